"""What the models of this package cost: `counts.json`, which docs/tables.py writes. Nothing here imports torch."""

import json
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("counts.json")


class Count(NamedTuple):
    """Of one model.

    Attributes:
        parameters: Their number.
        macs: Multiply-accumulates for one image, those of linear layers included; masks count as full.
        size: The side of that image.
    """

    parameters: int
    macs: int
    size: int


def read() -> dict[str, dict[str, Count]]:
    """The counts of all models, by family and model."""
    families = json.loads(FILE.read_text())
    return {family: {model: Count(*row) for model, row in models.items()} for family, models in families.items()}
