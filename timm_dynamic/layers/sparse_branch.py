"""Residual branches that are computed where a mask says so (arXiv 1912.03203, section 3)."""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_dynamic.dispatch import choose
from timm_dynamic.layers.base import DropInConv2d, DynamicLayer, has_plain_forward
from timm_dynamic.layers.budget import Budget, Cost
from timm_dynamic.ops.sparse.executor import Plan
from timm_dynamic.ops.sparse.table import BLOCK, NAME, activation, branch_problem, make_plan, same_padding, step_problem

EXECUTIONS = ("auto", NAME, "dense")
Steps = list[tuple[nn.Conv2d, nn.Module | None, nn.Module | None]]


@register_notrace_module
class SparseBranch(DynamicLayer):
    """Mixin of residual blocks with a mask.

        y = act(shortcut(x) + mask(x) * branch(x))

    That is what training computes, the branch at every position. In inference its active positions are enough: see
    `timm_dynamic.ops.sparse`.

    A block has the modules `masker`, a `MaskUnit` with the block's stride, and `downsample`, or None, on the shortcut;
    it defines `branch`, `finish`, `steps` and `final_activation`, and sets `family`. Its convolutions are padded such
    that only strides make maps smaller.

    Attributes:
        execution: `"auto"`, `"sparse"` or `"dense"`: how eval mode runs; the results are the same. `"auto"` is sparse
            where that is faster, and dense under `torch.compile`.
        max_active: The share of active positions up to which `"auto"` is sparse; None: what was measured.
    """

    # Without annotations, which TorchScript would read.
    family = "dynconv"
    implementations = BLOCK
    absorb = None
    execution = "auto"
    max_active = None
    packed = False
    seen = None
    __jit_unused_properties__ = ["parts", "preferred"]

    def branch(self, x: Tensor) -> Tensor:
        """The branch at every position."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """What follows the sum, which may be overwritten."""
        raise NotImplementedError

    @torch.jit.unused
    def steps(self) -> Steps:
        """The convolutions of the branch, each with its batch norm and activation.

        The second one reads neighbours of what the first one gave; one after it is pointwise.
        """
        raise NotImplementedError

    @torch.jit.unused
    def final_activation(self) -> nn.Module | None:
        """The activation that `finish` applies."""
        raise NotImplementedError

    def formula(self, x: Tensor) -> Tensor:
        return self.dense(x, self.mask(x))

    def mask(self, x: Tensor) -> Tensor:
        """1 where the branch counts, else 0, `[B, 1, Ho, Wo]`; in training with the gradient of the budget."""
        mask = self.masker(x)
        if self.training and not torch.jit.is_scripting():
            mask = self._with_budget(mask, x)
        return mask

    def dense(self, x: Tensor, mask: Tensor) -> Tensor:
        """The output for a mask, with the branch at every position."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.branch(x)
        return self.finish(y * mask.to(y.dtype) + shortcut)

    def _check_input(self, x: Tensor) -> None:
        """What is in the block does it."""

    @torch.jit.unused
    def _with_budget(self, mask: Tensor, x: Tensor) -> Tensor:
        budget = self._modules.get("budget")
        return mask if budget is None else budget.attach(mask, self.cost(mask, x), self.number, self.closes)

    @torch.jit.unused
    def use_budget(self, budget: Budget, number: int, closes: bool) -> None:
        """Attach the network's budget loss in training.

        Args:
            budget: Becomes the submodule `budget`.
            number, closes: As for `Budget.attach`.
        """
        self.budget, self.number, self.closes = budget, number, closes
        budget.blocks = number

    @property
    def parts(self) -> tuple[tuple[type, str], ...]:
        """All that is in the branch."""
        return _parts(self, ("masker", "budget", "downsample"))

    @property
    def preferred(self) -> str | None:
        return NAME if self.execution == NAME else None

    @torch.jit.unused
    def dilated(self, mask: Tensor, x: Tensor) -> Tensor:
        """The positions at which the first convolution must run: those that the second one reads, `[B, 1, H, W]`."""
        conv = _convolution(self.steps()[1][0])
        spread = mask
        if conv.stride != (1, 1):
            spread = mask.new_zeros(len(mask), 1, *x.shape[2:])
            spread[:, :, :: conv.stride[0], :: conv.stride[1]] = mask
        rows, columns = same_padding(conv)  # more than max_pool2d itself would pad
        return F.max_pool2d(F.pad(spread, (columns, columns, rows, rows)), conv.kernel_size, 1, 0, conv.dilation)

    @torch.jit.unused
    def macs_per_position(self) -> tuple[int, int]:
        """Multiply-accumulates of an output position of the first convolution, and of the others together."""
        convs = [_convolution(conv) for conv, _, _ in self.steps()]
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
    def plan(self, dtype: torch.dtype) -> Plan | None:
        """The weights, folded and packed, if the block holds them so."""
        return None

    @torch.jit.unused
    def optimized(self) -> "PackedBlock | None":
        """For `timm_dynamic.optimize`."""
        changed = self.overridden or not has_plain_forward(self)
        return None if changed or branch_problem(self) else PackedBlock(self)


