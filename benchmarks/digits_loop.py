"""Digits trained by our `train` and by the plain loop in examples/: the same accuracy?

    timm-dynamic digits DIGITS
    python benchmarks/digits_loop.py DIGITS --seeds 0 1 2

One model a family, with the recipe of its config; accuracy on the 360 test images after the last epoch. Each run is a
process of its own, with one thread. The results are written after each run, so that what is done can be looked at.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.families import FAMILIES
from timm_dynamic.timing import environment

ROOT = Path(__file__).parents[1]
MODELS = [family.tiny for family in FAMILIES.values()]
COMMANDS = {
    "train": "timm-dynamic train {data} --config configs/{model}.digits.yaml --seed {seed} --workers 0 "
    "--output {output} --experiment run",
    "loop": "python examples/train_loop.py {data} {model} --epochs {epochs} --seed {seed}",
}


def run(way: str, data: str, model: str, epochs: int, seed: int) -> dict[str, float]:
    """Train once: test accuracy, and losses of the training, of the last epoch.

    `loss` is the task's; `auxiliary` the weighted sum of the others, with `loop` that of the last batch alone.
    """
    with tempfile.TemporaryDirectory() as output:
        command = COMMANDS[way].format(data=data, model=model, epochs=epochs, seed=seed, output=output)
        argv = command.replace("timm-dynamic", "python -m timm_dynamic.cli").split()
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *argv[1:]], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=True
        )
        if way == "train":
            with open(Path(output, "run", "summary.csv"), newline="") as file:
                *_, last = csv.DictReader(file)
            auxiliary = {"epoch", "train_loss", "lr"} | {key for key in last if key.startswith("eval_")}
            result = {
                "top1": float(last["eval_top1"]),
                "loss": float(last["train_loss"]),
                "auxiliary": sum(float(value) for key, value in last.items() if key not in auxiliary),
            }
        else:
            numbers = re.fullmatch(r"epoch .*: loss (.*), auxiliary (.*), top-1 (.*)", done.stdout.splitlines()[-1])
            result = dict(zip(("loss", "auxiliary", "top1"), map(float, numbers.groups()), strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("digits", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "digits_train_loop.json")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the runs
    report = {**environment(torch.device("cpu")), "commands": COMMANDS, "rows": []}
    todo = [(seed, model, way) for seed in args.seeds for model in args.models for way in COMMANDS]
    for seed, model, way in tqdm(todo, unit="run"):
        epochs = yaml.safe_load((ROOT / "configs" / f"{model}.digits.yaml").read_text())["epochs"]
        result = run(way, str(args.digits.resolve()), model, epochs, seed)
        report["rows"].append({"model": model, "way": way, "seed": seed, "epochs": epochs, **result})
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
