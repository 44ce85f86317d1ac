"""Involution: a filter for every position, made from the input there (Li et al., CVPR 2021, arXiv 2103.06255).

Parameters are named as in the authors' layer, so that their weights load as they are.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.base import DropInConv2d, check_positive
from timm_dynamic.ops import dynamic_filter


@register_notrace_module
class Involution2d(DropInConv2d):
    """Involution with the constructor and attributes of `nn.Conv2d`, which it replaces.

        y[c, p] = sum_k F[c // group_channels, k, p] * x[c, stride*p + o_k],    F = conv2(relu(bn(conv1(pool(x)))))

    with 1x1 convolutions (eq. 4 to 6 of the paper). Channels are filtered one by one, as in a depthwise convolution,
    whether it replaces a dense or a depthwise one; the `group_channels` of a block share a filter.

    With a stride the filters are made from the average over stride x stride inputs. The authors' layer takes only maps
    whose size the stride divides. Here the last windows of others are smaller (`ceil_mode`), so that there is a filter
    for each of the ceil(H/stride) x ceil(W/stride) outputs: new, and the same on maps that they take.

    Args:
        in_channels, out_channels: Equal.
        kernel_size: Square, odd.
        stride, dilation: The same in both directions.
        padding: `dilation * (kernel_size // 2)`, or `"same"` with stride 1. nn.Conv2d's default, 0, is refused.
        groups: 1 or `in_channels`.
        bias: Add a static bias per channel, zero at first.
        padding_mode: `"zeros"`.
        group_channels: Channels that share a filter; where it does not divide the channels, the largest number that
            divides both.
        reduction: The filters are made from 1/reduction of the channels.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    family = "involution"

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
        group_channels: int = 16,
        reduction: int = 4,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        check_positive(group_channels=group_channels, reduction=reduction)
        if in_channels != out_channels:
            raise ValueError(
                f"involution keeps the channels: out_channels must equal in_channels, {in_channels}, got {out_channels}"
            )
        for name in ("kernel_size", "stride", "dilation"):
            if len(set(getattr(self, name))) > 1:
                raise ValueError(f"involution needs the same {name} in both directions, got {getattr(self, name)}")
        K, d = self.kernel_size[0], self.dilation[0]
        if K % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {K}")
        if self.padding not in ("same", (d * (K // 2),) * 2):
            raise ValueError(
                f"involution needs padding dilation * (kernel_size // 2) = {d * (K // 2)}, got {padding!r}"
            )
        if groups not in (1, in_channels):
            raise ValueError(f"involution filters every channel: groups must be 1 or {in_channels}, got {groups}")
        if padding_mode != "zeros":
            raise ValueError(f'involution pads with zeros: padding_mode must be "zeros", got {padding_mode!r}')
        self.filters = in_channels // math.gcd(in_channels, group_channels)
        dd, hidden = {"device": device, "dtype": dtype}, max(1, in_channels // reduction)
        conv = nn.Conv2d(in_channels, hidden, 1, bias=False, **dd)
        self.conv1 = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(hidden, **dd), activate=nn.ReLU()))
        self.conv2 = nn.Sequential(OrderedDict(conv=nn.Conv2d(hidden, self.filters * K**2, 1, **dd)))
        self.register_parameter("scale", None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(in_channels, **dd)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors, normal by the fan-out."""
        for conv in (self.conv1.conv, self.conv2.conv):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv2.conv.bias)

    @torch.jit.unused
    def start_from(self, conv: nn.Conv2d) -> None:
        """Every filter is an average at first, whatever the input's size: products of activations could overflow."""
        nn.init.zeros_(self.conv2.conv.weight)
        nn.init.constant_(self.conv2.conv.bias, self.kernel_size[0] ** -2)

    def formula(self, x: Tensor) -> Tensor:
        K, stride = self.kernel_size[0], self.stride[0]
        pooled = x if stride == 1 else F.avg_pool2d(x, stride, ceil_mode=True)
        filters = self.conv2(self.conv1(pooled))
        filters = filters.reshape(x.shape[0], self.filters, K * K, filters.shape[2], filters.shape[3])
        y = dynamic_filter(x, filters, K, dilation=self.dilation[0], stride=stride)
        if self.bias is None:
            return y
        bias = self.bias[:, None, None].to(y.dtype)
        if self.scale is None:
            return y + bias
        return torch.addcmul(bias, y, self.scale[:, None, None].to(y.dtype))  # one pass

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        """Not into `conv2`: the channels of a filter have different scales."""
        self.bias = nn.Parameter(shift.clone() if self.bias is None else self.bias * scale + shift)
        self.scale = nn.Parameter(scale.clone() if self.scale is None else self.scale * scale)
