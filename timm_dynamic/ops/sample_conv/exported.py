"""Convolutions with a weight for every sample in ONNX graphs, in the shape that onnxruntime runs fast.

A convolution of ONNX has a fixed number of groups, so that the samples of a dynamic batch cannot be its groups. They
are the steps of a Scan, which also has the mixture of the kernels, the bias and the activation. What is said of times
here was measured in onnxruntime 1.32 on a CPU, one thread, November 2026, single layers, not whole networks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.sample_conv.samples import mix
from timm_dynamic.ops.scan import scan
from timm_dynamic.ops.shapes import Pair, output_size

Limits = tuple[float, float]

# The runtime convolves with static kernels in a layout of its own. Up to so many positions a depthwise convolution with
# all four kernels takes 0.6 to 0.75 of the time of one with a sample's weight (MobileNetV2, 7x7), above 1.0 to 1.8.
_FEW = 64


def mixed_conv2d(
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
    bias: Tensor | None = None,
    limits: Limits | None = None,
) -> Tensor:
    """As the operator's definition, plus `bias`, `[O]`, or with an attention `[N, O]`, within limits."""
    kernels = kernels.to(x.dtype)
    attention, a_out, bias = (None if t is None else t.to(x.dtype) for t in (attention, a_out, bias))
    size = output_size(x.shape[2:], kernels.shape[3:], stride, padding, dilation)
    positions = size[0] * size[1] if all(isinstance(n, int) for n in size) else None
    gates = None
    if a_in is not None or a_tap is not None:
        inputs = 1 if a_in is None else a_in[:, :, None, None]
        taps = 1 if a_tap is None else a_tap.view(-1, 1, *kernels.shape[3:])
        gates = (inputs * taps).to(x.dtype)
    options = stride, padding, dilation
    is_gated = attention is None and gates is not None and groups == 1
    if is_gated and positions is not None and positions < kernels.shape[1]:
        return _gate_columns(x, kernels[0], gates, a_out, bias, limits, options)
    is_depthwise = kernels.shape[1] == groups and kernels.shape[2] == 1
    if is_depthwise and attention is not None and gates is None and a_out is None and (positions or _FEW) < _FEW:
        return _add_all(x, attention, kernels, bias, limits, options)

    def convolve(
        x: Tensor,
        kernels: Tensor,
        attention: Tensor | None = None,
        gates: Tensor | None = None,
        a_out: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        # Not indexed: the runtime copies what an index takes.
        weight = (kernels if attention is None else mix(attention, kernels)).squeeze(0)
        bias = bias if attention is None or bias is None else torch.matmul(attention, bias).flatten()
        weight = weight if gates is None else weight * gates
        if a_out is not None and (positions is None or kernels.shape[2:].numel() <= positions):  # whichever is smaller
            weight, a_out = weight * a_out.view(-1, 1, 1, 1), None
        if a_out is None:
            y = F.conv2d(x, weight, bias, *options, groups)
        else:
            y = _shift(F.conv2d(x, weight, None, *options, groups) * a_out[:, :, None, None], bias)
        return _limit(y, limits)

    samples = {"x": x, "attention": attention, "gates": gates, "a_out": a_out}
    others = {"kernels": kernels, "bias": bias}
    return scan(convolve, samples, others)


def sample_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """As `timm_dynamic.ops.sample_conv2d`."""

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight.squeeze(0), None, stride, padding, dilation, groups)

    return scan(convolve, {"x": x, "weight": weight}, {})


def _gate_columns(
    x: Tensor,
    weight: Tensor,
    gates: Tensor,
    a_out: Tensor | None,
    bias: Tensor | None,
    limits: Limits | None,
    options: tuple[Pair, Pair, Pair],
) -> Tensor:
    """A product of the weight as it is and gated columns, which are smaller where positions are fewer than outputs.

    On the 3x3 layers of ResNet-18 it takes 0.66 of the time of a gated weight with 512 channels of 7x7, 0.88 with 256
    of 14x14; with 128 of 28x28 1.1, and with 64 of 56x56 1.6.
    """
    (I, Kh, Kw), (stride, padding, dilation) = weight.shape[1:], options
    Ho, Wo = output_size(x.shape[2:], (Kh, Kw), stride, padding, dilation)
    width = x.shape[3] + 2 * padding[1]
    top, left = torch.arange(Ho) * stride[0], torch.arange(Wo) * stride[1]
    down, right = torch.arange(Kh) * dilation[0], torch.arange(Kw) * dilation[1]
    tops, lefts = top[:, None, None, None] + down[:, None], left[:, None, None] + right
    reads = (tops * width + lefts).flatten().to(x.device)  # for positions and taps, what of the padded map
    gates = gates.expand(-1, I, Kh, Kw).permute(0, 2, 3, 1).flatten(1)

    def multiply(
        x: Tensor, gates: Tensor, matrix: Tensor, reads: Tensor, a_out: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
        columns = rows.flatten(1, 2).index_select(1, reads).view(1, Ho * Wo, Kh * Kw * I)
        y = torch.matmul(columns * gates[:, None], matrix)
        y = y if a_out is None else y * a_out[:, None]
        y = _limit(y if bias is None else y + bias, limits)
        return y.mT.unflatten(2, (Ho, Wo))

    samples = {"x": x, "gates": gates, "a_out": a_out}
    others = {"matrix": weight.permute(2, 3, 1, 0).flatten(0, 2), "reads": reads, "bias": bias}
    return scan(multiply, samples, others)


def _add_all(
    x: Tensor,
    attention: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    limits: Limits | None,
    options: tuple[Pair, Pair, Pair],
) -> Tensor:
    """What the kernels of a depthwise convolution give, each times its attention."""
    y = 0
    for n, kernel in enumerate(kernels):
        each = F.conv2d(x, kernel, None if bias is None else bias[n], *options, x.shape[1])
        y = y + each * attention[:, n, None, None, None]
    return _limit(y, limits)


def _shift(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias[:, None, None]


def _limit(y: Tensor, limits: Limits | None) -> Tensor:
    return y if limits is None else y.clamp(*limits)
