"""Residual branches that are computed where a mask says so (arXiv 1912.03203, section 3).

    out = act(shortcut(x) + mask(x) * branch(x))

In training, and wherever gradients are wanted, the branch runs at every position and is multiplied by the mask. Else
the active positions of the whole batch are gathered into rows, and only those are computed, with the batch norms folded
into the convolutions.
"""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from timm_dynamic.ops import sparse
from timm_dynamic.ops._autocast import autocast_dtype
from timm_dynamic.ops._library import counting_operations

EXECUTIONS = ("auto", "sparse", "dense")
_LIMITS = {type(None): (-torch.inf, torch.inf), nn.Identity: (-torch.inf, torch.inf), nn.ReLU: (0.0, torch.inf)}
_LIMITS[nn.ReLU6] = (0.0, 6.0)


class Cost(NamedTuple):
    """Multiply-accumulates of a masked branch for a batch, float64 scalars: what was active, and if all had been."""

    executed: Tensor
    total: Tensor


class _Folded(NamedTuple):
    """A convolution with the batch norm and the activation behind it, for the operators of `ops.sparse`."""

    weight: Tensor
    bias: Tensor
    low: float
    high: float


class SparseBranch(nn.Module):
    """Mixin of residual blocks with a mask.

    A block has the modules `masker`, a `MaskUnit` with the block's stride, and `downsample`, or None, on the shortcut;
    and it defines `branch`, `finish` and `steps`. Its convolutions are padded such that only strides make maps smaller.

    Attributes:
        execution: `"auto"`, `"sparse"` or `"dense"`: how eval mode runs; the results are the same.
        on_cost: Called with every training forward's `Cost`, if not None.
    """

    execution = "auto"
    on_cost: Callable[[Cost], None] | None = None

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
            if self.training and self.on_cost is not None:
                self.on_cost(self.cost(mask, x))
            if self._runs_sparse(x):
                return _execute(self, x, mask, overwrite)
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.branch(x)
        return self.finish(y * mask.to(y.dtype) + shortcut)

    @torch.jit.unused
    def dilated(self, mask: Tensor, x: Tensor) -> Tensor:
        """The positions at which the first convolution must run: those that the second one reads, `[B, 1, H, W]`."""
        conv = self.steps()[1][0]
        spread = mask
        if conv.stride != (1, 1):
            spread = mask.new_zeros(len(mask), 1, *x.shape[2:])
            spread[:, :, :: conv.stride[0], :: conv.stride[1]] = mask
        return F.max_pool2d(spread, conv.kernel_size, 1, _same_padding(conv), conv.dilation)

    @torch.jit.unused
    def macs_per_position(self) -> tuple[int, int]:
        """Multiply-accumulates of an output position of the first convolution, and of the others together."""
        first, *others = [conv.weight[0].numel() * conv.out_channels for conv, _, _ in self.steps()]
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
    def _runs_sparse(self, x: Tensor) -> bool:
        if self.training or not may_run_sparse(x, self.execution):
            return False
        return type(self.final_activation()) in _LIMITS and all(_is_foldable(*step) for step in self.steps())

    def train(self, mode: bool = True):
        _PLANS.pop(self, None)  # what trains may change weights behind their version counters
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        _PLANS.pop(self, None)
        return super()._apply(*args, **kwargs)


def may_run_sparse(x: Tensor, execution: str) -> bool:
    """Whether this is inference of the kind that the sparse executor is for, of a model in eval mode."""
    if execution == "dense" or torch.is_grad_enabled() or torch.jit.is_tracing() or counting_operations():
        return False
    if torch.compiler.is_compiling() and (execution == "auto" or torch.compiler.is_exporting()):
        return False  # a graph of the dense form; "sparse" breaks it
    return x.device.type in ("cpu", "cuda") and x.numel() > 0


# What the executor made of a block's parameters, and of which: not in the block, whose copies must not share it.
_PLANS: "WeakKeyDictionary[SparseBranch, tuple[tuple, list[_Folded]]]" = WeakKeyDictionary()


