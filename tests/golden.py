"""The golden cases: numbers that the authors' code gave, and the networks of ours that must give them, too.

A case is a file in tests/data. Its network is the model of the same name, or what a family's record says (`golden`).
"""

import json
import math
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_dynamic
from timm_dynamic.convert import load_checkpoint
from timm_dynamic.families import FAMILIES, family_of
from timm_dynamic.layers import CARAFE, CoTLayer, DynamicConv2d, FDConv2d, Involution2d, load_reference

DATA = Path(__file__).parent / "data"
CASES = sorted(path.stem for path in DATA.glob("*.json"))


class SimpleConvNet(nn.Module):
    """Network for MNIST of DY's authors, without its dropout."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), DynamicConv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


# Networks that are not among this package's models, and single layers.
NO_MODELS = {
    "dy_simple_conv": SimpleConvNet,
    "op_carafe_up2": lambda: CARAFE(10),
    "op_cot_layer": lambda: CoTLayer(32),
    "op_involution_k7_s2": lambda: Involution2d(32, 32, 7, 2, 3, bias=False),
    "op_fdconv_k3": lambda: FDConv2d(32, 64, 3, padding=1),
}


def random_input(shape: list[int], seed: int) -> Tensor:
    """float32, the frozen numbers of a seed: coarse blocks plus noise where it is an image."""
    random = np.random.RandomState(seed)
    if len(shape) != 4:
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    n, c, h, w = shape
    block = 8 if min(h, w) >= 16 else 2
    coarse = random.standard_normal((n, c, -(-h // block), -(-w // block)))
    coarse = coarse.repeat(block, 2).repeat(block, 3)[:, :, :h, :w]
    return torch.from_numpy((coarse + 0.5 * random.standard_normal((n, c, h, w))).astype(np.float32))


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Leave tensors that a file will fill as the memory is: it takes a second to draw a large network."""
    with ExitStack() as patches:
        for name in ("normal_", "uniform_"):
            patches.enter_context(mock.patch.object(torch.Tensor, name, lambda tensor, *args, **kwargs: tensor))
        yield


