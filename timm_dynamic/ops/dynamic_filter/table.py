"""How a `DDFPack` runs faster than by its formula."""

import torch
from torch import Tensor

from timm_dynamic.ops.dynamic_filter.definition import ddf_with_heads
from timm_dynamic.ops.dynamic_filter.filter_norm import filter_norm
from timm_dynamic.ops.implementation import Implementation
from timm_dynamic.ops.kernels import has_kernel


def _cannot_infer(layer, x: Tensor) -> str | None:
    if x.numel() == 0:
        return "the input is empty"
    if not x.is_contiguous():
        return "the input is not contiguous in NCHW"
    channel_norm = layer.channel_branch[4]
    if channel_norm.std is None or channel_norm.mean is not None or layer.spatial_branch[1].std is not None:
        return "a filter norm has other parameters than the layer gives it"
    if any(conv.bias is None for conv in (layer.spatial_branch[0], layer.channel_branch[1], layer.channel_branch[3])):
        return "a convolution has no bias"
    if any(p.dtype != x.dtype or not p.is_contiguous() for p in layer.parameters()):
        return f"a parameter is not {x.dtype}, or not contiguous"
    return None if has_kernel("cpu", "pooled_heads") else "the CPU kernels are not loaded"


def _infer(layer, x: Tensor) -> Tensor:
    _, hidden, _, channel, channel_norm = layer.channel_branch
    (filters,) = torch.ops.timm_dynamic.pooled_heads(
        x, hidden.weight.flatten(1), hidden.bias, [channel.weight.flatten(1)], [channel.bias], "none", 1.0
    )
    channel_filter = filter_norm(filters[:, :, None, None], channel_norm.taps, channel_norm.scale)
    channel_filter = channel_filter.mul_(channel_norm.std[:, None, None])
    y = ddf_with_heads(
        x,
        channel_filter,
        _spatial_filter(layer, x),
        layer.head,
        layer.kernel_size[0],
        layer.dilation[0],
        layer.stride[0],
        layer.kernel_combine,
    )
    if layer.bias is not None:
        y = y.add_(layer.bias[:, None, None])
    return y if layer.limits is None else y.clamp_(*layer.limits)


def _spatial_filter(layer, x: Tensor) -> Tensor:
    conv, norm = layer.spatial_branch
    B, _, H, W = x.shape
    if layer.stride == (1, 1):
        # A product for every sample: torch's convolution is busy rearranging its input for so few outputs.
        weight = conv.weight.flatten(1).expand(B, -1, -1)
        filters = torch.baddbmm(conv.bias[:, None], weight, x.flatten(2)).view(B, -1, H, W)
    else:
        filters = torch.conv2d(x, conv.weight, conv.bias, conv.stride)
    return filter_norm(filters, norm.taps, norm.scale)


TABLE = (Implementation("pooled heads", _infer, cannot=_cannot_infer),)
