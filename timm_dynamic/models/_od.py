"""What the networks with omni-dimensional dynamic convolution share."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.layers import ODConv2d
from timm_dynamic.models._cfg import imagenet_cfg
from timm_dynamic.models._dy import anneal, check_steps

# Top-1 on ImageNet in the authors' README, of the weights that they published.
REPORTED = {
    "od_resnet18": 73.05,
    "od_resnet18_4x": 74.19,
    "od_resnet50": 77.87,
    "od_resnet50_4x": 78.50,
    "od_resnet101": 78.84,
    "od_resnet101_2x": 79.15,
    "od_mobilenetv2": 74.74,
    "od_mobilenetv2_4x": 75.29,
    "od_mobilenetv2_075": 72.71,
    "od_mobilenetv2_075_4x": 74.01,
    "od_mobilenetv2_050": 68.06,
    "od_mobilenetv2_050_4x": 70.23,
}


def reported(backbone: str) -> dict[str, float]:
    """The authors' accuracies, by tag."""
    return {f"{name}.in1k": top1 for name, top1 in REPORTED.items() if backbone in name}


def make_dynamic(
    model: nn.Module, names: list[str], num_kernels: int, reduction: float, anneal_steps: int | None
) -> None:
    """Make convolutions of a new model dynamic, and initialise its classifier, as the authors do.

    Args:
        model: Changed in place.
        names: Of the convolutions.
        num_kernels, reduction: As for `ODConv2d`.
        anneal_steps: The temperature falls from 30 to 1 over so many training forwards; without it, it is 1 (unless
            `set_progress` is called).

    Raises:
        ValueError: If an argument has an unusable value.
    """
    check_steps(anneal_steps)
    for name in names:
        conv = model.get_submodule(name)
        layer = ODConv2d.from_conv(conv, from_scratch=True, num_kernels=num_kernels, reduction=reduction)
        model.set_submodule(name, layer)
    if isinstance(model.get_classifier(), nn.Linear):
        nn.init.normal_(model.get_classifier().weight, std=0.01)
        nn.init.zeros_(model.get_classifier().bias)
    anneal(model, anneal_steps)


def load_authors(state_dict: dict[str, Any], model: nn.Module, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    """The weights in an author's checkpoint with our names; the attention's 1x1 convolutions are linear layers.

    Args:
        state_dict: Wrapped or not, with or without `module.` (see `extract_state_dict`).
        model: The one to load it into.
        rename: From a key without wrappers to timm's.
    """
    dynamic = {name for name, layer in model.named_modules() if isinstance(layer, ODConv2d)}
    state = {}
    for key, value in extract_state_dict(state_dict).items():
        module, _, leaf = rename(key).rpartition(".")
        if module in dynamic and leaf == "weight":
            leaf = "kernels"
        elif ".attention." in f".{module}." and value.ndim == 4:
            value = value.flatten(1)
        state[f"{module}.{leaf}"] = value
    return state


def od_cfg(first_conv: str, classifier: str, **kwargs) -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    about = {
        "interpolation": "bilinear",
        "origin_url": "https://github.com/OSVAI/ODConv",
        "paper_ids": "arXiv:2209.07947",
    }
    return imagenet_cfg(first_conv, classifier, **{**about, **kwargs})


def od_cfgs(names: Iterable[str], first_conv: str, classifier: str) -> dict[str, dict[str, Any]]:
    """Those of several models, by tag: `in1k` where the authors published weights."""
    hub = {name: {"hf_hub_id": f"timm-dynamic/{name}.in1k"} for name in REPORTED}
    tags = {name: "in1k" if name in REPORTED else "untrained" for name in names}
    return {f"{name}.{tag}": od_cfg(first_conv, classifier, **hub.get(name, {})) for name, tag in tags.items()}
