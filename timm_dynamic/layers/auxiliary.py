"""Losses that a layer carries itself."""

import functools
import warnings

import torch
from torch import Tensor

from timm_dynamic.ops.attached_gradient import attached_gradient
from timm_dynamic.ops.kernels import transforms


class _AttachLoss(torch.autograd.Function):
    """The identity on an activation; its backward pass also starts that of a loss."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor, weight: float | Tensor, scale: float | Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        # Not saved for backward, where a hook may keep a copy: the value of the scale is yet to come.
        _, loss, ctx.weight, ctx.scale = inputs
        ctx.dtype = loss.dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        number = 1.0 if isinstance(ctx.weight, Tensor) else ctx.weight
        if isinstance(ctx.scale, Tensor):
            attached = attached_gradient(grad, ctx.scale, number, ctx.dtype)
        else:
            attached = torch.full((), number * ctx.scale, dtype=ctx.dtype, device=grad.device)
        return grad, attached * ctx.weight if isinstance(ctx.weight, Tensor) else attached, None, None


class _AttachLossToTangents(_AttachLoss):
    """In forward mode; torch.compile knows no function with a `jvp`."""

    @staticmethod
    def jvp(ctx, x_tangent: Tensor, *others) -> Tensor:
        return x_tangent.view_as(x_tangent)


def attach_loss(x: Tensor, loss: Tensor, weight: float | Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return `x`, unchanged, such that whatever trains through it minimises `weight * loss` too.

    `task_loss.backward()` then gives the gradients of `task_loss + scale * weight * loss`, without the loss being kept
    or handed out: gradient checkpointing, feature extractors, copies of the model, DistributedDataParallel and
    torch.compile need not know. Nor does a `GradScaler`, which therefore does not scale this gradient, unless a
    `timm_dynamic.training.DynamicTask` says so in `scale`.

    Args:
        x: An activation that the task loss depends on. Nothing may change what is returned in place.
        loss: A scalar, or a tensor of some.
        weight: Of the loss: a number, or a tensor of the shape of `loss` without a gradient.
        scale: Factor of the gradient. The value of a tensor is that which it has in the backward pass.
    """
    function = _AttachLoss if torch.compiler.is_compiling() else _AttachLossToTangents
    return function.apply(x, loss, weight, scale)


def store(buffer: Tensor, value: Tensor) -> None:
    """Write what a buffer shows of the last forward, but within `torch.func`, which forbids it; "meta" has no value."""
    if not value.is_meta and (torch.compiler.is_compiling() or not transforms()):
        buffer.copy_(value.detach())


def warn_about_float16(dtype: torch.dtype, scale: float | Tensor, loss: str) -> None:
    """Warn, once, that an attached loss is lost under loss scaling.

    Args:
        dtype: Of the activation that carries it.
        scale: As for `attach_loss`; one that is a tensor follows that of the task loss.
        loss: Whose.
    """
    if dtype == torch.float16 and not isinstance(scale, Tensor) and not torch.compiler.is_compiling():
        _warn_once(loss)


@functools.cache
def _warn_once(loss: str) -> None:
    warnings.warn(
        f"timm_dynamic: in float16, a GradScaler scales the task loss but not {loss}, whose gradient is all but lost. "
        "Train with timm_dynamic.training.DynamicTask, as `timm-dynamic train` does, or in bfloat16 "
        "(--amp-dtype bfloat16).",
        stacklevel=4,
    )
