"""Standardised dynamic filters: what ends both branches of a decoupled dynamic filter layer."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.ops.dynamic_filter.filter_norm import filter_norm


@register_notrace_module
class FilterNorm(nn.Module):
    """Standardise every K x K filter over its taps, then scale it.

    Each filter loses its mean and is divided by (unbiased standard deviation + 1e-10): `timm_dynamic.ops.filter_norm`.

    Args:
        in_channels: Number of filters at a position.
        kernel_size: K, at least 2.
        filter_type: `"spatial"` or `"channel"`: which of the two factors these filters are.
        nonlinearity: What follows, for `torch.nn.init.calculate_gain`; the scale is gain / K.
        running_std: Learn the scale, one number a tap (parameter `std`); else it is the constant gain / K.
        running_mean: Learn an offset as well, one number a tap (parameter `mean`).

    Shape:
        `[B, in_channels*K*K, H, W]`, filters one after the other, to the same.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        filter_type: str,
        nonlinearity: str = "linear",
        running_std: bool = False,
        running_mean: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if kernel_size < 2:
            raise ValueError(f"kernel_size must be at least 2 (one tap has no deviation), got {kernel_size}")
        if filter_type not in ("spatial", "channel"):
            raise ValueError(f'filter_type must be "spatial" or "channel", got {filter_type!r}')
        self.in_channels = in_channels
        self.taps = kernel_size**2
        scale = _gain(nonlinearity) / kernel_size
        self.scale = 1.0 if running_std else scale
        size = in_channels * self.taps
        dd = {"device": device, "dtype": dtype}
        self.std = nn.Parameter(torch.randn(size, **dd) * scale) if running_std else None
        self.mean = nn.Parameter(torch.zeros(size, **dd)) if running_mean else None

    def forward(self, x: Tensor) -> Tensor:
        check_maps("x", x, self.in_channels * self.taps)
        dtype = x.dtype
        if (self.std is not None or self.mean is not None) and dtype != torch.float64:
            x = x.float()  # round once, at the end
        out = filter_norm(x, self.taps, self.scale)
        if self.std is not None:
            out = out * self.std.reshape(-1, 1, 1)
        if self.mean is not None:
            out = out + self.mean.reshape(-1, 1, 1)
        return out.to(dtype)


def check_maps(name: str, x: Tensor, channels: int) -> None:
    """Raise a ValueError that names maps which are not `[B, channels, H, W]`."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} must be [B, {channels}, H, W], got shape {list(x.shape)}")


def _gain(nonlinearity: str) -> float:
    try:
        return nn.init.calculate_gain(nonlinearity)
    except ValueError:
        raise ValueError(
            f'nonlinearity must be a name that torch.nn.init.calculate_gain knows ("relu", "linear", ...), '
            f"got {nonlinearity!r}"
        ) from None
