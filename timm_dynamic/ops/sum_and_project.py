"""`sum_and_project`: what the dynamic branch of a DCD convolution reads from its input, in one pass over it.

    sums[b,c] = sum_i x[b,c,i]        z[b,l,i] = sum_c q[l,c] * x[b,c,i]

over positions i. Its gradient with respect to `x` is one pass too, and what `timm_dynamic.ops.scaled_sum` computes.
"""

import torch
from torch import Tensor

from timm_dynamic.ops import scaled_sum
from timm_dynamic.ops._library import NAMESPACE, accumulation_dtype
from timm_dynamic.ops.ddf import _memory_format


def serves(x: Tensor, q: Tensor) -> bool:
    """Whether the operator should take the place of a mean and a convolution: as for `scaled_sum`."""
    return scaled_sum.serves(x, q, q, q)


def sum_and_project_reference(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Defines the operator `torch.ops.timm_dynamic.sum_and_project`, differentiable.

    Sums run in float32, or float64 for float64 inputs. What is not float32 beside an `x` of 16 bits is cast to its
    dtype before it is multiplied.

    Args:
        x: `[B, C, H, W]`.
        q: `[L, C, 1, 1]` or `[L, C]`, of the dtype of `x` or float32.

    Returns:
        The sums, `[B, C]`, in the dtype in which they run, and `[B, L, H, W]`, in that of `q`.
    """
    dtype = accumulation_dtype(x)
    z = torch.matmul(q.flatten(1).to(x.dtype).to(dtype), x.flatten(2).to(dtype))
    return x.sum((2, 3), dtype=dtype), z.to(q.dtype).view(len(x), len(q), *x.shape[2:])


def _sum_and_project_backward_reference(dsums: Tensor, dz: Tensor, x: Tensor, q: Tensor) -> Tensor:
    ones = torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
    out = scaled_sum.scaled_sum_reference(ones, dsums.to(q.dtype), q.flatten(1).t(), dz)
    return out.contiguous(memory_format=_memory_format(x))


# Registration: the schema, and what torch.compile and autograd need to know.

_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(f"{NAMESPACE}::sum_and_project", "(Tensor x, Tensor q) -> (Tensor, Tensor)", tags=_TAGS)
torch.library.define(
    f"{NAMESPACE}::sum_and_project_backward", "(Tensor dsums, Tensor dz, Tensor x, Tensor q) -> Tensor", tags=_TAGS
)
torch.library.impl(f"{NAMESPACE}::sum_and_project", "CompositeExplicitAutograd")(sum_and_project_reference)
torch.library.impl(f"{NAMESPACE}::sum_and_project_backward", "CompositeExplicitAutograd")(
    _sum_and_project_backward_reference
)


@torch.library.register_fake(f"{NAMESPACE}::sum_and_project")
def _sum_and_project_fake(x, q):
    sums = x.new_empty(x.shape[:2], dtype=accumulation_dtype(x))
    return sums, q.new_empty(x.shape[0], q.shape[0], *x.shape[2:])


@torch.library.register_fake(f"{NAMESPACE}::sum_and_project_backward")
def _sum_and_project_backward_fake(dsums, dz, x, q):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dsums, dz):
    needs, (x, q) = ctx.needs_input_grad, ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: the reference can be differentiated again
        wanted = [t for t, need in zip((x, q), needs, strict=True) if need]
        grads = iter(torch.autograd.grad(sum_and_project_reference(x, q), wanted, (dsums, dz), create_graph=True))
        return tuple(next(grads) if need else None for need in needs)
    dx = torch.ops.timm_dynamic.sum_and_project_backward(dsums, dz, x, q) if needs[0] else None
    return dx, scaled_sum.grad_p(x, q.flatten(1).t(), dz).t().reshape(q.shape) if needs[1] else None


torch.library.register_autograd(f"{NAMESPACE}::sum_and_project", _autograd, setup_context=_setup_context)
