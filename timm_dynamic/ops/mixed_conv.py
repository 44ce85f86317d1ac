"""Convolution whose weight is, for every sample, its own mixture of a few kernels:

    out[b] = conv2d(x[b], sum_n attention[b,n] * kernels[n])

(Chen et al., "Dynamic Convolution: Attention over Convolution Kernels", CVPR 2020, eq. 4). The mixing is one product of
small matrices. The `[B, Co, Ci, Kh, Kw]` weights are there for a few samples at a time; the backward pass mixes again.
On a GPU the kernels of `fused_conv` do without them where these serve.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops import fused_conv
from timm_dynamic.ops._autocast import autocast_dtype, no_autocast
from timm_dynamic.ops._library import NAMESPACE, has_kernel
from timm_dynamic.ops._linear import by_onednn, linear
from timm_dynamic.ops.affine import NO_NORM, affine
from timm_dynamic.ops.dynamic_filter.definition import DTYPES
from timm_dynamic.ops.per_sample_conv import (
    _GROUPED_WEIGHTS,
    Pair,
    memory_format,
    output_size,
    per_sample_conv2d,
    per_sample_conv2d_reference,
)

# Mixed weights that are there at a time. At least four samples are mixed together, as every mixing reads all kernels.
_CHUNK = {"cpu": 2**22, "cuda": 2**27}


def mixed_conv2d(
    x: Tensor,
    attention: Tensor,
    kernels: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve every sample with its own mixture of the kernels.

    In training only the arguments are kept for the backward pass. The kernels are mixed in their own precision and cast
    to that of `x` afterwards. Under autocast `x` is cast.

    Args:
        x: `[B, C, H, W]`; the output has its dtype and memory format.
        attention: `[B, N]`.
        kernels: `[N, Co, C // groups, Kh, Kw]`.
        stride, padding, dilation, groups: As for `conv2d`; the padding is of zeros.

    Returns:
        `[B, Co, Ho, Wo]`.

    Raises:
        ValueError: If the shapes do not fit together or the input is smaller than the kernel.
    """
    x = x.to(autocast_dtype(x))
    _check(x, attention, kernels, stride, padding, dilation, groups)
    arguments = (x, attention, kernels, stride, padding, dilation, groups)
    if torch.onnx.is_in_onnx_export():
        return mixed_conv2d_reference(*arguments)
    return torch.ops.timm_dynamic.mixed_conv2d(*arguments)


def mixed_conv2d_reference(
    x: Tensor,
    attention: Tensor,
    kernels: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The same as `mixed_conv2d` in plain differentiable PyTorch."""
    N, Co, Ci = kernels.shape[:3]
    if Ci == 1:  # depthwise: mixing the outputs of all kernels is the smaller graph, and faster than gathering taps
        stacked = kernels.transpose(0, 1).flatten(0, 1).to(x.dtype)
        out = F.conv2d(x, stacked, None, stride, padding, dilation, groups)
        out = out.view(-1, Co, N, out.shape[2], out.shape[3])
        return (out * attention[:, None, :, None, None].to(x.dtype)).sum(2)
    return per_sample_conv2d_reference(x, _mix(attention, kernels, x.dtype), stride, padding, dilation, groups)


def _check(x, attention, kernels, stride, padding, dilation, groups) -> None:
    N, _, Ci, Kh, Kw = kernels.shape
    if x.ndim != 4 or x.shape[1] != Ci * groups:
        raise ValueError(f"x must be [B, {Ci * groups}, H, W], got shape {list(x.shape)}")
    if attention.shape != (x.shape[0], N):
        raise ValueError(f"attention must be [{x.shape[0]}, {N}], got shape {list(attention.shape)}")
    if min(output_size(x.shape[2:], (Kh, Kw), stride, padding, dilation)) < 1:
        raise ValueError(
            f"x of size {list(x.shape[2:])} is too small for a {Kh}x{Kw} kernel with padding {padding} and "
            f"dilation {dilation}"
        )


def _mix(attention: Tensor, kernels: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, Co, Ci, Kh, Kw]`."""
    mixed = torch.matmul(attention.to(kernels.dtype), kernels.flatten(1))
    return mixed.view(-1, *kernels.shape[1:]).to(dtype)


# What the operator runs: below autograd, so that only what is returned can be kept.


def _forward(x, attention, kernels, stride, padding, dilation, groups):
    options = (stride, padding, dilation, groups)
    if x.shape[0] == 0:
        return _empty_output(x, attention, kernels, *options)
    pointwise = _is_pointwise(kernels, padding, groups)
    if pointwise and mixed_pointwise_serves(x, kernels) and attention.dtype == torch.float32:
        strided = x[:, :, :: stride[0], :: stride[1]].contiguous()
        return torch.ops.timm_dynamic.mixed_pointwise(strided, attention.contiguous(), kernels, *NO_NORM)
    if not pointwise and _fused_serves(x, kernels, *options):
        return fused_conv.mixed(x, attention, kernels, stride, padding, dilation)
    by = _pointwise if pointwise else _depthwise if _is_ddf(x, kernels, *options) else per_sample_conv2d
    with no_autocast(x):
        if x.shape[0] == 1 and not (by is _pointwise and by_onednn(x)):
            weight = _mix(attention, kernels, x.dtype)[0]
            return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, (0, 0), groups)
        return _joined([by(x[part], _mix(attention[part], kernels, x.dtype), *options) for part in _parts(x, kernels)])


