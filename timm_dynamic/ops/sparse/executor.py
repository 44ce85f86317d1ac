"""Runs a residual branch at the active positions of its mask: gather, products, scatter.

    out[active] = act(out[active] + branch(x)[active])

of a branch of two or three convolutions with their norms folded into them: the second one reads neighbours of what the
first one gave, the third is pointwise.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.sparse import capacity
from timm_dynamic.ops.sparse.definition import (
    NO_LIMITS,
    gather_conv,
    gather_depthwise,
    neighbour_table,
    panel_width,
    product,
    runs_kernel,
    scatter_conv_,
    scatter_rows_,
    window_table,
)

# Inverted residuals are bound by memory: so many bytes of their wide maps at once, for the cache, and because freshly
# mapped pages cost more than the arithmetic. Measured; residual blocks with dense convolutions gain nothing.
_WIDE_BYTES = 4 * 2**20
Window = tuple[tuple[int, int], ...]  # kernel size, stride, dilation, padding


class Folded(NamedTuple):
    """A convolution with the norm and the clamp behind it, as `gather_conv` or `gather_depthwise` takes it."""

    weight: Tensor
    bias: Tensor
    low: float
    high: float


class Geometry(NamedTuple):
    """What a branch reads.

    Attributes:
        first: Window of the first convolution; None: it is pointwise.
        second: Of the second one.
        width: Channels between the two.
        depthwise: Whether the second one is.
    """

    first: Window | None
    second: Window
    width: int
    depthwise: bool


class Plan(NamedTuple):
    """How a block runs.

    Attributes:
        geometry: Of its branch.
        convs: Of its branch.
        limits: Of its output.
        shortcut: A 1x1 convolution at the end of the shortcut, and its stride, if it is folded, too.
    """

    geometry: Geometry
    convs: tuple[Folded, ...]
    limits: tuple[float, float]
    shortcut: tuple[Folded, tuple[int, int]] | None


class Tables(NamedTuple):
    """Where a branch runs, for some samples: what `neighbour_table` gives."""

    samples: int
    positions: Tensor
    needed: Tensor
    table: Tensor


def fold(
    kernel: Tensor, scale: Tensor | None, shift: Tensor, groups: int, limits: tuple[float, float], dtype: torch.dtype
) -> Folded:
    """A convolution for the executor, in one pass over its weight.

    Args:
        kernel: `[O, C/groups, K, K]`.
        scale: Of the outputs, `[O]`; None: 1.
        shift: What is added then, `[O]`.
        groups: 1, or as many as there are channels.
        limits: Of the result.
        dtype: Of the maps.
    """
    kernel, shift = kernel.detach(), shift.detach()
    if groups > 1:
        kernel = kernel if scale is None else kernel * scale[:, None, None, None]
        return Folded(kernel.flatten(1).t().contiguous().to(dtype), shift.to(dtype), *limits)
    width = panel_width(len(kernel), kernel.device.type)
    rest = -len(kernel) % width
    scale = torch.ones_like(shift) if scale is None else scale.detach()
    if rest:
        kernel, scale = F.pad(kernel, (0, 0) * 3 + (0, rest)), F.pad(scale, (0, rest))
    panels = kernel.flatten(2).unflatten(0, (-1, width)).permute(0, 3, 2, 1)  # [panels, K*K, C, width]
    packed = torch.empty(panels.shape, dtype=kernel.dtype, device=kernel.device)
    torch.mul(panels, scale.view(-1, 1, 1, width), out=packed)
    return Folded(packed.flatten(1, 2).to(dtype), shift.to(dtype), *limits)


def rows_of(x: Tensor) -> Tensor:
    """A channels_last map's positions, `[B*H*W, C]`, in the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def pointwise(x: Tensor, folded: Folded) -> Tensor:
    """A 1x1 convolution of a map at all positions, in channels_last."""
    x = x.to(folded.bias.dtype).contiguous(memory_format=torch.channels_last)
    y = gather_conv(rows_of(x), None, *folded)
    return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


