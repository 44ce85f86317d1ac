"""A 1x1 convolution with scaled inputs and outputs, and a second one added to it: what DCD is made of.

    scaled_pointwise: out[b] = clamp(out_scale[b] * (weight . (in_scale[b] * x[b])) + p . v[b] + shift[b])

(Li et al., "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021, and its gradient.) One pass over the
maps, which writes the output once. `scaled_pointwise_grads` gives the gradients of the matrices, without a gradient of
the weight for every sample in memory.
"""

import torch
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE, has_kernel


def scaled_pointwise_reference(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    p: Tensor | None,
    v: Tensor | None,
    shift: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    """Defines `torch.ops.timm_dynamic.scaled_pointwise`.

    Args:
        x: `[B, C, H, W]`.
        weight: `[O, C]`, or `[B, O, C]`: one for every sample.
        in_scale: `[B, C]`.
        out_scale: `[B, O]`.
        p: `[O, L]`.
        v: `[B, L, H * W]`.
        shift: `[B, O]`.
        low, high: Limits of the result.

    Returns:
        `[B, O, H, W]`.
    """
    columns = x.flatten(2)
    out = torch.matmul(weight, columns if in_scale is None else columns * in_scale[:, :, None])
    if out_scale is not None:
        out = out * out_scale[:, :, None]
    if p is not None:
        out = out + torch.matmul(p, v)
    if shift is not None:
        out = out + shift[:, :, None]
    return out.clamp(low, high).view(len(x), -1, *x.shape[2:])


def scaled_pointwise_grads_reference(
    grad: Tensor, dz: Tensor, x: Tensor, v: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Defines `torch.ops.timm_dynamic.scaled_pointwise_grads`.

    Args:
        grad: `[B, O, H, W]`, of `scaled_pointwise(x, weight, None, scale, p, v, ...)`.
        dz: `[B, L, H * W]`, the gradient of `q . x`.
        x: `[B, C, H, W]`.
        v: `[B, L, H * W]`.
        scale: `[B, O]`.
        weight: `[O, C]`.

    Returns:
        The gradients of `weight`, `scale`, `p`, `[O, L]`, and `q`, `[L, C]`.
    """
    grad, columns = grad.flatten(2), x.flatten(2).mT
    each = torch.bmm(grad, columns)
    dweight, dscale = (each * scale[:, :, None]).sum(0), (each * weight).sum(2)
    return dweight, dscale, torch.bmm(grad, v.mT).sum(0), torch.bmm(dz, columns).sum(0)


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    f"{NAMESPACE}::scaled_pointwise",
    "(Tensor x, Tensor weight, Tensor? in_scale, Tensor? out_scale, Tensor? p, Tensor? v, Tensor? shift, float low, "
    "float high) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    f"{NAMESPACE}::scaled_pointwise_grads",
    "(Tensor grad, Tensor dz, Tensor x, Tensor v, Tensor scale, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.impl(f"{NAMESPACE}::scaled_pointwise", "CompositeExplicitAutograd")(scaled_pointwise_reference)
torch.library.impl(f"{NAMESPACE}::scaled_pointwise_grads", "CompositeExplicitAutograd")(
    scaled_pointwise_grads_reference
)


@torch.library.register_fake(f"{NAMESPACE}::scaled_pointwise")
def _scaled_pointwise_fake(x, weight, *others):
    return x.new_empty(x.shape[0], weight.shape[-2], *x.shape[2:])


@torch.library.register_fake(f"{NAMESPACE}::scaled_pointwise_grads")
def _scaled_pointwise_grads_fake(grad, dz, x, v, scale, weight):
    L = v.shape[1]
    return torch.empty_like(weight), torch.empty_like(scale), x.new_empty(len(weight), L), x.new_empty(L, x.shape[1])


def scaled_pointwise_serves(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> bool:
    """Whether the CPU kernels serve for a convolution of this kind without groups, `[O, C, Kh, Kw]`."""
    pointwise = weight.shape[2:] == (1, 1) == tuple(stride) and x.numel() > 0
    dense = x.dtype == weight.dtype == torch.float32 and x.is_contiguous() and weight.is_contiguous()
    return pointwise and dense and x.device.type == "cpu" and has_kernel("cpu")
