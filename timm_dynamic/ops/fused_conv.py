"""Convolutions with a weight per sample that is never in memory, for `mixed_conv2d` and `factored_conv2d` on a GPU.

    out[b,o] = sum_{t,i} weight[b,t,o,i] * x[b,i] shifted by tap t
    weight[b,t,o,i] = sum_n attention[b,n] * kernels[n,t,o,i]                ("mixed")
    weight[b,t,o,i] = kernel[t,o,i] * pairs[b,t,i] * gates[b,o]              ("gated")

The CUDA kernels form tiles of the weights, in float32 and rounded once, right where tensor cores multiply by them. They
take float16 and bfloat16 in channels_last. The gradient of `x` is such a convolution too, with a transposed window; the
others are the sums that the formulas say, over weight gradients that are not in memory either.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE, has_kernel
from timm_dynamic.ops.per_sample_conv import Pair, memory_format, output_size

# Where the kernels serve. None of these was chosen by measuring: a GPU session may turn or move them.
ENABLED = True
LEAST_BATCH = 8  # with fewer, deep layers do not fill a GPU, and few calls do with weights in memory
MOST_KERNELS = 8  # that can be mixed: registers
LONGEST_SIDE = 2**14  # of a map, and the most of any option: 16-bit coordinates
MULTIPLE = 8  # of channels: 16 bytes


def serves(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> bool:
    """Whether the kernels take this input and weights like `weight`, `[..., Co, Ci, Kh, Kw]`.

    Asks nothing of the batch, whose size may be unknown in a graph.
    """
    return (
        ENABLED
        and groups == 1
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[1] % MULTIPLE == 0
        and weight.shape[-4] % MULTIPLE == 0
        and _has_tensor_cores(x.device)
        and max(*x.shape[2:], *weight.shape[-2:], *stride, *padding, *dilation) <= LONGEST_SIDE
        and max(output_size(x.shape[2:], weight.shape[-2:], stride, padding, dilation)) <= LONGEST_SIDE
        and memory_format(x) == torch.channels_last
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _has_tensor_cores(device: torch.device) -> bool:
    """That multiply bfloat16, and kernels that use them."""
    return device.type == "cuda" and has_kernel("cuda") and _capability(device) >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


def mixed(x: Tensor, attention: Tensor, kernels: Tensor, *options: Pair) -> Tensor:
    """`mixed_conv2d`; the options are stride, padding and dilation."""
    kernel_size = kernels.shape[3:]
    size = output_size(x.shape[2:], kernel_size, *options)
    tensors = _aligned(x), attention.float().contiguous(), _packed(kernels)
    return torch.ops.timm_dynamic.fused_mixed_conv(*tensors, size, kernel_size, *options, False)


def mixed_backward(
    grad: Tensor, x: Tensor, attention: Tensor, kernels: Tensor, *options: Pair, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, attention and kernels, or None."""
    kernel_size = kernels.shape[3:]
    grad, x, factors = _aligned(grad), _aligned(x), attention.float().contiguous()
    grad_x = grad_attention = grad_kernels = None
    if needs[0]:
        arguments = grad, factors, _packed(kernels, transposed=True), x.shape[2:], kernel_size, *options, True
        grad_x = torch.ops.timm_dynamic.fused_mixed_conv(*arguments)
    if needs[1] or needs[2]:
        tensors = grad, x, factors, _packed(kernels)
        grads = torch.ops.timm_dynamic.fused_mixed_conv_gradients(*tensors, kernel_size, *options)
        grad_attention = grads[0].to(attention.dtype)
        grad_kernels = _unpack(grads[1], torch.empty_like(kernels, memory_format=torch.contiguous_format))
    return grad_x, grad_attention, grad_kernels


def gated(x: Tensor, weight: Tensor, a_in: Tensor, a_tap: Tensor, a_out: Tensor, *options: Pair) -> Tensor:
    """`factored_conv2d` with gates of rank 1; the options are stride, padding and dilation."""
    kernel_size = weight.shape[2:]
    size = output_size(x.shape[2:], kernel_size, *options)
    tensors = _aligned(x), *_gates(a_tap, a_in, a_out), _packed(weight[None])
    return torch.ops.timm_dynamic.fused_gated_conv(*tensors, size, kernel_size, *options, False)


