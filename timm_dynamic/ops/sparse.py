"""Convolutions of listed positions only: what spatially sparse execution is made of.

Positions are rows: a map `[B, C, H, W]` in channels_last is a matrix `[B*H*W, C]`, and a position the number of its
row, `(b*H + y)*W + x`. Tables hold row numbers, -1 outside the image, whose features are zero. All are int32.

    gather_conv:      out[m] = clamp(bias + sum_t source[table[m, t]] @ matrix[t])
    scatter_conv_:    out[p[m]] = clamp(out[p[m]] + bias + sum_t source[table[m, t]] @ matrix[t])
    gather_depthwise: out[m] = clamp(bias + sum_t source[table[m, t]] * weight[t])

The clamp is ReLU, ReLU6 or nothing. These serve inference: they have no gradient.

On a GPU the first two are made of three parts, between which the features are in memory; the product is cuBLAS's, and
what reads it may do the clamp:

    gather_rows:   out[m] = clamp(source[table[m, 0]], source[table[m, 1]], ...)
    scatter_rows_: out[p[m]] = clamp(out[p[m]] + rows[m])
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops._library import CUDA_DTYPES, NAMESPACE, has_kernel
from timm_dynamic.ops.affine import NO_LIMITS

Pair = tuple[int, int]
_PANEL_WIDTHS = (64, 48, 32, 16)  # columns that a kernel does at once


def pack_matrix(matrix: Tensor) -> Tensor:
    """`[K, N]` as `gather_conv` takes it: in panels of columns, `[panels, K, width]`, the last one filled with zeros.

    On a GPU it is one panel: the product is left to cuBLAS.
    """
    K, N = matrix.shape
    width = N
    if matrix.device.type == "cpu":
        width = min(_PANEL_WIDTHS, key=lambda w: (-N % w, -w))
    return F.pad(matrix, (0, -N % width)).view(K, -1, width).transpose(0, 1).contiguous()


def gather_rows_reference(source: Tensor, table: Tensor, low: float, high: float) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.gather_rows`.

    Args:
        source: `[P, C]`.
        table: `[M, T]`, rows of `source`.
        low, high: Limits of the result, between which there is 0.

    Returns:
        `[M, T*C]`.
    """
    rows = torch.cat([source, source.new_zeros(1, source.shape[1])])[table.long()].flatten(1)
    return rows if (low, high) == NO_LIMITS else rows.clamp_(low, high)


def scatter_rows_reference_(out: Tensor, positions: Tensor, rows: Tensor, low: float, high: float) -> None:
    """Defines the operator `torch.ops.timm_dynamic.scatter_rows_`, which writes into `out`.

    Args:
        out: `[P, N]`; rows that are not in `positions` stay as they are.
        positions: `[M]`, each once; -1: nowhere.
        rows: `[M, N]`.
        low, high: Limits of the result.
    """
    some = positions >= 0
    at = positions[some].long()
    out[at] = (out[at] + rows[some]).clamp(low, high)


def product(
    source: Tensor, table: Tensor | None, matrix: Tensor, bias: Tensor, source_limits: tuple[float, float] = NO_LIMITS
) -> Tensor:
    """`gather_conv` without limits, but of a source that is clamped first, in its own memory if there is no table."""
    if table is not None:
        rows = gather_rows(source, table, *source_limits)
    else:
        rows = source if source_limits == NO_LIMITS else source.clamp_(*source_limits)
    return torch.addmm(bias, rows, matrix.transpose(0, 1).flatten(1)[:, : len(bias)])


