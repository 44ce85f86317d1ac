"""Large-small convolution: filters that see a large neighbourhood are applied to a small one.

Wang et al., "LSNet: See Large, Focus Small", CVPR 2025 (arXiv 2503.23135). Parameters are named as the authors' are, so
that their weights load as they are.
"""

from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.base import check_positive
from timm_dynamic.layers.filter_norm import check_maps
from timm_dynamic.ops import dynamic_filter


class ConvNorm(nn.Sequential):
    """A convolution without bias, which keeps the size but for its stride, and a batch norm.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: As for `nn.Conv2d`.
        gain: What the norm's scale starts with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        gain: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        padding = kernel_size // 2
        self.c = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_channels, **dd)
        nn.init.constant_(self.bn.weight, gain)


@register_notrace_module
class SKA(nn.Module):
    """Small-kernel aggregation: `y[b,c,p] = sum_k w[b, c mod G, k, p] * x[b,c,p+o_k]`, with zeros outside of x.

    Args:
        kernel_size: K, odd.

    Raises:
        ValueError: From the forward pass, if the filters do not fit the input.
    """

    def __init__(self, kernel_size: int = 3):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """`x`, `[B, C, H, W]`, filtered with `w`, `[B, G, K*K, H, W]`; G divides C."""
        return dynamic_filter(x, w, self.kernel_size, grouping="interleaved")

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class LKP(nn.Module):
    """Large-kernel perception: `[B, C, H, W]` becomes the filters of `SKA`, `[B, C / groups, K*K, H, W]`.

    Every filter is normalised over its taps and all positions, and so depends on the whole image.

    Args:
        dim: C, even.
        large_kernel_size: Of the depthwise convolution that sees the neighbourhood.
        kernel_size: K.
        groups: Number of channels that share a filter.
    """

    def __init__(self, dim: int, large_kernel_size: int, kernel_size: int, groups: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden, filters, self.taps = dim // 2, dim // groups, kernel_size**2
        self.cv1 = ConvNorm(dim, hidden, **dd)
        self.act1 = nn.ReLU()
        self.cv2 = ConvNorm(hidden, hidden, large_kernel_size, groups=hidden, **dd)
        self.cv3 = ConvNorm(hidden, hidden, **dd)
        self.act3 = nn.ReLU()
        self.cv4 = nn.Conv2d(hidden, filters * self.taps, 1, **dd)
        self.norm = nn.GroupNorm(filters, filters * self.taps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv2(self.act1(self.cv1(x)))
        x = self.norm(self.cv4(self.act3(self.cv3(x))))
        return x.unflatten(1, (-1, self.taps))


@register_notrace_module
class LSConv(nn.Module):
    """Large-small convolution: `y = BN(SKA(x, LKP(x))) + x`; `[B, C, H, W]` keeps its shape.

    Args:
        dim: C, even and divisible by `groups`.
        large_kernel_size: Of the neighbourhood that a filter depends on, odd.
        kernel_size: K, of the filters, odd.
        groups: Number of channels that share a filter; those of a group are C / groups apart.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    def __init__(
        self, dim: int, large_kernel_size: int = 7, kernel_size: int = 3, groups: int = 8, device=None, dtype=None
    ):
        super().__init__()
        check_positive(dim=dim, groups=groups)
        for name, value in (("large_kernel_size", large_kernel_size), ("kernel_size", kernel_size)):
            if value < 1 or value % 2 == 0:
                raise ValueError(f"{name} must be odd and positive, got {value}")
        if dim % 2 or dim % groups:
            raise ValueError(f"dim must be even and divisible by groups, got dim={dim} and groups={groups}")
        self.dim = dim
        self.lkp = LKP(dim, large_kernel_size, kernel_size, groups, device, dtype)
        self.ska = SKA(kernel_size)
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_maps("x", x, self.dim)
        return self.bn(self.ska(x, self.lkp(x))) + x
