"""What one image costs, in multiply-accumulates (MACs)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_dynamic.layers.sparse_branch import SparseBranch


class Macs(NamedTuple):
    """Multiply-accumulates per image.

    Attributes:
        static: Of convolutions and dynamic filters, each at every output position.
        executed: The same without what masks skip for these images; equal to `static` in models without masks.
        linear: Of matrix products (linear layers, attention), which published figures often leave out.
    """

    static: int
    executed: int
    linear: int


def count_macs(model: nn.Module, x: Tensor) -> Macs:
    """Count the multiply-accumulates of an evaluation forward, per image.

    Biases, normalisation, activations and pooling are not counted, but for the bias of a mask unit's convolution and
    what a network names in `counted_biases`, as the authors of DynConv count. The count looks at what runs, so
    functional calls count as layers do, and it does not depend on whether compiled kernels are installed.

    Args:
        model: Any model; it is left as it was found.
        x: `[B, C, H, W]` with B > 0, on the model's device (`meta` will do, where masks count as full). What masks
            skip depends on the images: `executed` is the mean of the batch, rounded to an integer.

    Raises:
        ValueError: If the batch is empty.
    """
    if x.shape[0] == 0:
        raise ValueError(f"count_macs needs at least one image, got shape {list(x.shape)}")
    with count_active(model) as active, _counted_biases(model) as outputs:
        flops = _flops(model, x)
    total = sum(flops["Global"].values())
    convolution = sum(count for operator, count in flops["Global"].items() if _is_convolution(operator))
    convolution += sum(count for operator, count in flops[_WITHIN].items() if not _is_convolution(operator))
    biases = sum(outputs) + sum(block.positions for block in active.blocks.values())
    static, linear = (convolution // 2 + biases) // x.shape[0], (total - convolution) // 2 // x.shape[0]
    return Macs(static=static, executed=static - round(active.skipped_macs), linear=linear)


@contextmanager
def _counted_biases(model: nn.Module) -> Iterator[list[int]]:
    """How many numbers each convolution gives, in a `with` block, whose bias counts."""
    model, outputs = getattr(model, "_orig_mod", model), []
    names = getattr(model, "counted_biases", ())
    handles = [
        conv.register_forward_hook(lambda conv, args, y: outputs.append(y.numel()))
        for name, conv in model.named_modules()
        if name in names
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def masked_blocks(model: nn.Module) -> dict[str, SparseBranch]:
    """The blocks with a mask, by name."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper adds this to every name
    return {name: block for name, block in model.named_modules() if isinstance(block, SparseBranch)}


class ActivePositions(NamedTuple):
    """Positions of a block's mask and of its dilated mask, at which the first convolution runs, over several images."""

    active: int
    positions: int
    dilated_active: int
    dilated_positions: int


class ActiveCount:
    """What `count_active` has seen so far.

    Attributes:
        images: The number of images.
    """

    def __init__(self):
        self.images = 0
        # Counts stay on their device until somebody asks: a number on the host would wait for it at every block.
        self._sums: dict[str, list[int | Tensor]] = {}
        self._macs: dict[str, tuple[int, int]] = {}

    @property
    def blocks(self) -> dict[str, ActivePositions]:
        """The counts, by the name of the block, in the order in which the blocks ran."""
        return {name: ActivePositions(*map(int, sums)) for name, sums in self._sums.items()}

    @property
    def skipped_macs(self) -> float:
        """Multiply-accumulates that the masks saved, per image; 0 in a model without masks."""
        executed, total = self._masked_macs()
        return (total - executed) / self.images if self.images else 0.0

    @property
    def share(self) -> float | None:
        """The share of the masked blocks' multiply-accumulates that ran, which a budget names; None: there are none."""
        executed, total = self._masked_macs()
        return executed / total if total else None

    def _masked_macs(self) -> tuple[int, int]:
        """Of the masked blocks, for all images: what ran, and what would have without masks."""
        executed = total = 0
        for name, block in self.blocks.items():
            first, others = self._macs[name]
            executed += first * block.dilated_active + others * block.active
            total += first * block.dilated_positions + others * block.positions
        return executed, total

    def _hook(self, name: str, block: SparseBranch) -> Callable:
        @torch.compiler.disable
        def hook(masker, args, mask) -> None:
            if name not in self._sums:
                self._sums[name] = [0] * len(ActivePositions._fields)
                self._macs[name] = block.macs_per_position()
            if name == next(iter(self._sums)):
                self.images += len(mask)
            mask = mask.detach()
            counts = [n for one in (mask, block.dilated(mask, *args)) for n in (_count_active(one), one.numel())]
            self._sums[name] = [sum_ + n for sum_, n in zip(self._sums[name], counts, strict=True)]

        return hook


def _count_active(mask: Tensor) -> int | Tensor:
    return mask.numel() if mask.is_meta else mask.count_nonzero()


@contextmanager
def count_active(model: nn.Module) -> Iterator[ActiveCount]:
    """Count the positions that masks leave active, and the multiply-accumulates they skip, in a `with` block.

        with count_active(model) as active:
            for images in batches:
                model(images)
        executed = count_macs(model, images).static - active.skipped_macs  # mean over all images

    The outputs of the model, and how it runs, stay the same; a compiled model must not have run before.

    Args:
        model: Any model, in eval mode.
    """
    count, blocks = ActiveCount(), masked_blocks(model)
    handles = [block.masker.register_forward_hook(count._hook(name, block)) for name, block in blocks.items()]
    # Where a model is compiled, the hooks break its graph, and the same lines are compiled for every block.
    limit = max(torch._dynamo.config.recompile_limit, 8 * len(blocks))
    try:
        with torch._dynamo.config.patch(recompile_limit=limit) if hasattr(model, "_orig_mod") else nullcontext():
            yield count
    finally:
        for handle in handles:
            handle.remove()


_WITHIN = "convolutions"


class _Within:
    """In the place of FlopCounterMode's tracker of modules, which hooks into those that other threads run.

    Whatever an nn.Conv2d runs is a convolution, a matrix product included.
    """

    def __init__(self, model: nn.Module):
        self.parents, self._thread = {"Global"}, threading.get_ident()
        self._convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]

    def __enter__(self) -> None:
        self._handles = [module.register_forward_pre_hook(self._enter) for module in self._convolutions]
        self._handles += [module.register_forward_hook(self._leave) for module in self._convolutions]

    def __exit__(self, *args) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, *args) -> None:
        if threading.get_ident() == self._thread:
            self.parents.add(_WITHIN)

    def _leave(self, *args) -> None:
        if threading.get_ident() == self._thread:
            self.parents.discard(_WITHIN)


def _is_convolution(operator) -> bool:
    return "conv" in str(operator) or str(operator).startswith("timm_dynamic.")


def _flops(model: nn.Module, x: Tensor) -> dict[str, dict]:
    """Floating-point operations of an evaluation forward, twice its MACs, by operator; and those within `_WITHIN`."""
    modes = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Within(model)
    try:
        with torch.no_grad(), counter:
            model.eval()(x)
    finally:
        for module, training in modes.items():
            module.training = training
    return {"Global": {}, _WITHIN: {}, **counter.get_flop_counts()}
