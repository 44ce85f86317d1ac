"""A DCD convolution with its gradient in one piece, for eager training.

It keeps fewer maps than its operations would one by one, and leaves few small objects for autograd among the large
blocks of memory: there they would keep the allocator from joining blocks, and every map would be mapped afresh.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.ops.affine import NO_LIMITS
from timm_dynamic.ops.dcd_branch import factors
from timm_dynamic.ops.pool_and_project import add_pool_backward, pool, pool_and_project_backward, project
from timm_dynamic.ops.scaled_conv import in_cache, scaled_conv, scaled_conv_backward
from timm_dynamic.ops.scaled_pointwise import scaled_pointwise_serves


def dcd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    p: Tensor,
    fc: list[Tensor],
    bn1: nn.Module,
    bn2: nn.Module,
    pool_size: int,
    own_weights: bool,
    options: tuple,
) -> Tensor:
    """What `timm_dynamic.layers.DCDConv2d` computes; differentiable once, not for torch.compile.

    Args:
        x, weight, bias, q, p, own_weights, options: As for `scaled_conv` and `project`.
        fc: As for `timm_dynamic.ops.dcd_branch`.
        bn1, bn2: Norms that `serves` agrees to. They update their running statistics.
        pool_size: Side of the pooled map.
    """
    norms = [t for bn in (bn1, bn2) for t in (bn.weight, bn.bias)]
    return _DCDConv.apply(x, weight, bias, q, p, *norms, *fc, bn1, bn2, pool_size, own_weights, options)[0]


def serves(bn: nn.Module) -> bool:
    """Whether `dcd_conv` can take the place of this norm."""
    plain = type(bn) in (nn.BatchNorm1d, nn.BatchNorm2d) and bn.affine and bn.track_running_stats
    return plain and bn.momentum is not None


class _DCDConv(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, q, p, weight1, bias1, weight2, bias2, *rest):
        *fc, bn1, bn2, pool_size, own_weights, options = rest
        parts = [(pool(part, pool_size), project(part, q, options[0]).flatten(2)) for (part,) in in_cache(x)]
        pooled, z = (torch.cat(results) for results in zip(*parts, strict=True))
        phi, scale = factors(pooled, fc)
        u, *statistics1 = _normalise(z, weight1, bias1, bn1)
        v, *statistics2 = _normalise(torch.bmm(phi, u), weight2, bias2, bn2)
        v.add_(u)
        if _is_pointwise(x, weight, options):
            shift = None if bias is None else bias * scale
            out, y = _pointwise(x, weight.flatten(1), out_scale=scale, p=p.flatten(1), v=v, shift=shift), None
        else:
            out, y = scaled_conv(x, scale, weight, bias, p, v, own_weights, options)
        return out, y, pooled, z, *statistics1, *statistics2

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, bn1, bn2, ctx.pool_size, _, ctx.options = inputs
        ctx.norms = [(bn.training, bn.eps) for bn in (bn1, bn2)]
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, bias, q, p, weight1, bias1, weight2, bias2, *fc, y, pooled, z, mean1, var1, mean2, var2 = (
            ctx.saved_tensors
        )
        norm1, norm2 = (weight1, mean1, var1, *ctx.norms[0]), (weight2, mean2, var2, *ctx.norms[1])
        phi, scale = factors(pooled, fc)
        u = _affine(z, bias1, *norm1)
        w = torch.bmm(phi, u)
        v = _affine(w, bias2, *norm2).add_(u)
        needs_x = ctx.needs_input_grad[0]
        pointwise = _is_pointwise(x, weight, ctx.options)
        if pointwise:
            grad = grad.contiguous()
            dv = _pointwise(grad, p.flatten(1).t().contiguous()).flatten(2)
        else:
            dx, dscale, dweight, dbias, dp, dv = scaled_conv_backward(
                grad, y, x, scale, weight, bias, p, v, needs_x, ctx.options
            )
        dw, *dnorm2 = _normalise_backward(dv, w, *norm2)
        dphi = torch.bmm(dw, u.mT)
        dz, *dnorm1 = _normalise_backward(dv.baddbmm_(phi.mT, dw), z, *norm1)
        if pointwise:
            dweight, dscale, dp, dq = torch.ops.timm_dynamic.scaled_pointwise_grads(
                grad, dz, x, v, scale, weight.flatten(1)
            )
            dweight, dp, dq, dbias = dweight.view_as(weight), dp.view_as(p), dq.view_as(q), None
            if bias is not None:
                sums = grad.sum((2, 3))
                dscale.addcmul_(sums, bias)
                dbias = (sums * scale).sum(0)
        dpooled, *dfc = _factors_backward(dphi, dscale, pooled, *fc)
        if not pointwise:
            dq = pool_and_project_backward(dpooled, dz, x, q, ctx.pool_size, ctx.options[0], dx)
        elif needs_x:
            shift = dpooled / x[0, 0].numel() if ctx.pool_size == 1 else None
            matrices = (t.flatten(1).t().contiguous() for t in (weight, q))
            dx = _pointwise(grad, next(matrices), in_scale=scale, p=next(matrices), v=dz, shift=shift)
            if shift is None:
                add_pool_backward(dx, dpooled, x, ctx.pool_size)
        else:
            dx = None
        return dx, dweight, dbias, dq, dp, *dnorm1, *dnorm2, *dfc, None, None, None, None, None


def _is_pointwise(x: Tensor, weight: Tensor, options: tuple) -> bool:
    stride, padding, _, groups = options
    return groups == 1 and not any(padding) and scaled_pointwise_serves(x, weight, stride)


def _pointwise(x: Tensor, weight: Tensor, in_scale=None, out_scale=None, p=None, v=None, shift=None) -> Tensor:
    return torch.ops.timm_dynamic.scaled_pointwise(x, weight, in_scale, out_scale, p, v, shift, *NO_LIMITS)


def _normalise(z: Tensor, weight: Tensor, bias: Tensor, bn: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the mean and, of a norm in training, the deviation's inverse, else the variance."""
    running = bn.running_mean, bn.running_var
    if not bn.training:
        return F.batch_norm(z, *running, weight, bias, eps=bn.eps), *(t.clone() for t in running)
    bn.num_batches_tracked.add_(1)
    return torch.native_batch_norm(z, weight, bias, *running, True, bn.momentum, bn.eps)


