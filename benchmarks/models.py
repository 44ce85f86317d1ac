"""Times the weight-dynamic models against their static twins: batch 1 and 16 eval, batch 16 training step, 224 px.

    python benchmarks/models.py [--device cpu|cuda] [--threads N] [--models NAME ...] [--processes N] [--output FILE]

Runs `timm-dynamic benchmark` for every model and case, and saves the ratios of time and of peak memory. On a CPU what
a process gets of memory and caches decides a good part of a ratio: every case runs in several processes, one after the
other over all cases, and the median counts. On a GPU the batches are 1, 64 and 128, channels_last, in bfloat16, eager
and compiled, in one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment

MODELS = ("dcd_resnet50", "dcd_mobilenetv2", "ped_resnet18", "dy_mobilenetv2")


def cases(device: str) -> list[list[str]]:
    """What follows `--models NAME --baseline static`."""
    if device == "cpu":
        return [
            ["--mode", "eval", "--batch-size", "1", "--num-bench-iter", "40"],
            ["--mode", "eval", "--batch-size", "16", "--num-bench-iter", "9"],
            ["--mode", "train", "--batch-size", "16", "--num-bench-iter", "6"],
        ]
    common = ["--channels-last", "--amp", "--amp-dtype", "bfloat16", "--num-bench-iter", "40"]
    return [
        ["--mode", mode, "--batch-size", *sizes, *common, *compiler]
        for compiler in ([], ["--torchcompile"])
        for mode, sizes in (("eval", ("1", "64", "128")), ("train", ("64", "128")))
    ]


def run(argv: list[str]) -> list[dict]:
    """The rows of `timm-dynamic benchmark`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "timm_dynamic.cli", "benchmark", *argv, "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())["rows"]


def combine(samples: list[list[dict]]) -> list[dict]:
    """One row for each of several processes' rows: medians of their medians and of their ratios."""
    rows = []
    for same in zip(*samples, strict=True):
        row = {**same[0], **{key: median(r[key] for r in same) for key in ("median_ms", "p10_ms", "p90_ms")}}
        row["time_ratios"] = [r["time_ratio"] for r in same]
        row["time_ratio"] = median(row["time_ratios"])
        rows.append(row)
    twins = {row["batch_size"]: row for row in rows if row["model"] == row["baseline"]}
    for row in rows:
        row["memory_ratio"] = row["peak_memory"] / twins[row["batch_size"]]["peak_memory"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--processes", type=int, help="for every case (default: 3, on a GPU 1)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    output = args.output or Path(__file__).parent / "results" / f"models_{args.device}.json"
    report = {**environment(torch.device(args.device)), "kernels": backend_info()[args.device]}
    options = ["--device", args.device, "--threads", str(args.threads), "--num-warm-iter", "3"]
    wanted = [(model, tuple(case)) for model in args.models for case in cases(args.device)]
    found: dict[tuple, list] = {key: [] for key in wanted}
    rounds = args.processes or (3 if args.device == "cpu" else 1)
    with tqdm(total=rounds * len(wanted), disable=None) as bar:
        for _ in range(rounds):
            for model, case in wanted:
                found[model, case].append(run(["--models", model, "--baseline", "static", *case, *options]))
                bar.update()
    report["rows"] = [row for samples in found.values() for row in combine(samples)]
    for row in report["rows"]:
        if row["model"] != row["baseline"]:
            each = " ".join(f"{ratio:.2f}" for ratio in row["time_ratios"])
            print(
                f"{row['model']} / {row['baseline']}, {row['execution']}, batch {row['batch_size']} {row['mode']}: "
                f"time {row['time_ratio']:.2f} ({each}), memory {row['memory_ratio']:.2f}, MACs {row['macs_ratio']:.2f}"
            )
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, output)


if __name__ == "__main__":
    main()