def _same_padding(conv: nn.Conv2d) -> tuple[int, int]:
    return tuple(d * (k // 2) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))


def _is_foldable(conv: nn.Module | None, norm: nn.Module | None, act: nn.Module | None) -> bool:
    own = isinstance(conv, nn.Conv2d) and type(conv).forward is nn.Conv2d.forward
    if not own or not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
        return False
    if isinstance(norm, BatchNormAct2d):
        act = norm.act
    return type(act) in _LIMITS and conv.padding_mode == "zeros" and conv.groups in (1, conv.in_channels)


def _plan(block: SparseBranch, dtype: torch.dtype) -> list[_Folded]:
    """The folded convolutions of the branch and of the shortcut, made anew when a parameter has changed."""
    steps = block.steps() + _shortcut_steps(block)
    tensors = [t for conv, norm, _ in steps for t in (conv.weight, conv.bias, *_statistics(norm)) if t is not None]
    made_of = (dtype, *state_of(tensors))
    cached = _PLANS.get(block)
    if cached is None or cached[0] != made_of:
        cached = _PLANS[block] = (made_of, [_fold(*step, dtype) for step in steps])
    return cached[1]


def state_of(tensors: list[Tensor]) -> tuple:
    """What changes when one of the tensors is changed, or its memory exchanged."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _shortcut_steps(block: SparseBranch) -> list[tuple[nn.Conv2d, nn.Module, None]]:
    """The convolution at the end of a shortcut that ends in a plain 1x1 one and its norm."""
    conv, norm = list(block.downsample)[-2:] if isinstance(block.downsample, nn.Sequential) else (None, None)
    pointwise = _is_foldable(conv, norm, None) and conv.groups == 1 and conv.kernel_size == (1, 1)
    return [(conv, norm, None)] if pointwise else []


def _statistics(norm: nn.Module) -> tuple[Tensor | None, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _fold(conv: nn.Conv2d, norm: nn.Module, act: nn.Module | None, dtype: torch.dtype) -> _Folded:
    weight, bias, mean, variance = _statistics(norm)
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if weight is None else scale * weight
    shift = -mean if conv.bias is None else conv.bias - mean
    shift = shift * scale if bias is None else shift * scale + bias
    kernel = conv.weight * scale[:, None, None, None]
    if conv.groups == 1:
        matrix = sparse.pack_matrix(kernel.permute(2, 3, 1, 0).flatten(0, 2).to(dtype))
    else:
        matrix = kernel.flatten(1).t().contiguous().to(dtype)
    return _Folded(matrix, shift.to(dtype), *_LIMITS[type(norm.act if isinstance(norm, BatchNormAct2d) else act)])


@torch.compiler.disable
def _execute(block: SparseBranch, x: Tensor, mask: Tensor, overwrite: bool) -> Tensor:
    """The block at the active positions, in channels_last."""
    (first_conv, *_), (second_conv, *_), *others = block.steps()
    dtype = autocast_dtype(x)
    x = x.contiguous(memory_format=torch.channels_last)
    middle = x.shape[2:] if second_conv.stride != (1, 1) else mask.shape[2:]
    positions, needed, table = sparse.neighbour_table(mask.bool(), middle, *_window(second_conv))
    first_table = needed[:, None]
    if (first_conv.kernel_size, first_conv.stride) != ((1, 1), (1, 1)):
        first_table = sparse.window_table(needed, x.shape[2:], middle, *_window(first_conv))

    plan = _plan(block, dtype)
    y, final = sparse.gather_conv(_rows(x).to(dtype), first_table, *plan[0]), plan[1]
    if others:
        gather = sparse.gather_conv if second_conv.groups == 1 else sparse.gather_depthwise
        y, table, final = gather(y, table, *plan[1]), None, plan[2]
    low, high = _LIMITS[type(block.final_activation())]
    in_place = overwrite and block.downsample is None and x.dtype == dtype
    out = x if in_place else _shortcut(block, x, plan[-1])
    sparse.scatter_conv_(_rows(out), positions, y, table, final.weight, final.bias, low, high)
    return out if in_place or low == -torch.inf else out.clamp_(low, high)


def _shortcut(block: SparseBranch, x: Tensor, last: _Folded) -> Tensor:
    """What the shortcut gives, in channels_last and memory of its own; `last` is its convolution if that is folded."""
    dtype = last.bias.dtype
    if block.downsample is None:
        return x.to(dtype, copy=True)
    folded = _shortcut_steps(block)
    if not folded:
        y = block.downsample(x)
        return y.to(dtype, memory_format=torch.channels_last, copy=y is x)
    *before, conv, _ = block.downsample
    for module in before:
        x = module(x)
    x = x.contiguous(memory_format=torch.channels_last)[:, :, :: conv.stride[0], :: conv.stride[1]]
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(dtype)
    y = sparse.gather_conv(rows, None, *last)
    return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """A channels_last map's positions, `[B*H*W, C]`, in the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _window(conv: nn.Conv2d) -> tuple:
    return conv.kernel_size, conv.stride, conv.dilation, _same_padding(conv)


class SparseStage(nn.Sequential):
    """A sequence of residual blocks; in sparse execution they work on one map, each in the memory of the one before.

    Not if somebody may look at what is between them: a block with hooks, or before one with hooks, keeps its output.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not torch.compiler.is_compiling() and isinstance(x, Tensor):
                return self._in_place(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _in_place(self, x: Tensor) -> Tensor:
        before = None
        for block in self:
            own = all(isinstance(one, SparseBranch) and not has_hooks(one) for one in (before, block))
            # What comes before has the same limits: a shortcut without convolution needs no clamping.
            own = own and type(before.final_activation()) is type(block.final_activation())
            x = block.forward(x, overwrite=True) if own else block(x)
            before = block
        return x


def has_hooks(module: nn.Module) -> bool:
    hooks = nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
    )
