"""Dynamic layers that have chosen for good how they run."""

from collections.abc import Iterator
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
    takes 12 (one sample of 16 channels, an AMD EPYC, November 2026). Asked again is only what later changes of the
    layer can undo: whether its parts are still there, with plain parameters, and nobody waits for their calls.

    Attributes:
        row: What runs.
    """

    def __init__(self, layer: DynamicLayer, row: Implementation):
        self.row = row
        self._parts = list(_parts(layer))

    def holds(self, layer: DynamicLayer, x: Tensor) -> bool:
        """Whether the row runs a call with this input, which the layer has checked."""
        if torch.is_grad_enabled() or not is_plain(x) or not is_dense(x) or x.numel() == 0:
            return False
        if has_choices() or observer.get() is not None or any(GLOBAL_HOOKS):
            return False
        if "formula" in layer.__dict__ or not _are_plain(layer._parameters):
            return False
        for siblings, name, part in self._parts:
            if siblings.get(name) is not part or part.training or part._forward_hooks or part._forward_pre_hooks:
                return False
            if "forward" in part.__dict__ or "_conv_forward" in part.__dict__ or not _are_plain(part._parameters):
                return False
        return True


def _are_plain(parameters: dict[str, Tensor | None]) -> bool:
    return _PLAIN.issuperset(map(type, parameters.values()))


def _parts(layer: DynamicLayer) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """Where every part is, and the part."""
    for _, path in layer.parts:
        parent, _, name = path.rpartition(".")
        siblings = layer.get_submodule(parent)._modules
        if siblings.get(name) is not None:
            yield siblings, name, siblings[name]


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
        layer.settled = Settled(layer, row)
    return len(settled)