def samples_at_once(x: Tensor, width: int) -> int:
    """How many samples of a batch to run together, of which there are maps of this width in between."""
    if x.device.type != "cpu":
        return len(x)
    return max(1, _WIDE_BYTES // max(1, x.shape[2:].numel() * width * x.element_size()))


def _middle(geometry: Geometry, x: Tensor, mask: Tensor) -> torch.Size:
    """The size of the map between the first two convolutions."""
    _, stride, *_ = geometry.second
    return x.shape[2:] if stride != (1, 1) else mask.shape[2:]


def make_tables(
    geometry: Geometry, x: Tensor, mask: Tensor, limit: float, seen: capacity.Seen | None
) -> list[Tables] | None:
    """Where to run a branch, in parts of the batch; on a GPU with at most one wait for the device.

    Args:
        geometry: Of the branch.
        x: The block's input.
        mask: `[B, 1, Ho, Wo]`.
        limit: None is the answer if more than this share of the positions is active.
        seen: What the block has seen so far, with which it need not wait (see `capacity`).
    """
    middle, capacities = _middle(geometry, x, mask), capacity.current() if seen is not None else None
    if capacities is None:
        samples = samples_at_once(x, geometry.width) if geometry.depthwise else max(1, len(x))
        tables = []
        for part in mask.split(samples):
            *table, _ = neighbour_table(part, middle, *geometry.second)
            tables.append(Tables(len(part), *table))
        active = sum(len(part.positions) for part in tables)
        return None if active > limit * mask.numel() else tables
    totals, key = (mask.numel(), len(x) * middle.numel()), (x.device, x.shape)
    expected = capacities.expected(seen, key, totals)
    if expected is None:
        *table, _ = neighbour_table(mask, middle, *geometry.second)
        active, needed = map(len, table[:2])
        capacity.remember(seen, key, (active, needed))
    else:
        active = expected[0]
    if active > limit * totals[0]:
        return None
    if expected is not None:
        room = capacities.room(expected, totals)
        *table, counts = neighbour_table(mask, middle, *geometry.second, room)
        capacities.take(seen, key, room, counts)
    return [Tables(len(x), *table)]


def execute(plan: Plan, x: Tensor, mask: Tensor, out: Tensor, tables: list[Tables]) -> None:
    """Add the branch to `out` and clamp that, in place, at the active positions.

    Args:
        plan: Of the block.
        x: Its input, in channels_last.
        mask: From which the tables are.
        out: In channels_last.
        tables: Of `make_tables`.
    """
    run = _run_fused if runs_kernel("gather_conv", out) and out.device.type == "cpu" else _run_in_steps
    samples = [part.samples for part in tables]
    for part, *maps in zip(tables, x.split(samples), mask.split(samples), out.split(samples), strict=True):
        run(plan, *maps, part)


def _first_table(geometry: Geometry, x: Tensor, mask: Tensor, tables: Tables) -> Tensor:
    middle = _middle(geometry, x, mask)
    if geometry.first is None:
        return tables.needed[:, None]
    return window_table(tables.needed, x.shape[2:], middle, *geometry.first)


def _run_fused(plan: Plan, x: Tensor, mask: Tensor, out: Tensor, tables: Tables) -> None:
    """By kernels that gather, multiply and scatter in one."""
    first, second, *others = plan.convs
    table, final = tables.table, second
    y = gather_conv(rows_of(x).to(first.bias.dtype), _first_table(plan.geometry, x, mask, tables), *first)
    if others:
        gather = gather_depthwise if plan.geometry.depthwise else gather_conv
        y, table, final = gather(y, table, *second), None, others[0]
    scatter_conv_(rows_of(out), tables.positions, y, table, final.weight, final.bias, *plan.limits)


def _run_in_steps(plan: Plan, x: Tensor, mask: Tensor, out: Tensor, tables: Tables) -> None:
    """By gather, product, ..., product, scatter."""
    first, second, *others = plan.convs
    table = _first_table(plan.geometry, x, mask, tables)
    if plan.geometry.first is None and len(table) == len(x) * _middle(plan.geometry, x, mask).numel():
        table = None  # all, in their order
    y = product(rows_of(x).to(first.bias.dtype), table, first.weight, first.bias)
    limits = first.low, first.high
    if plan.geometry.depthwise:
        y, limits = gather_depthwise(y.clamp_(*limits), tables.table, *second), NO_LIMITS
    else:
        y, limits = product(y, tables.table, second.weight, second.bias, limits), (second.low, second.high)
    for last in others:
        y = product(y, None, last.weight, last.bias, limits)
    scatter_rows_(rows_of(out), tables.positions, y, *plan.limits)
