"""`scaled_sum`: DCD's two terms behind its convolution, each sample's outputs rescaled and mixed with latent channels.

    out[b,o,i] = scale[b,o] * y[b,o,i] + sum_l p[o,l] * v[b,l,i]

over positions i (Li et al., "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021). One pass over the
maps, and over `y` and the incoming gradient going back, where a product and a sum make two.
"""

import torch
from torch import Tensor

from timm_dynamic.ops._library import CUDA_DTYPES, NAMESPACE, accumulation_dtype, counting_operations, has_kernel
from timm_dynamic.ops.ddf import _memory_format

_MAX_SIZE = 2**24  # what the kernels take of positions


def serves(y: Tensor, scale: Tensor, p: Tensor, v: Tensor) -> bool:
    """Whether the operator should take the place of a product and a sum: on a GPU, with kernels that know these."""
    return (
        y.device.type == "cuda"
        and y.dtype in CUDA_DTYPES
        and scale.dtype == p.dtype == v.dtype
        and scale.dtype in (torch.float32, y.dtype)
        and y.shape[2] * y.shape[3] < _MAX_SIZE
        and has_kernel("cuda")
        and not counting_operations()
        and not torch.onnx.is_in_onnx_export()
        and not torch.jit.is_tracing()
    )


def scaled_sum_reference(y: Tensor, scale: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.scaled_sum`, differentiable.

    Sums run in float32, or float64 for float64 inputs. What is not float32 beside maps of 16 bits is cast to their
    dtype before it is multiplied.

    Args:
        y: `[B, O, H, W]`; the result has its dtype and memory format.
        scale: `[B, O]`.
        p: `[O, L, 1, 1]` or `[O, L]`.
        v: `[B, L, H, W]` or `[B, L, H * W]`. Of one dtype with `scale` and `p`: float32, or that of `y`.

    Returns:
        `[B, O, H, W]`.
    """
    dtype = accumulation_dtype(y)
    product = torch.matmul(p.flatten(1).to(y.dtype).to(dtype), narrowed(v.flatten(2), y.dtype).to(dtype))
    out = scale.to(dtype)[:, :, None, None] * y.to(dtype) + product.view(y.shape)
    return out.to(y.dtype).contiguous(memory_format=_memory_format(y))


def _scaled_sum_backward_reference(grad: Tensor, y: Tensor, scale: Tensor, p: Tensor, v: Tensor):
    dtype = accumulation_dtype(y)
    wide = grad.to(dtype)
    dy = (scale.to(dtype)[:, :, None, None] * wide).to(y.dtype).contiguous(memory_format=_memory_format(y))
    dscale = (wide * y.to(dtype)).sum((2, 3)).to(scale.dtype)
    dv = torch.matmul(p.flatten(1).t().to(y.dtype).to(dtype), wide.flatten(2)).to(v.dtype)
    return dy, dscale, dv.reshape(v.shape)


def grad_p(grad: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """The gradient of `p` for that of the sum."""
    v = narrowed(v.flatten(2), grad.dtype)
    return torch.bmm(grad.flatten(2), v.mT).sum(0, dtype=p.dtype).view(p.shape)


def narrowed(v: Tensor, dtype: torch.dtype) -> Tensor:
    """`v` in another dtype; float16 would make infinity of large numbers, and their product NaN."""
    if dtype == torch.float16 != v.dtype:
        v = v.clamp(-65504, 65504)
    return v.to(dtype)


# Registration: the schema, and what torch.compile and autograd need to know.

_TENSORS = "Tensor y, Tensor scale, Tensor p, Tensor v"
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(f"{NAMESPACE}::scaled_sum", f"({_TENSORS}) -> Tensor", tags=_TAGS)
torch.library.define(
    f"{NAMESPACE}::scaled_sum_backward", f"(Tensor grad, {_TENSORS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS
)
torch.library.impl(f"{NAMESPACE}::scaled_sum", "CompositeExplicitAutograd")(scaled_sum_reference)
torch.library.impl(f"{NAMESPACE}::scaled_sum_backward", "CompositeExplicitAutograd")(_scaled_sum_backward_reference)


@torch.library.register_fake(f"{NAMESPACE}::scaled_sum")
def _scaled_sum_fake(y, scale, p, v):
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=_memory_format(y))


@torch.library.register_fake(f"{NAMESPACE}::scaled_sum_backward")
def _scaled_sum_backward_fake(grad, y, scale, p, v):
    return _scaled_sum_fake(y, scale, p, v), scale.new_empty(scale.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    needs, (y, scale, p, v) = ctx.needs_input_grad, ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: the reference can be differentiated again
        wanted = [t for t, need in zip(ctx.saved_tensors, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(scaled_sum_reference(y, scale, p, v), wanted, grad, create_graph=True))
        return tuple(next(grads) if need else None for need in needs)
    dy, dscale, dv = torch.ops.timm_dynamic.scaled_sum_backward(grad, y, scale, p, v)
    return dy, dscale, grad_p(grad, p, v) if needs[2] else None, dv


torch.library.register_autograd(f"{NAMESPACE}::scaled_sum", _autograd, setup_context=_setup_context)
