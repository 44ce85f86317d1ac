"""Decoupled dynamic filters as layers: what makes the two filter factors, and applies them.

Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021 (arXiv 2104.14107). The operator is `timm_dynamic.ops.ddf`.
Parameters are named as the authors' are, so that their weights load as they are.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.base import DropInConv2d, check_positive
from timm_dynamic.layers.filter_norm import FilterNorm, check_maps
from timm_dynamic.ops.dynamic_filter import ddf_with_heads
from timm_dynamic.ops.dynamic_filter.table import TABLE


@register_notrace_module
class DDFPack(DropInConv2d):
    """Decoupled dynamic filter layer: a K x K convolution whose filter depends on the sample, channel and position.

        y[c,p] = sum_k D[k,p] * C[c,k] * x[c, stride*p + o_k]

    One branch makes a filter D for every position, another one a filter C for every channel; each output uses the
    product (or sum) of its two. `[B, C, H, W]` becomes `[B, C, ceil(H/stride), ceil(W/stride)]`.
    Channels are filtered one by one, as in a depthwise convolution.

    Args:
        in_channels: C, also the output's channels.
        kernel_size: K, odd and at least 3.
        stride: Distance between outputs.
        dilation: Distance between taps.
        head: Split the channels into this many groups, each with its own spatial filters.
        se_ratio: Width of the channel branch's hidden layer, as a fraction of C.
        nonlinearity: What follows the layer, for the scale of its filters (see `FilterNorm`).
        kernel_combine: `"mul"` or `"add"`.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    family = "ddf"
    implementations = TABLE
    parts = (
        *((nn.Sequential, "spatial_branch"), (nn.Conv2d, "spatial_branch.0"), (FilterNorm, "spatial_branch.1")),
        *((nn.Sequential, "channel_branch"), (nn.AdaptiveAvgPool2d, "channel_branch.0")),
        *((nn.Conv2d, "channel_branch.1"), (nn.ReLU, "channel_branch.2"), (nn.Conv2d, "channel_branch.3")),
        (FilterNorm, "channel_branch.4"),
    )

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        head: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        kernel_combine: str = "mul",
        device=None,
        dtype=None,
    ):
        padding = dilation * (kernel_size // 2)
        super().__init__(in_channels, in_channels, kernel_size, stride, padding, dilation, bias=False)
        _check(in_channels, kernel_size, head, se_ratio, kernel_combine)
        self.head = head
        self.kernel_combine = kernel_combine
        dd = {"device": device, "dtype": dtype}
        self.spatial_branch = _spatial_branch(in_channels, head, kernel_size, stride, nonlinearity, **dd)
        self.channel_branch = _channel_branch(in_channels, kernel_size, se_ratio, nonlinearity, **dd)
        self.register_parameter("bias", None)

    def formula(self, x: Tensor) -> Tensor:
        channel_filter, spatial_filter = self.channel_branch(x), self.spatial_branch(x)
        size, dilation, stride = self.kernel_size[0], self.dilation[0], self.stride[0]
        y = ddf_with_heads(x, channel_filter, spatial_filter, self.head, size, dilation, stride, self.kernel_combine)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        if self.kernel_combine != "mul":
            raise ValueError('DDF absorbs a norm where filters are multiplied: kernel_combine is "add"')
        norm = self.channel_branch[4]
        for filters in (norm.std, norm.mean):
            if filters is not None:
                filters.mul_(scale.repeat_interleave(norm.taps))
        self.bias = nn.Parameter(shift.clone() if self.bias is None else self.bias * scale + shift)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **kwargs) -> "DDFConv2d":
        """The `DDFConv2d` that replaces `conv`. Only its bias is kept: dynamic filters have no static counterpart.

        Args:
            conv: A convolution that a `DDFConv2d` can stand in for.
            **kwargs: `head`, `se_ratio`, `nonlinearity`, `kernel_combine`.

        Raises:
            ValueError: If `DDFConv2d` cannot stand in for `conv`.
        """
        drop_in = cls if issubclass(cls, DDFConv2d) else DDFConv2d
        return super(DDFPack, drop_in).from_conv(conv, **kwargs)