def _backward(grad, x, attention, kernels, stride, padding, dilation, groups, needs):
    if x.shape[0] == 0:
        return tuple(t.zero_() for t in _empty_gradients(x, attention, kernels, needs))
    options = (stride, padding, dilation, groups)
    pointwise = _is_pointwise(kernels, padding, groups)
    if not pointwise and _fused_serves(x, kernels, *options):
        grad = grad.contiguous(memory_format=torch.channels_last)
        grads = fused_conv.mixed_backward(grad, x, attention, kernels, *options[:3], needs=needs)
        inputs = (x, attention, kernels)
        return tuple(g if need else t.new_empty(0) for t, g, need in zip(inputs, grads, needs, strict=True))
    separate = _depthwise_backward if _is_ddf(x, kernels, *options) else _convolution_backward
    by = _pointwise_backward if pointwise else separate
    grad_x, grad_attention, grad_kernels = _empty_gradients(x, attention, kernels, needs)
    grad_kernels.zero_()
    grads_x = []
    grad = grad.contiguous(memory_format=memory_format(x))
    with no_autocast(x):
        for part in _parts(x, kernels):
            weight = _mix(attention[part], kernels, x.dtype)
            part_grad_x, grad_weight = by(grad[part], x[part], weight, stride, padding, dilation, groups, needs[0])
            grads_x.append(part_grad_x)
            grad_weight = grad_weight.to(kernels.dtype).flatten(1)
            if needs[1]:
                grad_attention[part] = torch.matmul(grad_weight, kernels.flatten(1).t())
            if needs[2]:
                grad_kernels.view(len(kernels), -1).addmm_(attention[part].to(kernels.dtype).t(), grad_weight)
    if needs[0]:
        grad_x = _joined(grads_x).contiguous(memory_format=memory_format(x))
    return grad_x, grad_attention, grad_kernels


