"""What is done sample by sample in an ONNX graph, whose batch may be of any size."""

from collections.abc import Callable

import torch
from torch import Tensor


def scan(
    function: Callable[..., Tensor], samples: dict[str, Tensor | None], others: dict[str, Tensor | None]
) -> Tensor:
    """`function` of every sample, as a batch of one.

    Args:
        function: Of all tensors that are not None, by their names; its result is of a batch of one.
        samples: `[B, ...]`, of which it gets `[1, ...]`.
        others: What it gets as it is.

    Returns:
        All results, `[B, ...]`.
    """
    samples, others = ({name: t for name, t in some.items() if t is not None} for some in (samples, others))
    names = [*samples, *others]

    def step(nothing: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return nothing.clone(), function(**dict(zip(names, tensors, strict=True)))

    # A graph for ONNX has no gradients; with them the scan would be traced backwards, too.
    each, all_of_them = [t.detach()[:, None] for t in samples.values()], [t.detach() for t in others.values()]
    return torch.ops.higher_order.scan(step, [each[0].new_zeros(1)], each, all_of_them)[1].squeeze(1)
