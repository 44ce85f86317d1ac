"""One row of a table: a faster way to compute what a layer's formula says."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_dynamic.ops.kernels import exports_to_onnx


class Situation(NamedTuple):
    """What a call is like, as far as rows of tables declare it."""

    device: str
    dtype: torch.dtype
    gradients: bool
    autocast: bool
    exported: bool


def situation_of(x: Tensor) -> Situation:
    """That of a call with this input."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return Situation(device, x.dtype, torch.is_grad_enabled(), autocast, exports_to_onnx())


def _never(layer: Any, x: Tensor) -> None:
    return None


def _run(prepare: Callable[[Any], Callable[[Tensor], Tensor]], layer: Any, x: Tensor) -> Tensor:
    return prepare(layer)(x)


@dataclass(frozen=True)
class Implementation:
    """A way to run a layer that equals its formula.

    Attributes:
        name: For `timm_dynamic.explain` and `timm_dynamic.use`.
        run: Computes the layer's output from the layer and its input; applies `layer.limits` itself.
        prepare: Instead of `run`: reads what there is to read of a layer, and returns what computes the output from the
            input. Layers of optimized models call it once: modules find their attributes slowly. What it keeps are
            attributes and whole parameters, nothing that was computed of them.
        devices: Types of devices that it runs on.
        dtypes: Of input and parameters that it takes.
        gradients: Whether it is for calls with gradients (True) or without (False).
        autocast: Whether it takes a call under autocast.
        exported: Whether it is for ONNX graphs and nothing else: made of operations that they have, for a batch of any
            size, and shaped for the runtimes that read them.
        cannot: Why it does not take this layer and input, in words, or None.
        pays: Why the formula is faster for this layer and input, in words, or None. Names the measurement.
    """

    name: str
    run: Callable[[Any, Tensor], Tensor] | None = None
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    gradients: bool = False
    autocast: bool = False
    exported: bool = False
    cannot: Callable[[Any, Tensor], str | None] = _never
    pays: Callable[[Any, Tensor], str | None] = _never
    prepare: Callable[[Any], Callable[[Tensor], Tensor]] | None = None

    def __post_init__(self):
        if self.run is None:
            object.__setattr__(self, "run", partial(_run, self.prepare))

    @property
    def always_pays(self) -> bool:
        """Whether it is faster than the formula wherever it can run."""
        return self.pays is _never

    def reason_against(self, layer: Any, x: Tensor, situation: Situation) -> str | None:
        """Why it cannot run here, in words, or None; whether it pays is another question."""
        if situation.exported != self.exported:
            return "it is for ONNX graphs" if self.exported else "it is not for ONNX graphs"
        if situation.device not in self.devices:
            return f"it is for {' and '.join(self.devices)}, the input is on {situation.device}"
        if situation.dtype not in self.dtypes:
            return f"it is for {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {situation.dtype}"
        if situation.gradients != self.gradients and not self.exported:
            return "it has no gradient" if situation.gradients else "it is for training"
        if situation.autocast and not self.autocast:
            return "autocast is on"
        return self.cannot(layer, x)
