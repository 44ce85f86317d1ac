"""What a dynamic layer answers when it is asked for the weight of the layer that it replaces."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_REFUSAL = (
    "a dynamic layer has no static weight to read or write: timm_dynamic.optimize(model) merges norms into its parts"
)
_ATTRIBUTES = "shape dtype device layout ndim requires_grad is_leaf grad is_meta is_cuda is_cpu is_sparse is_quantized"
_METHODS = "size dim ndimension numel nelement element_size stride is_contiguous is_floating_point is_complex __len__"
_ANSWERS = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}


class StandInWeight(Tensor):
    """Shape, dtype and device of a weight that is not there; all else is refused.

    Whoever merges a norm into `conv.weight`, or makes a plain convolution of it, would get other numbers.
    """

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: Tensor) -> "StandInWeight":
        return Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in _ANSWERS:
            raise ValueError(_REFUSAL)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise ValueError(_REFUSAL)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


def stand_in_weight(shape: Callable[[nn.Module], Sequence[int]]) -> property:
    """An attribute `weight` of a layer without one: a `StandInWeight`, which cannot be set.

    Args:
        shape: Gives that of the weight which the layer replaces.
    """

    def get(layer: nn.Module) -> StandInWeight:
        return StandInWeight(shape(layer), next(layer.parameters()))

    def refuse(layer: nn.Module, value: Tensor | None = None) -> None:
        raise ValueError(_REFUSAL)

    return property(get, refuse, refuse)


def conv_weight_shape(conv: nn.Module) -> tuple[int, ...]:
    """Of a convolution with these attributes."""
    return (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)


def refuse_weight(layer: nn.Module, name: str) -> None:
    """For `register_parameter`, which `layer.weight = parameter` calls.

    Raises:
        ValueError: If `name` is that of a weight or bias that the layer only shows.
    """
    if name in ("weight", "bias") and isinstance(getattr(type(layer), name, None), property):
        raise ValueError(_REFUSAL)
