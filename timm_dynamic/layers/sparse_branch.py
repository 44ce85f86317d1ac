"""Residual branches that are computed where a mask says so (arXiv 1912.03203, section 3).

    out = act(shortcut(x) + mask(x) * branch(x))

In training, and wherever gradients are wanted, the branch runs at every position and is multiplied by the mask. Else
the active positions of the whole batch are gathered into rows, and only those are computed, with the batch norms folded
into the convolutions.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers import capacity
from timm_dynamic.layers.budget import Budget, Cost
from timm_dynamic.layers.folding import LIMITS, Folded, KeepsFolded, fold, folded_copy, has_hooks, is_foldable, rows_of
from timm_dynamic.ops import sparse
from timm_dynamic.ops._autocast import autocast_dtype
from timm_dynamic.ops._library import counting_operations

EXECUTIONS = ("auto", "sparse", "dense")
_MAX_ACTIVE = {True: 1.0, False: 0.25}  # with and without compiled CPU kernels
# Inverted residuals are bound by memory: so many bytes of their wide maps at once, for the cache, and because freshly
# mapped pages cost more than the arithmetic. Measured; residual blocks with dense convolutions gain nothing.
_WIDE_BYTES = 4 * 2**20


class SparseBranch(KeepsFolded):
    """Mixin of residual blocks with a mask.

    A block has the modules `masker`, a `MaskUnit` with the block's stride, and `downsample`, or None, on the shortcut;
    and it defines `branch`, `finish` and `steps`. Its convolutions are padded such that only strides make maps smaller.

    Attributes:
        execution: `"auto"`, `"sparse"` or `"dense"`: how eval mode runs; the results are the same. `"auto"` is sparse
            up to a share of active positions, `max_active`, and dense under `torch.compile`.
        max_active: That share; None: what was measured (`benchmarks/sparse.py`), 1 with the compiled CPU kernels, else
            0.25.
    """

    # Without annotations, which TorchScript would read.
    execution = "auto"
    max_active = None

    @torch.jit.unused
    def use_budget(self, budget: Budget, number: int, closes: bool) -> None:
        """Attach the network's budget loss in training.

        Args:
            budget: Becomes the submodule `budget`.
            number, closes: As for `Budget.attach`.
        """
        self.budget, self.number, self.closes = budget, number, closes
        budget.blocks = number

    def branch(self, x: Tensor) -> Tensor:
        """The branch at every position."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """What follows the sum, which may be overwritten."""
        raise NotImplementedError

    @torch.jit.unused
    def steps(self) -> list[tuple[nn.Conv2d, nn.Module, nn.Module | None]]:
        """The convolutions of the branch, each with its batch norm and activation.

        The second one reads neighbours of what the first one gave; one after it is pointwise.
        """
        raise NotImplementedError

    @torch.jit.unused
    def final_activation(self) -> nn.Module | None:
        """The activation that `finish` applies."""
        raise NotImplementedError

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """The block's output; `overwrite`: it may take the place of x, which is the output of a block like this."""
        mask = self.masker(x)
        if not torch.jit.is_scripting():
            if isinstance(x, Tensor):  # not a proxy of torch.fx
                budget = self._modules.get("budget")
                if self.training and budget is not None:
                    mask = budget.attach(mask, self.cost(mask, x), self.number, self.closes)
                plan = self._plan(x)
                if plan is not None:
                    y = _execute(self, plan, x, mask, overwrite)
                    if y is not None:
                        return y
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.branch(x)
        return self.finish(y * mask.to(y.dtype) + shortcut)

    @torch.jit.unused
    def _pays_up_to(self, mask: Tensor) -> float:
        """The share of active positions up to which sparse execution is the faster one."""
        if self.execution == "sparse":
            return 1.0
        if self.max_active is not None:
            return self.max_active
        return _MAX_ACTIVE[mask.device.type == "cpu" and sparse.kernels_serve(mask)]

    @torch.jit.unused
    def dilated(self, mask: Tensor, x: Tensor) -> Tensor:
        """The positions at which the first convolution must run: those that the second one reads, `[B, 1, H, W]`."""
        conv = self.steps()[1][0]
        spread = mask
        if conv.stride != (1, 1):
            spread = mask.new_zeros(len(mask), 1, *x.shape[2:])
            spread[:, :, :: conv.stride[0], :: conv.stride[1]] = mask
        rows, columns = _same_padding(conv)  # more than max_pool2d itself would pad
        return F.max_pool2d(F.pad(spread, (columns, columns, rows, rows)), conv.kernel_size, 1, 0, conv.dilation)

    @torch.jit.unused
    def macs_per_position(self) -> tuple[int, int]:
        """Multiply-accumulates of an output position of the first convolution, and of the others together."""
        convs = [conv for conv, _, _ in self.steps()]
        first, *others = [math.prod(c.kernel_size) * c.in_channels // c.groups * c.out_channels for c in convs]
        return first, sum(others)

    @torch.jit.unused
    def cost(self, mask: Tensor, x: Tensor) -> Cost:
        """The cost of a batch; its gradient is that of the mask, not of the dilated mask.

        Args:
            mask: `[B, 1, Ho, Wo]`.
            x: The input of the block.
        """
        dilated = self.dilated(mask.detach(), x)
        first, others = self.macs_per_position()
        executed = first * dilated.sum(dtype=torch.float64) + others * mask.sum(dtype=torch.float64)
        return Cost(executed, torch.full_like(executed, first * dilated.numel() + others * mask.numel()))

    @torch.jit.unused
    def _plan(self, x: Tensor) -> "_Plan | None":
        """How to run sparse, if the block is to and can."""
        if self.training or not may_run_sparse(x, self.execution):
            return None
        dtype = autocast_dtype(x)
        return self._keep(dtype, lambda: [self.masker], lambda: _make_plan(self, dtype))


def may_run_sparse(x: Tensor, execution: str) -> bool:
    """Whether this is inference of the kind that the sparse executor is for, of a model in eval mode."""
    if execution == "dense" or torch.is_grad_enabled() or torch.jit.is_tracing() or counting_operations():
        return False
    if torch.compiler.is_compiling() and (execution == "auto" or torch.compiler.is_exporting()):
        return False  # a graph of the dense form; "sparse" breaks it
    return x.ndim == 4 and x.device.type in ("cpu", "cuda") and x.numel() > 0


def _same_padding(conv: nn.Conv2d) -> tuple[int, int]:
    return tuple(d * (k // 2) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))


def _window(conv: nn.Conv2d) -> tuple[tuple[int, int], ...]:
    """As the operators take it: kernel size, stride, dilation, padding."""
    return conv.kernel_size, conv.stride, conv.dilation, _same_padding(conv)


class _Plan(NamedTuple):
    """How the executor runs a block."""

    convs: list[Folded]
    shortcut: Folded | None  # a 1x1 convolution at the end of the shortcut
    before_shortcut: list[nn.Module]
    first_window: tuple | None  # None: the first convolution is pointwise
    second_window: tuple
    depthwise: bool
    low: float
    high: float
    seen: capacity.Seen


def _make_plan(block: SparseBranch, dtype: torch.dtype) -> _Plan | None:
    steps, final = block.steps(), block.final_activation()
    if type(final) not in LIMITS or (final and has_hooks(final)) or not all(is_foldable(*step) for step in steps):
        return None
    first, second = steps[0][0], steps[1][0]
    shortcut, before = None, []
    if isinstance(block.downsample, nn.Sequential) and len(block.downsample) >= 2 and not has_hooks(block.downsample):
        *before, conv, norm = block.downsample
        if is_foldable(conv, norm, None) and conv.groups == 1 and conv.kernel_size == (1, 1):
            shortcut = fold(conv, norm, None, dtype)
            before.append(nn.AvgPool2d(1, conv.stride))  # leaves out what the stride does
    pointwise = (first.kernel_size, first.stride) == ((1, 1), (1, 1))
    return _Plan(
        [fold(*step, dtype) for step in steps],
        shortcut,
        before,
        None if pointwise else _window(first),
        _window(second),
        second.groups > 1,
        *LIMITS[type(final)],
        {},
    )


class _Tables(NamedTuple):
    """What `sparse.neighbour_table` gives."""

    positions: Tensor
    needed: Tensor
    table: Tensor


@torch.compiler.disable
def _execute(block: SparseBranch, plan: _Plan, x: Tensor, mask: Tensor, overwrite: bool) -> Tensor | None:
    """The block at the active positions, in channels_last; None if it is faster at all positions."""
    limit, tables = block._pays_up_to(mask), None
    if x.device.type == "cpu" and capacity.current() is None:
        if limit < 1 and mask.mean().item() > limit:
            return None
    else:
        tables = _whole_tables(plan, x, mask, limit)
        if tables is None:
            return None
    dtype = plan.convs[0].bias.dtype
    x = x.contiguous(memory_format=torch.channels_last)
    in_place = overwrite and block.downsample is None and x.dtype == dtype
    out = x if in_place else _shortcut(block, plan, x)
    if tables is not None:
        _add_branch_by_parts(plan, x, mask, out, tables)
    else:
        samples = _samples_at_once(x, len(plan.convs[0].bias)) if plan.depthwise else len(x)
        for part in zip(*(tensor.split(samples) for tensor in (x, mask, out)), strict=True):
            _add_branch(plan, *part)
    return out if in_place or plan.low == -torch.inf else out.clamp_(plan.low, plan.high)


def _middle(plan: _Plan, x: Tensor, mask: Tensor) -> torch.Size:
    """The size of the map between the first two convolutions."""
    _, stride, *_ = plan.second_window
    return x.shape[2:] if stride != (1, 1) else mask.shape[2:]


def _whole_tables(plan: _Plan, x: Tensor, mask: Tensor, limit: float) -> _Tables | None:
    """Tables for a whole batch, with at most one wait for the device; None if more than this share is active."""
    middle, capacities, key = _middle(plan, x, mask), capacity.current(), (x.device, x.shape)
    totals = mask.numel(), len(x) * middle.numel()
    expected = None if capacities is None else capacities.expected(plan.seen, key, totals)
    if expected is not None:
        if expected[0] > limit * totals[0]:
            return None
        room = capacities.room(expected, totals)
        *tables, counts = sparse.fixed_neighbour_table(mask, middle, *plan.second_window, room)
        capacities.take(plan.seen, key, room, counts)
    else:
        tables = sparse.neighbour_table(mask, middle, *plan.second_window)
        active, needed = map(len, tables[:2])
        if capacities is not None:
            capacity.remember(plan.seen, key, (active, needed))
        if active > limit * totals[0]:
            return None
    return _Tables(*tables)


def _add_branch_by_parts(plan: _Plan, x: Tensor, mask: Tensor, out: Tensor, tables: _Tables) -> None:
    """`_add_branch` as a GPU does it: gather, product, ..., product, scatter."""
    first, second, *others = plan.convs
    middle, needed = _middle(plan, x, mask), tables.needed
    table = needed[:, None]
    if plan.first_window:
        table = sparse.window_table(needed, x.shape[2:], middle, *plan.first_window)
    elif len(needed) == len(x) * middle.numel():
        table = None  # all, in their order
    y = sparse.product(rows_of(x).to(first.bias.dtype), table, first.weight, first.bias)
    limits = first.low, first.high
    if plan.depthwise:
        y, limits = sparse.gather_depthwise(y.clamp_(*limits), tables.table, *second), sparse.NO_LIMITS
    else:
        y, limits = sparse.product(y, tables.table, second.weight, second.bias, limits), (second.low, second.high)
    for last in others:
        y = sparse.product(y, None, last.weight, last.bias, limits)
    sparse.scatter_rows_(rows_of(out), tables.positions, y, plan.low, plan.high)


def _add_branch(plan: _Plan, x: Tensor, mask: Tensor, out: Tensor) -> None:
    """Add the branch to `out`, in place, and apply the block's activation, at the active positions."""
    first, second, *others = plan.convs
    middle = _middle(plan, x, mask)
    positions, needed, table = sparse.neighbour_table(mask, middle, *plan.second_window)
    first_table = needed[:, None]
    if plan.first_window:
        first_table = sparse.window_table(needed, x.shape[2:], middle, *plan.first_window)
    y, final = sparse.gather_conv(rows_of(x).to(first.bias.dtype), first_table, *first), second
    if others:
        gather = sparse.gather_depthwise if plan.depthwise else sparse.gather_conv
        y, table, final = gather(y, table, *second), None, others[0]
    sparse.scatter_conv_(rows_of(out), positions, y, table, final.weight, final.bias, plan.low, plan.high)


def _samples_at_once(x: Tensor, width: int) -> int:
    """How many samples of a batch to run together, of which there are maps of this width in between."""
    if x.device.type != "cpu":
        return len(x)
    return max(1, _WIDE_BYTES // (x.shape[2:].numel() * width * x.element_size()))


def _shortcut(block: SparseBranch, plan: _Plan, x: Tensor) -> Tensor:
    """What the shortcut gives, in channels_last and memory of its own."""
    dtype = plan.convs[0].bias.dtype
    if block.downsample is None:
        return x.to(dtype, copy=True)
    if plan.shortcut is None:
        y = block.downsample(x)
        return y.to(dtype, memory_format=torch.channels_last, copy=y is x)
    for module in plan.before_shortcut:
        x = module(x)
    x = x.to(dtype, memory_format=torch.channels_last)
    y = sparse.gather_conv(rows_of(x), None, *plan.shortcut)
    return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


@register_notrace_module
class SparseStage(KeepsFolded, nn.Sequential):
    """A sequence of residual blocks, some of them with masks.

    In sparse execution those work on one map, each in the memory of the one before; and the others run with their batch
    norms folded. Not if somebody may look: a block with hooks, or before one with hooks, keeps its output, and one
    with hooks inside its norms.

    Attributes:
        execution: As for `SparseBranch`.
    """

    execution = "auto"

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not self.training and not torch.compiler.is_compiling() and may_run_sparse(x, self.execution):
                return self._run_sparse(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _run_sparse(self, x: Tensor) -> Tensor:
        others = self._keep(None, self._masked, self._fold_others)
        before = None
        for name, block in self._modules.items():
            plain = not isinstance(block, SparseBranch)
            # What comes before has the same limits: a shortcut without convolution needs no clamping.
            own = not (plain or has_hooks(block)) and isinstance(before, SparseBranch) and not has_hooks(before)
            own = own and type(before.final_activation()) is type(block.final_activation())
            if own:
                x = block.forward(x, overwrite=True)
            elif plain and x.dtype == autocast_dtype(x) == torch.float32 and name in others:
                folded, width = others[name]
                parts = x.contiguous(memory_format=torch.channels_last).split(_samples_at_once(x, width))
                x = torch.cat([folded(part) for part in parts]) if len(parts) > 1 else folded(parts[0])
            else:
                x = block(x)
            before = block
        return x

    @torch.jit.unused
    def _masked(self) -> list[nn.Module]:
        return [block for block in self if isinstance(block, SparseBranch)]

    @torch.jit.unused
    def _fold_others(self) -> dict[str, tuple[nn.Module, int]]:
        """Copies of the blocks without masks that nobody looks into, and the width of their widest map."""
        others = {name: block for name, block in self._modules.items() if not isinstance(block, SparseBranch)}
        seen = {name for name, block in others.items() if any(map(has_hooks, block.modules()))}
        return {name: (folded_copy(block), _width(block)) for name, block in others.items() if name not in seen}


def _width(block: nn.Module) -> int:
    return max((conv.out_channels for conv in block.modules() if isinstance(conv, nn.Conv2d)), default=1)
