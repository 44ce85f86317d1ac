"""`filter_norm`: standardise dynamic filters over their taps.

    out[b, f, k, y, x] = scale * (x - mean) / (std + 1e-10)

with the mean and the unbiased standard deviation over the K x K taps k of filter f at one position (Zhou et al.,
"Decoupled Dynamic Filter Networks", CVPR 2021, section 3.2).
"""

import torch
from torch import Tensor

from timm_dynamic.ops.kernels import runs_kernel
from timm_dynamic.ops.precision import accumulation_dtype, no_autocast
from timm_dynamic.ops.registration import register

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
    if torch.jit.is_scripting():  # TorchScript knows the registered operator alone
        return torch.ops.timm_dynamic.filter_norm(x, taps, scale)
    else:
        return _filter_norm(x, taps, scale)


def _filter_norm(x: Tensor, taps: int, scale: float) -> Tensor:
    # The compiler fuses the definition's operations itself.
    kernel = not torch.compiler.is_compiling() and runs_kernel("filter_norm", x)
    with no_autocast(x):
        return (torch.ops.timm_dynamic.filter_norm if kernel else _definition)(x, taps, scale)


def _definition(x: Tensor, taps: int, scale: float) -> Tensor:
    deviations, norm = _deviations(x, taps)
    root = (taps - 1) ** 0.5  # norm = root * std
    out = deviations * (scale * root / (norm + _EPS * root))
    return out.reshape(x.shape).to(x.dtype)


def _deviations(x: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """`x` less the means, `[B, filters, taps, H, W]`, and its norm over the taps, in the accumulation dtype."""
    B, C, H, W = x.shape
    x = x.to(accumulation_dtype(x)).reshape(B, C // taps, taps, H, W)
    x = x - x.mean(2, keepdim=True)
    # torch.std is several times slower along a strided dimension.
    return x, x.square().sum(2, keepdim=True).clamp_min(_MIN_NORM**2).sqrt()


def _gradient(grad, inputs, outputs, options, needs) -> tuple[Tensor]:
    (x,), (taps, scale) = inputs, options
    d, norm = _deviations(x, taps)
    grad = grad.to(d.dtype).reshape(d.shape)
    root = (taps - 1) ** 0.5
    scaled = norm + _EPS * root
    along = (grad * d).sum(2, keepdim=True) / (norm * scaled)
    grad = (grad - d * along.masked_fill(norm <= _MIN_NORM, 0)) * (scale * root / scaled)
    grad = grad - grad.mean(2, keepdim=True)
    return (grad.reshape(x.shape).to(x.dtype),)


def _fake(x, taps, scale):
    return torch.empty_like(x)


register("filter_norm", "(Tensor x, int taps, float scale) -> Tensor", _definition, _fake, gradient=_gradient)
