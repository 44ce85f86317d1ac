"""Model cards: the README.md of a repository on the Hugging Face Hub."""

from typing import Any

import timm
import torch
import yaml
from torch import nn

from timm_dynamic.cost import count_macs, masked_blocks
from timm_dynamic.families import FAMILIES
from timm_dynamic.hub import is_ours
from timm_dynamic.version import __version__

_CLASSIFICATION = "image-classification"
_DATASETS = {"in1k": "imagenet-1k", "cifar10": "cifar10"}  # the Hub's names, by the end of a tag


def model_card(
    model: nn.Module,
    repo_id: str,
    tag: str | None = None,
    model_args: dict[str, Any] | None = None,
    license: str | None = None,
    dataset: str | None = None,
    source: str | None = None,
    converted: tuple[str, str] | None = None,
    results: dict[str, Any] | None = None,
) -> str:
    """The text of a model's card.

    Args:
        model: With a `pretrained_cfg`, on the CPU.
        repo_id: ORG/NAME of the repository.
        tag: The pretrained tag whose weights these are; what is known of it goes into the card.
        model_args: What the model was created with.
        license: The Hub's identifier of the weights' licence; None: the cfg's, or unknown.
        dataset: The Hub's name of the dataset they were trained on; None: by the tag, if it says so.
        source: Where the weights come from; None: what the cfg says of the tag.
        converted: Name and SHA-256 of the checkpoint that the weights were converted from.
        results: What `timm-dynamic validate` measured.
    """
    cfg = model.pretrained_cfg
    name = cfg["architecture"] + (f".{tag}" if tag else "")
    ours = is_ours(name)
    package = "timm-dynamic" if ours else "timm"
    license = license or (cfg.get("license") if tag else None)
    dataset = dataset or _DATASETS.get((tag or "").rpartition("_")[2])
    task = getattr(model, "pipeline_tag", _CLASSIFICATION)
    front = {
        "license": license or "unknown",
        "library_name": "timm",
        "pipeline_tag": task,
        "tags": [task, "timm", *(["timm-dynamic", "dynamic-convolution"] if ours else [])],
        **({"datasets": [dataset]} if dataset else {}),
    }
    description = (timm.model_entrypoint(cfg["architecture"]).__doc__ or name).strip().splitlines()[0]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repo_id.rpartition('/')[2]}",
        description,
        _facts(model, model_args or {}, results or {}),
        "## Weights",
        "\n".join(f"- {line}" for line in _provenance(cfg, name, tag, package, license, source, converted)),
        "## Accuracy",
        _accuracy(name, repo_id, dataset, results),
        "## Use",
        _usage(repo_id, ours, task),
    ]
    return "\n\n".join(sections) + "\n"


def _facts(model: nn.Module, model_args: dict[str, Any], results: dict[str, Any]) -> str:
    cfg = model.pretrained_cfg
    size = cfg["input_size"]
    macs = count_macs(model, torch.zeros(1, *size))
    full = " with full masks" if masked_blocks(model) else ""
    executed = f" ({_count(1e9 * float(results['gmacs']))} executed, measured)" if "gmacs" in results else ""
    papers = cfg.get("paper_ids") or ()
    papers = [papers] if isinstance(papers, str) else papers
    normalised = f"mean {tuple(cfg['mean'])}, standard deviation {tuple(cfg['std'])}"
    rows = {
        "model": f"`{cfg['architecture']}`",
        "arguments": ", ".join(f"`{key}={value!r}`" for key, value in model_args.items()),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}".replace(",", " "),
        "MACs per image": f"{_count(macs.static)}{full}{executed}, and {_count(macs.linear)} of linear layers",
        "input": f"{size[0]} x {size[1]} x {size[2]}, {normalised}, {cfg['interpolation']}, crop {cfg['crop_pct']}",
        "classes": str(model.num_classes),
        "paper": ", ".join(
            f"[arXiv {number}](https://arxiv.org/abs/{number})"
            for number in (paper.removeprefix("arXiv:") for paper in papers)
        )
        or cfg.get("paper_name"),
        "the authors' code": cfg.get("origin_url"),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)])


def _count(macs: float) -> str:
    return f"{macs / 1e9:.4g} G" if macs >= 1e9 else f"{macs / 1e6:.3g} M"


def _provenance(cfg, name, tag, package, license, source, converted) -> list[str]:
    if not source and tag:
        origin = cfg.get("origin_url")
        source = f"`{name}` of {package}" + (f", published by the authors: {origin}" if origin else "")
    lines = [f"Licence: {license or 'not stated'}", f"Source: {source or 'not stated'}"]
    if converted:
        file, sha256 = converted
        lines.append(
            f"Conversion: by timm-dynamic {__version__} from `{file}` (SHA-256 `{sha256}`), which loads strictly"
        )
    return lines


def _accuracy(name: str, repo_id: str, dataset: str | None, results: dict[str, Any] | None) -> str:
    on = f" on {dataset}" if dataset else ""
    lines = []
    for family in FAMILIES.values():
        if name in family.reported:
            lines.append(f"- reported by the authors: top-1 {family.reported[name]:g} %{on}")
    if results:
        lines.append(
            f"- measured: top-1 {float(results['top1']):.2f} %, top-5 {float(results['top5']):.2f} %{on}, by "
            f"`timm-dynamic validate DATA --model hf-hub:{repo_id} --img-size {results['img_size']} "
            f"--crop-pct {results['crop_pct']} --interpolation {results['interpolation']}`"
        )
    return "\n".join(lines) or "Neither reported nor measured."


def _usage(repo_id: str, ours: bool, task: str) -> str:
    output = "model(transform(image).unsqueeze(0))"
    output = f"probabilities = {output}.softmax(1)" if task == _CLASSIFICATION else f"output = {output}"
    imports = ["import timm", *(["import timm_dynamic  # registers the model"] if ours else [])]
    return "\n".join(
        [
            "```python",
            *imports,
            "",
            f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()',
            "config = timm.data.resolve_model_data_config(model)",
            "transform = timm.data.create_transform(**config, is_training=False)",
            f"{output}  # of a PIL image",
            "```",
        ]
    )