def _pointwise(x, weight, stride, padding, dilation, groups):
    x = x[:, :, :: stride[0], :: stride[1]]
    B, Co, (H, W) = x.shape[0], weight.shape[1], x.shape[2:]
    if B == 1 and by_onednn(x):  # without a copy
        columns, matrix = x[0].flatten(1), weight[0].flatten(1)
        if memory_format(x) == torch.channels_last:
            return linear(columns.t(), matrix).view(1, H, W, Co).permute(0, 3, 1, 2)
        return linear(matrix, columns.t()).view(1, Co, H, W)
    out = torch.empty((B, Co, H, W), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    _matmul(weight.flatten(2), x.flatten(2), out.flatten(2))
    return out


def _pointwise_backward(grad, x, weight, stride, padding, dilation, groups, need_x):
    strided = x[:, :, :: stride[0], :: stride[1]]
    columns, grad_columns = strided.flatten(2), grad.flatten(2)
    grad_weight = weight.new_empty(weight.shape[:3])
    _matmul(grad_columns, columns.mT, grad_weight)
    if not need_x:
        return None, grad_weight
    grad_x = torch.empty_like(strided, memory_format=memory_format(x))
    _matmul(weight.flatten(2).mT, grad_columns, grad_x.flatten(2))
    if tuple(stride) != (1, 1):
        whole = torch.zeros_like(x)
        whole[:, :, :: stride[0], :: stride[1]] = grad_x
        grad_x = whole
    return grad_x, grad_weight


def _convolution_backward(grad, x, weight, stride, padding, dilation, groups, need_x):
    """All samples as groups, or one by one: as `per_sample_conv2d` does."""
    B, Co, Ci, Kh, Kw = weight.shape
    n = B if Ci == 1 or Co * Ci * Kh * Kw <= _GROUPED_WEIGHTS else 1
    grads_x, grads_weight = [], []
    for first in range(0, B, n):
        part = slice(first, first + n)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(t[part].flatten(0, 1)[None] for t in (grad, x)),
            *(weight[part].flatten(0, 1), None, stride, padding, dilation, False, (0, 0), n * groups),
            (need_x, True, False),
        )
        grads_x.append(grad_x.view(n, *x.shape[1:]) if need_x else None)
        grads_weight.append(grad_weight.view(n, *weight.shape[1:]))
    return _joined(grads_x) if need_x else None, _joined(grads_weight)


