"""`timm-dynamic inspect`: the entropy of a model's attention (or gates), by feature resolution; pictures of masks."""

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from timm.data.readers.reader import Reader
from timm.models import safe_model_name
from torch import Tensor, nn
from tqdm import tqdm

from timm_dynamic.cli import pose_data, pose_maps
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cli.common import create_model, dynamize_options, name_of, resolve_device
from timm_dynamic.cli.data import (
    IMAGE_MODES,
    Images,
    image_options,
    make_loader,
    open_dataset,
    resolve_data,
)
from timm_dynamic.cli.validate import take_over_training
from timm_dynamic.cost import masked_blocks
from timm_dynamic.inspect import record, routing_entropy, routing_layers
from timm_dynamic.optimize import optimize


class _OneImage(Reader):
    """A timm reader of a single file."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        return open(self.path, "rb"), 0

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return str(self.path)


def main(args: argparse.Namespace) -> None:
    path = Path(args.data or args.data_dir or "")
    from timm_dynamic.cli.inspect_masks import report_masks  # before the work: a missing matplotlib costs no time

    device = resolve_device(args)
    take_over_training(args)
    options = {
        "checkpoint": args.checkpoint,
        "use_ema": args.use_ema,
        **dynamize_options(args),
        "num_classes": args.num_classes,
        **image_options(args),
        **args.model_kwargs,
    }
    model = create_model(args.model, **options)
    routing_layers(model)  # an error for a model without them, before its weights are downloaded
    if args.pretrained or not args.checkpoint:
        model = create_model(args.model, pretrained=True, **options)
    config, is_pose = resolve_data(args, model, use_test_size=True), pose_maps.finds_joints(model)
    checkpoint_parts = Path(args.checkpoint).resolve().parts[-2:] if args.checkpoint else ()
    out = Path(args.out or Path("output/inspect", safe_model_name(name_of(args)), *checkpoint_parts))
    if is_pose and (path / "annot").is_dir():
        dataset = pose_data.open_persons(args, {"validation": "valid"}.get(args.split, args.split), config, truth=False)
    elif is_pose and args.dataset:
        raise ValueError("--dataset: a pose network is shown images in a folder, a single one, or MPII's persons")
    elif path.is_file() and path.suffix != ".tar":
        dataset = Images(_OneImage(path), IMAGE_MODES[config["input_size"][0]])
        args.workers = 0  # starting processes would take longer than the image
        out = out if args.out else out / path.stem
    else:
        dataset = open_dataset(args, args.split, config)
    dataset.blue_first = is_pose
    out.mkdir(parents=True, exist_ok=True)

    model = model.to(device).eval()
    if args.optimize:
        model = optimize(model, torch.zeros(1, *config["input_size"], device=device))
    about = {
        "model": name_of(args),
        "checkpoint": args.checkpoint or None,
        "images": len(dataset),
        "img_size": list(config["input_size"][1:]),
    }
    if gates(model):
        report_entropy(model, make_loader(dataset, args, config, device), about, out)
    if masked_blocks(model):
        if isinstance(dataset, pose_data.Persons):
            loader = pose_data.make_loader(dataset, args, device, batch_size=1)
        else:
            loader = make_loader(dataset, args, config, device, batch_size=1)
        report_masks(model, loader, args.images, config, about, out, is_pose)


def gates(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose decisions have an entropy: those with attention or gates, not those with masks."""
    return {name: layer for name, layer in routing_layers(model).items() if hasattr(layer, "routing_limit")}


