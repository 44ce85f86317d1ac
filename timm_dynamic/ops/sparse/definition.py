"""Convolutions of listed positions only: what spatially sparse execution is made of.

Positions are rows: a map `[B, C, H, W]` in channels_last is a matrix `[B*H*W, C]`, and a position the number of its
row, `(b*H + y)*W + x`. Tables hold row numbers, -1 outside the image, whose features are zero. All are int32.

    gather_conv:      out[m] = clamp(bias + sum_t source[table[m, t]] @ matrix[t])
    scatter_conv_:    out[p[m]] = clamp(out[p[m]] + bias + sum_t source[table[m, t]] @ matrix[t])
    gather_depthwise: out[m] = clamp(bias + sum_t source[table[m, t]] * weight[t])

The clamp is ReLU, ReLU6 or nothing. All of this is for inference, without gradients.

Where the first two have no kernel, on a GPU above all, they are made of three parts, between which the features are in
memory; the product is the library's, and what reads it may do the clamp:

    gather_rows:   out[m] = clamp(source[table[m, 0]], source[table[m, 1]], ...)
    scatter_rows_: out[p[m]] = clamp(out[p[m]] + rows[m])
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.kernels import has_kernel
from timm_dynamic.ops.registration import register

NO_LIMITS = (-math.inf, math.inf)
Pair = tuple[int, int]
_PANEL_WIDTHS = (64, 48, 32, 16)  # columns that a kernel does at once
_INDICES = (torch.int32, torch.bool)
_DTYPES = {
    "cpu": (torch.float32, *_INDICES),
    "cuda": (torch.float32, torch.float16, torch.bfloat16, *_INDICES),
}


def panel_width(columns: int, device_type: str) -> int:
    """Into panels of how many columns a matrix is packed: one panel, but for the kernels of the CPU."""
    return min(_PANEL_WIDTHS, key=lambda w: (-columns % w, -w)) if device_type == "cpu" else columns


def pack_matrix(matrix: Tensor) -> Tensor:
    """`[K, N]` as `gather_conv` takes it: in panels of columns, `[panels, K, width]`, zeros behind the last one."""
    K, N = matrix.shape
    width = panel_width(N, matrix.device.type)
    return F.pad(matrix, (0, -N % width)).view(K, -1, width).transpose(0, 1).contiguous()


def runs_kernel(name: str, tensor: Tensor) -> bool:
    """Whether a compiled kernel of an operator may run on tensors like this."""
    device = tensor.device.type
    return tensor.dtype in _DTYPES.get(device, ()) and has_kernel(device, name)


def gather_rows(source: Tensor, table: Tensor, low: float, high: float) -> Tensor:
    """Rows of a matrix.

    Args:
        source: `[P, C]`.
        table: `[M, T]`, rows of `source`.
        low, high: Limits of the result, between which there is 0.

    Returns:
        `[M, T*C]`.
    """
    if runs_kernel("gather_rows", source):
        return torch.ops.timm_dynamic.gather_rows(source, table, low, high)
    return _gather_rows(source, table, low, high)


def _gather_rows(source: Tensor, table: Tensor, low: float, high: float) -> Tensor:
    rows = torch.cat([source, source.new_zeros(1, source.shape[1])])[table.long()].flatten(1)
    return rows if (low, high) == NO_LIMITS else rows.clamp_(low, high)


def scatter_rows_(out: Tensor, positions: Tensor, rows: Tensor, low: float, high: float) -> None:
    """Add to rows of a matrix, in place.

    Args:
        out: `[P, N]`; rows that are not in `positions` stay as they are.
        positions: `[M]`, each once; -1: nowhere.
        rows: `[M, N]`.
        low, high: Limits of the result.
    """
    if runs_kernel("scatter_rows_", out):
        torch.ops.timm_dynamic.scatter_rows_(out, positions, rows, low, high)
    else:
        _scatter_rows_(out, positions, rows, low, high)


def _scatter_rows_(out: Tensor, positions: Tensor, rows: Tensor, low: float, high: float) -> None:
    some = positions >= 0
    at = positions[some].long()
    out[at] = (out[at] + rows[some]).clamp(low, high)


def product(
    source: Tensor, table: Tensor | None, matrix: Tensor, bias: Tensor, source_limits: tuple[float, float] = NO_LIMITS
) -> Tensor:
    """`gather_conv` without limits, but of a source that is clamped first, in its memory if there is no table."""
    if table is not None:
        rows = gather_rows(source, table, *source_limits)
    else:
        rows = source if source_limits == NO_LIMITS else source.clamp_(*source_limits)
    return torch.addmm(bias, rows, matrix.transpose(0, 1).flatten(1)[:, : len(bias)])


def gather_conv(source: Tensor, table: Tensor | None, matrix: Tensor, bias: Tensor, low: float, high: float) -> Tensor:
    """A convolution at some positions.

    Args:
        source: `[P, C]`.
        table: `[M, T]`, rows of `source`; None for all rows, one tap.
        matrix: `[T*C, N]` as `pack_matrix` arranges it.
        bias: `[N]`.
        low, high: Limits of the result.

    Returns:
        `[M, N]`.
    """
    if runs_kernel("gather_conv", source):
        return torch.ops.timm_dynamic.gather_conv(source, table, matrix, bias, low, high)
    return _gather_conv(source, table, matrix, bias, low, high)


def _gather_conv(source: Tensor, table: Tensor | None, matrix: Tensor, bias: Tensor, low: float, high: float) -> Tensor:
    out = product(source, table, matrix, bias)
    return out if (low, high) == NO_LIMITS else out.clamp_(low, high)


def scatter_conv_(
    out: Tensor,
    positions: Tensor,
    source: Tensor,
    table: Tensor | None,
    matrix: Tensor,
    bias: Tensor,
    low: float,
    high: float,
) -> None:
    """Add a convolution at some positions, in place.

    Args:
        out: `[P, N]`; rows that are not in `positions` stay as they are.
        positions: `[M]`, each once; -1: nowhere.
        source, table, matrix, bias, low, high: As for `gather_conv`.
    """
    if runs_kernel("scatter_conv_", out):
        torch.ops.timm_dynamic.scatter_conv_(out, positions, source, table, matrix, bias, low, high)
    else:
        _scatter_conv_(out, positions, source, table, matrix, bias, low, high)


def _scatter_conv_(out: Tensor, positions: Tensor, source, table, matrix, bias, low: float, high: float) -> None:
    scatter_rows_(out, positions, product(source, table, matrix, bias), low, high)


def gather_depthwise(source: Tensor, table: Tensor, weight: Tensor, bias: Tensor, low: float, high: float) -> Tensor:
    """A depthwise convolution at some positions.

    Args:
        source: `[P, C]`.
        table: `[M, T]`.
        weight: `[T, C]`.
        bias: `[C]`.
        low, high: Limits of the result.

    Returns:
        `[M, C]`.
    """
    if runs_kernel("gather_depthwise", source):
        return torch.ops.timm_dynamic.gather_depthwise(source, table, weight, bias, low, high)
    return _gather_depthwise(source, table, weight, bias, low, high)


def _gather_depthwise(source: Tensor, table: Tensor, weight: Tensor, bias: Tensor, low: float, high: float) -> Tensor:
    taps = gather_rows(source, table, *NO_LIMITS).view(*table.shape, source.shape[1])
    return ((taps * weight).sum(1) + bias).clamp(low, high)


def window_table(
    positions: Tensor,
    input_size: Pair,
    output_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    padding: Pair,
) -> Tensor:
    """What a convolution's outputs read.

    Args:
        positions: `[M]`, of the convolution's output map; -1: none, which reads nothing.
        input_size, output_size: (H, W) of its maps.
        kernel_size, stride, dilation, padding: Of the convolution.

    Returns:
        `[M, T]`, positions of its input map.
    """
    run = torch.ops.timm_dynamic.window_table if runs_kernel("window_table", positions) else _window_table
    return run(positions, input_size, output_size, kernel_size, stride, dilation, padding)


def _window_table(positions, input_size, output_size, kernel_size, stride, dilation, padding) -> Tensor:
    positions = positions.long()
    (H, W), (Ho, Wo) = input_size, output_size
    b, p = positions // (Ho * Wo), positions % (Ho * Wo)
    taps = [torch.arange(k, device=positions.device) * d for k, d in zip(kernel_size, dilation, strict=True)]
    y = (p // Wo * stride[0] - padding[0])[:, None, None] + taps[0][:, None]
    x = (p % Wo * stride[1] - padding[1])[:, None, None] + taps[1]
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (positions >= 0)[:, None, None]
    return torch.where(inside, (b[:, None, None] * H + y) * W + x, -1).flatten(1).int()


def neighbour_table(
    mask: Tensor,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    padding: Pair,
    capacity: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A convolution at the active positions of a mask.

    Args:
        mask: `[B, 1, Ho, Wo]`, of the convolution's output map: boolean, or numbers, active where they are not 0.
        input_size: (H, W) of its input map.
        kernel_size, stride, dilation, padding: Of the convolution.
        capacity: How many active positions and how many needed ones there is room for, so that the tables have the
            same sizes for every mask and nobody waits for it; None: as many as there are. What there is no room for is
            left out. If there is room for all positions of the input map, all are listed as needed.

    Returns:
        The active positions of the output map, `[M]`; the positions of the input map that they read, `[P]`, ascending;
        for every active position and tap the number of the latter, `[M, T]`; and how many are active and needed, `[2]`.
        With a capacity M and P are that, and -1 is in rows that are left and for what was left out.
    """
    run = torch.ops.timm_dynamic.neighbour_table if runs_kernel("neighbour_table", mask) else _neighbour_table
    return run(mask, input_size, kernel_size, stride, dilation, padding, capacity)


