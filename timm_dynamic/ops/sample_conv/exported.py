"""Convolutions with a weight for every sample in ONNX graphs, in the shape that onnxruntime runs fast.

A convolution of ONNX has a fixed number of groups, so that the samples of a dynamic batch cannot be its groups. They
are the steps of a Scan, which also has the bias and the activation. Measured in onnxruntime 1.32 on a CPU, one thread,
November 2026, single nodes, not whole networks: on the depthwise layers of MobileNetV2 a convolution with a sample's
weight takes 0.3 to 0.6 of the time of convolving with all four kernels; on the 3x3 layers of ResNet-18 one with a gated
weight takes 0.5 to 1.0 of that of a product with what the taps read, 1.2 with 512 channels of 7x7.
"""

import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.sample_conv.samples import mix
from timm_dynamic.ops.scan import scan
from timm_dynamic.ops.shapes import Pair, output_size

Limits = tuple[float, float]


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
    """As the operator's definition, plus `bias`, `[O]` or `[B, O]`, within limits."""
    samples, others = {"x": x}, {}
    (samples if attention is not None else others)["weight"] = (
        kernels[0] if attention is None else mix(attention, kernels)
    ).to(x.dtype)
    if a_in is not None or a_tap is not None:
        inputs = 1 if a_in is None else a_in[:, :, None, None]
        taps = 1 if a_tap is None else a_tap.view(-1, 1, *kernels.shape[3:])
        samples["gates"] = (inputs * taps).to(x.dtype)
    if a_out is not None:
        samples["scale"] = a_out.to(x.dtype)
    if bias is not None:
        (samples if bias.ndim == 2 else others)["bias"] = bias.to(x.dtype)
    options = stride, padding, dilation, groups
    scales_weight = _fewer_weights(x, kernels, stride, padding, dilation)

    def convolve(
        x: Tensor,
        weight: Tensor,
        gates: Tensor | None = None,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        weight = weight if attention is None else weight[0]
        weight = weight if gates is None else weight * gates
        bias = bias if bias is None else bias.flatten()
        if scale is not None and scales_weight:
            weight, scale = weight * scale[0, :, None, None, None], None
        if scale is None:
            y = F.conv2d(x, weight, bias, *options)
        else:
            y = F.conv2d(x, weight, None, *options) * scale[:, :, None, None]
            y = y if bias is None else y + bias[:, None, None]
        return y if limits is None else y.clamp(*limits)

    return scan(convolve, samples, others)


def sample_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """As `timm_dynamic.ops.sample_conv2d`."""

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight[0], None, stride, padding, dilation, groups)

    return scan(convolve, {"x": x, "weight": weight}, {})


def _fewer_weights(x: Tensor, kernels: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> bool:
    """Whether an output channel has fewer weights than positions, as far as these are known."""
    size = output_size(x.shape[2:], kernels.shape[3:], stride, padding, dilation)
    return not all(isinstance(n, int) for n in size) or kernels.shape[2:].numel() <= size[0] * size[1]
