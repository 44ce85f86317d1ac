"""`timm-dynamic validate`: top-1 and top-5 accuracy of any timm model on a dataset."""

import argparse
import csv
import json
import logging
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils import accuracy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from tqdm import tqdm

from timm_dynamic.cli.arguments.data import INTERPOLATIONS
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cli.common import (
    amp_autocast,
    check_classes,
    check_classifier,
    check_compile,
    create_model,
    dynamize_options,
    name_of,
    resolve_device,
)
from timm_dynamic.cli.data import (
    count_classes,
    describe,
    image_options,
    make_loader,
    open_dataset,
    report_bad_images,
    resolve_data,
)
from timm_dynamic.convert import read_checkpoint
from timm_dynamic.cost import ActiveCount, count_active, count_macs
from timm_dynamic.optimize import optimize

_logger = logging.getLogger(__name__)

_PREPROCESSING = ("img_size", "input_size", "crop_pct", "mean", "std", "interpolation")
_INTERPOLATIONS = (None, "", *INTERPOLATIONS)
_LARGEST = 10_000  # of numbers in a file that a model is made with
_EXAMPLES = 16  # images at most on which the way to run is chosen


def main(args: argparse.Namespace) -> None:
    check_classifier(args.model)
    device = resolve_device(args)
    model, config = open_model(args)
    check_classifier(args.model, model)
    check_classes(args, model)
    dataset = open_dataset(args, args.split, config, model.num_classes, max_bad=args.max_bad_images)
    loader = make_loader(dataset, args, config, device)
    if not args.class_map and 0 < (classes := count_classes(dataset)) < model.num_classes:
        print(
            f"timm-dynamic validate: warning: the data has {classes} classes, the model {model.num_classes}: they "
            f"count as its first {classes} (--class-map FILE says which they are)",
            file=sys.stderr,
        )
    runs = prepare(args, model, config, device)
    with count_active(runs) as active:
        metrics = evaluate(runs, loader, amp_autocast(args, device), args.channels_last)
    report_bad_images(dataset, args.split, False, device)
    results = {
        "model": name_of(args),
        "top1": round(metrics["top1"], 4),
        "top1_err": round(100 - metrics["top1"], 4),
        "top5": round(metrics["top5"], 4),
        "top5_err": round(100 - metrics["top5"], 4),
        "param_count": parameters(model),
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        **executed(active, model, config, device),
    }
    show(args, results)


