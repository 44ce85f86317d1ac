"""`timm-dynamic benchmark`: the speed of models side by side, as ratios to a baseline."""

import argparse
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_dynamic import families
from timm_dynamic.cli import common
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cli.data import IMAGE_MODES, Images
from timm_dynamic.cost import count_macs
from timm_dynamic.dispatch import use
from timm_dynamic.hub import is_ours
from timm_dynamic.layers.base import DynamicLayer
from timm_dynamic.ops import backend_info
from timm_dynamic.optimize import optimize
from timm_dynamic.timing import environment, measure, peak_memory, summarise

_WIDTH = 100
_KERNELS = {"cpu": "C++", "cuda": "CUDA"}
_OPTIMIZED = "optimized"
_MACHINE = ("device", "driver", "torch", "timm", "timm_dynamic", "commit")  # what every row repeats


@dataclass(frozen=True)
class Candidate:
    """One thing to time: a model at an image size, the code behind its operators, and how it is compiled."""

    model: str
    img_size: int
    backend: str  # "C++", "CUDA" or "reference"; "torch" for a model without operators of ours
    compiler: str | None


def main(args: argparse.Namespace) -> None:
    device = common.resolve_device(args)
    common.check_compile(args)
    if device.type not in _KERNELS:
        raise ValueError(f"--device {args.device}: only cpu and cuda can be timed")
    if args.plot:
        from timm_dynamic.cli.plot import save_ratios  # before the timing, so that a missing matplotlib costs no time
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True

    report = {"command": args.command, **environment(device)}
    report["kernels"] = backend_info()[device.type]
    report["cudnn_tf32"] = torch.backends.cudnn.allow_tf32 if device.type == "cuda" else None
    report["rows"] = [row | {key: report[key] for key in _MACHINE} for row in run(args, device)]
    print(format_report(report))
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        with replacing(args.plot) as path:
            save_ratios(report["rows"], describe(report), path)


