"""Sizes, layouts and windows of convolutions, and gates of grouped ones."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def output_size(size: tuple[int, int], kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Height and width of a convolution's output, from those of its input."""
    Ho, Wo = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return Ho, Wo


def window(options: Sequence[Pair]) -> tuple[Pair, Pair, Pair]:
    """Stride, padding and dilation, of which the last ones may be missing: an operator's defaults."""
    return *options, *((1, 1), (0, 0), (1, 1))[len(options) :]


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


def gate_groups(x: Tensor, kernels: Tensor, a_in: Tensor, a_out: Tensor | None) -> tuple[Tensor, None, Tensor | None]:
    """`x`, `a_in` and `a_out` of a convolution with groups, that gates all of its input channels, without `a_in`.

    The gates of a depthwise convolution's inputs are gates of its outputs; others scale the input.
    """
    if kernels.shape[2] > 1:
        return x * a_in.to(x.dtype)[:, :, None, None], None, a_out
    multiplier = kernels.shape[1] // a_in.shape[1]
    gates = a_in if multiplier == 1 else a_in.repeat_interleave(multiplier, 1)
    return x, None, gates if a_out is None else gates * a_out


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format in which `conv2d` would return its output."""
    channels_last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` lie one after the other, in NCHW or in channels_last."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
