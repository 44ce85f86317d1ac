"""How layers that mix and gate kernels run faster than by their formula."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from timm_dynamic.ops.channel_fusion.definition import NO_LIMITS
from timm_dynamic.ops.implementation import Implementation
from timm_dynamic.ops.kernels import has_kernel
from timm_dynamic.ops.pooled_heads.definition import average
from timm_dynamic.ops.sample_conv import exported
from timm_dynamic.ops.sample_conv.cells import CellConvolution, convolve_cells
from timm_dynamic.ops.sample_conv.samples import filter_depthwise, is_filtered, mix
from timm_dynamic.ops.sample_conv.training import factors, forward, fused, is_fused
from timm_dynamic.ops.shapes import gate_groups, is_dense

_pooled_heads = torch.ops.timm_dynamic.pooled_heads.default


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


def _heads(squeeze, linears: list, activations: list[str]) -> tuple:
    """What `pooled_heads` reads, the input and the temperature apart."""
    return *squeeze, [linear.weight for linear in linears], [linear.bias for linear in linears], activations


def _gating(layer) -> Callable[[Tensor], Tensor]:
    net, kernel, bias = layer.attn, layer.kernel, layer.bias
    gate = "sigmoid2" if layer.neutral_gates else "sigmoid"
    squeeze, linears = (net.fc_share.weight, net.fc_share.bias), [net.fc_inp, net.fc_oup, net.fc_k]
    heads, convolve = _heads(squeeze, linears, [gate] * 3), _convolution(layer)

    def run(x: Tensor) -> Tensor:
        a_in, a_out, a_tap = _pooled_heads(x, *heads, 1.0)
        return convolve(x, None, kernel[None], a_in, a_tap, a_out, None if bias is None else bias[None])

    return run


def _cannot_mix(layer, x: Tensor) -> str | None:
    squeeze, _, expand = layer.attention.to_scores
    return _kernel_problem(layer, x, layer.kernels_weights) or _cannot(layer, x, (squeeze, expand))


def _mixing(layer) -> Callable[[Tensor], Tensor]:
    squeeze, _, expand = layer.attention.to_scores
    heads, convolve = _heads((squeeze.weight, squeeze.bias), [expand], ["softmax"]), _convolution(layer)
    temperature = partial(layer.progress.value, layer.hottest, 1.0)
    kernels, biases, coefficients = layer.kernels_weights, layer.kernels_bias, layer.coefficients

    def run(x: Tensor) -> Tensor:
        attention = coefficients(*_pooled_heads(x, *heads, temperature()))
        bias = None if biases is None else torch.mm(attention, biases)
        return convolve(x, attention, kernels, None, None, None, bias)

    return run


def _cannot_attend(layer, x: Tensor) -> str | None:
    norm = layer.attention.bn
    if norm.training or getattr(norm, "running_var", x) is None:
        return "the attention's norm takes the statistics of the batch"
    heads = [head for head in layer.attention.heads() if head is not None]
    return _kernel_problem(layer, x, layer.kernels) or _cannot(layer, x, heads)


def _attending(layer) -> Callable[[Tensor], Tensor]:
    net, kernels, bias, groups = layer.attention, layer.kernels, layer.bias, layer.groups
    gate = "sigmoid2" if layer.neutral_gates else "sigmoid"
    present = [head is not None for head in net.heads()]
    linears = [head for head in net.heads() if head is not None]
    heads = _heads((), linears, ["softmax" if head is net.kernel_fc else gate for head in linears])
    temperature, coefficients = partial(layer.progress.value, layer.hottest, 1.0), layer.coefficients
    convolve = _convolution(layer)

    def run(x: Tensor) -> Tensor:
        found = iter(_pooled_heads(x, *net.squeeze(), *heads, temperature()))
        a_in, a_out, a_tap, pi = (next(found) if there else None for there in present)
        pi = None if pi is None else coefficients(pi)
        if groups > 1:
            x, a_in, a_out = gate_groups(x, kernels, a_in, a_out)
        return convolve(x, pi, kernels, a_in, a_tap, a_out, None if bias is None else bias[None])

    return run


def _cannot_assemble(layer, x: Tensor) -> str | None:
    return "the layer is in training mode" if layer.training else _cell_problem(layer, x)


def _cannot_train_cells(layer, x: Tensor) -> str | None:
    return "it is optimized for inference" if layer.limits is not None else _cell_problem(layer, x)


def _cell_problem(layer, x: Tensor) -> str | None:
    if layer.groups > 1:
        return "the convolution has groups"
    if not has_kernel("cpu", "channel_fusion"):
        return "the CPU kernels are not loaded"
    return "the input is empty" if x.numel() == 0 else None


def _assembling(layer) -> Callable[[Tensor], Tensor]:
    cells, gain, bias, factors_of = layer.warehouse.cells, layer.gain, layer.bias, layer.factors_of
    blocks, pad, limits = (*layer.kernel_size, *layer.grid[1:]), layer.pad, layer.limits or NO_LIMITS
    options = (layer.stride, layer.zero_padding, layer.dilation)

    def run(x: Tensor) -> Tensor:
        coefficients = factors_of(average(x))[:, :, :-1].unflatten(1, blocks)
        return convolve_cells(pad(x), coefficients, cells, gain, bias, limits, options)

    return run


def _train_cells(layer, x: Tensor) -> Tensor:
    if layer.training:
        layer.progress.count(layer.number)
    coefficients = layer.factors_of(average(x))[:, :, :-1].unflatten(1, (*layer.kernel_size, *layer.grid[1:]))
    options = (layer.stride, layer.zero_padding, layer.dilation)
    return layer.finish(CellConvolution.apply(layer.pad(x), coefficients, layer.warehouse.cells, *options))


def _convolution(layer) -> Callable[..., Tensor]:
    """Without the checks of the public function, which take a tenth of the time at batch 1."""
    pad, groups, limits = layer.pad, layer.groups, layer.limits
    options = (layer.stride, layer.zero_padding, layer.dilation)

    def convolve(x: Tensor, attention, kernels, a_in, a_tap, a_out, bias: Tensor | None) -> Tensor:
        x = pad(x)
        if is_fused(x, attention, kernels, groups):
            pairs, a_out = factors(x, attention, kernels, a_in, a_tap, a_out)
            return fused(x, attention, kernels, pairs, a_out, *options, bias, *(limits or NO_LIMITS))
        if is_filtered(x, kernels, *options, groups):
            pairs, a_out = factors(x, attention, kernels, a_in, a_tap, a_out)
            weight = (kernels if attention is None else mix(attention, kernels)).flatten(2)
            weight = weight if pairs is None else weight * pairs[:, None] * a_out[:, :, None]
            y = filter_depthwise(x, weight, kernels.shape[3], options[0][0], options[2][0])
        else:
            y, _ = forward(x, attention, kernels, a_in, a_tap, a_out, *options, groups)
        if bias is not None:
            y.add_(bias[:, :, None, None])
        return y if limits is None else y.clamp_(*limits)

    return convolve


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
    Implementation("one call", prepare=_gating, cannot=_cannot_gate),
    Implementation(run=_export_gates, cannot=_cannot_export_gates, **_ONNX),
)
MIXED = (
    Implementation("one call", prepare=_mixing, cannot=_cannot_mix),
    Implementation(run=_export_mixture, cannot=_cannot_export, **_ONNX),
)
OMNI = (Implementation("one call", prepare=_attending, cannot=_cannot_attend),)
ASSEMBLED = (
    # Kernels that are made as a whole, some samples at a time, take 1.3 times as long for one sample, 1.6 for 16.
    Implementation("mixed in the cache", prepare=_assembling, cannot=_cannot_assemble),
    # By the formula a step takes 1.25 times as long, and all kernels of the batch are kept: 2.2 times the memory
    # (kw1x_resnet18, two threads of an AMD EPYC, November 2026).
    Implementation("training in one piece", _train_cells, gradients=True, cannot=_cannot_train_cells),
)
