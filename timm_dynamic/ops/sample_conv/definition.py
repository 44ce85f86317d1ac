"""Convolutions with a weight for every sample, most of all with a mixture of kernels and with gates.

    y = a_out * conv2d(a_in * x, sum_n attention_n * a_tap * kernels_n)

The mixture is that of Chen et al., "Dynamic Convolution: Attention over Convolution Kernels", CVPR 2020; the gates are
those of Hou and Kung, "Parameter Efficient Dynamic Convolution via Tensor Decomposition", BMVC 2021.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.kernels import exports_to_onnx, runs_registered
from timm_dynamic.ops.precision import autocast_dtype, no_autocast
from timm_dynamic.ops.registration import register
from timm_dynamic.ops.sample_conv import exported, training
from timm_dynamic.ops.sample_conv.columns import empty_rows
from timm_dynamic.ops.sample_conv.samples import convolve, convolve_groups, mix
from timm_dynamic.ops.shapes import Pair, columns_of, gate_groups, output_size


def mixed_conv2d(
    x: Tensor,
    attention: Tensor | None,
    kernels: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    a_in: Tensor | None = None,
    a_tap: Tensor | None = None,
    a_out: Tensor | None = None,
) -> Tensor:
    """Convolve every sample with a mixture of kernels, gated by input channel, tap and output channel.

    The `[B, O, I, Kh, Kw]` weights that this means are there for some samples at a time, for one if there is no
    attention; in training little but the arguments is kept for the backward pass. Kernels, attention and gates are
    multiplied in the precision of the kernels, or the gates', and cast to that of `x` afterwards. Under autocast `x` is
    cast.

    Args:
        x: `[B, C, H, W]`; the output has its dtype and memory format.
        attention: `[B, N]`; None: there is one kernel, with weight 1.
        kernels: `[N, O, C // groups, Kh, Kw]`.
        stride, padding, dilation, groups: As for `conv2d`; the padding is of zeros.
        a_in: `[B, C // groups]`, the same for every group, or `[B, C]`; None: 1.
        a_tap: `[B, Kh * Kw]`; None: 1.
        a_out: `[B, O]`; None: 1.

    Returns:
        `[B, O, Ho, Wo]`.

    Raises:
        ValueError: If the shapes do not fit together or the input is smaller than the kernel.
    """
    if groups > 1 and a_in is not None and a_in.shape[1] == x.shape[1]:
        x, a_in, a_out = gate_groups(x, kernels, a_in, a_out)
    if torch.jit.is_scripting():  # TorchScript knows the registered operator, not what leads to it
        return torch.ops.timm_dynamic.mixed_conv2d(
            x, attention, kernels, a_in, a_tap, a_out, stride, padding, dilation, groups
        )[0]
    else:
        return _mixed_conv2d(x, attention, kernels, a_in, a_tap, a_out, stride, padding, dilation, groups)


def _mixed_conv2d(x, attention, kernels, a_in, a_tap, a_out, stride, padding, dilation, groups) -> Tensor:
    x = x.to(autocast_dtype(x))
    _check_input(x, kernels, stride, padding, dilation, groups)
    N, O, I, *kernel_size = kernels.shape
    _check("attention", attention, x, N)
    for name, gate, n in (("a_in", a_in, I), ("a_tap", a_tap, math.prod(kernel_size)), ("a_out", a_out, O)):
        _check(name, gate, x, n)
    if attention is None and N != 1:
        raise ValueError(f"{N} kernels need an attention")
    options = (stride, padding, dilation, groups)
    with no_autocast(x):
        if attention is None and a_in is None and a_tap is None and a_out is None:
            return F.conv2d(x, kernels[0].to(x.dtype), None, *options)
        if runs_registered("mixed_conv2d", x):
            return torch.ops.timm_dynamic.mixed_conv2d(x, attention, kernels, a_in, a_tap, a_out, *options)[0]
        run = exported.mixed_conv2d if exports_to_onnx() else _definition
        return run(x, attention, kernels, a_in, a_tap, a_out, *options)


def sample_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve every sample with a weight that was made for it: `out[b] = conv2d(x[b], weight[b])`.

    A 1x1 convolution is one batched matrix product, a depthwise one the channels of a grouped convolution, any other
    such groups too or a call for every sample, whichever is faster for its size. In a graph that is compiled or
    exported there is no loop over the batch, whose size may be dynamic. Under autocast `x` is cast.

    Args:
        x: `[B, C, H, W]`.
        weight: `[B, O, C // groups, Kh, Kw]`.
        stride, padding, dilation, groups: As for `conv2d`; the padding is of zeros.

    Returns:
        `[B, O, Ho, Wo]`, in the dtype and the memory format of `x`.

    Raises:
        ValueError: If the shapes do not fit together or the input is smaller than the kernel.
    """
    if torch.jit.is_scripting():  # TorchScript knows no autocast, and not what chooses
        return convolve_groups(x, weight.to(x.dtype), stride, padding, dilation, groups)
    else:
        return _sample_conv2d(x, weight, stride, padding, dilation, groups)


