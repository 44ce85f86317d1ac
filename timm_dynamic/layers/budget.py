"""DynConv's loss for executing a given share of the masked computations (arXiv 1912.03203, section 3.3)."""

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_dynamic.layers.auxiliary import attach_loss, store, warn_about_float16
from timm_dynamic.layers.progress import Progress, State, recomputing
from timm_dynamic.layers.shared_part import SharedPart

BUDGET_WEIGHT = 10.0
_ANNEALED = 0.33  # share of the training in which the blocks' bounds open


class Cost(NamedTuple):
    """Multiply-accumulates of a masked branch for a batch, float64 scalars: what was active, and if all had been."""

    executed: Tensor
    total: Tensor


def budget_loss(costs: Sequence[Cost], budget: float, progress: float | Tensor) -> tuple[Tensor, Tensor]:
    """The loss for executing a given share of the masked computations.

    With p the share that a block executes, over the batch, and P that of all blocks together: the network's term is
    `(P - budget)^2`, that of the blocks the mean of `max(0, p - upper)^2 + max(0, lower - p)^2`. The bounds open from
    the budget to 0 and 1 in the first third of the training.

    Args:
        costs: Of every masked block.
        budget: Between 0 and 1.
        progress: Share of the training that is done, a number or a tensor `[]`.

    Returns:
        The term of the network and that of the blocks, without a weight.
    """
    executed, total = (torch.stack(column) for column in zip(*costs, strict=True))
    network, block, _ = _loss(executed, total, budget, progress)
    return network, block


def _loss(executed: Tensor, total: Tensor, budget: float, progress: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both terms, and the gradient of their sum with respect to `executed`."""
    q = torch.cos((torch.as_tensor(progress) / _ANNEALED).clamp(max=1) * (math.pi / 2)) ** 2
    upper, lower = 1 - q * (1 - budget), q * budget
    share, beyond = executed / total, executed.sum() / total.sum() - budget
    above, below = (share - upper).clamp(min=0), (lower - share).clamp(min=0)
    slopes = 2 * beyond / total.sum() + 2 * (above - below) / (total * len(total))
    return beyond**2, (above**2 + below**2).mean(), slopes.detach()


class _Running(dict):
    """By thread, what a forward has collected: tensors with a graph, which copies of the model leave out."""

    def __reduce_ex__(self, protocol):
        return _Running, ()


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()  # Dynamo cannot ask, and traces in one


class Budget(SharedPart, State):
    """Attaches the loss to the masks of a network, of whose masked blocks it is a shared submodule.

    The last masked block of each stage attaches what the loss has become since the last one of the stage before. So
    whatever runs the stages, and however many of them, has the gradient of the loss over all blocks that ran.

    The slopes of the loss are numbers of the forward that computed them. So nothing is to be computed again where
    checkpointing runs a block again, whatever has run since. Where it ran the block without a graph before
    (`use_reentrant=True`), the block attaches its part then, with the slopes of the last forward.

    Args:
        budget: The share to execute.
        aux_scale: Factor of the gradient.
        weight: Of the loss.

    Attributes:
        network_budget, block_budget: The weighted terms of the last training forward.
    """

    auxiliary_terms = ("network_budget", "block_budget")

    def __init__(self, budget: float, aux_scale: float, device=None, weight: float = BUDGET_WEIGHT):
        super().__init__()
        self.budget, self.aux_scale, self.weight, self.blocks = budget, aux_scale, weight, 0
        self.progress = Progress(False, device=device)
        for name in self.auxiliary_terms:
            self.register_state(name, torch.zeros((), device="cpu"), device)
        self._running, self._without_graph = _Running(), _Running()

    def attach(self, mask: Tensor, cost: Cost, number: int, closes: bool) -> Tensor:
        """The mask of a block in training, with a gradient attached if the block is the last one of a stage.

        Args:
            mask: Of the block.
            cost: Of the block.
            number: The block's, from 1, in the order in which they run.
            closes: Whether it is the last masked block of its stage.
        """
        if recomputing():
            slope = self._slope_of(number)
            return mask if slope is None else attach_loss(mask, cost.executed, self.weight * slope, self.aux_scale)
        costs, slopes, last = self._running.pop(_thread(), ({}, None, 0))
        if last >= number:  # of a forward that went no further
            costs, slopes = {}, None
        costs = {**costs, number: cost}
        if closes:
            executed, total = (torch.stack(column) for column in zip(*costs.values(), strict=True))
            network, block, new = _loss(executed.detach(), total, self.budget, self.progress(True))
            before, slopes = slopes, new
            if not torch.compiler.is_compiling():
                self._without_graph[_thread()] = {
                    key: slope for (key, one), slope in zip(costs.items(), new, strict=True) if not one[0].requires_grad
                }
            if before is not None:
                new = torch.cat([new[: len(before)] - before, new[len(before) :]])
            store(self.network_budget, self.weight * network)
            store(self.block_budget, self.weight * block)
            warn_about_float16(mask.dtype, self.aux_scale, "DynConv's budget loss")
            mask = attach_loss(mask, executed, self.weight * new, self.aux_scale)
        if number < self.blocks:
            self._running[_thread()] = costs, slopes, number
        return mask

    def _slope_of(self, number: int) -> Tensor | None:
        """For a block that ran without a graph in the last forward; the backward pass may have a thread of its own."""
        forwards = self._without_graph
        last = forwards.get(_thread()) or (next(iter(forwards.values())) if len(forwards) == 1 else {})
        return last.get(number)
