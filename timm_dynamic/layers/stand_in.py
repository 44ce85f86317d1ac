"""What a dynamic layer answers when it is asked for the weight of the layer that it replaces.

There are no such numbers. But a norm behind the layer can be merged into it as into a convolution,

    conv.weight, conv.bias = conv.weight * scale[:, None, None, None], (conv.bias - mean) * scale + shift

as `torch.nn.utils.fusion` and the `fuse()` of detectors do: the product is not computed, and when it is set, the layer
scales what it gives (`DynamicLayer.absorb`), exactly.
"""

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
_PRODUCTS = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)
_COPIES = (Tensor.detach, Tensor.requires_grad_)  # by which `nn.Parameter` makes one


class StandInWeight(Tensor):
    """Shape, dtype and device of a weight that is not there, and what its outputs are to be scaled by; no numbers.

    Whoever reads them, or makes a plain convolution of them, would get other numbers: that is refused.

    Args:
        layer: Whose weight it stands for.
        shape: Of that weight.
        like: Has its dtype and device.
        scale: `[out_channels]`, of a product with it.
    """

    @staticmethod
    def __new__(
        cls, layer: nn.Module, shape: Sequence[int], like: Tensor, scale: Tensor | None = None
    ) -> "StandInWeight":
        weight = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        weight.layer, weight.scale = layer, scale
        return weight

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _PRODUCTS and not kwargs:
            return cls._product(*args)
        weight = args[0] if args and isinstance(args[0], cls) else None
        if weight is not None and weight.scale is not None:
            if function in _COPIES or (function is Tensor.to and kwargs == {"dtype": weight.dtype}):
                return cls(weight.layer, weight.shape, weight, weight.scale)
        if function not in _ANSWERS:
            raise ValueError(_REFUSAL)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def _product(cls, *factors) -> "StandInWeight":
        weights = [one for one in factors if isinstance(one, cls) and one.scale is None]
        scales = [one for one in factors if isinstance(one, Tensor) and not isinstance(one, cls)]
        if len(weights) != 1 or len(scales) != 1 or scales[0].shape != (len(weights[0]), *[1] * (weights[0].ndim - 1)):
            raise ValueError(_REFUSAL)
        return cls(weights[0].layer, weights[0].shape, weights[0], scales[0].detach().flatten())

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise ValueError(_REFUSAL)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


def stand_in_weight(shape: Callable[[nn.Module], Sequence[int]]) -> property:
    """An attribute `weight` of a layer without one: a `StandInWeight`. Setting a multiple of it scales the outputs.

    Only the part of them that is not `bias`, as in a convolution.

    Args:
        shape: Gives that of the weight which the layer replaces.
    """

    def get(layer: nn.Module) -> StandInWeight:
        return StandInWeight(layer, shape(layer), next(layer.parameters()))

    def scale_outputs(layer: nn.Module, value: Tensor) -> None:
        if not isinstance(value, StandInWeight) or value.layer is not layer or value.scale is None:
            raise ValueError(_REFUSAL)
        scale, bias = value.scale.to(value.dtype), layer.bias
        layer.take_over(scale, torch.zeros_like(scale) if bias is None else bias.detach() * (1 - scale))

    return property(get, scale_outputs, _refuse)


def stand_in_bias(get: Callable[[nn.Module], Tensor | None]) -> property:
    """An attribute `bias` that several parameters make up. Setting it moves the outputs by the difference.

    Args:
        get: Gives it, `[out_channels]`, or None.
    """

    def move_outputs(layer: nn.Module, value: Tensor | None) -> None:
        if value is None or value.shape != (layer.out_channels,):
            raise ValueError(_REFUSAL)
        bias = get(layer)
        moved = value.detach() if bias is None else (value - bias).detach()
        layer.take_over(torch.ones_like(moved), moved)

    return property(get, move_outputs, _refuse)


def _refuse(layer: nn.Module, value: Tensor | None = None) -> None:
    raise ValueError(_REFUSAL)


def conv_weight_shape(conv: nn.Module) -> tuple[int, ...]:
    """Of a convolution with these attributes."""
    return (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
