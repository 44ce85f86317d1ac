"""How layers that mix and gate kernels run faster than by their formula."""

import torch
from torch import Tensor

from timm_dynamic.ops.channel_fusion.definition import NO_LIMITS
from timm_dynamic.ops.implementation import Implementation
from timm_dynamic.ops.kernels import has_kernel
from timm_dynamic.ops.pooled_heads.definition import average
from timm_dynamic.ops.sample_conv import exported
from timm_dynamic.ops.sample_conv.cells import convolve_mixtures
from timm_dynamic.ops.sample_conv.samples import filter_depthwise, is_filtered, mix
from timm_dynamic.ops.sample_conv.training import factors, forward, fused, is_fused
from timm_dynamic.ops.shapes import gate_groups, is_dense


def _cannot(layer, x: Tensor, linears) -> str | None:
    if any(linear.bias is None for linear in linears):
        return "a linear layer has no bias"
    if layer.training:
        return "the layer is in training mode"
    if not is_dense(x):
        return "the input is contiguous neither in NCHW nor in channels_last"
    if x.numel() == 0:
        return "the input is empty"
    if not has_kernel("cpu", "pooled_heads"):
        return "the CPU kernels are not loaded"
    return None


def _kernel_problem(layer, x: Tensor, kernels: Tensor) -> str | None:
    if type(kernels) not in (Tensor, torch.nn.Parameter):
        return f"the weight is a {type(kernels).__name__}"
    if kernels.dtype != x.dtype:
        return f"the input is {x.dtype}, the parameters {kernels.dtype}"
    return None if kernels.is_contiguous() else "the weight is not contiguous"


def _cannot_gate(layer, x: Tensor) -> str | None:
    if layer.rank != 1:
        return f"the gates are of rank {layer.rank}"
    heads = layer.attn
    linears = (heads.fc_share, heads.fc_inp, heads.fc_oup, heads.fc_k)
    return _kernel_problem(layer, x, layer.kernel) or _cannot(layer, x, linears)


def _gate(layer, x: Tensor) -> Tensor:
    heads = layer.attn
    linears = (heads.fc_inp, heads.fc_oup, heads.fc_k)
    a_in, a_out, a_tap = torch.ops.timm_dynamic.pooled_heads(
        *(x, heads.fc_share.weight, heads.fc_share.bias),
        *([linear.weight for linear in linears], [linear.bias for linear in linears]),
        *(["sigmoid2" if layer.neutral_gates else "sigmoid"] * len(linears), 1.0),
    )
    bias = None if layer.bias is None else layer.bias[None]
    return _convolve(layer, x, None, layer.kernel[None], a_in, a_tap, a_out, bias)


def _cannot_mix(layer, x: Tensor) -> str | None:
    squeeze, _, expand = layer.attention.to_scores
    return _kernel_problem(layer, x, layer.kernels_weights) or _cannot(layer, x, (squeeze, expand))


def _mix(layer, x: Tensor) -> Tensor:
    squeeze, _, expand = layer.attention.to_scores
    (attention,) = torch.ops.timm_dynamic.pooled_heads(
        *(x, squeeze.weight, squeeze.bias, [expand.weight], [expand.bias]),
        *(["softmax"], layer.progress.value(layer.hottest, 1.0)),
    )
    attention = layer.coefficients(attention)
    bias = None if layer.kernels_bias is None else torch.mm(attention, layer.kernels_bias)
    return _convolve(layer, x, attention, layer.kernels_weights, None, None, None, bias)


def _cannot_attend(layer, x: Tensor) -> str | None:
    norm = layer.attention.bn
    if norm.training or getattr(norm, "running_var", x) is None:
        return "the attention's norm takes the statistics of the batch"
    heads = [head for head in layer.attention.heads() if head is not None]
    return _kernel_problem(layer, x, layer.kernels) or _cannot(layer, x, heads)


def _attend(layer, x: Tensor) -> Tensor:
    net = layer.attention
    heads = [head for head in net.heads() if head is not None]
    gate = "sigmoid2" if layer.neutral_gates else "sigmoid"
    scored = torch.ops.timm_dynamic.pooled_heads(
        *(x, *net.squeeze(), [head.weight for head in heads], [head.bias for head in heads]),
        *(["softmax" if head is net.kernel_fc else gate for head in heads], layer.progress.value(layer.hottest, 1.0)),
    )
    found = iter(scored)
    a_in, a_out, a_tap, pi = (None if head is None else next(found) for head in net.heads())
    pi = None if pi is None else layer.coefficients(pi)
    if layer.groups > 1:
        x, a_in, a_out = gate_groups(x, layer.kernels, a_in, a_out)
    bias = None if layer.bias is None else layer.bias[None]
    return _convolve(layer, x, pi, layer.kernels, a_in, a_tap, a_out, bias)


