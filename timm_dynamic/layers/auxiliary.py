"""Losses that a layer carries itself."""

import functools
import warnings

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    """The identity on an activation; its backward pass also starts that of a loss, with a constant gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.dtype = weight, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full((), ctx.weight, dtype=ctx.dtype, device=grad.device), None


def attach_loss(x: Tensor, loss: Tensor, weight: float) -> Tensor:
    """Return `x`, unchanged, such that whatever trains through it minimises `weight * loss` too.

    `task_loss.backward()` then gives the gradients of `task_loss + weight * loss`, without the loss being kept or
    handed out: gradient checkpointing, feature extractors, copies of the model, DistributedDataParallel and
    torch.compile need not know. Nor does a `GradScaler`, which therefore does not scale this gradient.

    Args:
        x: An activation that the task loss depends on. Nothing may change what is returned in place.
        loss: A scalar.
        weight: Of the loss.
    """
    return _AttachLoss.apply(x, loss, weight)


@functools.cache
def warn_about_float16(loss: str) -> None:
    """Warn, once, that an attached loss is lost under loss scaling.

    Args:
        loss: Whose.
    """
    warnings.warn(
        f"timm_dynamic: in float16, a GradScaler scales the task loss but not {loss}, whose gradient is all but lost. "
        "Train in bfloat16 (--amp-dtype bfloat16) or float32.",
        stacklevel=3,
    )
