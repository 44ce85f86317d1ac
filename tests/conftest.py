"""What several test files need: the golden cases, a small image folder."""

import functools
import importlib
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


class Golden:
    """A case computed with the authors' code (tests/data/<name>.json), and its weights and inputs, rebuilt.

    No weights are stored: a tensor is a function of its name, shape and kind. A kind is `base[*gain][+offset]`, or
    `=name` for the tensor of another name. Random numbers come from numpy's frozen legacy generator.
    """

    def __init__(self, name: str):
        self.case = json.loads((DATA / f"{name}.json").read_text())
        self.rows = {key: (shape, kind) for key, shape, _, kind in self.case["keys"]}

    def state(self) -> dict[str, Tensor]:
        return {key: self._tensor(key) for key in self.rows}

    def input(self, part: str = "eval") -> Tensor:
        """float32 input of the `eval` or `train` part: coarse blocks plus noise where it is an image."""
        spec = self.case["input"] if part == "eval" else self.case["train"]["input"]
        random = np.random.RandomState(spec["seed"])
        if len(spec["shape"]) != 4:
            return torch.from_numpy(random.standard_normal(spec["shape"]).astype(np.float32))
        n, c, h, w = spec["shape"]
        block = 8 if min(h, w) >= 16 else 2
        coarse = random.standard_normal((n, c, -(-h // block), -(-w // block)))
        coarse = coarse.repeat(block, 2).repeat(block, 3)[:, :, :h, :w]
        return torch.from_numpy((coarse + 0.5 * random.standard_normal((n, c, h, w))).astype(np.float32))

    def _tensor(self, key: str) -> Tensor:
        shape, kind = self.rows[key]
        if kind.startswith("="):
            return self._tensor(kind[1:])
        base, gain, offset = re.fullmatch(r"([a-z_]+)(?:\*([-+0-9.e]+?))?(?:\+([-+0-9.e]+))?", kind).groups()
        if base == "num_batches_tracked":
            return torch.zeros(shape, dtype=torch.int64)
        r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        fan_in = float(np.prod(shape[2:] if base == "kernel_bank" else shape[1:]))
        value = {
            "weight": r / np.sqrt(fan_in) if len(shape) > 1 else 1 + 0.1 * r,
            "kernel_bank": r / np.sqrt(fan_in),
            "bias": 0.05 * r,
            "filter_std": np.sqrt(2) / 3 * r,
            "running_mean": 0.1 * r,
            "running_var": 1 + 0.2 * np.abs(r),
        }[base]
        value = value * float(gain or 1) + float(offset or 0)
        return torch.from_numpy(np.asarray(value).astype(np.float32))


@pytest.fixture(scope="session")
def golden():
    """`golden(name)` is the `Golden` of a case."""
    return functools.cache(Golden)


@pytest.fixture
def script(monkeypatch):
    """`script(name)` is one of the scripts under benchmarks/, as a module."""
    monkeypatch.syspath_prepend(DATA.parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory):
    """An image folder of ten classes: 40 of scikit-learn's digits in train/, 20 in val/. Not to be written to."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for label in range(10):
        images = digits.images[digits.target == label][:6]
        for i, image in enumerate(images):
            path = folder / ("train" if i < 4 else "val") / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype(np.uint8)).save(path)
    return folder
