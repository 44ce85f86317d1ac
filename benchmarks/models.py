"""Times the weight-dynamic models against their static twins: batch 1 and 16 eval, batch 16 training step, 224 px.

    python benchmarks/models.py [--device cpu|cuda] [--threads N] [--models NAME ...] [--iterations N] [--output FILE]

Runs `timm-dynamic benchmark` for every model and case, and prints and saves the ratios of time and of peak memory. On
a GPU the batches are 1, 64 and 128, channels_last, in bfloat16, eager and compiled.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from timm_dynamic.cli import benchmark
from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment

MODELS = ("dcd_resnet50", "dcd_mobilenetv2", "ped_resnet18", "dy_mobilenetv2")


def cases(device: str) -> list[list[str]]:
    """What follows `--models NAME --baseline static`."""
    if device == "cpu":
        return [
            ["--mode", "eval", "--batch-size", "1"],
            ["--mode", "eval", "--batch-size", "16"],
            ["--mode", "train", "--batch-size", "16"],
        ]
    common = ["--channels-last", "--amp", "--amp-dtype", "bfloat16"]
    return [
        ["--mode", mode, "--batch-size", *sizes, *common, *compiler]
        for compiler in ([], ["--torchcompile"])
        for mode, sizes in (("eval", ("1", "64", "128")), ("train", ("64", "128")))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--iterations", type=int, default=0, help="default: 60 at batch 1, 15 above; 40 on a GPU")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    output = args.output or Path(__file__).parent / "results" / f"models_{args.device}.json"
    report = {**environment(device), "kernels": backend_info()[args.device], "rows": []}
    for model in args.models:
        for case in cases(args.device):
            default = 40 if args.device == "cuda" else 60 if case[-1] == "1" else 15
            iterations = str(args.iterations or default)
            argv = ["--models", model, "--baseline", "static", *case, "--device", args.device]
            argv += ["--num-bench-iter", iterations, "--num-warm-iter", "3"]
            rows = benchmark.run(benchmark.make_parser().parse_args(argv), device)
            twins = {(row["batch_size"], row["img_size"]): row for row in rows if row["model"] == row["baseline"]}
            for row in rows:
                twin = twins[row["batch_size"], row["img_size"]]
                row["memory_ratio"] = row["peak_memory"] / twin["peak_memory"]
                if row is not twin:
                    print(
                        f"{row['model']} / {row['baseline']}, {row['execution']}, batch {row['batch_size']} "
                        f"{row['mode']}: time {row['time_ratio']:.2f}, memory {row['memory_ratio']:.2f}, MACs "
                        f"{row['macs_ratio']:.2f} ({row['median_ms']:.1f} ms)",
                        flush=True,
                    )
            report["rows"] += rows
            temporary = output.with_suffix(".tmp")
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(temporary, output)


if __name__ == "__main__":
    main()
