"""Times the models against their static twins, 224 px.

    python benchmarks/models.py [--paths | --best] [--device cpu|cuda] [--threads N] [--models NAME ...] \
        [--processes N] [--iterations N] [--minutes N] [--longest N] [--output FILE]

Runs `timm-dynamic benchmark` for every model and case, and saves the ratios of time and of peak memory; in evaluation
also those of the inference copies that `timm_dynamic.optimize` makes of model and twin, in the same rounds. On a CPU
what a process gets of memory and caches decides a good part of a ratio: every case runs in several processes,
one after the other over all cases, and the median counts. On a GPU everything is channels_last, in bfloat16, eager and
compiled.

With `--paths` what serves without our kernels is timed too (the reference path), everything once more under
torch.compile, beside the twin under the same; on a CPU at batch 1, 32 and 128 instead of 1 and 16 (training: 16, more
takes minutes a step).

With `--best` a model and its twin each run in the fastest way that there is for them on a CPU, within PyTorch and in
onnxruntime (`benchmarks/best.py`).

The file is written after every process; a run that was stopped, or that `--minutes` ended, goes on where it was when
the same command is given again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, median_low

import torch
from tqdm import tqdm

from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.families import FAMILIES
from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment

MODELS = [model for _, family in sorted(FAMILIES.items()) for model in family.timed]
BEST = ["dcd_resnet50", "dcd_mobilenetv2", "ped_resnet18", "dy_mobilenetv2", "ddf_mul_resnet50"]
# Networks that were made dynamic: for `best.py`, in evaluation within PyTorch.
BEST += [f"{base}+{layer}" for base in ("resnet50", "tf_efficientnet_lite0") for layer in ("dcd", "dy", "ped")]
GPU = "--channels-last --amp --amp-dtype bfloat16 --num-warm-iter 3 --num-bench-iter 20"


def cases(device: str, kind: str) -> list[str]:
    """The arguments of a process for a model, the more important first.

    Args:
        device: `"cpu"` or `"cuda"`.
        kind: `"models"`, `"paths"` or `"best"`; the last one for `best.py`, the others for the command.
    """
    paths = kind == "paths"
    if kind == "best":
        within_torch = (("eval", 1), ("eval", 16), ("train", 16), ("eval", 128))
        torch_cases = [f"--mode {mode} --batch-size {n}" for mode, n in within_torch]
        return ["--runtime onnxruntime --batch-size 1 16", *torch_cases]
    if device == "cuda":
        sizes = [("eval", "1 32 64 128"), ("train", "32 64 128")]
        compiled = [("eval", "128"), ("train", "128"), ("eval", "1"), ("eval", "32"), ("train", "32")]
        found = [f"--mode {mode} --batch-size {batches} {GPU}" for mode, batches in sizes]
        found += [f"--mode {mode} --batch-size {batches} {GPU} --torchcompile" for mode, batches in compiled]
    elif paths:
        eager = [
            "--mode eval --batch-size 1 --num-warm-iter 3 --num-bench-iter 20",
            "--mode eval --batch-size 32 --num-warm-iter 2 --num-bench-iter 5",
            "--mode train --batch-size 16 --num-warm-iter 2 --num-bench-iter 4",
            "--mode eval --batch-size 128 --num-warm-iter 1 --num-bench-iter 3",
        ]
        found = eager + [f"{case} --torchcompile" for case in eager]
    else:
        found = [
            "--mode eval --batch-size 1 --num-warm-iter 3 --num-bench-iter 40 --optimize",
            "--mode eval --batch-size 16 --num-warm-iter 3 --num-bench-iter 9 --optimize",
            "--mode train --batch-size 16 --num-warm-iter 3 --num-bench-iter 6",
        ]
    return [case + " --backends kernel reference" * paths for case in found]


def run(kind: str, model: str, options: str, seconds: float) -> list[dict] | str:
    """The rows of `timm-dynamic benchmark`, or of `best.py`, in a process of its own, or why there are none."""
    if kind == "best":
        program = [str(Path(__file__).with_name("best.py")), model]
    else:
        program = ["-m", "timm_dynamic.cli", "benchmark", "--models", model, "--baseline", "static"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, *program, *options.split(), "--json", str(path)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        try:
            process = subprocess.run(command, **pipes, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        if process.returncode:
            return (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return json.loads(path.read_text())["rows"]


def combine(samples: list[list[dict]]) -> list[dict]:
    """One row for each of several processes' rows: medians of their medians and of their ratios."""
    rows = []
    for same in zip(*samples, strict=True):
        times = [key for key in ("median_ms", "p10_ms", "p90_ms", "optimized_ms", "optimized_ratio") if key in same[0]]
        row = {**same[0], **{key: median(r[key] for r in same) for key in times}}
        row["time_ratios"] = [r["time_ratio"] for r in same]
        row["time_ratio"] = median(row["time_ratios"])
        rows.append(row)
    twins = {row["batch_size"]: row for row in rows if row["model"] == row["baseline"]}
    for row in rows:
        row["memory_ratio"] = row["peak_memory"] / twins[row["batch_size"]]["peak_memory"]
    return rows


