"""Dynamic channel fusion: a convolution with rescaled outputs, and latent channels that are mixed into them.

    y = scale * conv(x) + P (BN2(Phi BN1(Q x)) + BN1(Q x))

with scale, `[B, O]`, and Phi, `[B, L, L]`, made of the pooled input (Li et al., "Revisiting Dynamic Convolution via
Matrix Decomposition", ICLR 2021, arXiv 2103.08756).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.kernels import runs_kernel
from timm_dynamic.ops.precision import autocast_dtype, no_autocast
from timm_dynamic.ops.registration import register
from timm_dynamic.ops.shapes import Pair, columns_of, memory_format, output_size, window

NO_LIMITS = (-math.inf, math.inf)
Norm = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, bool]  # weight, bias, mean, variance, eps, training


def hsig(t: Tensor) -> Tensor:
    """The authors' hard sigmoid, `relu6(t + 3) / 3`: 0 to 2, and 1 at 0."""
    return (t + 3).clamp(0, 6) / 3  # F.hardsigmoid's derivative is of single precision in float64 too


def channel_fusion(
    x: Tensor, weight: Tensor, scale: Tensor, p: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    """DCD's two terms for a 1x1 convolution: `scale * (weight . x + bias) + p . v`.

    Under autocast the maps are cast.

    Args:
        x: `[B, C, H, W]`.
        weight, bias: `[O, C]` and `[O]`.
        scale: `[B, O]`.
        p: `[O, L]`.
        v: `[B, L, H, W]`.

    Returns:
        `[B, O, H, W]`.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    B, C, H, W = x.shape
    outputs, L = len(weight), p.shape[-1]
    for name, t, shape in (
        ("weight", weight, (outputs, C)),
        ("scale", scale, (B, outputs)),
        ("p", p, (outputs, L)),
        ("v", v, (B, L, H, W)),
    ):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for x {list(x.shape)}, got shape {list(t.shape)}")
    dtype = autocast_dtype(x)
    x, weight, scale, p, v = (t.to(dtype) for t in (x, weight, scale, p, v))
    shift = None if bias is None else scale * bias.to(dtype)
    run = torch.ops.timm_dynamic.channel_fusion if runs_kernel("channel_fusion", x) else _definition
    with no_autocast(x):
        return run(x, weight, None, None, scale, p, v.flatten(2), shift, *NO_LIMITS)


def _definition(
    x: Tensor,
    weight: Tensor,
    attention: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    p: Tensor | None,
    v: Tensor | None,
    shift: Tensor | None,
    low: float,
    high: float,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """Of the registered operator: `clamp(out_scale * (weight . (in_scale * x)) + p . v + shift, low, high)`.

    Args:
        x: `[B, C, H, W]`.
        weight: `[O, C]`; `[B, O, C]`, one for every sample; or `[N, O, C, Kh, Kw]`, to be mixed for every sample and
            to read the columns of `x` at a stride, with padding and dilation: with these the CPU kernel also takes
            `x` in channels_last.
        attention: `[B, N]`, of the mixtures; may be missing where N is 1. Or `[B, Kh, Kw, o, i, N]`: then `weight` is
            `[N, O / o, C / i]`, cells of whose mixtures a sample's kernel is made, for `x` in channels_last.
        in_scale, out_scale: `[B, C]`, of a mixture `[B, C * Kh * Kw]`, and `[B, O]`, of a mixture also `[1, O]`.
        p, v: `[O, L]` and `[B, L, H * W]`; not for mixtures.
        shift: `[B, O]` or `[1, O]`.
        low, high: Limits of the result.
        stride, padding, dilation: Of the convolution with a mixture.
    """
    size = x.shape[2:]
    if attention is not None and weight.ndim == 3:
        x = columns_of(x, tuple(attention.shape[1:3]), stride, padding, dilation)
        weight, size = kernels_of_cells(attention, weight).flatten(2), x.shape[2:]
    elif weight.ndim == 5:
        x = columns_of(x, tuple(weight.shape[3:]), stride, padding, dilation)
        size = x.shape[2:]
        mixed = weight[0] if attention is None else torch.matmul(attention, weight.flatten(1))
        weight = mixed.reshape(-1, weight.shape[1], x.shape[1])
    columns = x.flatten(2)
    out = torch.matmul(weight, columns if in_scale is None else columns * in_scale[:, :, None])
    if out_scale is not None:
        out = out * out_scale[:, :, None]
    if p is not None:
        out = out + torch.matmul(p, v)
    if shift is not None:
        out = out + shift[:, :, None]
    out = out if (low, high) == NO_LIMITS else out.clamp(low, high)
    return out.view(len(x), weight.shape[-2], *size).contiguous(memory_format=memory_format(x))


def kernels_of_cells(coefficients: Tensor, cells: Tensor) -> Tensor:
    """`[B, O, C, Kh, Kw]`: with coefficients `[B, Kh, Kw, o, i, N]`, `o * i` blocks a tap of cells `[N, O/o, C/i]`."""
    B, *taps, o, i, _ = coefficients.shape
    blocks = torch.einsum("byxoin,npq->bopiqyx", coefficients, cells)
    return blocks.reshape(B, o * cells.shape[1], i * cells.shape[2], *taps)


def _definition_of_gradients(
    grad: Tensor, dz: Tensor, x: Tensor, v: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of `channel_fusion_backward`: the gradients of all matrices that read x, without one a sample in memory.

    Args:
        grad: `[B, O, H, W]`, of `scale * (weight . x) + p . v`.
        dz: `[B, L, H * W]`, the gradient of `q . x`.
        x, v, scale, weight: As above.

    Returns:
        The gradients of `weight`, `scale`, `p`, `[O, L]`, and `q`, `[L, C]`.
    """
    grad, columns = grad.flatten(2), x.flatten(2).mT
    each = torch.bmm(grad, columns)
    dweight, dscale = (each * scale[:, :, None]).sum(0), (each * weight).sum(2)
    return dweight, dscale, torch.bmm(grad, v.mT).sum(0), torch.bmm(dz, columns).sum(0)


def fused_convolution(
    x: Tensor,
    heads: Sequence[Tensor],
    q: Tensor,
    norm1: Norm,
    norm2: Norm,
    pool_size: int,
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple,
    q_bias: Tensor | None = None,
) -> Tensor:
    """The whole of a DCD convolution as a function of its parameters, for what needs it as one: see the module.

    Args:
        x: `[B, C, H, W]`.
        heads: Weights of the linear layers in front: `[s, C * pool_size**2]`, `[s, s]`, `[L * L, s]`, `[O, s]`.
        q, p: `[L, C, 1, 1]` and `[O, L, 1, 1]`.
        norm1, norm2: BN1 and BN2; without tensors: none.
        pool_size: Side of the pooled map.
        weight, bias: Of the convolution.
        options: Its stride, padding, dilation and groups.
        q_bias: `[L]`, of q, where BN1 has been absorbed.
    """
    phi, scale = factors(F.adaptive_avg_pool2d(x, pool_size).flatten(1), heads)
    z = F.conv2d(x, q, q_bias, options[0])
    u = _norm(z.flatten(2), norm1)
    v = _norm(torch.bmm(phi, u), norm2) + u
    return F.conv2d(x, weight, bias, *options) * scale[:, :, None, None] + F.conv2d(v.view_as(z), p)


def factors(pooled: Tensor, heads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Phi, `[B, L, L]`, and scale, `[B, O]`, of the pooled input."""
    z = F.linear(pooled, heads[0])
    z = z * hsig(F.linear(z, heads[1]))
    phi = F.linear(z, heads[2])
    L = math.isqrt(phi.shape[1])
    return phi.view(-1, L, L), hsig(F.linear(z, heads[3]))


def _norm(z: Tensor, norm: Norm) -> Tensor:
    *tensors, eps, training = norm
    if not tensors:
        return z
    weight, bias, mean, variance = tensors
    return F.batch_norm(z, mean, variance, weight, bias, training, 0.0, eps)


def _definition_of_inference(
    x,
    heads,
    q,
    norm1,
    norm2,
    eps1,
    eps2,
    pool_size,
    p,
    shift,
    weight,
    bias,
    stride,
    padding,
    dilation,
    groups,
    low,
    high,
    q_bias=None,
) -> Tensor:
    """Of `dcd_conv`: `fused_convolution` in eval mode, plus `shift`, `[O]`, within limits."""
    options = (stride, padding, dilation, groups)
    norms = (*norm1, eps1, False), (*norm2, eps2, False)
    p = p.flatten(1)[:, :, None, None]
    q = q.flatten(1)[:, :, None, None]
    out = fused_convolution(x, heads, q, *norms, pool_size, p, weight, bias, options, q_bias)
    out = (out if shift is None else out + shift[:, None, None]).clamp(low, high)
    return out.contiguous(memory_format=memory_format(x))


def _fake(x, weight, attention, *others):
    cells = attention is not None and weight.ndim == 3
    if not cells and weight.ndim < 5:
        return x.new_empty(x.shape[0], weight.shape[-2], *x.shape[2:])
    outputs = weight.shape[1] * (attention.shape[3] if cells else 1)
    taps = attention.shape[1:3] if cells else weight.shape[3:]
    out = x.new_empty(x.shape[0], outputs, *output_size(x.shape[2:], taps, *window(others[7:])))
    return out.contiguous(memory_format=memory_format(x))


def _fake_gradients(grad, dz, x, v, scale, weight):
    L = v.shape[1]
    return torch.empty_like(weight), torch.empty_like(scale), x.new_empty(len(weight), L), x.new_empty(L, x.shape[1])


def _fake_inference(x, heads, q, norm1, norm2, eps1, eps2, pool_size, p, shift, weight, bias, *options):
    return F.conv2d(x, weight, bias, *options[:4]).contiguous(memory_format=memory_format(x))


def _flops(x, weight, attention=None, in_scale=None, out_scale=None, p=None, *args, out_shape=None, **kwargs) -> int:
    mixing = 2 * math.prod(attention) * math.prod(weight[1:]) if attention else 0
    if attention and len(weight) == 3:
        depth = attention[1] * attention[2] * x[1]
    else:
        depth = math.prod(weight[2:]) if len(weight) == 5 else weight[-1] + (p[-1] if p else 0)
    return 2 * math.prod(out_shape) * depth + mixing


register(
    "channel_fusion",
    "(Tensor x, Tensor weight, Tensor? attention, Tensor? in_scale, Tensor? out_scale, Tensor? p, Tensor? v, "
    "Tensor? shift, float low, float high, int[2] stride=1, int[2] padding=0, int[2] dilation=1) -> Tensor",
    _definition,
    _fake,
    flops=_flops,
)
register(
    "channel_fusion_backward",
    "(Tensor grad, Tensor dz, Tensor x, Tensor v, Tensor scale, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _definition_of_gradients,
    _fake_gradients,
    differentiable=False,
)
register(
    "dcd_conv",
    "(Tensor x, Tensor[] heads, Tensor q, Tensor[] norm1, Tensor[] norm2, float eps1, float eps2, int pool_size, "
    "Tensor p, Tensor? shift, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "float low, float high, Tensor? q_bias=None) -> Tensor",
    _definition_of_inference,
    _fake_inference,
    differentiable=False,
)