def gated_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a_in: Tensor,
    a_tap: Tensor,
    a_out: Tensor,
    *options: Pair,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The gradients of x (or None), of weight, of `a_tap[b,k] * a_in[b,i]` as `[B, Kh * Kw, C]`, and of a_out."""
    kernel_size = weight.shape[2:]
    grad, x = _aligned(grad), _aligned(x)
    grad_x = None
    if need_x:
        tensors = grad, *_gates(a_tap, a_out, a_in), _packed(weight[None], transposed=True)
        grad_x = torch.ops.timm_dynamic.fused_gated_conv(*tensors, x.shape[2:], kernel_size, *options, True)
    tensors = grad, x, *_gates(a_tap, a_in, a_out), _packed(weight[None])
    grads = torch.ops.timm_dynamic.fused_gated_conv_gradients(*tensors, kernel_size, *options)
    grad_pairs, grad_gates, grad_kernel = grads
    grad_weight = _unpack(grad_kernel, torch.empty_like(weight)[None])[0]
    return grad_x, grad_weight, grad_pairs.to(a_in.dtype), grad_gates[..., None].to(a_out.dtype)


def _packed(kernels: Tensor, transposed: bool = False) -> Tensor:
    """`[N, Co, Ci, Kh, Kw]` as `[N, Kh * Kw, Co, Ci]`, or `[N, Kh * Kw, Ci, Co]`, in float32."""
    order = (0, 3, 4, 2, 1) if transposed else (0, 3, 4, 1, 2)
    return _aligned(kernels.permute(order).float().contiguous().flatten(1, 2))


def _unpack(packed: Tensor, out: Tensor) -> Tensor:
    """Back to `[N, Co, Ci, Kh, Kw]`; returns `out`."""
    return out.copy_(packed.permute(0, 2, 3, 1).unflatten(3, out.shape[3:]))


def _gates(a_tap: Tensor, of_inputs: Tensor, of_outputs: Tensor) -> tuple[Tensor, Tensor]:
    """`pairs` and `gates` of the formula."""
    pairs = (a_tap * of_inputs.mT).float().contiguous()
    return pairs, of_outputs[..., 0].float().contiguous()


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


# What the operators compute, in plain PyTorch.


def fused_mixed_conv_reference(
    x: Tensor,
    attention: Tensor,
    kernels: Tensor,
    size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    transposed: bool,
) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.fused_mixed_conv`.

    Args:
        x: `[B, C, H, W]`.
        attention: `[B, N]`.
        kernels: `[N, Kh * Kw, Co, C]`.
        size: Of the output.
        kernel_size, stride, padding, dilation: Of the convolution.
        transposed: Whether the convolution is from `size` to that of x, and this the gradient of its input.

    Returns:
        `[B, Co, *size]` in channels_last.
    """
    weights = torch.einsum("bn,ntoi->btoi", attention, kernels)
    return _convolve(x, weights, size, kernel_size, stride, padding, dilation, transposed)


