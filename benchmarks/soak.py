"""A training run killed with SIGKILL again and again, at random moments, beside one that is left alone.

    python benchmarks/soak.py --kills 50

After each kill `last.pth.tar` must read back whole, with an epoch no earlier than before; then the same command runs
again, with `--resume auto`. In the end both runs must have left the same bits: weights, averaged weights, optimizer,
summary. Processes are forked from this one, so that torch is imported once.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import timm_dynamic.cli.train  # noqa: F401 (before the forks)
from timm_dynamic import cli
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.convert import read_checkpoint
from timm_dynamic.timing import environment

FLAGS = (
    "--model dynconv_resnet8 --img-size 32 --device cpu --workers 1 -b 20 --lr 0.05 --warmup-epochs 0 --model-ema "
    "--model-ema-decay 0.99 --mixup 0.2 --sched-on-updates --checkpoint-hist 3 --deterministic --resume auto"
).split()
STATE = ("state_dict", "state_dict_ema", "optimizer", "epoch", "metric")
PER_CLASS = {"train": 4, "val": 2}


def make_data(folder: Path) -> None:
    """A few of scikit-learn's digits: epochs have to be short."""
    cli.main(["digits", str(folder)])
    for split, number in PER_CLASS.items():
        for label in (folder / split).iterdir():
            for path in sorted(label.iterdir())[number:]:
                path.unlink()


def start(data: Path, output: Path, epochs: int) -> int:
    """Fork a run; returns its process number."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    flags = ["--output", str(output), "--experiment", "run", "--epochs", str(epochs)]
    os._exit(cli.main(["train", str(data), *FLAGS, *flags]))


def finish(pid: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        sys.exit(f"a run ended with status {status}")


def last_epoch(output: Path) -> int:
    path = output / "run" / "last.pth.tar"
    return read_checkpoint(path)["epoch"] if path.exists() else -1


def outcome(output: Path) -> tuple[dict, bytes]:
    """What a run has come to: the state in its last checkpoint, and its summary."""
    checkpoint = read_checkpoint(output / "run" / "last.pth.tar")
    return {key: checkpoint[key] for key in STATE}, (output / "run" / "summary.csv").read_bytes()


def same(a: object, b: object) -> bool:
    """Whether two nests of containers are equal, their tensors to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "soak_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data, whole, killed = (Path(folder, name) for name in ("data", "whole", "killed"))
        make_data(data)
        began = time.perf_counter()
        finish(start(data, whole, args.epochs))
        alone = time.perf_counter() - began

        kills, epoch, lost = [], -1, 0
        longest = 1.2 * alone / args.kills  # so that the run does not end before the last kill
        for _ in range(args.kills):
            delay = draw.uniform(0, longest)
            pid = start(data, killed, args.epochs)
            time.sleep(delay)
            if os.waitpid(pid, os.WNOHANG)[0]:
                sys.exit(f"the run ended after {len(kills)} kills: take more --epochs")
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            saving = (killed / "run" / "tmp.pth.tar").exists()
            try:
                found = last_epoch(killed)
            except ValueError:
                found = None
            lost += found is None or found < epoch
            epoch = epoch if found is None else found
            kills.append({"after_s": round(delay, 3), "last_epoch": found, "file_half_written": saving})
            print(f"kill {len(kills)} after {delay:.2f} s: last whole epoch {found}", flush=True)
        finish(start(data, killed, args.epochs))
        equal = same(outcome(whole), outcome(killed))
    report = {
        "flags": " ".join(FLAGS),
        "epochs": args.epochs,
        "seed": args.seed,
        "kills": len(kills),
        "kills_with_a_file_half_written": sum(kill["file_half_written"] for kill in kills),
        "lost_checkpoints": lost,
        "final_state_equal": equal,
        "uninterrupted_s": round(alone, 1),
        **environment(torch.device("cpu")),
        "rows": kills,
    }
    with replacing(args.output) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=1))
    if lost or not equal:
        sys.exit("checkpoints were lost" if lost else "the runs ended differently")


if __name__ == "__main__":
    main()
