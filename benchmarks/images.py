"""Images per second of optimized networks, each as it runs best.

    python benchmarks/images.py [--models NAME ...] [--batch-sizes N ...] [--threads N] [--seconds N] [--no-compile] \
        [--output FILE]

Every network runs as timm makes it, as the copy that `timm_dynamic.optimize` makes of it, in either memory format, and
as that copy under `torch.compile` (inductor), all in evaluation mode on images of its own size. All ways of all
networks take turns, in an order drawn anew for every round; the fastest way of a network counts.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn
from tqdm import tqdm

from timm_dynamic import optimize
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment, measure, summarise

MODELS = ("lsnet_t", "mobilenetv4_conv_small", "efficientnet_b0", "resnet18")
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
FEWEST, MOST = 5, 200  # rounds


def ways(model: nn.Module, x: torch.Tensor, compiles: bool) -> dict[str, nn.Module]:
    """How the model runs."""
    found = {"as it is": model}
    for name, form in FORMATS.items():
        found[f"optimized, {name}"] = optimize(model, x, memory_format=form)
        if compiles:
            found[f"optimized, {name}, compiled"] = optimize(model, x, memory_format=form, compile={"dynamic": False})
    return found


def rows_of(names: list[str], batch_size: int, seconds: float, compiles: bool) -> list[dict]:
    """A row for each network, with the times of all ways that it runs."""
    candidates, sizes, failed = {}, {}, {name: {} for name in names}
    for name in names:
        model = timm.create_model(name).eval()
        sizes[name] = model.pretrained_cfg["input_size"]
        x = torch.randn(batch_size, *sizes[name])
        torch.compiler.reset()
        for way, runs in ways(model, x, compiles).items():
            try:
                runs(x)
            except Exception as error:  # of a compiler
                failed[name][way] = str(error).strip().splitlines()[0]
            else:
                candidates[name, way] = partial(runs, x)
    rounds = measure(candidates, 2, 1, torch.device("cpu"))
    each = sum(min(times) for times in rounds.values()) / 1e3
    samples = measure(candidates, int(min(max(seconds / each, FEWEST), MOST)), 0, torch.device("cpu"))
    rows = []
    for name in names:
        times = {way: summarise(samples[model, way]) for model, way in candidates if model == name}
        best = min(times, key=lambda way: times[way]["median_ms"])
        speed = 1e3 * batch_size / times[best]["median_ms"]
        about = {"model": name, "batch_size": batch_size, "input_size": sizes[name], "best": best}
        rows.append({**about, "images_per_s": speed, "ways": times, "failed": failed[name]})
    return rows


def show(row: dict) -> str:
    return f"{row['model']:24} batch {row['batch_size']:3} {row['images_per_s']:8.1f} images/s ({row['best']})"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(1, 16))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=240, help="for the timed rounds of a batch size (default: 240)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "images_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    facts = {"kernels": backend_info()["cpu"], "seconds": args.seconds, "rows": []}
    report = {**environment(torch.device("cpu")), **facts}
    for batch_size in tqdm(args.batch_sizes, disable=None):
        rows = rows_of(args.models, batch_size, args.seconds, not args.no_compile)
        report["rows"] += rows
        print(*map(show, rows), sep="\n")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
