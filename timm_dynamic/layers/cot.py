"""Contextual transformer layer: a static context of every position, and a dynamic one that it guides.

Li et al., "Contextual Transformer Networks for Visual Recognition", TPAMI 2022 (arXiv 2107.12292). Parameters are named
as the authors' are, so that their weights load as they are.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.base import check_positive
from timm_dynamic.layers.filter_norm import check_maps
from timm_dynamic.layers.pooled_norm import normalize_pooled
from timm_dynamic.ops import dynamic_filter

_SHARED = 8  # channels that a filter serves


@register_notrace_module
class CoTLayer(nn.Module):
    """Contextual transformer, in the place of a 3x3 convolution: `[B, C, H, W]` to `[B, C, ceil(H/s), ceil(W/s)]`.

        k = relu(BN(conv3x3(x)))                             the static context
        w = GN(conv1x1(relu(BN(conv1x1([x, k])))))           [B, C/8, 9, H, W], filters
        y[b,c,p] = silu(BN(sum_k w[b, c mod C/8, k, p] * v[b,c,p+o_k])),  v = BN(conv1x1(x))
        out = a y + (1 - a) k                                a of every channel: a gate of the mean of y + k

    With `groups` (CoTNeXt) the convolutions are grouped, and `c mod C/8` is taken within each group of channels, with
    its share of the filters. A batch of one normalises the gate by the running statistics, in training, too.

    Args:
        dim: C, divisible by `8 * groups`.
        groups: Of the 1x1 convolutions; that of the 3x3 convolution has four times as many.
        stride: s: 1, or 2 for an average pool of 3x3 windows in front.
        dilation: Distance between taps, of the 3x3 convolution and of the filters.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    def __init__(self, dim: int, groups: int = 1, stride: int = 1, dilation: int = 1, device=None, dtype=None):
        super().__init__()
        check_positive(dim=dim, groups=groups, dilation=dilation)
        if dim % (_SHARED * groups):
            raise ValueError(f"dim must be divisible by {_SHARED} * groups = {_SHARED * groups}, got {dim}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        self.dim, self.groups, self.stride, self.dilation = dim, groups, stride, dilation
        dd = {"device": device, "dtype": dtype}
        hidden, filters, squeezed = dim // 2, dim // _SHARED, max(dim // 2, 32)
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.key_embed = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation, groups=4 * groups, bias=False, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.ReLU(),
        )
        self.embed = nn.Sequential(
            nn.Conv2d(2 * dim, hidden, 1, groups=groups, bias=False, **dd),
            nn.BatchNorm2d(hidden, **dd),
            nn.ReLU(),
            nn.Conv2d(hidden, filters * 9, 1, groups=groups, **dd),
            nn.GroupNorm(filters, filters * 9, **dd),
        )
        self.conv1x1 = nn.Sequential(
            nn.Conv2d(dim, dim, 1, groups=groups, bias=False, **dd),
            nn.BatchNorm2d(dim, **dd),
        )
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.act = nn.SiLU()
        self.se = nn.Sequential(
            nn.Conv2d(dim, squeezed, 1, **dd),
            nn.BatchNorm2d(squeezed, **dd),
            nn.ReLU(),
            nn.Conv2d(squeezed, 2 * dim, 1, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_maps("x", x, self.dim)
        x = self.pool(x)
        k = self.key_embed(x)
        # Channels of x and k in turn: every group sees its share of both.
        both = torch.stack([x, k], 2).flatten(1, 2) if self.groups > 1 else torch.cat([x, k], 1)
        filters = self.embed(both).unflatten(1, (-1, 9))
        values, groups, dilation = self.conv1x1(x), self.groups, self.dilation
        y = dynamic_filter(values, filters, 3, grouping="interleaved", parts=groups, dilation=dilation)
        y = self.act(self.bn(y))
        gate = self.gate((y + k).mean((2, 3), keepdim=True))
        return k + gate * (y - k)

    def gate(self, pooled: Tensor) -> Tensor:
        """`[B, C, 1, 1]` to the same: the share of the dynamic context."""
        if torch.jit.is_scripting():
            scores = self.se(pooled)
        else:
            squeezed = normalize_pooled(self.se[1], self.se[0](pooled))
            scores = self.se[3](self.se[2](squeezed))
        return scores.unflatten(1, (-1, 2)).softmax(2)[:, :, 0]