def _cannot_assemble(layer, x: Tensor) -> str | None:
    if layer.training:
        return "the layer is in training mode"
    return "the input is empty" if x.numel() == 0 else None


def _assemble(layer, x: Tensor) -> Tensor:
    coefficients = layer.factors_of(average(x))[:, :, :-1].contiguous()
    made_of = (layer.warehouse.cells, layer.grid, layer.gain, layer.kernel_size)
    options = (layer.stride, layer.zero_padding, layer.dilation, layer.groups)
    y = convolve_mixtures(layer.pad(x), coefficients, *made_of, *options)
    if layer.bias is not None:
        y.add_(layer.bias[:, None, None])
    return y if layer.limits is None else y.clamp_(*layer.limits)


def _convolve(layer, x: Tensor, attention, kernels, a_in, a_tap, a_out, bias: Tensor | None) -> Tensor:
    """Without the checks of the public function, which take a tenth of the time at batch 1."""
    x = layer.pad(x)
    options = (layer.stride, layer.zero_padding, layer.dilation)
    limits = layer.limits or NO_LIMITS
    if is_fused(x, attention, kernels, layer.groups):
        pairs, a_out = factors(x, attention, kernels, a_in, a_tap, a_out)
        return fused(x, attention, kernels, pairs, a_out, *options, bias, *limits)
    if is_filtered(x, kernels, *options, layer.groups):
        pairs, a_out = factors(x, attention, kernels, a_in, a_tap, a_out)
        weight = (kernels if attention is None else mix(attention, kernels)).flatten(2)
        weight = weight if pairs is None else weight * pairs[:, None] * a_out[:, :, None]
        y = filter_depthwise(x, weight, kernels.shape[3], layer.stride[0], layer.dilation[0])
    else:
        y, _ = forward(x, attention, kernels, a_in, a_tap, a_out, *options, layer.groups)
    if bias is not None:
        y.add_(bias[:, :, None, None])
    return y if layer.limits is None else y.clamp_(*limits)


def _cannot_export(layer, x: Tensor) -> str | None:
    return "the layer is in training mode" if layer.training else None


def _cannot_export_gates(layer, x: Tensor) -> str | None:
    return f"the gates are of rank {layer.rank}" if layer.rank != 1 else _cannot_export(layer, x)


def _export_gates(layer, x: Tensor) -> Tensor:
    a_in, a_out, a_tap = map(layer.gate, layer.attn(average(x)))  # `factors` has ranks, and so twelve nodes more
    return _export(layer, x, None, layer.kernel[None], a_in, a_tap, a_out, layer.bias)


def _export_mixture(layer, x: Tensor) -> Tensor:
    attention = layer.coefficients(layer.attention(x, layer.temperature()))
    return _export(layer, x, attention, layer.kernels_weights, None, None, None, layer.kernels_bias)


def _export(layer, x: Tensor, attention, kernels, a_in, a_tap, a_out, bias: Tensor | None) -> Tensor:
    options = (layer.stride, layer.zero_padding, layer.dilation, layer.groups)
    return exported.mixed_conv2d(
        layer.pad(x), attention, kernels, a_in, a_tap, a_out, *options, bias=bias, limits=layer.limits
    )


# A dozen small operations in front of the convolution, whose overhead is much of the time at batch 1 (ped_resnet50,
# dy_mobilenetv2: benchmarks/models.py, on a CPU); layers of 64 samples are no slower.
_ONNX = {"name": "sample by sample", "devices": ("cpu", "cuda"), "exported": True}
GATED = (
    Implementation("one call", _gate, cannot=_cannot_gate),
    Implementation(run=_export_gates, cannot=_cannot_export_gates, **_ONNX),
)
MIXED = (
    Implementation("one call", _mix, cannot=_cannot_mix),
    Implementation(run=_export_mixture, cannot=_cannot_export, **_ONNX),
)
OMNI = (Implementation("one call", _attend, cannot=_cannot_attend),)
# For one sample 0.9 of the time of formulas alone, for 16 0.45 (kw1x_resnet18, one thread of a CPU, November 2026).
ASSEMBLED = (Implementation("some samples at a time", _assemble, cannot=_cannot_assemble),)
