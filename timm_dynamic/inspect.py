"""What dynamic layers decide for the inputs they see: attention over kernels, gates, masks."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.families import FAMILIES


class Record(Mapping[str, Tensor]):
    """What `record` has seen so far: `{layer name: routing}`, all inputs along the first dimension, on the CPU.

    Attributes:
        resolutions: (H, W) of the last input of every layer; (1, 1) for a classifier, whose input is pooled.
    """

    def __init__(self):
        self._batches: dict[str, list[Tensor]] = {}
        self.resolutions: dict[str, tuple[int, int]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self._batches[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def _hook(self, name: str) -> Callable:
        def hook(layer, args, kwargs, output) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # within a backward pass: gradient checkpointing runs the layer again
            (x,) = (*args, *kwargs.values())
            with torch.no_grad():
                self._batches.setdefault(name, []).append(layer.routing(x).cpu())
            self.resolutions[name] = tuple(x.shape[2:]) or (1, 1)

        return hook


@contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Record what every dynamic layer decides for the inputs seen in a `with` block.

        with timm_dynamic.record(model) as routing:
            model(images)
        routing["layer1.0.conv1"]

    These are, with all inputs seen along the first dimension:

    - Attention over kernels, `[B, num_kernels]`.
    - Gates, `[B, N]`, for example of output channels. In training, those without the noise.
    - Masks, `[B, 1, H, W]`, of zeros and ones. In training, those without the noise.

    Each layer's `routing` says which; layers without it are not recorded.

    The outputs of the model stay the same. Within the block, models compiled by `torch.compile` run uncompiled.

    Args:
        model: Any model, in any mode.

    Raises:
        ValueError: If the model has no such layer.
    """
    record = Record()
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper adds this to every name
    handles = [
        layer.register_forward_hook(record._hook(name), with_kwargs=True)
        for name, layer in routing_layers(model).items()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would run without the hooks
            yield record
    finally:
        for handle in handles:
            handle.remove()


def routing_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that `record` knows: those with a method `routing`, from the layer's input to what it decides.

    Raises:
        ValueError: If the model has none.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "routing")}
    if not layers:
        titles = ", ".join(family.title for family in FAMILIES.values() if family.routing)
        raise ValueError(
            f"no layer with attention, gates or masks in this {type(model).__name__}: it takes those of {titles} "
            "(masks: with a budget, not -1)"
        )
    return layers


def routing_spread(model: nn.Module, images: Tensor) -> dict[str, float]:
    """How much what each layer decides differs between images: 0 where it decides the same for all of them.

    Args:
        model: Any model, in eval mode.
        images: `[B, C, H, W]`, at least two.

    Returns:
        By layer, the standard deviation over the images of what `record` has of it, on average over its numbers; empty
        for a model without such layers.
    """
    if not any(hasattr(module, "routing") for module in model.modules()):
        return {}
    with torch.inference_mode(), record(model) as routing:
        model(images)
    return {name: values.double().flatten(1).std(0).mean().item() for name, values in routing.items()}


def routing_entropy(layer: nn.Module, routing: Tensor) -> tuple[Tensor, float]:
    """How undecided a layer is: the entropy of what `record` has of it, in nats.

    Gates are taken, divided by their upper limit, as the probabilities of independent yes-or-no choices, and their
    entropies averaged.

    Args:
        layer: The layer.
        routing: `[B, N]`.

    Returns:
        The entropy of every input, `[B]`, and the highest one there can be: log N for attention, log 2 for gates.
    """
    if layer.routing_limit is None:
        return torch.special.entr(routing).sum(1), math.log(routing.shape[1])
    on = routing / layer.routing_limit
    return (torch.special.entr(on) + torch.special.entr(1 - on)).mean(1), math.log(2)


def ponder_cost(masks: Iterable[Tensor]) -> Tensor:
    """How many blocks are executed at every position: the sum of their masks, at the resolution of the first.

    Smaller masks are enlarged to the nearest position (arXiv 1912.03203 shows such maps).

    Args:
        masks: What `record` has of mask units, each `[B, 1, h, w]`, in the order of the blocks.

    Returns:
        `[B, H, W]`.

    Raises:
        ValueError: If there are no masks.
    """
    masks = list(masks)
    if not masks:
        raise ValueError("ponder_cost needs at least one mask")
    return sum(F.interpolate(mask, masks[0].shape[2:]).squeeze(1) for mask in masks)
