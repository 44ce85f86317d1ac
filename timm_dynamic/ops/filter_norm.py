"""`filter_norm`: standardise dynamic filters over their taps.

    out[b, f, k, y, x] = scale * (x - mean) / (std + 1e-10)

with the mean and the unbiased standard deviation over the K x K taps k of filter f at one position (Zhou et al.,
"Decoupled Dynamic Filter Networks", CVPR 2021, section 3.2).
"""

import torch
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE, has_kernel

_EPS = 1e-10
_MIN_NORM = 1e-18  # changes nothing beside 1e-10; keeps the root's gradient finite where a filter is constant


def filter_norm(x: Tensor, taps: int, scale: float) -> Tensor:
    """Standardise filters over their taps.

    Computed in float32, or float64 for float64 inputs: 1e-10 is zero in float16, and a constant filter would become
    NaN.

    Args:
        x: `[B, filters*taps, H, W]`, filters one after the other.
        taps: Taps of a filter, at least 2.
        scale: The standard deviation of the result's filters.

    Returns:
        `[B, filters*taps, H, W]`, with the dtype of `x`.
    """
    # The compiler fuses the reference's operations itself.
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or not has_kernel(x.device.type):
        return filter_norm_reference(x, taps, scale)
    return torch.ops.timm_dynamic.filter_norm(x, taps, scale)


def filter_norm_reference(x: Tensor, taps: int, scale: float) -> Tensor:
    """The same as `filter_norm` in plain differentiable PyTorch. Defines the operator."""
    deviations, norm = _deviations(x, taps)
    root = (taps - 1) ** 0.5  # norm = root * std
    out = deviations * (scale * root / (norm + _EPS * root))
    return out.reshape(x.shape).to(x.dtype)


def _deviations(x: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """`x` less the means, `[B, filters, taps, H, W]`, and its norm over the taps, in the accumulation dtype."""
    B, C, H, W = x.shape
    x = (x if x.dtype == torch.float64 else x.float()).reshape(B, C // taps, taps, H, W)
    x = x - x.mean(2, keepdim=True)
    # torch.std is several times slower along a strided dimension.
    return x, x.square().sum(2, keepdim=True).clamp_min(_MIN_NORM**2).sqrt()


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(f"{NAMESPACE}::filter_norm", "(Tensor x, int taps, float scale) -> Tensor", tags=_TAGS)
torch.library.impl(f"{NAMESPACE}::filter_norm", "CompositeExplicitAutograd")(filter_norm_reference)


@torch.library.register_fake(f"{NAMESPACE}::filter_norm")
def _filter_norm_fake(x, taps, scale):
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output):
    x, ctx.taps, ctx.scale = inputs
    ctx.save_for_backward(x)


def _filter_norm_autograd(ctx, grad):
    (x,) = ctx.saved_tensors
    d, norm = _deviations(x, ctx.taps)
    grad = grad.to(d.dtype).reshape(d.shape)
    root = (ctx.taps - 1) ** 0.5
    scaled = norm + _EPS * root
    along = (grad * d).sum(2, keepdim=True) / (norm * scaled)
    grad = (grad - d * along.masked_fill(norm <= _MIN_NORM, 0)) * (ctx.scale * root / scaled)
    grad = grad - grad.mean(2, keepdim=True)
    return grad.reshape(x.shape).to(x.dtype), None, None


torch.library.register_autograd(f"{NAMESPACE}::filter_norm", _filter_norm_autograd, setup_context=_setup_context)
