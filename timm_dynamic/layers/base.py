"""What every drop-in layer shares: a convolution's arguments and attributes, `from_conv`, loading an author's layer."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", bound="DropInConv2d")


class DropInConv2d(nn.Module):
    """Base of the layers that stand in for an `nn.Conv2d`: its constructor arguments, checked, and its attributes.

    A subclass takes these arguments in this order, then `device` and `dtype`, then keyword arguments of its own.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            if min(value if isinstance(value, (tuple, list)) else (value,)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        # nn.Conv2d itself checks the rest and turns integers into pairs; on the meta device that costs no memory.
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device="meta"
        )
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self.padding_mode = padding_mode
        self.output_padding = conv.output_padding
        self.transposed = False
        # What a convolution operator pads by itself, and what `_pad` has to do before.
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        explicit = padding_mode != "zeros" or left != right or top != bottom
        self._padding = (0, 0) if explicit else (top, left)
        self._explicit_padding = [left, right, top, bottom] if explicit else None

    def _pad(self, x: Tensor) -> Tensor:
        if self._explicit_padding is None:
            return x
        return F.pad(x, self._explicit_padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    extra_repr = nn.Conv2d.extra_repr

    @classmethod
    def from_conv(cls: type[Layer], conv: nn.Conv2d, **kwargs) -> Layer:
        """Build the layer that replaces `conv`: same shapes, device, dtype and mode, and its bias if it has one.

        What is taken from a frozen `conv` is frozen too.

        Args:
            conv: A convolution with `nn.Conv2d`'s own forward.
            **kwargs: The layer's own keyword arguments.

        Raises:
            ValueError: If this layer cannot stand in for `conv`.
        """
        plain = nn.Conv2d
        if not isinstance(conv, plain) or type(conv).forward is not plain.forward:
            raise ValueError(f"{cls.__name__}.from_conv takes an nn.Conv2d with its own forward, got {type(conv)}")
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        layer = cls(
            *(getattr(conv, name) for name in names),
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **kwargs,
        )
        if conv.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
        return layer.train(conv.training)


def load_reference(layer: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a single layer from a state dict with its authors' key names, strictly.

    Args:
        layer: One of this package's layers. Its `reference_names`, if any, maps names of the authors' modules to ours.
        state: The authors' tensors.

    Raises:
        ValueError: If keys are missing, unexpected, or of another shape; all are named.
    """
    names = getattr(layer, "reference_names", {})
    try:
        layer.load_state_dict({rename(key, names): value for key, value in state.items()})
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None


def rename(key: str, names: dict[str, str]) -> str:
    """A state dict's key with its first part, the name of a module, replaced if `names` has it."""
    first, dot, rest = key.partition(".")
    return names.get(first, first) + dot + rest
