"""A DCD convolution with its gradient in one piece, for eager training.

It keeps fewer maps than its operations would one by one, and leaves few small objects for autograd among the large
blocks of memory: there they would keep the allocator from joining blocks, and every map would be mapped afresh.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.channel_fusion.definition import NO_LIMITS, Norm, factors, fused_convolution
from timm_dynamic.ops.channel_fusion.terms import (
    add_pool_backward,
    is_pointwise,
    pool,
    pool_and_project_backward,
    project,
    samples_in_cache,
    scaled_conv,
    scaled_conv_backward,
)
from timm_dynamic.ops.registration import differentiate


class FusedConvolution(torch.autograd.Function):
    """`fused_convolution`, with norms in training or eval mode, which update their running statistics.

    Inputs: x, weight, bias, q, p, weight and bias of norm 1 and of norm 2, the four heads; then for each norm its
    running mean, variance, momentum, eps and whether it is in training mode; the pool size; the convolution's options.
    """

    @staticmethod
    def forward(x, weight, bias, q, p, weight1, bias1, weight2, bias2, *rest):
        *heads, norm1, norm2, pool_size, options = rest
        parts = [(pool(part, pool_size), project(part, q, options[0]).flatten(2)) for (part,) in samples_in_cache(x)]
        pooled, z = (torch.cat(results) for results in zip(*parts, strict=True))
        phi, scale = factors(pooled, heads)
        u, *statistics1 = _normalise(z, weight1, bias1, *norm1)
        v, *statistics2 = _normalise(torch.bmm(phi, u), weight2, bias2, *norm2)
        v.add_(u)
        if is_pointwise(x, weight, options):
            shift = None if bias is None else bias * scale
            out, y = _product(x, weight.flatten(1), out_scale=scale, p=p.flatten(1), v=v, shift=shift), None
        else:
            out, y = scaled_conv(x, scale, weight, bias, p, v, options)
        return out, y, pooled, z, *statistics1, *statistics2

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, norm1, norm2, ctx.pool_size, ctx.options = inputs
        ctx.norms = [norm[3:] for norm in (norm1, norm2)]
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():  # create_graph
            return *_differentiable_gradients(ctx, grad), None, None, None, None
        x, weight, bias, q, p, weight1, bias1, weight2, bias2, *heads, y, pooled, z, mean1, var1, mean2, var2 = (
            ctx.saved_tensors
        )
        norm1, norm2 = (weight1, mean1, var1, *ctx.norms[0]), (weight2, mean2, var2, *ctx.norms[1])
        phi, scale = factors(pooled, heads)
        u = _affine(z, bias1, *norm1)
        w = torch.bmm(phi, u)
        v = _affine(w, bias2, *norm2).add_(u)
        needs_x = ctx.needs_input_grad[0]
        pointwise = is_pointwise(x, weight, ctx.options)
        if pointwise:
            grad = grad.contiguous()
            dv = _product(grad, p.flatten(1).t().contiguous()).flatten(2)
        else:
            dx, dscale, dweight, dbias, dp, dv = scaled_conv_backward(
                grad, y, x, scale, weight, bias, p, v, needs_x, ctx.options
            )
        dw, *dnorm2 = _normalise_backward(dv, w, *norm2)
        dphi = torch.bmm(dw, u.mT)
        dz, *dnorm1 = _normalise_backward(dv.baddbmm_(phi.mT, dw), z, *norm1)
        if pointwise:
            dweight, dscale, dp, dq = torch.ops.timm_dynamic.channel_fusion_backward(
                grad, dz, x, v, scale, weight.flatten(1)
            )
            dweight, dp, dq, dbias = dweight.view_as(weight), dp.view_as(p), dq.view_as(q), None
            if bias is not None:
                sums = grad.sum((2, 3))
                dscale.addcmul_(sums, bias)
                dbias = (sums * scale).sum(0)
        dpooled, *dheads = _factors_backward(dphi, dscale, pooled, *heads)
        if not pointwise:
            dq = pool_and_project_backward(dpooled, dz, x, q, ctx.pool_size, ctx.options[0], dx)
        elif needs_x:
            shift = dpooled / x[0, 0].numel() if ctx.pool_size == 1 else None
            matrices = (t.flatten(1).t().contiguous() for t in (weight, q))
            dx = _product(grad, next(matrices), in_scale=scale, p=next(matrices), v=dz, shift=shift)
            if shift is None:
                add_pool_backward(dx, dpooled, x, ctx.pool_size)
        else:
            dx = None
        return dx, dweight, dbias, dq, dp, *dnorm1, *dnorm2, *dheads, None, None, None, None


def _differentiable_gradients(ctx, grad: Tensor) -> list[Tensor | None]:
    saved = ctx.saved_tensors
    inputs, statistics = saved[:13], saved[-4:]

    def function(x, weight, bias, q, p, weight1, bias1, weight2, bias2, *heads):
        norms: list[Norm] = []
        for w, b, (mean, var), (eps, training) in (
            (weight1, bias1, statistics[:2], ctx.norms[0]),
            (weight2, bias2, statistics[2:], ctx.norms[1]),
        ):
            norms.append((w, b, *((None, None) if training else (mean, var)), eps, training))
        return fused_convolution(x, heads, q, *norms, ctx.pool_size, p, weight, bias, ctx.options)

    return differentiate(function, grad, inputs, ctx.needs_input_grad[:13])


def _product(x: Tensor, weight: Tensor, in_scale=None, out_scale=None, p=None, v=None, shift=None) -> Tensor:
    return torch.ops.timm_dynamic.channel_fusion(x, weight, None, in_scale, out_scale, p, v, shift, *NO_LIMITS)


def _normalise(z, weight, bias, mean, var, momentum, eps, training) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the mean and, of a norm in training, the deviation's inverse, else the variance."""
    if not training:
        return F.batch_norm(z, mean, var, weight, bias, eps=eps), mean.clone(), var.clone()
    return torch.native_batch_norm(z, weight, bias, mean, var, True, momentum, eps)


def _affine(z: Tensor, bias: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, training: bool) -> Tensor:
    """The norm's result once more."""
    slope = weight * (var if training else torch.rsqrt(var + eps))
    return torch.addcmul((bias - mean * slope)[:, None].to(z.dtype), z, slope[:, None].to(z.dtype))


def _normalise_backward(grad, z, weight, mean, var, eps, training):
    running, batch = ((None, None), (mean, var)) if training else ((mean, var), (None, None))
    return torch.ops.aten.native_batch_norm_backward(
        grad, z, weight, *running, *batch, training, eps, (True, True, True)
    )


def _factors_backward(dphi, dscale, pooled, fc, gate, fc_phi, fc_scale):
    """Gradients of the arguments of `factors`."""
    a = F.linear(pooled, fc)
    g = F.linear(a, gate)
    h = (g + 3).clamp(0, 6) / 3
    z = a * h
    dphi = dphi.flatten(1)
    dscale = dscale * (F.linear(z, fc_scale).abs() <= 3) / 3
    dz = dphi @ fc_phi + dscale @ fc_scale
    dgate = dz * a * (g.abs() <= 3) / 3
    da = dz * h + dgate @ gate
    return da @ fc, da.t() @ pooled, dgate.t() @ a, dphi.t() @ z, dscale.t() @ z