@register_notrace_module
class DDFConv2d(DDFPack):
    """`DDFPack` with the constructor and attributes of `nn.Conv2d`, which it replaces.

    It has the output shape of the convolution with the same arguments. What it computes is depthwise, whether it
    replaces a dense convolution (`groups=1`, as in the authors' networks) or a depthwise one.

    Args:
        in_channels, out_channels: Equal.
        kernel_size: Square, odd and at least 3.
        stride, dilation: The same in both directions.
        padding: `dilation * (kernel_size // 2)`, or `"same"` with stride 1. nn.Conv2d's default, 0, is refused.
        groups: 1 or `in_channels`.
        bias: Add a static bias per channel, zero at first.
        padding_mode: `"zeros"`.
        head, se_ratio, nonlinearity, kernel_combine: See `DDFPack`.

    Raises:
        ValueError: If the arguments describe a convolution that it cannot replace.
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
        device=None,
        dtype=None,
        *,
        head: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        kernel_combine: str = "mul",
    ):
        conv = DropInConv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        if in_channels != out_channels:
            raise ValueError(
                f"DDF keeps the channels: out_channels must equal in_channels, {in_channels}, got {out_channels}"
            )
        for name in ("kernel_size", "stride", "dilation"):
            pair = getattr(conv, name)
            if pair[0] != pair[1]:
                raise ValueError(f"DDF needs the same {name} in both directions, got {pair}")
        K, s, d = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
        if conv.padding not in ("same", (d * (K // 2),) * 2):
            raise ValueError(f"DDF needs padding dilation * (kernel_size // 2) = {d * (K // 2)}, got {padding!r}")
        if groups not in (1, in_channels):
            raise ValueError(f"DDF filters every channel by itself: groups must be 1 or {in_channels}, got {groups}")
        if padding_mode != "zeros":
            raise ValueError(f'DDF pads with zeros: padding_mode must be "zeros", got {padding_mode!r}')
        super().__init__(in_channels, K, s, d, head, se_ratio, nonlinearity, kernel_combine, device, dtype)
        self.padding, self.groups = conv.padding, groups
        if bias:
            self.bias = nn.Parameter(torch.zeros(in_channels, device=device, dtype=dtype))


@register_notrace_module
class DDFUpPack(nn.Module):
    """Upsampling by decoupled dynamic filters: `scale_factor**2` filterings of the input, shuffled into its pixels.

    `[B, C, H, W]` becomes `[B, C, scale_factor*H, scale_factor*W]` ("DDF-Up" in the paper). The spatial
    filters are made from the input itself, after a depthwise convolution, or from a guidance map (`joint_channels`).

    Args:
        in_channels: C.
        kernel_size: K, odd and at least 3.
        scale_factor: Integer factor.
        dilation: Distance between taps of the dynamic filters.
        head, se_ratio, nonlinearity, kernel_combine: See `DDFPack`.
        dw_kernel_size: Of the depthwise convolutions, odd; unused with a guidance map.
        joint_channels: Channels of the guidance map; below 1 there is none.

    Raises:
        ValueError: If an argument, or an input of the forward pass, has an unusable value.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 3,
        scale_factor: int = 2,
        dilation: int = 1,
        head: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "linear",
        dw_kernel_size: int = 3,
        joint_channels: int = -1,
        kernel_combine: str = "mul",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check(in_channels, kernel_size, head, se_ratio, kernel_combine)
        check_positive(scale_factor=scale_factor, dilation=dilation)
        if dw_kernel_size < 1 or dw_kernel_size % 2 == 0:
            raise ValueError(f"dw_kernel_size must be odd and positive, got {dw_kernel_size}")
        self.in_channels, self.joint_channels = in_channels, joint_channels
        self.kernel_size, self.scale_factor, self.dilation = kernel_size, scale_factor, dilation
        self.head, self.kernel_combine = head, kernel_combine
        dd = {"device": device, "dtype": dtype}

        def spatial_branch() -> nn.Sequential:
            if joint_channels >= 1:
                return _spatial_branch(joint_channels, head, kernel_size, 1, nonlinearity, **dd)
            depthwise = nn.Conv2d(
                in_channels, in_channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=in_channels, **dd
            )
            return nn.Sequential(depthwise, _spatial_branch(in_channels, head, kernel_size, 1, nonlinearity, **dd))

        pairs = range(scale_factor**2)
        self.spatial_branch = nn.ModuleList(spatial_branch() for _ in pairs)
        self.channel_branch = nn.ModuleList(
            _channel_branch(in_channels, kernel_size, se_ratio, nonlinearity, **dd) for _ in pairs
        )

    def forward(self, x: Tensor, joint_x: Tensor | None = None) -> Tensor:
        """Upsample `x`, `[B, C, H, W]`, guided by `joint_x`, `[B, joint_channels, H, W]`, if the layer is joint."""
        check_maps("x", x, self.in_channels)
        guide = x
        if self.joint_channels >= 1:
            if joint_x is None:
                raise ValueError(f"joint_x, [B, {self.joint_channels}, H, W], is missing: joint_channels was given")
            check_maps("joint_x", joint_x, self.joint_channels)
            if joint_x.shape[0] != x.shape[0] or joint_x.shape[2:] != x.shape[2:]:
                raise ValueError(
                    f"joint_x must have the batch and size of x, {list(x.shape)}, got {list(joint_x.shape)}"
                )
            guide = joint_x
        elif joint_x is not None:
            raise ValueError("joint_x was given to a layer without a guidance map; construct it with joint_channels")
        outputs = []
        for channel, spatial in zip(self.channel_branch, self.spatial_branch, strict=True):
            filters = channel(x), spatial(guide)
            outputs.append(
                ddf_with_heads(x, *filters, self.head, self.kernel_size, self.dilation, 1, self.kernel_combine)
            )
        return F.pixel_shuffle(torch.stack(outputs, 2).flatten(1, 2), self.scale_factor)


