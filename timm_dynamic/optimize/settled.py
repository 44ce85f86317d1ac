"""Dynamic layers that have chosen for good how they run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_dynamic.dispatch import GLOBAL_HOOKS, observer
from timm_dynamic.layers.base import DynamicLayer
from timm_dynamic.ops.implementation import Implementation
from timm_dynamic.ops.kernels import has_choices, is_plain
from timm_dynamic.ops.shapes import is_dense

_PLAIN = {nn.Parameter, Tensor, type(None)}


class Settled:
    """The row of its table that a layer of an optimized model runs, for calls like the example.

    To choose takes longer than many a layer at batch 1: 55 of 100 us with DCD, where a static convolution's whole call
    takes 12, and to find what the row reads in its modules 27 more (one sample of 16 channels, an AMD EPYC, November
    2026). Both are done once. Asked again is only what later changes of the layer can undo: whether its parts and
    parameters are still there, and nobody waits for the parts' calls.

    Attributes:
        row: What runs.
        run: It, with what it reads of the layer; None: nothing has been read yet.
    """

    def __init__(self, row: Implementation):
        self.row = row
        self._forget()

    def _forget(self) -> None:
        self.run: Callable[[Tensor], Tensor] | None = None
        # What was read, and where; of every part, its attributes, and the dictionaries of its hooks.
        self._read: list[tuple[dict[str, Any], str, Any]] = []
        self._parts: list[dict[str, Any]] = []
        self._hooks: list[dict] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"row": self.row}  # a copy is of another layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def holds(self, layer: DynamicLayer, x: Tensor) -> bool:
        """Whether `run` is right for a call with this input, which the layer has checked."""
        if torch.is_grad_enabled() or not is_plain(x) or not is_dense(x) or x.numel() == 0:
            return False
        if has_choices() or observer.get() is not None or any(GLOBAL_HOOKS) or "formula" in layer.__dict__:
            return False
        for holder, name, value in self._read:
            if holder.get(name) is not value:
                self._forget()
                break
        if self.run is None:
            self._prepare(layer)
        if self.run is None or any(self._hooks):
            return False
        for part in self._parts:
            if part["training"] or "forward" in part or "_conv_forward" in part:
                return False
        return True

    def _prepare(self, layer: DynamicLayer) -> None:
        """Read the layer as it is now; nothing if it is not as its table knows it."""
        holders = [layer._parameters, layer._buffers]
        for kind, path in layer.parts:
            *parents, name = path.split(".")
            siblings = _within(layer, parents)._modules
            part = siblings.get(name)
            if type(part) is not kind:
                return
            self._read.append((siblings, name, part))
            self._parts.append(part.__dict__)
            self._hooks += [part._forward_hooks, part._forward_pre_hooks]
            holders += [part._parameters, part._buffers]
        tensors = [(holder, name, value) for holder in holders for name, value in holder.items()]
        if _PLAIN.issuperset(type(value) for *_, value in tensors):
            self._read += tensors
            self.run = partial(self.row.run, layer) if self.row.prepare is None else self.row.prepare(layer)


def _within(module: nn.Module, names: list[str]) -> nn.Module:
    """A submodule, or, where there is none, one without parts."""
    for name in names:
        module = module._modules.get(name) or nn.Identity()
    return module


def settle(fast: nn.Module, inputs: tuple) -> int:
    """Let the layers of an optimized model keep what they choose for an example; their number."""
    chosen: dict[DynamicLayer, set[Implementation | None]] = {}
    token = observer.set(lambda layer, x, row: chosen.setdefault(layer, set()).add(row if is_plain(x) else None))
    try:
        fast(*inputs)
    finally:
        observer.reset(token)
    settled = [(layer, *rows) for layer, rows in chosen.items() if len(rows) == 1]
    settled = [(layer, row) for layer, row in settled if row is not None and row.always_pays]
    for layer, row in settled:
        layer.settled = Settled(row)
    return len(settled)
