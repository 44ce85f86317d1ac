"""What a convolution with a weight for every sample is made of: the weights, the convolution, its gradients."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.dynamic_filter.functions import ddf
from timm_dynamic.ops.kernels import has_kernel
from timm_dynamic.ops.products import by_onednn, linear
from timm_dynamic.ops.shapes import Pair, memory_format

# Up to so many weights a sample, the samples run as the groups of one convolution. Above, oneDNN's grouped convolution
# falls behind a call per sample, soon by several times (measured on a CPU, November 2026).
_GROUPED_WEIGHTS = 2**16


def mix(attention: Tensor, kernels: Tensor) -> Tensor:
    """`[B, O, I, Kh, Kw]`, in the precision of the kernels."""
    return torch.matmul(attention.to(kernels.dtype), kernels.flatten(1)).view(-1, *kernels.shape[1:])


def around_mean(attention: Tensor, total: Tensor) -> Tensor:
    """Coefficients of kernels that are stored as their mean, and how far all but the first one are from it.

    The deviation of the first kernel is minus the sum of the others'.

    Args:
        attention: `[B, N]`, of the kernels.
        total: `[B, 1]`, its sum.

    Returns:
        `[B, N]`, of the mean and of the deviations.
    """
    return torch.cat([total, attention[:, 1:] - attention[:, :1]], 1)


def is_pointwise(weight: Tensor, padding: Pair, groups: int) -> bool:
    """Whether a convolution with weights like this one, `[..., Kh, Kw]`, is a matrix product a sample."""
    return (*weight.shape[-2:], *padding, groups) == (1, 1, 0, 0, 1)


def convolve(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """`sample_conv2d`, differentiable; `weight` has the dtype of `x`."""
    B, O = weight.shape[:2]
    if is_pointwise(weight, padding, groups):
        out = x[:, :, :: stride[0], :: stride[1]]
        out = torch.bmm(weight.flatten(2), out.flatten(2)).view(B, O, out.shape[2], out.shape[3])
    elif is_filtered(x, weight, stride, padding, dilation, groups):
        K = weight.shape[3]
        return ddf(x, weight.view(B, O, K, K), x.new_ones(1, K * K, 1, 1), K, dilation[0], stride[0])
    elif torch.compiler.is_compiling() or (B > 0 and _grouped(weight)):
        out = convolve_groups(x, weight, stride, padding, dilation, groups)
    elif B > 0:
        # Not indexed: the gradient of an index is as large as what it is of.
        pairs = zip(x.split(1), weight.unbind(), strict=True)
        out = torch.cat([F.conv2d(one, kernels, None, stride, padding, dilation, groups) for one, kernels in pairs])
    else:
        out = F.conv2d(x, weight.sum(0), None, stride, padding, dilation, groups)
    return out.contiguous(memory_format=memory_format(x))


def convolve_groups(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """`convolve`, as one convolution whose groups are the samples'."""
    B, O = weight.shape[0], weight.shape[1]
    out = F.conv2d(x.flatten(0, 1)[None], weight.flatten(0, 1), None, stride, padding, dilation, B * groups)
    return out.view(B, O, out.shape[2], out.shape[3])