def open_model(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The model that the flags name, with its weights, and the data configuration for it."""
    check_compile(args)
    take_over_training(args)
    model = create_model(
        args.model,
        checkpoint=args.checkpoint,
        use_ema=args.use_ema,
        **dynamize_options(args),
        pretrained=args.pretrained or not args.checkpoint,
        **{"num_classes": args.num_classes, **image_options(args), **args.model_kwargs},
    )
    config = resolve_data(args, model, use_test_size=True)
    _logger.info(f"images {describe(config)}")
    return model, config


def prepare(args: argparse.Namespace, model: nn.Module, config: dict, device: torch.device) -> nn.Module:
    """What runs: the model on its device, or its inference copy, compiled if that is wanted."""
    model = model.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    if args.optimize:
        images = torch.zeros(min(args.batch_size, _EXAMPLES), *config["input_size"], device=device)
        with amp_autocast(args, device):
            memory_format = torch.channels_last if args.channels_last else "auto"
            model = optimize(model.eval(), images, memory_format=memory_format)
        print(model.report, file=sys.stderr)
    return torch.compile(model, backend=args.torchcompile) if args.torchcompile else model


def parameters(model: nn.Module) -> float:
    """In millions."""
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


def executed(active: ActiveCount, model: nn.Module, config: dict, device: torch.device) -> dict[str, float]:
    """Of a model with masks, the multiply-accumulates of what ran, on average over the images, and of all, in 1e9.

    And what ran of the masked blocks alone, which a budget names, as `executed`.
    """
    if not active.blocks:
        return {}
    static = count_macs(model, torch.zeros(1, *config["input_size"], device=device)).static
    macs = {"gmacs": round((static - active.skipped_macs) / 1e9, 6), "gmacs_static": round(static / 1e9, 6)}
    return {**macs, "executed": round(active.share, 4)}


def show(args: argparse.Namespace, results: dict) -> None:
    """Print the results, and write them to `--results-file`; first the former, lest a full disk lose them."""
    print(f"--result\n{json.dumps(results, indent=4)}", flush=True)
    if args.results_file:
        write_results(args.results_file, results)


def take_over_training(args: argparse.Namespace) -> None:
    """Take over, from the training that the checkpoint is from, what no flag says.

    That is how images are prepared, if no flag says anything of it, and the arguments of the same model.
    """
    trained = read_checkpoint(args.checkpoint).get("args") if args.checkpoint else None
    if not isinstance(trained, argparse.Namespace):
        return
    trained = vars(trained)
    flags, kwargs = _preprocessing_of(trained, args), _model_kwargs_of(trained, args)
    vars(args).update(flags)
    args.model_kwargs = {**kwargs, **args.model_kwargs}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in flags.items()]
    words += ["--model-kwargs", *(f"{key}={value}" for key, value in kwargs.items())] if kwargs else []
    if words:
        _logger.info(f"as in training: {' '.join(words)}")


def _preprocessing_of(trained: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    flags = {name: trained.get(name) for name in _PREPROCESSING}
    numbers = [value for name in _PREPROCESSING[:-1] for value in _listed(flags[name])]
    if not all(isinstance(value, (int, float)) for value in numbers) or flags["interpolation"] not in _INTERPOLATIONS:
        return {}  # a file can hold anything
    if any(getattr(args, name) for name in _PREPROCESSING):
        return {}
    return {name: value for name, value in flags.items() if value}


def _model_kwargs_of(trained: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Those that say what the model is made of; not where weights or code come from, for a file can hold anything."""
    kwargs = trained.get("model_kwargs")
    if not isinstance(kwargs, dict) or _network(trained) != _network(vars(args)):
        return {}
    return {
        key: value
        for key, value in kwargs.items()
        if key not in args.model_kwargs and re.fullmatch(r"(?!pretrained)[a-z]\w*", str(key)) and _is_harmless(value)
    }


def _network(flags: dict[str, Any]) -> tuple[str, str]:
    return str(flags.get("model")).partition(".")[0], str(flags.get("dynamize"))


def _is_harmless(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) < _LARGEST and all(map(_is_harmless, value))
    if isinstance(value, str):
        return re.fullmatch(r"[\w.*?-]{0,80}", value) is not None  # no address, no path
    return isinstance(value, bool) or (isinstance(value, (int, float)) and abs(value) <= _LARGEST)


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader,
    autocast: AbstractContextManager | None = None,
    channels_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    label: str = "validate",
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 accuracy in percent; exact, also over several processes.

    Args:
        model: Maps images `[B, C, H, W]` to logits `[B, classes]`.
        loader: timm's loader, of batches on the model's device.
        autocast: Context of the forward passes.
        channels_last: Feed images in that memory format.
        rank: Number of this process.
        world_size: Processes that share the dataset; the result is that of all of them.
        label: Caption of the progress bar.
    """
    model.eval()
    # Several processes get equally many images, the surplus repeated from the start: those are not counted twice.
    shared = world_size > 1 and not isinstance(loader.dataset, IterableDataset)
    share = len(range(rank, len(loader.dataset), world_size)) if shared else None
    seen, sums = 0, torch.zeros(4, device=loader.device)  # sums over images: loss, top-1, top-5 [percent], 1
    total = len(loader.dataset) // world_size
    with tqdm(total=total, desc=label, unit="img", leave=False, disable=True if rank else None) as bar:
        for images, target in loader:
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast or nullcontext():
                output = model(images)
            if shared:
                output, target = output[: share - seen], target[: share - seen]
            read = len(target)
            if getattr(loader.dataset, "bad", None) is not None:  # images that could not be read have the label -1
                output, target = output[target >= 0], target[target >= 0]
            if count := len(target):
                loss = F.cross_entropy(output.float(), target)
                sums += count * torch.stack([loss, *accuracy(output, target, topk=(1, 5)), torch.ones_like(loss)])
            seen += read
            bar.update(read)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    *totals, images = sums.tolist()
    return dict(zip(("loss", "top1", "top5"), (total / images for total in totals), strict=True))


def write_results(path: str, results: dict) -> None:
    """Write results as CSV or JSON, by the suffix of `path`; the file is whole or not there."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        if Path(path).suffix == ".json":
            json.dump(results, file, indent=4)
        else:
            writer = csv.DictWriter(file, fieldnames=results)
            writer.writeheader()
            writer.writerow(results)