class PackedBlock(SparseBranch):
    """A block for inference: norms folded into convolutions, whose weights are packed for the executor, too.

    They are packed again by `load_state_dict`, `to` and copying, not after other changes.

    Args:
        block: Without a `branch_problem`.
    """

    family = "dynconv"
    packed = True

    def __init__(self, block: SparseBranch):
        super().__init__()
        self.execution, self.max_active = block.execution, block.max_active
        self.masker, self.downsample = block.masker, _folded_shortcut(block.downsample)
        self.convs = nn.Sequential()
        for conv, norm, act in block.steps():
            self.convs.append(fuse_conv_bn_eval(conv, norm))
            self.convs.append(activation(norm, act) or nn.Identity())
        self.act = block.final_activation() or nn.Identity()
        self._named = _parts(self, ("masker",))
        self._forget()

    def _forget(self) -> None:
        self._plans: dict[torch.dtype, Plan] = {}
        self.seen = {}  # how many positions were active, by the device and shape of the input

    @property
    def parts(self) -> tuple[tuple[type, str], ...]:
        return self._named

    @torch.jit.unused
    def plan(self, dtype: torch.dtype) -> Plan:
        if dtype not in self._plans:
            with torch.inference_mode(False):
                self._plans[dtype] = make_plan(self, dtype)
        return self._plans[dtype]

    def branch(self, x: Tensor) -> Tensor:
        return self.convs(x)

    def finish(self, x: Tensor) -> Tensor:
        return self.act(x)

    @torch.jit.unused
    def steps(self) -> Steps:
        modules = list(self.convs)
        return [(conv, None, act) for conv, act in zip(modules[::2], modules[1::2], strict=True)]

    @torch.jit.unused
    def final_activation(self) -> nn.Module:
        return self.act

    @torch.jit.unused
    def overwrite(self, x: Tensor) -> Tensor:
        """The output, perhaps in the memory of x, which is the output of such a block with the same activation."""
        row = choose(self, x)
        return self.formula(x) if row is None else row.run(self, x, overwrite=True)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_plans": {}, "seen": {}}

    def _apply(self, *args, **kwargs):
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


def _convolution(part: nn.Module) -> nn.Conv2d:
    """A convolution, or the one that is wrapped, in an adapter for example."""
    return next((one for one in part.modules() if isinstance(one, (nn.Conv2d, DropInConv2d))), part)


def _parts(block: nn.Module, called: tuple[str, ...]) -> tuple[tuple[type, str], ...]:
    """Type and name of every module within, but for those that are called."""
    return tuple(
        (type(part), f"{key}.{name}" if name else key)
        for key, child in block._modules.items()
        if child is not None and key not in called
        for name, part in child.named_modules()
    )


def _folded_shortcut(downsample: nn.Module | None) -> nn.Module | None:
    if type(downsample) is not nn.Sequential or len(downsample) < 2 or step_problem(*downsample[-2:], None):
        return downsample
    return nn.Sequential(*downsample[:-2], fuse_conv_bn_eval(*downsample[-2:]))
