"""Convolution with a weight of its own for every sample: one public function that picks the cheapest way by shape."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]

# Up to so many weights a sample, the samples run as the groups of one convolution. Above, oneDNN's grouped convolution
# falls behind a call per sample, soon by several times.
_GROUPED_WEIGHTS = 2**16


def per_sample_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve every sample with its own weight: `out[b] = conv2d(x[b], weight[b])`.

    A 1x1 convolution is one batched matrix product, a depthwise one the channels of a grouped convolution, any other
    such groups too or a call per sample, whichever is faster for its size. In a graph that is compiled or exported
    there is no loop over the batch, whose size may be dynamic.

    Args:
        x: `[B, C, H, W]`.
        weight: `[B, Co, C // groups, Kh, Kw]`, of the dtype of `x`.
        stride, padding, dilation, groups: As for `conv2d`; the padding is of zeros.

    Returns:
        `[B, Co, Ho, Wo]`, in the memory format of `x`.
    """
    B, Co, Ci, Kh, Kw = weight.shape
    options = (stride, padding, dilation)
    if torch.onnx.is_in_onnx_export():
        return per_sample_conv2d_reference(x, weight, *options, groups)
    if (Kh, Kw, groups, padding) == (1, 1, 1, (0, 0)):
        out = x[:, :, :: stride[0], :: stride[1]]
        out = torch.bmm(weight.flatten(2), out.flatten(2)).view(B, Co, out.shape[2], out.shape[3])
    elif torch.compiler.is_compiling() or (B > 0 and (Ci == 1 or Co * Ci * Kh * Kw <= _GROUPED_WEIGHTS)):
        out = F.conv2d(x.flatten(0, 1)[None], weight.flatten(0, 1), None, *options, B * groups)
        out = out.view(B, Co, out.shape[2], out.shape[3])
    elif B > 0:
        out = torch.cat([F.conv2d(x[b : b + 1], weight[b], None, *options, groups) for b in range(B)])
    else:
        out = F.conv2d(x, weight.sum(0), None, *options, groups)
    return out.contiguous(memory_format=memory_format(x))


def per_sample_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The same as `per_sample_conv2d` as a product of the weights and the taps that every position reads."""
    B, Co, Ci, Kh, Kw = weight.shape
    columns = columns_of(x, (Kh, Kw), stride, padding, dilation)
    Ho, Wo = columns.shape[2:]
    columns = columns.reshape(B, groups, Ci * Kh * Kw, Ho * Wo)
    return torch.matmul(weight.reshape(B, groups, Co // groups, Ci * Kh * Kw), columns).reshape(B, Co, Ho, Wo)


def output_size(size: tuple[int, int], kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Height and width of a convolution's output, from those of its input."""
    Ho, Wo = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return Ho, Wo


def columns_of(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """`[B, C * Kh * Kw, Ho, Wo]`: what every tap of a kernel reads of the zero-padded input, at every output position.

    A convolution with one-hot kernels: a single node of an ONNX graph, whose export takes far longer with one a tap.
    """
    if kernel_size == (1, 1) and tuple(padding) == (0, 0):
        return x[:, :, :: stride[0], :: stride[1]]
    # Numbers, not what tracing makes of a shape: the TorchScript exporter must know the kernel's.
    C, Kh, Kw = int(x.shape[1]), int(kernel_size[0]), int(kernel_size[1])
    one_hot = torch.eye(Kh * Kw, dtype=x.dtype, device=x.device).repeat(C, 1).view(-1, 1, Kh, Kw)
    return F.conv2d(x, one_hot, None, stride, padding, dilation, C)


def tap_views(padded: Tensor, kernel_size: Pair, stride: Pair, dilation: Pair) -> Iterator[Tensor]:
    """For each tap of a kernel, in order, the `[B, C, Ho, Wo]` view of the padded input that it reads."""
    Ho, Wo = output_size(padded.shape[2:], kernel_size, stride, (0, 0), dilation)
    for top in range(0, kernel_size[0] * dilation[0], dilation[0]):
        for left in range(0, kernel_size[1] * dilation[1], dilation[1]):
            bottom, right = top + (Ho - 1) * stride[0] + 1, left + (Wo - 1) * stride[1] + 1
            yield padded[:, :, top : bottom : stride[0], left : right : stride[1]]


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format in which `conv2d` would return its output."""
    channels_last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