def _sample_conv2d(x, weight, stride, padding, dilation, groups) -> Tensor:
    x = x.to(autocast_dtype(x))
    weight = weight.to(x.dtype)
    _check_input(x, weight, stride, padding, dilation, groups)
    if weight.shape[0] != x.shape[0]:
        raise ValueError(f"weight must be for {x.shape[0]} samples, got {weight.shape[0]}")
    if exports_to_onnx():
        run = exported.sample_conv2d
    else:
        by_sample = runs_registered("sample_conv2d", x) and not torch.jit.is_tracing()  # which fixes the batch's size
        run = convolve if by_sample else _convolve_columns
    with no_autocast(x):
        return run(x, weight, stride, padding, dilation, groups)


def _check_input(x: Tensor, kernels: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> None:
    I, Kh, Kw = kernels.shape[2:]
    if x.ndim != 4 or x.shape[1] != I * groups:
        raise ValueError(f"x must be [B, {I * groups}, H, W], got shape {list(x.shape)}")
    if min(output_size(x.shape[2:], (Kh, Kw), stride, padding, dilation)) < 1:
        raise ValueError(
            f"x of size {list(x.shape[2:])} is too small for a {Kh}x{Kw} kernel with padding {padding} and "
            f"dilation {dilation}"
        )


def _check(name: str, factor: Tensor | None, x: Tensor, n: int) -> None:
    if factor is not None and factor.shape != (x.shape[0], n):
        raise ValueError(f"{name} must be [{x.shape[0]}, {n}], got shape {list(factor.shape)}")


def _definition(
    x: Tensor,
    attention: Tensor | None,
    kernels: Tensor,
    a_in: Tensor | None,
    a_tap: Tensor | None,
    a_out: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Of the first output of the registered operator, as `mixed_conv2d` describes it."""
    options = (stride, padding, dilation)
    if a_in is not None:
        x = x * a_in.to(x.dtype).repeat(1, groups)[:, :, None, None]
    if a_tap is not None:  # the taps become channels
        a_tap = a_tap.to(x.dtype).repeat(1, x.shape[1])[:, :, None, None]
        x = columns_of(x, tuple(kernels.shape[3:]), *options) * a_tap
        kernels, options = kernels.flatten(2)[..., None, None], ((1, 1), (0, 0), (1, 1))
    if attention is None:
        y = F.conv2d(x, kernels[0].to(x.dtype), None, *options, groups)
    elif kernels.shape[2] == 1:  # mixing the outputs of all kernels is the smaller graph
        stacked = kernels.transpose(0, 1).flatten(0, 1).to(x.dtype)
        y = F.conv2d(x, stacked, None, *options, groups)
        y = y.unflatten(1, (-1, len(kernels)))
        y = (y * attention[:, None, :, None, None].to(x.dtype)).sum(2)
    else:
        y = _convolve_columns(x, mix(attention, kernels).to(x.dtype), *options, groups)
    return y if a_out is None else y * a_out.to(x.dtype)[:, :, None, None]


def _convolve_columns(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """Of `sample_conv2d`: a product of the weights and the taps that every position reads."""
    B, O, I, Kh, Kw = weight.shape
    columns = columns_of(x, (Kh, Kw), stride, padding, dilation)
    Ho, Wo = columns.shape[2:]
    columns = columns.reshape(B, groups, I * Kh * Kw, Ho * Wo)
    return torch.matmul(weight.reshape(B, groups, O // groups, I * Kh * Kw), columns).reshape(B, O, Ho, Wo)


# What FlopCounterMode and torch.compile need to know.


def _fake(x, attention, kernels, a_in, a_tap, a_out, stride, padding, dilation, groups):
    out = training.empty_output(x, kernels, stride, padding, dilation)
    return out, empty_rows(x, attention, kernels, stride, padding, dilation, groups)


def _fake_gradients(grad, x, attention, kernels, a_in, a_tap, a_out, kept, stride, padding, dilation, groups, needs):
    return training.empty_gradients(x, attention, kernels, a_in, a_tap, a_out, needs)


def _flops(x, attention, kernels, *others, out_shape) -> int:
    return _convolution_flops(kernels, out_shape[0]) + _mixing_flops(attention, kernels)


def _flops_of_gradients(grad, x, attention, kernels, *others, out_shape) -> int:
    convolutions = (len(out_shape[0]) > 1) + (1 if attention is None else 1)  # of x, and of what makes the weights
    return convolutions * _convolution_flops(kernels, grad) + 3 * _mixing_flops(attention, kernels)


def _convolution_flops(kernels, out) -> int:
    return 2 * math.prod(kernels[2:]) * math.prod(out)


def _mixing_flops(attention, kernels) -> int:
    return 0 if attention is None else 2 * math.prod(attention) * math.prod(kernels[1:])


_TENSORS = "Tensor x, Tensor? attention, Tensor kernels, Tensor? a_in, Tensor? a_tap, Tensor? a_out"
_OPTIONS = "int[2] stride, int[2] padding, int[2] dilation, int groups"
register(
    "mixed_conv2d",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _definition,
    _fake,
    implementation=training.forward,
    gradient=training.gradient,
    flops=_flops,
)
register(
    "mixed_conv2d_backward",
    f"(Tensor grad, {_TENSORS}, Tensor kept, {_OPTIONS}, bool[6] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    training.backward,
    _fake_gradients,
    flops=_flops_of_gradients,
    differentiable=False,
)
