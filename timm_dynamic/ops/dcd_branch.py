"""The dynamic branch of a DCD convolution in one call, for inference: what `timm_dynamic.layers.DCDConv2d` computes.

    z = hsig(G F pool(x)) * F pool(x)        Phi = fc_phi z        scale = hsig(fc_scale z)
    dcd_branch_:         scale * y + P (BN2(Phi BN1(Q x)) + BN1(Q x)) for y = conv(x), in the place of y
    dcd_pointwise:       the same for a 1x1 convolution, which it does, and the norm behind the layer
    dcd_sample_weights:  scale * weight + P (S2 Phi + I) S1 Q, with the product at the central tap, and the bias
    dcd_factors:         Phi and scale alone

(Li et al., "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021; the norms are affine in eval mode: a
slope S and an offset). The branch is some twenty small operations a layer, whose overhead is most of their time where
there are few samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE
from timm_dynamic.ops.affine import affine


def _hsig(t: Tensor) -> Tensor:
    """0 to 2, and 1 at 0: twice the usual hard sigmoid."""
    return (t + 3).clamp(0, 6) / 3  # F.hardsigmoid's derivative is of single precision in float64 too


def factors(pooled: Tensor, fc: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`[B, pooled]` to Phi, `[B, L, L]`, and scale, `[B, outputs]`."""
    # Functions, not modules: at batch 1 the time goes into calls.
    z = F.linear(pooled.to(fc[0].dtype), fc[0])
    z = z * _hsig(F.linear(z, fc[1]))
    phi = F.linear(z, fc[2])
    L = int(phi.shape[1] ** 0.5 + 0.5)  # round gives TorchScript a float
    return phi.view(-1, L, L), _hsig(F.linear(z, fc[3]))


