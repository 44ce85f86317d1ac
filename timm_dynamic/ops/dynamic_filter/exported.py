"""Filters for every position in ONNX graphs, in the shape that onnxruntime runs fast."""

import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.dynamic_filter.definition import definition
from timm_dynamic.ops.scan import scan

# At a width of 56 whole shifts take 0.6 of the time of shifted rows, at 28 and less about as long (onnxruntime 1.32,
# the layers of ddf_mul_resnet50 alone, batch 1, one thread).
_WIDE = 40


def dynamic_filter(
    x: Tensor,
    filters: Tensor,
    channel_filter: Tensor | None,
    kernel_size: int,
    kernel_combine: str,
    parts: int,
    dilation: int,
    stride: int,
    upsample: int,
) -> Tensor:
    """As the operator's definition; a sample at a time."""
    tensors = {"x": x, "filters": filters}
    if channel_filter is not None:
        tensors["channel_filter"] = channel_filter
    one = {name: t for name, t in tensors.items() if isinstance(t.shape[0], int) and t.shape[0] == 1 and t is not x}
    samples = {name: t for name, t in tensors.items() if name not in one}
    is_wide = isinstance(x.shape[3], int) and x.shape[3] >= _WIDE
    is_simple = channel_filter is not None and (filters.shape[1], stride, upsample) == (1, 1, 1)
    shifts = is_wide and is_simple and filters.shape[4] == x.shape[3] and filters.shape[3] != 1

    def filter_sample(x: Tensor, filters: Tensor, channel_filter: Tensor | None = None) -> Tensor:
        if shifts:
            y = _shifted(x[0], filters[0, 0], channel_filter[0], kernel_size, kernel_combine, dilation)
            return y[None]
        options = (kernel_size, kernel_combine, parts, dilation, stride, upsample)
        return definition(x, filters, channel_filter, *options)

    return scan(filter_sample, samples, one)


def _shifted(x: Tensor, filters: Tensor, channels: Tensor, kernel_size: int, kernel_combine: str, dilation: int):
    """A map with a margin is one row of numbers, of which every tap reads a shifted piece.

    Args:
        x: `[C, H, W]`; so is the result.
        filters: `[K*K, H, W]`.
        channels: `[C, K*K]`.
        kernel_size, kernel_combine, dilation: As for the operator.
    """
    C, H, W = x.shape
    margin = dilation * (kernel_size // 2)
    width = W + 2 * margin
    x = F.pad(x, (margin, margin, margin, margin + 1)).flatten(1)
    filters = F.pad(filters, (0, 2 * margin)).flatten(1)
    out = 0
    for k in range(kernel_size**2):
        first = (k // kernel_size * width + k % kernel_size) * dilation
        channel = channels[:, k, None]
        weight = channel * filters[k] if kernel_combine == "mul" else channel + filters[k]
        out = out + weight * x[:, first : first + H * width]
    return out.view(C, H, width)[:, :, :W]
