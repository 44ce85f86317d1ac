"""How a `DDFPack` runs faster than by its formula."""

from collections.abc import Callable

import torch
from torch import Tensor

from timm_dynamic.ops.channel_fusion.definition import NO_LIMITS
from timm_dynamic.ops.implementation import Implementation
from timm_dynamic.ops.kernels import has_kernel
from timm_dynamic.ops.pooled_heads.definition import SCORES
from timm_dynamic.ops.shapes import is_dense, memory_format


def _parameters(layer) -> tuple[Tensor, ...]:
    spatial, channel = layer.spatial_branch, layer.channel_branch
    convs = (spatial[0], channel[1], channel[3])
    return *(t for conv in convs for t in (conv.weight, conv.bias)), channel[4].std


def _cannot_infer(layer, x: Tensor) -> str | None:
    if x.numel() == 0:
        return "the input is empty"
    if not is_dense(x):
        return "the input is contiguous neither in NCHW nor in channels_last"
    if layer.channel_branch[4].mean is not None or layer.spatial_branch[1].std is not None:
        return "a filter norm has other parameters than the layer gives it"
    if any(t is None or t.dtype != x.dtype for t in _parameters(layer)):
        return f"a parameter is missing or not {x.dtype}"
    return None if has_kernel("cpu", "dynamic_filter") else "the CPU kernels are not loaded"


def _inference(layer) -> Callable[[Tensor], Tensor]:
    spatial_weight, spatial_bias, *hidden, weight, channel_bias, std = _parameters(layer)
    norm, operators, bias, limits = layer.spatial_branch[1], torch.ops.timm_dynamic, layer.bias, layer.limits
    K, stride, head, taps, scale = layer.kernel_size[0], layer.stride[0], layer.head, norm.taps, norm.scale
    options = (K, layer.kernel_combine, head, layer.dilation[0], stride, 1)

    def run(x: Tensor) -> Tensor:
        B, C = x.shape[:2]
        with torch._C._AutoDispatchBelowAutograd():  # saves every operator a call of Python
            (scores,) = operators.pooled_heads(x, *hidden, [weight], [channel_bias], SCORES)
            filters = operators.filter_norm(scores[:, :, None, None], taps, 1.0)
            channel_filter = filters.mul_(std.view(-1, 1, 1)).view(B, C, taps)
            spatial_filter = operators.filter_norm(_convolve(x, spatial_weight, spatial_bias, stride), taps, scale)
            spatial_filter = spatial_filter.view(B, head, taps, *spatial_filter.shape[2:])
            y = operators.dynamic_filter(x, spatial_filter, channel_filter, *options)
            y = y if bias is None else y.add_(bias[:, None, None])
            return y if limits is None else y.clamp_(*limits)

    return run


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """A 1x1 convolution to a few channels; torch's is busy rearranging what it reads and its weight.

    In channels_last 0.3 to 0.8 of its time for one sample, 0.8 to 1.3 for 16 (the layers of ddf_mul_resnet50, two
    threads of an AMD EPYC with AVX2, November 2026).
    """
    if memory_format(x) == torch.channels_last:
        nothing, steps = (None,) * 5, ((stride, stride), (0, 0), (1, 1))
        return torch.ops.timm_dynamic.channel_fusion(x, weight[None], *nothing, bias[None], *NO_LIMITS, *steps)
    x = x[:, :, ::stride, ::stride]
    B, _, H, W = x.shape
    y = torch.baddbmm(bias[:, None], weight.flatten(1).expand(B, -1, -1), x.flatten(2))
    return y.view(B, len(weight), H, W)


TABLE = (
    # Half of the channel branch's time and two thirds of the spatial branch's at batch 1 and 16, and less overhead
    # between them (the layers of ddf_mul_resnet50, on a CPU).
    Implementation("products", prepare=_inference, cannot=_cannot_infer),
)