class Golden:
    """A case computed with the authors' code (tests/data/<name>.json), and its weights and inputs, rebuilt.

    No weights are stored: a tensor is a function of its name, shape and kind. A kind is `base[*gain][+offset]`, or
    `=name` for the tensor of another name. Random numbers come from numpy's frozen legacy generator.
    """

    def __init__(self, name: str):
        self.name, self.case = name, json.loads((DATA / f"{name}.json").read_text())
        self.rows = {key: (shape, kind) for key, shape, _, kind in self.case["keys"]}
        found = [family.golden[name] for family in FAMILIES.values() if name in family.golden]
        self.model, self.kwargs = found[0] if found else (name, {})

    def state(self) -> dict[str, Tensor]:
        state = {key: self._tensor(key) for key in self.rows}
        groups = self.case.get("structure", {}).get("frequency_group")
        if groups:  # of FDConv: the authors do not save it
            state["frequency_group"] = torch.tensor(groups).view(self.case["structure"]["frequency_group_shape"])
        return state

    def input(self, part: str = "eval", setting: str = "") -> Tensor:
        """float32 input of the `eval` or `train` part, or of another one that has an `input`, in a setting of it."""
        numbers = self.case[part]
        spec = self.case["input"] if part == "eval" else numbers.get(setting, numbers).get("input", self.case["input"])
        return random_input(spec["shape"], spec["seed"])

    def parts(self, mode: str) -> dict[str, dict]:
        """The expected numbers of `eval` or `train`, by the setting that they are of; "" if there is one only."""
        numbers = self.case[mode]
        return {"": numbers} if {"logits", "output", "stacks", "loss"} & numbers.keys() else numbers

    def save(self, path: Path) -> None:
        """Write the weights as the authors' script does."""
        wrapper = self.case["checkpoint_wrapper"]
        prefix = "module." if re.search("keys (carry a|prefixed) 'module.'", wrapper) else ""
        state = {prefix + key: value for key, value in self.state().items()}
        key = "model" if "'model'" in wrapper and "'state_dict'" not in wrapper else "state_dict"
        torch.save({"model": "a name", key: state, "optimizer": {}, "epoch": 1}, path)

    def network(self, folder: Path, **kwargs) -> nn.Module:
        """Our network, with the weights from such a file; without noise in training.

        Args:
            folder: To write the file to, for a moment.
            **kwargs: More arguments of the model.
        """
        if self.name in NO_MODELS:
            model = NO_MODELS[self.name]()
            load_reference(model, self.state())
            return model
        constructor = self.case.get("constructor", {})
        options = {key: constructor[key] for key in ("num_classes",) if key in constructor}
        with nothing_drawn():
            model = timm.create_model(self.model, **{**options, **family_of(self.model).exact, **self.kwargs, **kwargs})
        path = folder / "checkpoint.pth.tar"
        self.save(path)
        load_checkpoint(model, path)
        path.unlink()
        return model

    def output(self, model: nn.Module, x: Tensor) -> Tensor | list[Tensor]:
        """What the authors' network returns: some of them end in the logarithm of the softmax, or have heat maps."""
        if "stacks" in self.case.get("eval", ()):
            return model.forward_stacks(x)
        return model(x).log_softmax(1) if "log-probabilities" in str(self.case["constructor"]) else model(x)

    def task_loss(self, output: Tensor | list[Tensor] | tuple[Tensor, Tensor], part: dict) -> Tensor:
        """That of a network, with two classifiers if one of them learns from a teacher, or of a layer."""
        targets = part["targets"]
        if isinstance(output, list):  # of all but one joint of one image
            wanted, weight = 0.25 * random_input(targets["shape"], targets["seed"]).abs(), torch.ones(2, 16, 1, 1)
            weight[0, 3] = 0
            return sum((0.5 * (weight * (one - wanted)) ** 2).mean() for one in output)
        if isinstance(targets, dict):
            return (output * random_input(output.shape, targets["seed"])).mean()
        if isinstance(output, Tensor) and output.ndim == 4:  # a class for each pixel
            n, i, j = torch.meshgrid(*(torch.arange(size) for size in output[:, 0].shape), indexing="ij")
            targets = (i // 8 * 3 + j // 8 * 5 + 7 * n) % 22
            return F.cross_entropy(output, targets.masked_fill(targets == 21, 255), ignore_index=255)
        if isinstance(output, tuple):
            pairs = zip(output, (targets, part["teacher_classes"]), strict=True)
            return sum(F.cross_entropy(one, torch.tensor(classes)) for one, classes in pairs) / 2
        return F.cross_entropy(output, torch.tensor(targets))

    def grad_norms(self, model: nn.Module, part: dict) -> dict[str, float]:
        """The expected norms of all gradients, by our names of the parameters."""
        norms = part["grad_norms"]
        if self.name in NO_MODELS:
            return norms
        module = sys.modules[timm.model_entrypoint(self.model).__module__]
        state = {key: torch.tensor(norm, dtype=torch.float64) for key, norm in norms.items()}
        ours = module.checkpoint_filter_fn(state, model)
        return {name: ours[name].item() for name, _ in model.named_parameters() if name in ours}

    def _tensor(self, key: str) -> Tensor:
        shape, kind = self.rows[key]
        if kind.startswith("="):
            return self._tensor(kind[1:])
        base, gain, offset = re.fullmatch(r"([a-z_]+)(?:\*([-+0-9.e]+?))?(?:\+([-+0-9.e]+))?", kind).groups()
        if base == "num_batches_tracked":
            return torch.zeros(shape, dtype=torch.int64)
        if base == "offset_index":
            y, x = np.divmod(np.arange(shape[0]), math.isqrt(shape[0]))
            distance = np.abs(y[:, None] - y) * math.isqrt(shape[0]) + np.abs(x[:, None] - x)
            return torch.from_numpy(distance)
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


def set_schedule(model: nn.Module, setting: str, part: dict) -> None:
    """Bring a model to the point of training that expected numbers are of."""
    if setting == "temperature_30":
        timm_dynamic.set_progress(model, 0, 100)
    if setting == "temperature_0.5":  # of KernelWarehouse
        timm_dynamic.set_progress(model, 10, 300)
    if "dynconv" in part:
        timm_dynamic.set_progress(model, part["dynconv"]["epoch"], part["dynconv"]["num_epochs"])


def check_logits(output: Tensor | list[Tensor], expected: dict | list[dict], tolerance: float) -> None:
    """Compare with what is stored, the first logits of each sample or all, in units of their standard deviation."""
    if isinstance(output, list):  # of stacks
        for one, numbers in zip(output, expected["stacks"] if isinstance(expected, dict) else expected, strict=True):
            check_logits(one, numbers, tolerance)
        return
    assert output.double().std().item() == pytest.approx(expected["std"], rel=10 * tolerance)
    stored, positions = expected.get("logits") or expected.get("output"), expected.get("subsample")
    if stored is None:
        stored, positions = positions["values"], positions["rows"]
    for sample, numbers in zip(output.double(), stored, strict=True):
        numbers = torch.tensor(numbers, dtype=torch.float64)
        if positions:
            start, step = positions
            sample = sample[:, start::step, start::step]
        close = {"rtol": 0, "atol": tolerance * expected["std"]}
        torch.testing.assert_close(sample[: len(numbers)].cpu(), numbers, **close)