def dcd_factors_reference(x: Tensor, fc: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Defines `torch.ops.timm_dynamic.dcd_factors`: `factors` of the mean over positions.

    Args:
        x: `[B, C, H, W]`.
        fc: As for `dcd_branch_reference`, with a pool size of 1.

    Returns:
        Phi, `[B, L, L]`, and scale, `[B, O]`, of the dtype of `fc`.
    """
    return factors(x.mean((2, 3), dtype=fc[0].dtype), fc)


def _affine(norm: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    weight, bias, mean, variance = norm
    slope = weight * torch.rsqrt(variance + eps)
    return slope, bias - mean * slope


def dcd_branch_reference(
    x: Tensor,
    fc: list[Tensor],
    q: Tensor,
    norm1: list[Tensor],
    norm2: list[Tensor],
    eps1: float,
    eps2: float,
    pool_size: int,
    p: Tensor,
    stride_y: int,
    stride_x: int,
    y: Tensor,
) -> None:
    """Defines `torch.ops.timm_dynamic.dcd_branch_`.

    Args:
        x: `[B, C, H, W]`.
        fc: Weights of the linear layers F `[s, C*pool_size**2]`, G `[s, s]`, fc_phi `[L*L, s]` and fc_scale `[O, s]`.
        q: `[L, C, 1, 1]` or `[L, C]`.
        norm1, norm2: Weight, bias, running mean and running variance, `[L]` each.
        eps1, eps2: Those of the norms.
        pool_size: Side of the pooled map.
        p: `[O, L, 1, 1]` or `[O, L]`.
        stride_y, stride_x: Of Q.
        y: `[B, O, ceil(H/stride_y), ceil(W/stride_x)]`; becomes the layer's output.
    """
    phi, scale = factors(F.adaptive_avg_pool2d(x, pool_size).flatten(1), fc)
    z = F.conv2d(x, q.flatten(1)[:, :, None, None], None, (stride_y, stride_x))
    (s1, t1), (s2, t2) = _affine(norm1, eps1), _affine(norm2, eps2)
    u = z.flatten(2) * s1[:, None] + t1[:, None]
    v = torch.bmm(phi, u) * s2[:, None] + t2[:, None] + u
    y.mul_(scale[:, :, None, None]).add_(F.conv2d(v.view(z.shape), p.flatten(1)[:, :, None, None]))


def dcd_pointwise_reference(
    x: Tensor,
    fc: list[Tensor],
    q: Tensor,
    norm1: list[Tensor],
    norm2: list[Tensor],
    eps1: float,
    eps2: float,
    pool_size: int,
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    """Defines `torch.ops.timm_dynamic.dcd_pointwise`.

    Its compiled kernel makes a weight for every sample where maps are large beside it.

    Args:
        x, fc, q, norm1, norm2, eps1, eps2, pool_size, p: As for `dcd_branch_reference`.
        weight, bias: `[O, C, 1, 1]` and `[O]`.
        norm_scale, norm_shift, low, high: The output is `clamp(norm_scale * y + norm_shift)`; `[O]` each or None, and
            limits.

    Returns:
        `[B, O, H, W]`.
    """
    y = F.conv2d(x, weight, bias)
    dcd_branch_reference(x, fc, q, norm1, norm2, eps1, eps2, pool_size, p, 1, 1, y)
    return affine(y, norm_scale, norm_shift, low, high)


def dcd_sample_weights_reference(
    x: Tensor,
    fc: list[Tensor],
    q: Tensor,
    norm1: list[Tensor],
    norm2: list[Tensor],
    eps1: float,
    eps2: float,
    pool_size: int,
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Defines `torch.ops.timm_dynamic.dcd_sample_weights`.

    Args:
        x, fc, q, norm1, norm2, eps1, eps2, pool_size, p: As for `dcd_branch_reference`.
        weight, bias: `[O, C, Kh, Kw]` and `[O]`.

    Returns:
        Weights `[B, O, C, Kh, Kw]` and biases `[B, O]`.
    """
    phi, scale = factors(F.adaptive_avg_pool2d(x, pool_size).flatten(1), fc)
    (s1, t1), (s2, t2) = _affine(norm1, eps1), _affine(norm2, eps2)
    # The branch is affine, v = R Q x + r. Its columns, and r as one more: (S2 Phi + I) [S1 Q, t1] + [0, t2].
    base = torch.cat([q.flatten(1) * s1[:, None], t1[:, None]], 1).expand(x.shape[0], -1, -1)
    v = torch.baddbmm(base, phi * s2[:, None], base)
    v[:, :, -1] += t2
    v = torch.bmm(p.flatten(1).expand(x.shape[0], -1, -1), v)
    weights = weight * scale[:, :, None, None, None]
    weights[:, :, :, weight.shape[2] // 2, weight.shape[3] // 2].add_(v[:, :, :-1])
    biases = v[:, :, -1] if bias is None else torch.addcmul(v[:, :, -1], scale, bias)
    return weights, biases.contiguous()


_COMMON = (
    "Tensor x, Tensor[] fc, Tensor q, Tensor[] norm1, Tensor[] norm2, float eps1, float eps2, int pool_size, Tensor p"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    f"{NAMESPACE}::dcd_branch_", f"({_COMMON}, int stride_y, int stride_x, Tensor(a!) y) -> ()", tags=_TAGS
)
torch.library.define(
    f"{NAMESPACE}::dcd_pointwise",
    f"({_COMMON}, Tensor weight, Tensor? bias, Tensor? norm_scale, Tensor? norm_shift, float low, "
    "float high) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    f"{NAMESPACE}::dcd_sample_weights", f"({_COMMON}, Tensor weight, Tensor? bias) -> (Tensor, Tensor)", tags=_TAGS
)
torch.library.define(f"{NAMESPACE}::dcd_factors", "(Tensor x, Tensor[] fc) -> (Tensor, Tensor)", tags=_TAGS)
torch.library.impl(f"{NAMESPACE}::dcd_factors", "CompositeExplicitAutograd")(dcd_factors_reference)
torch.library.impl(f"{NAMESPACE}::dcd_branch_", "CompositeExplicitAutograd")(dcd_branch_reference)
torch.library.impl(f"{NAMESPACE}::dcd_pointwise", "CompositeExplicitAutograd")(dcd_pointwise_reference)
torch.library.impl(f"{NAMESPACE}::dcd_sample_weights", "CompositeExplicitAutograd")(dcd_sample_weights_reference)


@torch.library.register_fake(f"{NAMESPACE}::dcd_factors")
def _dcd_factors_fake(x, fc):
    L = int(fc[2].shape[0] ** 0.5 + 0.5)
    return fc[0].new_empty(x.shape[0], L, L), fc[0].new_empty(x.shape[0], fc[3].shape[0])


@torch.library.register_fake(f"{NAMESPACE}::dcd_branch_")
def _dcd_branch_fake(x, fc, q, norm1, norm2, eps1, eps2, pool_size, p, stride_y, stride_x, y):
    return None


@torch.library.register_fake(f"{NAMESPACE}::dcd_pointwise")
def _dcd_pointwise_fake(x, fc, q, norm1, norm2, eps1, eps2, pool_size, p, weight, *others):
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


@torch.library.register_fake(f"{NAMESPACE}::dcd_sample_weights")
def _dcd_sample_weights_fake(x, fc, q, norm1, norm2, eps1, eps2, pool_size, p, weight, bias):
    return x.new_empty(x.shape[0], *weight.shape), x.new_empty(x.shape[0], weight.shape[0])