def _affine(z: Tensor, bias: Tensor, weight: Tensor, mean: Tensor, var: Tensor, training: bool, eps: float) -> Tensor:
    """The norm's result once more."""
    slope = weight * (var if training else torch.rsqrt(var + eps))
    return torch.addcmul((bias - mean * slope)[:, None].to(z.dtype), z, slope[:, None].to(z.dtype))


def _normalise_backward(grad, z, weight, mean, var, training, eps):
    running, batch = ((None, None), (mean, var)) if training else ((mean, var), (None, None))
    return torch.ops.aten.native_batch_norm_backward(
        grad, z, weight, *running, *batch, training, eps, (True, True, True)
    )


def _factors_backward(dphi, dscale, pooled, fc0, fc1, fc_phi, fc_scale):
    """Gradients of the arguments of `factors`."""
    a = F.linear(pooled, fc0)
    gate = F.linear(a, fc1)
    h = (gate + 3).clamp(0, 6) / 3
    z = a * h
    dphi = dphi.flatten(1)
    dscale = dscale * (F.linear(z, fc_scale).abs() <= 3) / 3
    dz = dphi @ fc_phi + dscale @ fc_scale
    dgate = dz * a * (gate.abs() <= 3) / 3
    da = dz * h + dgate @ fc1
    return da @ fc0, da.t() @ pooled, dgate.t() @ a, dphi.t() @ z, dscale.t() @ z