def gather_conv_reference(
    source: Tensor, table: Tensor | None, matrix: Tensor, bias: Tensor, low: float, high: float
) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.gather_conv`.

    Args:
        source: `[P, C]`.
        table: `[M, T]`, rows of `source`; None for all rows, one tap.
        matrix: `[T*C, N]` as `pack_matrix` arranges it.
        bias: `[N]`.
        low, high: Limits of the result.

    Returns:
        `[M, N]`.
    """
    out = product(source, table, matrix, bias)
    return out if (low, high) == NO_LIMITS else out.clamp_(low, high)


def scatter_conv_reference_(
    out: Tensor,
    positions: Tensor,
    source: Tensor,
    table: Tensor | None,
    matrix: Tensor,
    bias: Tensor,
    low: float,
    high: float,
) -> None:
    """Defines the operator `torch.ops.timm_dynamic.scatter_conv_`, which writes into `out`.

    Args:
        out: `[P, N]`; rows that are not in `positions` stay as they are.
        positions: `[M]`, each once; -1: nowhere.
        source, table, matrix, bias, low, high: As for `gather_conv`.
    """
    scatter_rows_(out, positions, product(source, table, matrix, bias), low, high)


def gather_depthwise_reference(
    source: Tensor, table: Tensor, weight: Tensor, bias: Tensor, low: float, high: float
) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.gather_depthwise`.

    Args:
        source: `[P, C]`.
        table: `[M, T]`.
        weight: `[T, C]`.
        bias: `[C]`.
        low, high: Limits of the result.

    Returns:
        `[M, C]`.
    """
    taps = gather_rows(source, table, *NO_LIMITS).view(*table.shape, source.shape[1])
    return ((taps * weight).sum(1) + bias).clamp(low, high)


def window_table_reference(
    positions: Tensor,
    input_size: Pair,
    output_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    padding: Pair,
) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.window_table`: what a convolution's outputs read.

    Args:
        positions: `[M]`, of the convolution's output map; -1: none, which reads nothing.
        input_size, output_size: (H, W) of its maps.
        kernel_size, stride, dilation, padding: Of the convolution.

    Returns:
        `[M, T]`, positions of its input map.
    """
    positions = positions.long()
    (H, W), (Ho, Wo) = input_size, output_size
    b, p = positions // (Ho * Wo), positions % (Ho * Wo)
    taps = [torch.arange(k, device=positions.device) * d for k, d in zip(kernel_size, dilation, strict=True)]
    y = (p // Wo * stride[0] - padding[0])[:, None, None] + taps[0][:, None]
    x = (p % Wo * stride[1] - padding[1])[:, None, None] + taps[1]
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (positions >= 0)[:, None, None]
    return torch.where(inside, (b[:, None, None] * H + y) * W + x, -1).flatten(1).int()


def neighbour_table_reference(
    mask: Tensor,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    padding: Pair,
    capacity: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Defines the operator `torch.ops.timm_dynamic.neighbour_table`: a convolution at the active positions of a mask.

    With a capacity the tables are of the same sizes for every mask, and the kernel tells the host nothing about it.
    What there is no room for is left out; the counts say so.

    Args:
        mask: `[B, 1, Ho, Wo]`, of the convolution's output map: boolean, or numbers, active where they are not 0.
        input_size: (H, W) of its input map.
        kernel_size, stride, dilation, padding: Of the convolution.
        capacity: How many active positions and how many needed ones there is room for. If that is room for all
            positions of the input map, all are listed as needed.

    Returns:
        The active positions of the output map `[M]`; the positions of the input map that they read, `[P]`, ascending;
        for every active position and tap the number of the latter, `[M, T]`; and how many are active and needed, `[2]`.
        With a capacity the sizes are `[capacity[0]]`, `[capacity[1]]` and `[capacity[0], T]`, with -1 in the rows that
        are left and for what was left out.
    """
    positions = mask.flatten().nonzero()[:, 0].int()
    geometry = (input_size, mask.shape[2:], kernel_size, stride, dilation, padding)
    table = window_table_reference(positions, *geometry).long()
    inputs = mask.shape[0] * math.prod(input_size)
    is_needed = torch.zeros(inputs + 1, dtype=torch.bool, device=mask.device)
    is_needed[table] = True  # -1 is the last one, which is no position
    is_needed[-1] = False
    row_of = is_needed.cumsum(0) - 1
    row_of[-1] = -1
    needed, numbers = is_needed.nonzero()[:, 0].int(), row_of[table].int()
    counts = torch.tensor([len(positions), len(needed)], dtype=torch.int32, device=mask.device)
    if capacity is None:
        return positions, needed, numbers, counts
    if capacity[1] >= inputs:
        numbers, needed = table.int(), torch.arange(inputs, dtype=torch.int32, device=mask.device)
    numbers = numbers.where(numbers < capacity[1], -1)
    return (*map(_resize, (positions, needed, numbers), (*capacity, capacity[0])), counts)


def _resize(rows: Tensor, count: int) -> Tensor:
    """Cut or, with -1, extended."""
    return torch.cat([rows[:count], rows.new_full((max(0, count - len(rows)), *rows.shape[1:]), -1)])


_CONV = "Tensor source, Tensor? table, Tensor matrix, Tensor bias, float low, float high"
_WINDOW = "int[2] kernel_size, int[2] stride, int[2] dilation, int[2] padding"
_OPERATORS = {
    "gather_rows": (gather_rows_reference, "(Tensor source, Tensor table, float low, float high) -> Tensor"),
    "scatter_rows_": (
        scatter_rows_reference_,
        "(Tensor(a!) out, Tensor positions, Tensor rows, float low, float high) -> ()",
    ),
    "gather_conv": (gather_conv_reference, f"({_CONV}) -> Tensor"),
    "scatter_conv_": (
        scatter_conv_reference_,
        f"(Tensor(a!) out, Tensor positions, {_CONV}) -> ()",
    ),
    "gather_depthwise": (
        gather_depthwise_reference,
        "(Tensor source, Tensor table, Tensor weight, Tensor bias, float low, float high) -> Tensor",
    ),
    "window_table": (
        window_table_reference,
        f"(Tensor positions, int[2] input_size, int[2] output_size, {_WINDOW}) -> Tensor",
    ),
    "neighbour_table": (
        neighbour_table_reference,
        f"(Tensor mask, int[2] input_size, {_WINDOW}, int[2]? capacity=None) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
}
for _name, (_reference, _schema) in _OPERATORS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"{NAMESPACE}::{_name}", "CompositeExplicitAutograd")(_reference)


@torch.library.register_fake(f"{NAMESPACE}::gather_rows")
def _gather_rows_fake(source, table, low, high):
    return source.new_empty(table.shape[0], table.shape[1] * source.shape[1])


@torch.library.register_fake(f"{NAMESPACE}::scatter_rows_")
def _scatter_rows_fake(*args):
    return None


@torch.library.register_fake(f"{NAMESPACE}::gather_conv")
def _gather_conv_fake(source, table, matrix, bias, low, high):
    return source.new_empty((source if table is None else table).shape[0], bias.shape[0])


@torch.library.register_fake(f"{NAMESPACE}::scatter_conv_")
def _scatter_conv_fake(*args):
    return None


@torch.library.register_fake(f"{NAMESPACE}::gather_depthwise")
def _gather_depthwise_fake(source, table, *others):
    return source.new_empty(table.shape[0], source.shape[1])


@torch.library.register_fake(f"{NAMESPACE}::window_table")
def _window_table_fake(positions, input_size, output_size, kernel_size, *others):
    return positions.new_empty(positions.shape[0], kernel_size[0] * kernel_size[1])


@torch.library.register_fake(f"{NAMESPACE}::neighbour_table")
def _neighbour_table_fake(mask, input_size, kernel_size, stride, dilation, padding, capacity=None):
    if capacity is None:
        context = torch.library.get_ctx()
        capacity = context.new_dynamic_size(), context.new_dynamic_size()
    shapes = ((capacity[0],), (capacity[1],), (capacity[0], kernel_size[0] * kernel_size[1]), (2,))
    return tuple(mask.new_empty(shape, dtype=torch.int32) for shape in shapes)


_INDICES = (torch.int32, torch.bool)
_DTYPES = {"cpu": (torch.float32, *_INDICES), "cuda": (*CUDA_DTYPES, *_INDICES)}
_NO_KERNEL = {
    "cpu": ("gather_rows", "scatter_rows_"),
    "cuda": ("gather_conv", "scatter_conv_"),
}


def kernels_serve(tensor: Tensor) -> bool:
    """Whether compiled kernels serve tensors like this."""
    device = tensor.device.type
    return tensor.dtype in _DTYPES.get(device, ()) and has_kernel(device)


def _choose(name: str, tensor: Tensor):
    """The operator where a compiled kernel serves, else its reference."""
    serves = kernels_serve(tensor) and name not in _NO_KERNEL[tensor.device.type]
    return getattr(torch.ops.timm_dynamic, name) if serves else _OPERATORS[name][0]


def gather_rows(source: Tensor, *args) -> Tensor:
    """See `gather_rows_reference`."""
    return _choose("gather_rows", source)(source, *args)


def scatter_rows_(out: Tensor, *args) -> None:
    """See `scatter_rows_reference_`."""
    _choose("scatter_rows_", out)(out, *args)


def gather_conv(source: Tensor, *args) -> Tensor:
    """See `gather_conv_reference`."""
    return _choose("gather_conv", source)(source, *args)


def scatter_conv_(out: Tensor, *args) -> None:
    """See `scatter_conv_reference_`."""
    _choose("scatter_conv_", out)(out, *args)


def gather_depthwise(source: Tensor, *args) -> Tensor:
    """See `gather_depthwise_reference`."""
    return _choose("gather_depthwise", source)(source, *args)


def window_table(positions: Tensor, *args) -> Tensor:
    """See `window_table_reference`."""
    return _choose("window_table", positions)(positions, *args)


def neighbour_table(mask: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    """See `neighbour_table_reference`."""
    return _choose("neighbour_table", mask)(mask, *args)[:3]


def fixed_neighbour_table(mask: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with a capacity, the last argument, and with the counts."""
    return _choose("neighbour_table", mask)(mask, *args)
