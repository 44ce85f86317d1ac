"""Running commands, and reading what a training run writes."""

import csv
from pathlib import Path

from timm_dynamic import cli

# Of a short training run on the digits, into `out/run`.
TRAIN_FLAGS = (
    "--model test_ddf_resnet --num-classes 10 --img-size 32 --device cpu --workers 0 -b 8 --epochs 2 "
    "--warmup-epochs 0 --lr 0.05 --output out --experiment run"
).split()


def run(capsys, *argv) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of a command."""
    try:
        status = cli.main([str(word) for word in argv])
    except SystemExit as stop:  # argparse's own errors
        status = stop.code
    return status, *capsys.readouterr()


def read_summary(folder="out/run") -> list[dict[str, float]]:
    """The rows of a run's summary.csv."""
    with open(Path(folder) / "summary.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