def combine_best(samples: list[list[dict]]) -> list[dict]:
    """One row for each of several processes' rows: the one with the median ratio, and all ratios."""
    rows = []
    for same in zip(*samples, strict=True):
        ratios = [row["time_ratio"] for row in same]
        rows.append({**same[ratios.index(median_low(ratios))], "time_ratios": ratios})
    return rows


def started(output: Path, head: dict) -> dict[str, list]:
    """What an unfinished run has measured, by model and case; nothing if there is none.

    Raises:
        ValueError: If it was begun with other code or on another machine.
    """
    before = json.loads(output.read_text()) if output.exists() else {}
    for key in head if "samples" in before else ():
        if key != "date" and _known(before, key) != _known(head, key):
            raise ValueError(
                f"{output} was begun with {key} {before.get(key)}, not {head[key]}: delete it, or finish it there"
            )
    return before.get("samples", {})


def _known(head: dict, key: str) -> str:
    return str(head.get(key)).removesuffix("-dirty")  # of a commit: the file itself, which is written, makes it so


def save(output: Path, head: dict, samples: dict[str, list], finished: bool, best: bool) -> list[dict]:
    good = {key: [sample for sample in found if not isinstance(sample, str)] for key, found in samples.items()}
    rows = [row for found in good.values() if found for row in (combine_best if best else combine)(found)]
    failed = {key: sample for key, found in samples.items() for sample in found if isinstance(sample, str)}
    report = {**head, "failed": failed, **({} if finished else {"samples": samples}), "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--paths", action="store_true", help="also the reference path, and all under torch.compile")
    kinds.add_argument("--best", action="store_true", help="both in their fastest executions, on a CPU")
    parser.add_argument(
        "--iterations", type=int, default=20, help="with --best: at batch 1; a quarter of them at others"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", help="default: those that the families name")
    parser.add_argument("--processes", type=int, help="for every case (default: 3, on a GPU 1)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no process after so many")
    parser.add_argument("--longest", type=float, default=1e4, help="minutes after which a process is stopped")
    parser.add_argument("--output", type=Path, help="default: results/models_DEVICE.json or paths_DEVICE.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.best and args.device != "cpu":
        parser.error(f"--best is for --device cpu, got {args.device}")
    kind = "paths" if args.paths else "best" if args.best else "models"
    output = args.output or Path(__file__).parent / "results" / f"{kind}_{args.device}.json"
    models = args.models or (BEST if args.best else MODELS)
    head = {**environment(torch.device(args.device)), "kernels": backend_info()[args.device]}
    rounds = args.processes or (3 if args.device == "cpu" and not args.best else 1)
    wanted = [
        f"{model} {case}"
        for case in cases(args.device, kind)
        for model in models
        if "+" not in model or case in ("--mode eval --batch-size 1", "--mode eval --batch-size 16")
    ]
    try:
        samples = started(output, head)
    except ValueError as error:
        parser.error(str(error))
    todo = [key for i in range(rounds) for key in wanted if len(samples.get(key, [])) <= i]
    deadline, rows = time.monotonic() + 60 * args.minutes, []
    for i, key in enumerate(tqdm(todo, disable=None)):
        if time.monotonic() > deadline:
            print(f"{len(todo) - i} of {rounds * len(wanted)} are left: the same command goes on with them")
            break
        model, options = key.split(" ", 1)
        options += f" --threads {args.threads} "
        options += f"--iterations {args.iterations}" if args.best else f"--device {args.device}"
        found = run(kind, model, options, 60 * args.longest)
        if isinstance(found, str):
            tqdm.write(f"{key}: {found}")
        samples.setdefault(key, []).append(found)
        rows = save(output, head, samples, i + 1 == len(todo), args.best)
    for row in rows:
        case = f"batch {row['batch_size']} {row['mode']}: time {row['time_ratio']:.2f}, MACs {row['macs_ratio']:.2f}"
        if args.best:
            ways = f"{row['runtime']}, {row['execution']} / {row['baseline_execution']}"
            print(f"{row['model']} / {row['baseline']} ({ways}), {case}")
            continue
        each = " ".join(f"{ratio:.2f}" for ratio in row["time_ratios"])
        print(
            f"{row['model']} ({row['backend']}, {row['execution']}) / {row['baseline']}, batch {row['batch_size']} "
            f"{row['mode']}: time {row['time_ratio']:.2f} ({each}), {row['median_ms']:.1f} ms, "
            f"memory {row['memory_ratio']:.2f}, MACs {row['macs_ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