def _neighbour_table(mask, input_size, kernel_size, stride, dilation, padding, capacity=None):
    positions = mask.flatten().nonzero()[:, 0].int()
    inputs = mask.shape[0] * math.prod(input_size)
    table = _window_table(positions, input_size, mask.shape[2:], kernel_size, stride, dilation, padding).long()
    is_needed = torch.zeros(inputs + 1, dtype=torch.bool, device=mask.device)
    is_needed[table] = True  # -1 is the last one, which is no position
    is_needed[-1] = False
    row_of = is_needed.cumsum(0) - 1
    row_of[-1] = -1
    needed, table = is_needed.nonzero()[:, 0].int(), row_of[table].int()
    counts = torch.tensor([len(positions), len(needed)], dtype=torch.int32, device=mask.device)
    if capacity is None:
        return positions, needed, table, counts
    if capacity[1] >= inputs:
        table = F.pad(needed, (0, 1), value=-1)[table.long()]
        needed = torch.arange(inputs, dtype=torch.int32, device=mask.device)
    table = table.where(table < capacity[1], -1)
    return _resize(positions, capacity[0]), _resize(needed, capacity[1]), _resize(table, capacity[0]), counts


def _resize(rows: Tensor, count: int) -> Tensor:
    """Cut or, with -1, extended."""
    return torch.cat([rows[:count], rows.new_full((max(0, count - len(rows)), *rows.shape[1:]), -1)])