def report_entropy(model: nn.Module, loader, about: dict, out: Path) -> None:
    """Measure, print and draw the entropies, into `entropy.json` and `entropy.png`."""
    from timm_dynamic.cli.plot import save_entropy

    layers = measure(model, loader)
    report = {**about, "resolutions": by_resolution(layers), "layers": layers}
    print(format_report(report))
    with replacing(out / "entropy.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with replacing(out / "entropy.png") as temporary:
        save_entropy(report, temporary)
    print(f"\nsaved {out / 'entropy.json'} and {out / 'entropy.png'}")


@torch.inference_mode()
def measure(model: nn.Module, loader) -> list[dict]:
    """Mean entropy, and spread between images, of every layer over a loader, in the order in which the layers run.

    Args:
        model: In eval mode.
        loader: timm's loader, of batches on the model's device.

    Raises:
        ValueError: If a layer's attention is not finite.
    """
    rows: dict[str, dict] = {}
    spreads: dict[str, _Spread] = {}
    layers = gates(model)
    with tqdm(total=len(loader.dataset), desc="inspect", unit="img", leave=False, disable=None) as bar:
        for images, _ in loader:
            with record(model) as seen:
                model(images)
            for name, routing in seen.items():
                if name not in layers:
                    continue
                entropy, highest = routing_entropy(layers[name], routing.double())
                if not entropy.isfinite().all():
                    raise ValueError(f"the attention of {name} is not finite: are these weights of this model?")
                height, width = seen.resolutions[name]
                row = {
                    "layer": name,
                    "resolution": f"{height}x{width}",
                    "kind": "attention" if layers[name].routing_limit is None else "gates",
                    "values": routing.shape[1],
                    "highest": highest,
                }
                row = rows.setdefault(name, {**row, "inputs": 0, "entropy": 0.0})
                row["inputs"] += len(entropy)
                row["entropy"] += entropy.sum().item()
                spreads.setdefault(name, _Spread(routing)).add(routing)
            bar.update(len(images))
    for name, row in rows.items():
        row["spread"] = spreads[name].mean()
        row["entropy"] /= row["inputs"]
        row["normalised"] = row["entropy"] / row["highest"] if row["highest"] else 0.0  # attention over one kernel
    return list(rows.values())


class _Spread:
    """The standard deviation of numbers between images, summed up batch by batch."""

    def __init__(self, values: Tensor):
        self.zero = values[:1].double()  # what is the same for all images so has a deviation of exactly 0
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        difference = values.double() - self.zero
        self.count += len(values)
        self.sum = self.sum + difference.sum(0)
        self.squares = self.squares + difference.square().sum(0)

    def mean(self) -> float:
        variance = (self.squares - self.sum.square() / self.count) / max(1, self.count - 1)
        return variance.clamp(min=0).sqrt().mean().item()


def by_resolution(layers: list[dict]) -> list[dict]:
    """Means over the layers of every feature resolution, in the order in which they come."""
    groups: dict[str, list[dict]] = {}
    for row in layers:
        groups.setdefault(row["resolution"], []).append(row)
    return [
        {
            "resolution": resolution,
            "layers": len(rows),
            **{key: mean(row[key] for row in rows) for key in ("entropy", "normalised", "spread")},
        }
        for resolution, rows in groups.items()
    ]


def format_report(report: dict) -> str:
    """A table of resolutions, and one of layers."""
    kinds = " and ".join(dict.fromkeys(row["kind"] for row in report["layers"]))
    lines = [
        f"{report['model']}: mean entropy of its {kinds} (images: {report['images']})",
        "nats, and as a share of the highest entropy: log(values) of attention, log(2) of a gate; spread: the standard",
        "deviation of the values between images, 0 where a layer decides the same for all of them",
        "",
        f"{'resolution':<12}{'layers':>8}{'nats':>10}{'share':>9}{'spread':>10}",
    ]
    for row in report["resolutions"]:
        lines.append(
            f"{row['resolution']:<12}{row['layers']:>8}{row['entropy']:>10.4f}{row['normalised']:>9.4f}"
            f"{row['spread']:>10.1e}"
        )
    width = 2 + max(len(row["layer"]) for row in report["layers"])
    lines += [
        "",
        f"{'layer':<{width}}{'resolution':<12}{'kind':<11}{'values':>6}{'nats':>10}{'share':>9}{'spread':>10}",
    ]
    for row in report["layers"]:
        lines.append(
            f"{row['layer']:<{width}}{row['resolution']:<12}{row['kind']:<11}{row['values']:>6}"
            f"{row['entropy']:>10.4f}{row['normalised']:>9.4f}{row['spread']:>10.1e}"
        )
    return "\n".join(lines)
