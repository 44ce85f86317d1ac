"""`scaled_conv2d`: DCD's two terms in training, where maps are large beside the weight.

    out[b] = scale[b] * (conv2d(x[b], weight) + bias) + P v[b]

(Li et al., "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021.) Scaling weights, not maps, leaves no
map to keep for the backward pass but `x`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops._autocast import autocast_dtype
from timm_dynamic.ops._linear import linear
from timm_dynamic.ops.per_sample_conv import Pair, memory_format

# Up to so many multiplications a sample and positions of its map, all samples are one batched product; above, their
# maps leave the cache between its steps.
_SMALL_PRODUCT, _SMALL_MAP = 11 * 10**6, 28 * 28


def scaled_conv2d(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: Tensor,
    v: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Convolve, rescale the output channels of every sample, and add a 1x1 convolution of other maps.

    Differentiable once; not for torch.compile.

    Args:
        x: `[B, C, H, W]`.
        scale: `[B, O]`.
        weight, bias: `[O, C, Kh, Kw]` and `[O]`.
        p: `[O, L, 1, 1]`.
        v: `[B, L, Ho, Wo]`.
        stride, padding, dilation: As for `conv2d`; the padding is of zeros.

    Returns:
        `[B, O, Ho, Wo]`.
    """
    small = x.shape[2] * x.shape[3] <= _SMALL_MAP and weight[..., 0].numel() * x[0, 0].numel() <= _SMALL_PRODUCT
    with torch.no_grad():
        product = small and is_product(x, weight, stride)
    if product:
        return _ScaledProduct.apply(x, scale, weight, bias, p, v)
    return _ScaledConv.apply(x, scale, weight, bias, p, v, stride, padding, dilation)


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(x, scale, weight, bias, p, v):
        y = torch.bmm(weight.flatten(1) * scale[:, :, None], x.flatten(2))
        y.baddbmm_(p.flatten(1).expand(len(x), -1, -1), v.flatten(2))
        if bias is not None:
            y += (bias * scale)[:, :, None]
        return y.view(len(x), len(weight), *x.shape[2:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, scale, weight, bias, p, v = ctx.saved_tensors
        g, matrix = grad.flatten(2), weight.flatten(1)
        dw = torch.bmm(g, x.flatten(2).mT)
        dscale, dweight, dbias, dx = (dw * matrix).sum(2), (dw * scale[:, :, None]).sum(0), None, None
        if bias is not None:
            db = g.sum(2)
            dscale, dbias = dscale + db * bias, (db * scale).sum(0)
        if ctx.needs_input_grad[0]:
            dx = torch.bmm((matrix * scale[:, :, None]).mT, g).view_as(x)
        dp = torch.bmm(g, v.flatten(2).mT).sum(0).view_as(p)
        dv = torch.bmm(p.flatten(1).t().expand(len(x), -1, -1), g).view_as(v)
        return dx, dscale, dweight.view_as(weight), dbias, dp, dv


class _ScaledConv(torch.autograd.Function):
    """Sample by sample: as long as its map is in the cache, nothing of its size is read from memory twice."""

    @staticmethod
    def forward(x, scale, weight, bias, p, v, stride, padding, dilation):
        out = None
        for b in range(len(x)):
            own_bias = None if bias is None else bias * scale[b]
            y = conv_sample(x[b : b + 1], weight * scale[b, :, None, None, None], own_bias, stride, padding, dilation)
            y = combine(y, p, v[b : b + 1])
            if out is None:  # filled at once, not joined at the end: the samples' own memory is used again and again
                shape = (len(x), *y.shape[1:])
                out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=memory_format(y))
            out[b] = y[0]
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, weight, bias, p, v, *ctx.options = inputs
        ctx.save_for_backward(x, scale, weight, bias, p, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, scale, weight, bias, p, v = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        dx, dv, dscale = torch.empty_like(x) if needs_x else None, torch.empty_like(v), torch.empty_like(scale)
        dweight, dp = torch.zeros_like(weight), torch.zeros_like(p)
        dbias = None if bias is None else torch.zeros_like(bias)
        for b in range(len(x)):
            g, s = grad[b : b + 1], scale[b, :, None, None, None]
            dx_b, dw = _conv_sample_backward(g, x[b : b + 1], weight * s, needs_x, *ctx.options)
            if needs_x:
                dx[b] = dx_b[0]
            dweight.addcmul_(dw, s)
            dscale[b] = (dw * weight).sum((1, 2, 3))
            g = g[0].flatten(1)
            if bias is not None:
                db = g.sum(1)
                dbias.addcmul_(db, scale[b])
                dscale[b].addcmul_(db, bias)
            dp.flatten(1).addmm_(g, v[b].flatten(1).t())
            dv[b] = torch.mm(p.flatten(1).t(), g).view_as(dv[b])
        return dx, dscale, dweight, dbias, dp, dv, None, None, None


def conv_sample(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """`conv2d` of one sample, without groups; a 1x1 one is a product, and half the time."""
    if not is_product(x, weight, stride):
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    y = linear(weight.flatten(1), x[0].flatten(1).t()).view(1, -1, *x.shape[2:])
    return y if bias is None else y.add_(bias[:, None, None])


def _conv_sample_backward(grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, stride, padding, dilation):
    """The gradients of the sample, if needed, and of the weight."""
    if not is_product(x, weight, stride):
        options = (None, stride, padding, dilation, False, (0, 0), 1, (needs_x, True, False))
        return torch.ops.aten.convolution_backward(grad, x, weight, *options)[:2]
    grad_map, matrix = grad[0].flatten(1), weight.flatten(1)
    grad_x = linear(matrix.t(), grad_map.t()).view_as(x) if needs_x else None
    return grad_x, linear(grad_map, x[0].flatten(1)).view_as(weight)


def is_product(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> bool:
    pointwise = weight.shape[2:] == (1, 1) == tuple(stride) and x.is_contiguous()
    # `linear` knows neither autograd nor autocast.
    return pointwise and not torch.is_grad_enabled() and x.dtype == weight.dtype == autocast_dtype(x)


def combine(y: Tensor, p: Tensor, v: Tensor, scale: Tensor | None = None) -> Tensor:
    """`scale * y + P v` for y, `[B, O, H, W]`, and v, `[B, L, H, W]`; y is overwritten where autograd allows it."""
    channels_last = not y.is_contiguous()
    if channels_last:
        y = y.permute(0, 2, 3, 1)
    shape = y.shape
    # Never a view of the sum's own result: autograd would copy the whole gradient for an operation on part of a tensor.
    y = y.flatten(1, 2) if channels_last else y.flatten(2)
    if scale is not None:
        scale = scale[:, None, :] if channels_last else scale[:, :, None]
        y = y * scale if torch.is_grad_enabled() else y.mul_(scale)
    p, v = p.flatten(1).expand(len(y), -1, -1), v.flatten(2)
    y = y.baddbmm_(v.mT, p.mT) if channels_last else y.baddbmm_(p, v)
    y = y.view(shape)
    return y.permute(0, 3, 1, 2) if channels_last else y
