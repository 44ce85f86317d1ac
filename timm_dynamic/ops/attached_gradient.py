"""`attached_gradient`: what starts the backward pass of an attached loss, where a tensor says how much it counts."""

import torch
from torch import Tensor

from timm_dynamic.ops.registration import register


def attached_gradient(grad: Tensor, scale: Tensor, weight: float, dtype: torch.dtype) -> Tensor:
    """`scale * weight`, a scalar of the dtype, when the backward pass gives `grad`: see `_definition`."""
    return torch.ops.timm_dynamic.attached_gradient(grad, scale, weight, dtype)


def _definition(grad: Tensor, scale: Tensor, weight: float, dtype: torch.dtype) -> Tensor:
    """Of the registered operator.

    `grad` gives no values. It is what makes this part of the backward pass: a product of `scale` and `weight` alone
    may be moved to the forward pass by a compiler, when `scale` has not got its value yet.

    Args:
        grad: Gradient of the activation that the loss is attached to.
        scale: A number.
        weight: Another one.
        dtype: Of the loss.

    Returns:
        `scale * weight`, a scalar on the device of `grad`.
    """
    return (scale * weight).to(grad.device, dtype)


def _fake(grad, scale, weight, dtype):
    return grad.new_empty((), dtype=dtype)


register(
    "attached_gradient",
    "(Tensor grad, Tensor scale, float weight, ScalarType dtype) -> Tensor",
    _definition,
    _fake,
    differentiable=False,
)