def _is_ddf(x: Tensor, kernels: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> bool:
    """Whether it is decoupled dynamic filtering on a GPU: whose kernels know channels_last, unlike B * C groups."""
    _, Co, _, K, _ = kernels.shape
    same = dilation[0] * (K // 2)
    depthwise = K > 1 and kernels.shape[1:] == (groups, 1, K, K) and x.shape[1] == Co
    known = K % 2 == 1 and tuple(padding) == (same, same) and stride[0] == stride[1] and dilation[0] == dilation[1]
    return depthwise and known and x.device.type == "cuda" and x.dtype in DTYPES and has_kernel("cuda")


def _depthwise(x, weight, stride, padding, dilation, groups):
    return torch.ops.timm_dynamic.ddf(*_ddf_arguments(x, weight, stride, dilation))


def _depthwise_backward(grad, x, weight, stride, padding, dilation, groups, need_x):
    arguments = _ddf_arguments(x, weight, stride, dilation)
    grad_x, grad_weight, _ = torch.ops.timm_dynamic.ddf_backward(grad, *arguments, [need_x, True, False])
    return grad_x if need_x else None, grad_weight[:, :, None]


def _ddf_arguments(x, weight, stride, dilation):
    K = weight.shape[3]
    return x, weight[:, :, 0], x.new_ones(1, K * K, 1, 1), K, dilation[0], stride[0], "mul"


def _is_pointwise(kernels: Tensor, padding: Pair, groups: int) -> bool:
    return (*kernels.shape[3:], *padding, groups) == (1, 1, 0, 0, 1)


def _fused_serves(x: Tensor, kernels: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> bool:
    return (
        len(x) >= fused_conv.LEAST_BATCH
        and len(kernels) <= fused_conv.MOST_KERNELS
        and fused_conv.serves(x, kernels, stride, padding, dilation, groups)
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out[i] = a[i] @ b[i]`; any of them may be transposed in memory."""
    if out.stride(1) == 1 and out.stride(2) > 1:
        a, b, out = b.mT, a.mT, out.mT
    if by_onednn(a):  # which takes one pair at a time
        for own_a, own_b, own_out in zip(a, b, out, strict=True):
            own_out.copy_(linear(own_a, own_b.t()))
    else:
        torch.bmm(a, b, out=out)


def _parts(x: Tensor, kernels: Tensor) -> Iterator[slice]:
    n = max(4, _CHUNK.get(x.device.type, _CHUNK["cuda"]) // kernels[0].numel())
    for first in range(0, len(x), n):
        yield slice(first, first + n)


def mixed_pointwise_reference(
    x: Tensor,
    attention: Tensor,
    kernels: Tensor,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.mixed_pointwise`, the 1x1 convolution of `mixed_conv2d`.

    Its compiled kernel mixes the weights of four samples at a time and multiplies while they are in the cache.

    Args:
        x: `[B, C, H, W]`.
        attention: `[B, N]`.
        kernels: `[N, Co, C, 1, 1]`.
        norm_scale, norm_shift, low, high: The output is `clamp(norm_scale * y + norm_shift)`; `[Co]` each or None, and
            limits.

    Returns:
        `[B, Co, H, W]`.
    """
    return affine(mixed_conv2d_reference(x, attention, kernels), norm_scale, norm_shift, low, high)


def mixed_pointwise_serves(x: Tensor, kernels: Tensor) -> bool:
    """Whether its kernel does, for a 1x1 convolution without padding and groups, and a stride that is applied to x."""
    return (
        x.device.type == "cpu"
        and x.dtype == kernels.dtype == torch.float32
        and x.numel() > 0
        and memory_format(x) == torch.contiguous_format
        and kernels.is_contiguous()
        and has_kernel("cpu")
    )


# Registration: the schema, and what torch.compile and autograd need to know.

_TENSORS = "Tensor x, Tensor attention, Tensor kernels"
_ARGS = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(f"{NAMESPACE}::mixed_conv2d", f"({_TENSORS}, {_ARGS}) -> Tensor", tags=_TAGS)
torch.library.define(
    f"{NAMESPACE}::mixed_conv2d_backward",
    f"(Tensor grad, {_TENSORS}, {_ARGS}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.impl(f"{NAMESPACE}::mixed_conv2d", "CompositeExplicitAutograd")(_forward)
torch.library.impl(f"{NAMESPACE}::mixed_conv2d_backward", "CompositeExplicitAutograd")(_backward)


torch.library.define(
    f"{NAMESPACE}::mixed_pointwise",
    f"({_TENSORS}, Tensor? norm_scale, Tensor? norm_shift, float low, float high) -> Tensor",
    tags=_TAGS,
)
torch.library.impl(f"{NAMESPACE}::mixed_pointwise", "CompositeExplicitAutograd")(mixed_pointwise_reference)


@torch.library.register_fake(f"{NAMESPACE}::mixed_pointwise")
def _mixed_pointwise_fake(x, attention, kernels, *others):
    return x.new_empty(x.shape[0], kernels.shape[1], *x.shape[2:])


@torch.library.register_fake(f"{NAMESPACE}::mixed_conv2d")
def _empty_output(x, attention, kernels, stride, padding, dilation, groups):
    Ho, Wo = output_size(x.shape[2:], kernels.shape[3:], stride, padding, dilation)
    shape = (x.shape[0], kernels.shape[1], Ho, Wo)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@torch.library.register_fake(f"{NAMESPACE}::mixed_conv2d_backward")
def _backward_fake(grad, x, attention, kernels, stride, padding, dilation, groups, needs):
    return _empty_gradients(x, attention, kernels, needs)


def _empty_gradients(x: Tensor, attention: Tensor, kernels: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    """What `mixed_conv2d_backward` returns: the inputs' shapes, 0 elements where not needed."""
    formats = (memory_format(x), torch.contiguous_format, torch.contiguous_format)
    return tuple(
        torch.empty_like(t, memory_format=f) if need else t.new_empty(0)
        for t, f, need in zip((x, attention, kernels), formats, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _autograd(ctx, grad):
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():  # create_graph: the reference can be differentiated again
        inputs = ctx.saved_tensors
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        out = mixed_conv2d_reference(*inputs, *ctx.options)
        grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return *(next(grads) if need else None for need in needs), None, None, None, None
    grads = torch.ops.timm_dynamic.mixed_conv2d_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::mixed_conv2d", _autograd, setup_context=_setup_context)