def _fake_neighbour_table(mask, input_size, kernel_size, stride, dilation, padding, capacity=None):
    if capacity is None:
        context = torch.library.get_ctx()
        capacity = context.new_dynamic_size(), context.new_dynamic_size()
    shapes = ((capacity[0],), (capacity[1],), (capacity[0], kernel_size[0] * kernel_size[1]), (2,))
    return tuple(mask.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _fake_gather_conv(source, table, matrix, bias, low, high):
    return source.new_empty((source if table is None else table).shape[0], bias.shape[0])


def _fake_window_table(positions, input_size, output_size, kernel_size, *others):
    return positions.new_empty(positions.shape[0], kernel_size[0] * kernel_size[1])


def _fake_nothing(*args) -> None:
    return None


_LIMITS = "float low, float high"
_CONV = f"Tensor source, Tensor? table, Tensor matrix, Tensor bias, {_LIMITS}"
_WINDOW = "int[2] kernel_size, int[2] stride, int[2] dilation, int[2] padding"
for _name, _schema, _definition, _fake in (
    (
        "gather_rows",
        f"(Tensor source, Tensor table, {_LIMITS}) -> Tensor",
        _gather_rows,
        lambda source, table, *limits: source.new_empty(table.shape[0], table.shape[1] * source.shape[1]),
    ),
    (
        "scatter_rows_",
        f"(Tensor(a!) out, Tensor positions, Tensor rows, {_LIMITS}) -> ()",
        _scatter_rows_,
        _fake_nothing,
    ),
    ("gather_conv", f"({_CONV}) -> Tensor", _gather_conv, _fake_gather_conv),
    ("scatter_conv_", f"(Tensor(a!) out, Tensor positions, {_CONV}) -> ()", _scatter_conv_, _fake_nothing),
    (
        "gather_depthwise",
        f"(Tensor source, Tensor table, Tensor weight, Tensor bias, {_LIMITS}) -> Tensor",
        _gather_depthwise,
        lambda source, table, *others: source.new_empty(table.shape[0], source.shape[1]),
    ),
    (
        "window_table",
        f"(Tensor positions, int[2] input_size, int[2] output_size, {_WINDOW}) -> Tensor",
        _window_table,
        _fake_window_table,
    ),
    (
        "neighbour_table",
        f"(Tensor mask, int[2] input_size, {_WINDOW}, int[2]? capacity) -> (Tensor, Tensor, Tensor, Tensor)",
        _neighbour_table,
        _fake_neighbour_table,
    ),
):
    register(_name, _schema, _definition, _fake, differentiable=False)