def run(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Build every model, then time all candidates at each batch size; one row for each of both."""
    built: dict[tuple[str, int], nn.Module] = {}
    options = {"checkpoint": args.checkpoint, "pretrained": args.pretrained, "num_classes": args.num_classes}
    baselines: dict[tuple[str, int], tuple[str, str, dict] | None] = {}
    for name in args.models:
        kwargs = {**options, **common.dynamize_options(args), **args.model_kwargs}
        model, size = _create(name, args, args.img_size, kwargs)
        label = common.network_name(name, args.dynamize, args.model_kwargs)
        built.setdefault((label, size), model)
        baselines[label, size] = _baseline(args, name, model)
    candidates: dict[Candidate, Candidate | None] = {}  # to the one its ratios refer to
    for label, size in list(built):
        reference = None
        if baseline := baselines[label, size]:
            other, name, kwargs = baseline
            if (other, size) not in built:
                built[other, size] = _create(name, args, size, {"num_classes": args.num_classes, **kwargs})[0]
            reference = _candidate(other, size, built[other, size], args.backends[0], args, device)
            candidates[reference] = reference
        for backend in args.backends:
            candidates.setdefault(_candidate(label, size, built[label, size], backend, args, device), reference)

    rows, rounds = [], (args.num_warm_iter + args.num_bench_iter) * len(args.batch_size)
    with tqdm(total=rounds, desc=f"{len(candidates)} candidates", unit="round", disable=None) as progress:
        for batch_size in args.batch_size:
            try:
                rows += _run_batch(candidates, built, batch_size, args, device, progress.update)
            except RuntimeError as error:
                reason = _first_line(error)
                if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason:
                    raise ValueError(f"out of memory at --batch-size {batch_size}: try a smaller one") from error
                if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise ValueError(f"torch.compile failed: {reason}") from error
                raise
    return rows


def _baseline(args: argparse.Namespace, name: str, model: nn.Module) -> tuple[str, str, dict] | None:
    """What the ratios of a model refer to: a label, a name and arguments."""
    if args.baseline == "none":
        return None
    if args.baseline != "static":
        return args.baseline, args.baseline, {}
    if recipe := getattr(model, "recipe", None):
        return recipe.base, recipe.base, recipe.base_kwargs
    try:
        twin = families.static_twin(name)
    except ValueError:
        static = families.family_of(name).static if is_ours(name) else {}
        if not static:
            raise
        label = ", ".join(f"{key}={value}" for key, value in static.items())
        return f"{name} ({label})", name, {**args.model_kwargs, **static}
    return twin, twin, {}


def _create(name: str, args: argparse.Namespace, img_size: int | None, kwargs: dict) -> tuple[nn.Module, int]:
    """The model, ready to run, and the side of its images."""
    model = common.create_model(name, **kwargs, image_size=(img_size, img_size) if img_size else None)
    size = img_size or model.pretrained_cfg["input_size"][-1]
    return model.to(args.device, memory_format=_memory_format(args)).train(args.mode == "train"), size


def _memory_format(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def _candidate(
    name: str, size: int, model: nn.Module, backend: str, args: argparse.Namespace, device: torch.device
) -> Candidate:
    """The candidate that `--backends` asks for, by what really runs: the same twice is timed once."""
    compiler = args.torchcompile or ("inductor" if backend == "compiled-reference" else None)
    x = _images(model, 1, size, args, device)
    try:
        count_macs(model, x)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} does not run on images {list(x.shape)}: {_first_line(error)}") from error
    if not any(isinstance(module, DynamicLayer) for module in model.modules()):
        return Candidate(name, size, "torch", compiler)
    has_kernel = backend == "kernel" and backend_info()[device.type] == "loaded"
    return Candidate(name, size, _KERNELS[device.type] if has_kernel else "reference", compiler)


def _images(model: nn.Module, batch: int, size: int, args: argparse.Namespace, device: torch.device) -> Tensor:
    channels = getattr(model, "in_chans", model.pretrained_cfg["input_size"][0])
    if args.images:
        x = _photographs(args.images, batch, resolve_data_config({"input_size": (channels, size, size)}, model=model))
    else:
        x = torch.randn(batch, channels, size, size)
    return x.to(device).contiguous(memory_format=_memory_format(args))


def _photographs(folder: str, batch: int, config: dict) -> Tensor:
    """The first images of a folder, as validation sees them; repeated if they are fewer than the batch."""
    try:
        reader = create_dataset("", folder, search_split=False).reader
    except RuntimeError:  # timm's, of a folder without any
        raise ValueError(f"no images in {folder}") from None
    images = Images(reader, IMAGE_MODES[config["input_size"][0]])
    images.transform = create_transform(**config, is_training=False)
    return torch.stack([images[i % len(images)][0] for i in range(batch)])


def _run_batch(
    candidates: dict[Candidate, Candidate | None],
    built: dict[tuple[str, int], nn.Module],
    batch_size: int,
    args: argparse.Namespace,
    device: torch.device,
    on_round: Callable[[], object],
) -> list[dict]:
    if any(candidate.compiler for candidate in candidates):
        torch.compiler.reset()  # each batch size is compiled for itself, not for a dynamic one
        # Models of one class share this limit; past it they would silently run uncompiled.
        torch._dynamo.config.recompile_limit = 8 + len(candidates)
    images = {key: _images(model, batch_size, key[1], args, device) for key, model in built.items()}
    macs = {key: count_macs(model, images[key]) for key, model in built.items()}
    steps = {c: _step(c, built[c.model, c.img_size], images[c.model, c.img_size], args, device) for c in candidates}
    if args.optimize:
        steps |= _optimized_steps(steps, built, images, args, device)
    samples = measure(steps, args.num_bench_iter, args.num_warm_iter, device, on_round)
    times = {candidate: summarise(values) for candidate, values in samples.items()}

    rows = []
    for c, baseline in candidates.items():
        key = c.model, c.img_size
        peak, source = peak_memory(steps[c], device)
        row = {
            "model": c.model,
            "tag": built[key].pretrained_cfg.get("tag") or None,
            "backend": c.backend,
            "execution": f"compile {c.compiler}" if c.compiler else "eager",
            "mode": args.mode,
            "batch_size": batch_size,
            "img_size": c.img_size,
            "dtype": f"amp {args.amp_dtype}" if args.amp else "float32",
            "memory_format": "channels_last" if args.channels_last else "contiguous",
            "params": sum(p.numel() for p in built[key].parameters()),
            **{f"macs_{kind}": count for kind, count in macs[key]._asdict().items()},
            "num_warm_iter": args.num_warm_iter,
            "num_bench_iter": args.num_bench_iter,
            **times[c],
            "peak_memory": _resident_bytes(built[key], images[key], args) + peak,
            "peak_memory_source": f"model and input, and {source} of one step",
            "baseline": baseline.model if baseline else None,
            "time_ratio": None,
            "macs_ratio": None,
        }
        if args.optimize:
            row["optimized_ms"] = times[_OPTIMIZED, c]["median_ms"]
            row["optimized_ratio"] = (
                row["optimized_ms"] / times[_OPTIMIZED, baseline]["median_ms"] if baseline else None
            )
        if baseline:
            row["time_ratio"] = times[c]["median_ms"] / times[baseline]["median_ms"]
            row["macs_ratio"] = total_macs(row) / sum(macs[baseline.model, baseline.img_size][1:])
        rows.append(row)
    return rows


def _optimized_steps(
    candidates: Iterable[Candidate],
    built: dict[tuple[str, int], nn.Module],
    images: dict[tuple[str, int], Tensor],
    args: argparse.Namespace,
    device: torch.device,
) -> dict[tuple[str, Candidate], Callable[[], object]]:
    """The same with the models' inference copies, each made for this batch."""
    memory_format, copies, steps = torch.channels_last if args.channels_last else "auto", {}, {}
    for c in candidates:
        key = c.model, c.img_size
        if key not in copies:
            with common.amp_autocast(args, device):
                copies[key] = optimize(built[key], images[key], memory_format=memory_format)
        steps[_OPTIMIZED, c] = _step(c, copies[key], images[key], args, device)
    return steps


def _step(
    candidate: Candidate, model: nn.Module, x: Tensor, args: argparse.Namespace, device: torch.device
) -> Callable[[], object]:
    """One iteration, to be called again and again."""
    way = partial(use, "formula") if candidate.backend == "reference" else nullcontext
    autocast = common.amp_autocast(args, device)
    forward = torch.compile(model, backend=candidate.compiler, dynamic=False) if candidate.compiler else model

    def evaluate() -> Tensor:
        with torch.inference_mode(), way(), autocast:
            return forward(x)

    if args.mode == "eval":
        return evaluate
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=device)

    def train() -> None:
        with way(), autocast:
            loss = F.cross_entropy(forward(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def _resident_bytes(model: nn.Module, x: Tensor, args: argparse.Namespace) -> int:
    """What a step finds in memory: weights, buffers, images, and for training the momentum of every weight."""
    weights = sum(p.nbytes for p in model.parameters())
    return weights * (2 if args.mode == "train" else 1) + sum(b.nbytes for b in model.buffers()) + x.nbytes


def total_macs(row: dict) -> int:
    return row["macs_executed"] + row["macs_linear"]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe(report: dict) -> str:
    """The conditions shared by all rows, in a line."""
    first = report["rows"][0]
    settings = [first["mode"], first["dtype"], first["memory_format"]]
    return f"{report['device']}, {report['threads']} threads, torch {report['torch']}, {', '.join(settings)}"


def format_report(report: dict) -> str:
    """A table for each batch size and image size, at most 100 columns wide."""
    rows = report["rows"]
    lines = [
        describe(report),
        f"medians of {rows[0]['num_bench_iter']} interleaved rounds after {rows[0]['num_warm_iter']} to warm up",
    ]
    groups = dict.fromkeys((row["batch_size"], row["img_size"]) for row in rows)
    for batch_size, img_size in groups:
        group = [row for row in rows if (row["batch_size"], row["img_size"]) == (batch_size, img_size)]
        lines += ["", f"batch {batch_size}, {img_size} px", *_table([_cells(row) for row in group])]
    lines.append("")
    if any(row["baseline"] for row in rows):
        baselines = dict.fromkeys(row["baseline"] for row in rows if row["baseline"])
        lines.append(f"time x, MACs x: relative to {', '.join(baselines)}")
    if "optimized_ms" in rows[0]:
        lines.append("opt: the inference copies that timm_dynamic.optimize makes; opt x: of both")
    compilers = dict.fromkeys(row["execution"] for row in rows if row["execution"] != "eager")
    lines += [f"*: torch.compile, {name.removeprefix('compile ')}" for name in compilers]
    if any(row["p90_ms"] > 2 * row["p10_ms"] for row in rows):
        lines.append("times differ more than twofold between p10 and p90: is something else running?")
    if report["kernels"] != "loaded" and any(row["backend"] == "reference" for row in rows):
        lines.append(f"reference: kernels {report['kernels']}")
    lines.append(f"MB: {rows[0]['peak_memory_source']}")
    return "\n".join(lines)


def _cells(row: dict) -> dict[str, str]:
    cells = {
        "model": row["model"],
        "backend": row["backend"] + ("" if row["execution"] == "eager" else "*"),
        "params": f"{row['params'] / 1e6:.2f}M",
        "GMACs": f"{total_macs(row) / 1e9:.3f}",
        "ms": _milliseconds(row["median_ms"]),
        "p10-p90": f"{_milliseconds(row['p10_ms'])}-{_milliseconds(row['p90_ms'])}",
        "MB": f"{row['peak_memory'] / 1e6:.1f}",
    }
    if row["baseline"]:
        cells |= {"time x": f"{row['time_ratio']:.2f}", "MACs x": f"{row['macs_ratio']:.2f}"}
    if "optimized_ms" in row:
        cells["opt ms"] = _milliseconds(row["optimized_ms"])
        if row["baseline"]:
            cells["opt x"] = f"{row['optimized_ratio']:.2f}"
    return cells


def _milliseconds(value: float) -> str:
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def _table(rows: list[dict[str, str]]) -> list[str]:
    header = list(rows[0])
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in header}
    others = sum(width + 2 for key, width in widths.items() if key != "model")
    widths["model"] = min(widths["model"], _WIDTH - others)

    def line(cells: dict[str, str]) -> str:
        model = cells["model"]
        if len(model) > widths["model"]:
            model = model[: widths["model"] - 1] + "…"
        aligned = [
            cells[key].ljust(widths[key]) if key == "backend" else cells[key].rjust(widths[key]) for key in header[1:]
        ]
        return "  ".join([model.ljust(widths["model"]), *aligned]).rstrip()

    return [line({key: key for key in header}), *map(line, rows)]
