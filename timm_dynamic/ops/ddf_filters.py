"""`ddf_filters`: both branches of a decoupled dynamic filter layer at once, for inference.

    channel_filter = channel_scale * filter_norm(channel_weight . relu(hidden_weight . mean(x) + hidden_bias)
                                                 + channel_bias, scale 1)
    spatial_filter = filter_norm(spatial_weight . x + spatial_bias, scale)

with the mean over positions (Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, figure 2). The branches are
ten small operations a layer, whose overhead is most of their time where there are few samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE
from timm_dynamic.ops.filter_norm import filter_norm_reference


def ddf_filters_reference(
    x: Tensor,
    spatial_weight: Tensor,
    spatial_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor,
    channel_scale: Tensor,
    taps: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Defines the operator `torch.ops.timm_dynamic.ddf_filters`.

    Args:
        x: `[B, C, H, W]`.
        spatial_weight, spatial_bias: `[heads*taps, C, 1, 1]` and `[heads*taps]`.
        hidden_weight, hidden_bias: `[hidden, C, 1, 1]` and `[hidden]`.
        channel_weight, channel_bias, channel_scale: `[C*taps, hidden, 1, 1]`, `[C*taps]` and `[C*taps]`.
        taps: K*K.
        stride: Distance between outputs.
        scale: Standard deviation of the spatial filters.

    Returns:
        The channel filters `[B, C*taps, 1, 1]` and the spatial filters `[B, heads*taps, ceil(H/stride),
        ceil(W/stride)]`.
    """
    hidden = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), hidden_weight, hidden_bias))
    channel = filter_norm_reference(F.conv2d(hidden, channel_weight, channel_bias), taps, 1.0)
    spatial = filter_norm_reference(F.conv2d(x, spatial_weight, spatial_bias, stride), taps, scale)
    return channel * channel_scale.reshape(-1, 1, 1), spatial


_PARAMETERS = ", ".join(
    f"Tensor {name}"
    for name in (
        "spatial_weight",
        "spatial_bias",
        "hidden_weight",
        "hidden_bias",
        "channel_weight",
        "channel_bias",
        "channel_scale",
    )
)
torch.library.define(
    f"{NAMESPACE}::ddf_filters",
    f"(Tensor x, {_PARAMETERS}, int taps, int stride, float scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(f"{NAMESPACE}::ddf_filters", "CompositeExplicitAutograd")(ddf_filters_reference)


@torch.library.register_fake(f"{NAMESPACE}::ddf_filters")
def _ddf_filters_fake(x, spatial_weight, spatial_bias, hidden_weight, hidden_bias, channel_weight, *others):
    taps, stride = others[2:4]
    size = [(n - 1) // stride + 1 for n in x.shape[2:]]
    return x.new_empty(x.shape[0], channel_weight.shape[0], 1, 1), x.new_empty(x.shape[0], len(spatial_bias), *size)