def fused_gated_conv_reference(
    x: Tensor,
    pairs: Tensor,
    gates: Tensor,
    kernel: Tensor,
    size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    transposed: bool,
) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.fused_gated_conv`.

    Args:
        x: `[B, C, H, W]`.
        pairs: `[B, Kh * Kw, C]`.
        gates: `[B, Co]`.
        kernel: `[1, Kh * Kw, Co, C]`.
        size, kernel_size, stride, padding, dilation, transposed: As for `fused_mixed_conv_reference`.

    Returns:
        `[B, Co, *size]` in channels_last.
    """
    weights = kernel * pairs[:, :, None] * gates[:, None, :, None]
    return _convolve(x, weights, size, kernel_size, stride, padding, dilation, transposed)


def fused_mixed_conv_gradients_reference(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    kernels: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Tensor]:
    """Defines the operator `torch.ops.timm_dynamic.fused_mixed_conv_gradients`: those of attention and kernels."""
    of_weights = _weight_gradients(grad, x, kernels, kernel_size, stride, padding, dilation)
    return (
        torch.einsum("btoi,ntoi->bn", of_weights, kernels).contiguous(),
        torch.einsum("btoi,bn->ntoi", of_weights, attention).contiguous(),
    )


def fused_gated_conv_gradients_reference(
    grad: Tensor,
    x: Tensor,
    pairs: Tensor,
    gates: Tensor,
    kernel: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Tensor, Tensor]:
    """Defines the operator `torch.ops.timm_dynamic.fused_gated_conv_gradients`: those of pairs, gates and kernel."""
    of_weights = _weight_gradients(grad, x, kernel, kernel_size, stride, padding, dilation)
    return (
        torch.einsum("btoi,toi,bo->bti", of_weights, kernel[0], gates).contiguous(),
        torch.einsum("btoi,toi,bti->bo", of_weights, kernel[0], pairs).contiguous(),
        torch.einsum("btoi,bti,bo->toi", of_weights, pairs, gates).contiguous()[None],
    )


def _convolve(x, weights, size, kernel_size, stride, padding, dilation, transposed):
    B, _, Co, _ = weights.shape
    weights = weights.to(x.dtype).unflatten(1, tuple(kernel_size)).permute(0, 3, 4, 1, 2)
    samples = x.flatten(0, 1)[None]
    if transposed:
        least = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, k, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
        ]
        more = [n - m for n, m in zip(size, least, strict=True)]
        weights = weights.transpose(1, 2).flatten(0, 1)
        out = F.conv_transpose2d(samples, weights, None, stride, padding, more, B, dilation)
    else:
        out = F.conv2d(samples, weights.flatten(0, 1), None, stride, padding, dilation, B)
    return out.view(B, Co, *size).contiguous(memory_format=torch.channels_last)


def _weight_gradients(grad, x, kernels, kernel_size, stride, padding, dilation):
    """`[B, Kh * Kw, Co, C]`."""
    B, C, Co = len(x), x.shape[1], grad.shape[1]
    grad, x = (t.to(kernels.dtype).flatten(0, 1)[None] for t in (grad, x))
    grads = torch.nn.grad.conv2d_weight(x, (B * Co, C, *kernel_size), grad, stride, padding, dilation, B)
    return grads.view(B, Co, C, -1).permute(0, 3, 1, 2)


# Registration. The operators run below the autograd of `mixed_conv2d` and `factored_conv2d` and need none of their own.

_OPTIONS = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"
_MIXED, _GATED = "Tensor attention, Tensor kernels", "Tensor pairs, Tensor gates, Tensor kernel"


def _register(name: str, schema: str, reference) -> None:
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"{NAMESPACE}::{name}", "CompositeExplicitAutograd")(reference)


for _name, _tensors, _reference in (
    ("fused_mixed_conv", _MIXED, fused_mixed_conv_reference),
    ("fused_gated_conv", _GATED, fused_gated_conv_reference),
):
    _register(_name, f"(Tensor x, {_tensors}, int[2] size, {_OPTIONS}, bool transposed) -> Tensor", _reference)

_register(
    "fused_mixed_conv_gradients",
    f"(Tensor grad, Tensor x, {_MIXED}, {_OPTIONS}) -> (Tensor, Tensor)",
    fused_mixed_conv_gradients_reference,
)
_register(
    "fused_gated_conv_gradients",
    f"(Tensor grad, Tensor x, {_GATED}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fused_gated_conv_gradients_reference,
)


@torch.library.register_fake(f"{NAMESPACE}::fused_mixed_conv")
def _mixed_fake(x, attention, kernels, size, kernel_size, stride, padding, dilation, transposed):
    return _empty_output(x, kernels, size)


@torch.library.register_fake(f"{NAMESPACE}::fused_gated_conv")
def _gated_fake(x, pairs, gates, kernel, size, kernel_size, stride, padding, dilation, transposed):
    return _empty_output(x, kernel, size)


def _empty_output(x, kernels, size):
    shape = (x.shape[0], kernels.shape[2], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake(f"{NAMESPACE}::fused_mixed_conv_gradients")
def _mixed_gradients_fake(grad, x, attention, kernels, kernel_size, stride, padding, dilation):
    return torch.empty_like(attention), torch.empty_like(kernels)


@torch.library.register_fake(f"{NAMESPACE}::fused_gated_conv_gradients")
def _gated_gradients_fake(grad, x, pairs, gates, kernel, kernel_size, stride, padding, dilation):
    return torch.empty_like(pairs), torch.empty_like(gates), torch.empty_like(kernel)