def _spatial_branch(
    in_channels: int, head: int, kernel_size: int, stride: int, nonlinearity: str, **dd
) -> nn.Sequential:
    """`[B, C, H, W]` -> `[B, head*K*K, Ho, Wo]`: the filters of every position."""
    return nn.Sequential(
        nn.Conv2d(in_channels, head * kernel_size**2, 1, stride, **dd),
        FilterNorm(head, kernel_size, "spatial", nonlinearity, **dd),
    )


def _channel_branch(in_channels: int, kernel_size: int, se_ratio: float, nonlinearity: str, **dd) -> nn.Sequential:
    """`[B, C, H, W]` -> `[B, C*K*K, 1, 1]`: the filters of every channel."""
    hidden = max(1, int(in_channels * se_ratio))
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(in_channels, hidden, 1, **dd),
        nn.ReLU(),
        nn.Conv2d(hidden, in_channels * kernel_size**2, 1, **dd),
        FilterNorm(in_channels, kernel_size, "channel", nonlinearity, running_std=True, **dd),
    )


def _check(in_channels: int, kernel_size: int, head: int, se_ratio: float, kernel_combine: str) -> None:
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}")
    if head < 1 or in_channels < 1 or in_channels % head:
        raise ValueError(f"head must divide in_channels, got head={head} and in_channels={in_channels}")
    if se_ratio < 0:
        raise ValueError(f"se_ratio must not be negative, got {se_ratio}")
    if kernel_combine not in ("mul", "add"):
        raise ValueError(f'kernel_combine must be "mul" or "add", got {kernel_combine!r}')
