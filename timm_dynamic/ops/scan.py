"""What is done sample by sample in an ONNX graph, whose batch may be of any size.

onnxruntime runs a Scan at 20 microseconds a step, and small maps stay in the cache from one operation of a step to the
next (measured on a CPU, in one thread, November 2026).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def scan(function: Callable[..., Tensor], samples: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
    """`function` of every sample's tensors and of the others, by their names; the results are one tensor."""
    names = [*samples, *others]

    def step(nothing: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return nothing.clone(), function(**dict(zip(names, tensors, strict=True)))

    # A graph for ONNX has no gradients; with them the scan would be traced backwards, too.
    given = [[t.detach() for t in tensors.values()] for tensors in (samples, others)]
    return torch.ops.higher_order.scan(step, [given[0][0].new_zeros(1)], *given)[1]
