"""`mixed_conv2d` with one kernel, by gating what the taps read at every output position ("columns"), not the weight.

Columns of some samples at a time meet the shared weight in one matrix product. They have fewer elements than the
weights of all samples where output positions are rarer than output channels.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.products import linear
from timm_dynamic.ops.shapes import Pair, memory_format, output_size, tap_views

# Columns of a sample with so many elements are gated however few its weights are: 0.8 of the training step of ResNet-8
# for CIFAR-10 at batch 128 (one thread of an AMD EPYC, November 2026).
_FEW = 2**17
_CHUNK = 2**21  # elements of the columns that are there at a time (benchmarks/models.py, ped_resnet50, on a CPU)


def empty_rows(
    x: Tensor, attention: Tensor | None, kernels: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Room for the output before `a_out`, `[B, Ho * Wo, O]`, if columns are to be gated; else an empty tensor.

    On a GPU they are wherever possible: a kernel launch for every sample takes longer. So do the calls for a sample of
    small maps.
    """
    if groups != 1 or attention is not None:
        return x.new_empty(0)
    Ho, Wo = output_size(x.shape[2:], kernels.shape[3:], stride, padding, dilation)
    O, C, *taps = kernels.shape[1:]
    few = taps != [1, 1] and Ho * Wo * C * math.prod(taps) <= _FEW
    if few or Ho * Wo < O or x.device.type == "cuda":
        return x.new_empty((x.shape[0], Ho * Wo, O))
    return x.new_empty(0)


def forward(
    x: Tensor,
    weight: Tensor,
    pairs: Tensor,
    a_out: Tensor,
    rows: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """The output; the rows are filled.

    Args:
        x: `[B, C, H, W]`.
        weight: `[O, C, Kh, Kw]`.
        pairs: `[B, C * Kh * Kw]`, the gates of inputs times those of taps.
        a_out: `[B, O]`.
        rows: See `empty_rows`.
        stride, padding, dilation: Of the convolution.
    """
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    a_out = a_out[:, :, None, None].to(x.dtype)
    if len(x) == 1 and not _weight_order(rows):
        gated = (weight * pairs.view(weight.shape[1:])).to(x.dtype)
        out = F.conv2d(x, gated, None, stride, padding, dilation)
        rows.copy_(out.flatten(2).mT)
        return out.mul_(a_out).contiguous(memory_format=memory_format(x))
    matrix = _matrix(weight, rows).to(x.dtype)
    for chunk, columns in _columns(x, weight, pairs, rows, stride, padding, dilation):
        rows[chunk] = linear(columns, matrix).view(rows[chunk].shape)
    shape = (len(x), len(weight), *size)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return torch.mul(rows.mT.view(shape), a_out, out=out)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pairs: Tensor,
    a_out: Tensor,
    rows: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The gradients of `x`, `weight` (or None), `pairs` and `a_out`."""
    kernel_size = weight.shape[2:]
    grad_rows = grad.flatten(2).mT.contiguous()
    grad_a_out = (grad_rows * rows).sum(1, dtype=a_out.dtype)
    grad_rows = grad_rows * a_out[:, None].to(x.dtype)

    matrix, scale = _matrix(weight, rows).to(x.dtype), _scale(weight, pairs, x.dtype)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_matrix = torch.zeros_like(matrix, dtype=pairs.dtype)
    grad_scale = torch.empty_like(scale, dtype=pairs.dtype)
    for chunk, columns in _columns(x, weight, pairs, rows, stride, padding, dilation):
        grad_chunk = grad_rows[chunk].flatten(0, 1)
        if needs_weight:
            grad_matrix += linear(grad_chunk.t(), columns.t())
        padded = _padded(x[chunk], padding)
        grad_padded = torch.zeros_like(padded)
        grad_columns = _by_tap(linear(grad_chunk, matrix.t()).view(len(padded), *grad.shape[2:], -1), weight, rows)
        views = (tap_views(t, kernel_size, stride, dilation) for t in (padded, grad_padded))
        for k, (tap, grad_tap) in enumerate(zip(*views, strict=True)):
            grad_scale[chunk, k] = (grad_columns[k] * tap).sum((2, 3), dtype=pairs.dtype)
            if needs_x:
                grad_tap.addcmul_(grad_columns[k], scale[chunk, k, :, None, None])
        if needs_x:
            grad_x[chunk] = F.pad(grad_padded, [-p for p in (padding[1], padding[1], padding[0], padding[0])])
    grad_weight = _by_tap(grad_matrix, weight, rows).movedim(0, -1).view(weight.shape) if needs_weight else None
    return grad_x, grad_weight, grad_scale.mT.reshape(pairs.shape), grad_a_out


def _columns(
    x: Tensor, weight: Tensor, pairs: Tensor, rows: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> Iterator[tuple[slice, Tensor]]:
    """Gated taps, `[n * Ho * Wo, C * Kh * Kw]`, of some samples at a time, in a buffer which the next ones reuse."""
    C, Kh, Kw = weight.shape[1:]
    scale = _scale(weight, pairs, x.dtype)
    Ho, Wo = output_size(x.shape[2:], (Kh, Kw), stride, padding, dilation)
    limit = _CHUNK if x.device.type == "cpu" else max(_CHUNK, x.numel())
    n = max(1, limit // (Ho * Wo * Kh * Kw * C))
    buffer = x.new_empty(min(n, len(x)), Ho, Wo, Kh * Kw * C)
    for first in range(0, len(x), n):
        chunk = slice(first, min(first + n, len(x)))
        columns = buffer[: chunk.stop - first]
        by_tap = _by_tap(columns, weight, rows)
        for k, tap in enumerate(tap_views(_padded(x[chunk], padding), (Kh, Kw), stride, dilation)):
            torch.mul(tap, scale[chunk, k, :, None, None], out=by_tap[k])
        yield chunk, columns.flatten(0, 2)


# Where the positions of the whole batch are rare beside the output channels, the columns are put in the order of the
# weight, (channel, tap); elsewhere a copy of the weight in an order in which the columns are made fast, (tap, channel)
# (benchmarks/models.py, ped_resnet50 at batch 1, on a CPU).


def _weight_order(rows: Tensor) -> bool:
    samples, positions, outputs = rows.shape
    return 4 * samples * positions <= outputs


def _matrix(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.flatten(1) if _weight_order(rows) else weight.flatten(2).mT.flatten(1)


def _by_tap(columns: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """View `[n, Ho, Wo, C * Kh * Kw]` as `[Kh * Kw, n, C, Ho, Wo]`, `[O, C * Kh * Kw]` as `[Kh * Kw, O, C]`."""
    C, taps = weight.shape[1], weight.shape[2:].numel()
    if _weight_order(rows):
        columns = columns.unflatten(-1, (C, taps)).movedim(-1, 0)
    else:
        columns = columns.unflatten(-1, (taps, C)).movedim(-2, 0)
    return columns.movedim(-1, 2)


def _scale(weight: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, Kh * Kw, C]`: what the columns are multiplied by."""
    return pairs.view(len(pairs), *weight.shape[1:]).flatten(2).mT.to(dtype, memory_format=torch.contiguous_format)


def _padded(x: Tensor, padding: Pair) -> Tensor:
    """Zero-padded, with the channels innermost in memory."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    return x.contiguous(memory_format=torch.channels_last)
