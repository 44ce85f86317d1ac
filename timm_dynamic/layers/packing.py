"""Modules of optimized models that have their weights a second time, in an order that a library reads."""

from typing import Any

from torch import nn


class Packing(nn.Module):
    """Base of modules that `timm_dynamic.optimize` packs.

    They are packed again by `load_state_dict`, `to`, copying and unpickling, not after other changes of the weights.

    Attributes:
        packed_for: The input's shape for which the module is packed; others are right, too. None: it is not.
        packed: What `_pack` has made.
    """

    # Without annotations, which TorchScript would read.
    __jit_ignored_attributes__ = ["packed"]
    packed_for = None
    packed = None

    def pack(self) -> None:
        """Pack the weights as they are now, if the module is to be packed."""
        self.packed = None
        if self.packed_for is not None:
            self.packed = self._pack()

    def _pack(self) -> Any:
        return None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "packed": None} if self.packed_for is not None else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self.pack()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.pack()