def is_filtered(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> bool:
    """Whether the kernel of `dynamic_filter` convolves, faster than a grouped convolution does; `weight` or kernels."""
    return _is_filtering(x, weight, stride, padding, dilation, groups) and _filters(x, stride)


def _is_filtering(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> bool:
    """Whether it is a depthwise convolution that `dynamic_filter` can run, with a kernel on the CPU."""
    K = weight.shape[3]
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and weight.shape[1] == groups == x.shape[1]
        and weight.shape[4] == K
        and K % 2 == 1
        and stride[0] == stride[1]
        and dilation[0] == dilation[1]
        and tuple(padding) == (dilation[0] * (K // 2),) * 2
        and x.numel() > 0
        and has_kernel("cpu", "dynamic_filter")
    )


def _filters(x: Tensor, stride: Pair) -> bool:
    """Whether that is faster than a grouped convolution, forwards.

    Measured in one thread at batch 1 and 16 on the layers of MobileNetV2: 0.13 to 0.25 of the time on large maps,
    0.5 to 1.1 in channels_last, up to 2 on small ones in NCHW at batch 16, and with a stride (an AMD EPYC with
    AVX-512, November 2026). Backwards: 0.1 to 0.9 of it, but for small maps in NCHW.
    """
    if memory_format(x) == torch.channels_last:
        return True
    return x.numel() >= 2**22 or (len(x) == 1 and tuple(stride) == (1, 1))


def multiply(x: Tensor, weight: Tensor, stride: Pair) -> Tensor:
    """The 1x1 convolution, without autograd."""
    x = x[:, :, :: stride[0], :: stride[1]]
    B, O, (H, W) = len(x), weight.shape[1], x.shape[2:]
    if B == 1 and by_onednn(x):  # without a copy
        columns, matrix = x[0].flatten(1), weight[0].flatten(1)
        if memory_format(x) == torch.channels_last:
            return linear(columns.t(), matrix).view(1, H, W, O).permute(0, 3, 1, 2)
        return linear(matrix, columns.t()).view(1, O, H, W)
    out = torch.empty((B, O, H, W), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    _matmul(weight.flatten(2), x.flatten(2), out.flatten(2))
    return out


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, needs_x: bool
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """For some samples at a time, those of `x` (or None) and of `weight`; `grad` has the memory format of `x`."""
    B, whole = len(weight), slice(0, len(weight))
    if is_pointwise(weight, padding, groups):
        yield whole, *_gradients_of_product(grad, x, weight, stride, needs_x)
        return
    large = x.numel() >= 2**20 or memory_format(x) == torch.channels_last
    if large and _is_filtering(x, weight, stride, padding, dilation, groups):
        K = weight.shape[3]
        ones, filters = x.new_ones(1, 1, K * K, 1, 1), weight.flatten(2).view(*weight.shape[:2], K * K)
        options = (K, "mul", 1, dilation[0], stride[0], 1, [needs_x, False, True])
        grad_x, _, grad_filters = torch.ops.timm_dynamic.dynamic_filter_backward(grad, x, ones, filters, *options)
        yield whole, grad_x if needs_x else None, grad_filters.view(weight.shape)
        return
    n = B if _grouped(weight) else 1
    for first in range(0, B, n):
        part = slice(first, first + n)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(t[part].flatten(0, 1)[None] for t in (grad, x)),
            *(weight[part].flatten(0, 1), None, stride, padding, dilation, False, (0, 0), n * groups),
            (needs_x, True, False),
        )
        yield part, grad_x.view(n, *x.shape[1:]) if needs_x else None, grad_weight.view(n, *weight.shape[1:])


def _gradients_of_product(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, needs_x: bool):
    strided = x[:, :, :: stride[0], :: stride[1]]
    columns, grad_columns = strided.flatten(2), grad.flatten(2)
    grad_weight = weight.new_empty(weight.shape)
    _matmul(grad_columns, columns.mT, grad_weight.flatten(2))
    if not needs_x:
        return None, grad_weight
    grad_x = torch.empty_like(strided, memory_format=memory_format(x))
    _matmul(weight.flatten(2).mT, grad_columns, grad_x.flatten(2))
    if tuple(stride) != (1, 1):
        whole = torch.zeros_like(x)
        whole[:, :, :: stride[0], :: stride[1]] = grad_x
        grad_x = whole
    return grad_x, grad_weight


def _grouped(weight: Tensor) -> bool:
    return weight.shape[2] == 1 or weight.shape[1:].numel() <= _GROUPED_WEIGHTS


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out[i] = a[i] @ b[i]`; any of them may be transposed in memory."""
    if out.stride(1) == 1 and out.stride(2) > 1:
        a, b, out = b.mT, a.mT, out.mT
    if by_onednn(a):  # which takes one pair at a time
        for one_a, one_b, one_out in zip(a, b, out, strict=True):
            one_out.copy_(linear(one_a, one_b.t()))
    else:
        torch.bmm(a, b, out=out)
