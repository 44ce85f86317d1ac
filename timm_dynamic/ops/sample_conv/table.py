"""How layers that mix and gate kernels run faster than by their formula."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from timm_dynamic.ops.channel_fusion.definition import NO_LIMITS
from timm_dynamic.ops.implementation import Implementation
from timm_dynamic.ops.kernels import has_kernel
from timm_dynamic.ops.norms import folded, has_statistics
from timm_dynamic.ops.pooled_heads.definition import INPUTS, KERNELS, OUTPUTS, SCORES, TAPS, average
from timm_dynamic.ops.sample_conv import exported
from timm_dynamic.ops.sample_conv.cells import CellConvolution, convolve_cells
from timm_dynamic.ops.shapes import is_dense


def _cannot(layer, x: Tensor, kernels: Tensor, bias: Tensor | None, linears) -> str | None:
    for name, parameter in (("weight", kernels), ("bias", bias)):
        if parameter is None:
            continue
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"the {name} is a {type(parameter).__name__}"
        if parameter.dtype != x.dtype:
            return f"the input is {x.dtype}, the parameters {parameter.dtype}"
        if not parameter.is_contiguous():
            return f"the {name} is not contiguous"
    if layer.explicit_padding is not None:
        return f"padding {layer.padding!r} in mode {layer.padding_mode!r}"
    if layer.groups > 1 and not layer.groups == layer.in_channels == layer.out_channels:
        return "the convolution has groups and is not depthwise"
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


def _cannot_gate(layer, x: Tensor) -> str | None:
    if layer.rank != 1:
        return f"the gates are of rank {layer.rank}"
    heads = layer.attn
    linears = (heads.fc_share, heads.fc_inp, heads.fc_oup, heads.fc_k)
    return _cannot(layer, x, layer.kernel, layer.bias, linears)


def _gating(layer) -> Callable[[Tensor], Tensor]:
    net = layer.attn
    heads = {INPUTS: net.fc_inp, OUTPUTS: net.fc_oup, TAPS: net.fc_k}
    convolve, kernel = _convolution(layer, heads, layer.bias, layer.neutral_gates), layer.kernel
    squeeze = (net.fc_share.weight, net.fc_share.bias)
    return lambda x: convolve(x, squeeze, 1.0, kernel[None])


def _cannot_mix(layer, x: Tensor) -> str | None:
    squeeze, _, expand = layer.attention.to_scores
    return _cannot(layer, x, layer.kernels_weights, layer.kernels_bias, (squeeze, expand))


def _mixing(layer) -> Callable[[Tensor], Tensor]:
    squeeze, _, expand = layer.attention.to_scores
    convolve = _convolution(layer, {KERNELS: expand}, layer.kernels_bias, layer.around_mean)
    squeeze, kernels = (squeeze.weight, squeeze.bias), layer.kernels_weights
    temperature = partial(layer.progress.value, layer.hottest, 1.0)
    return lambda x: convolve(x, squeeze, temperature(), kernels)


def _cannot_attend(layer, x: Tensor) -> str | None:
    if not has_statistics(layer.attention.bn):
        return "the attention's norm takes the statistics of the batch"
    heads = [head for head in layer.attention.heads() if head is not None]
    return _cannot(layer, x, layer.kernels, layer.bias, heads)


def _attending(layer) -> Callable[[Tensor], Tensor]:
    net, temperature = layer.attention, partial(layer.progress.value, layer.hottest, 1.0)
    heads = {INPUTS: net.channel_fc, OUTPUTS: net.filter_fc, TAPS: net.spatial_fc, KERNELS: net.kernel_fc}
    convolve, kernels = _convolution(layer, heads, layer.bias, layer.neutral_gates), layer.kernels
    return lambda x: convolve(x, folded(net.fc, net.bn), temperature(), kernels)


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
    cells, gain, bias, scores_of = layer.warehouse.cells, layer.gain, layer.bias, _scoring(layer.attention)
    blocks, pad, limits = (*layer.kernel_size, *layer.grid[1:]), layer.pad, layer.limits or NO_LIMITS
    options, coefficients_of = (layer.stride, layer.zero_padding, layer.dilation), layer.coefficients

    def run(x: Tensor) -> Tensor:
        coefficients = coefficients_of(scores_of(x))[:, :, :-1].unflatten(1, blocks)
        return convolve_cells(pad(x), coefficients, cells, gain, bias, limits, options)

    return run


def _scoring(net) -> Callable[[Tensor], Tensor]:
    """A `CellAttention`'s call, but from the map, which is not pooled yet."""
    if net.fc3 is not None or net.fc2.bias is None or not has_statistics(net.norm1):
        return lambda x: net(average(x))
    operator, heads = torch.ops.timm_dynamic.pooled_heads.default, ([net.fc2.weight], [net.fc2.bias], SCORES)

    def scores_of(x: Tensor) -> Tensor:
        scores = operator(x if is_dense(x) else x.contiguous(), *folded(net.fc1, net.norm1), *heads)[0]
        return scores.view(len(x), net.mixtures, -1)

    return scores_of


def _train_cells(layer, x: Tensor) -> Tensor:
    if layer.training:
        layer.progress.count(layer.number)
    coefficients = layer.factors_of(average(x))[:, :, :-1].unflatten(1, (*layer.kernel_size, *layer.grid[1:]))
    options = (layer.stride, layer.zero_padding, layer.dilation)
    return layer.finish(CellConvolution.apply(layer.pad(x), coefficients, layer.warehouse.cells, *options))


def _convolution(
    layer, heads: dict[str, nn.Linear | None], bias: Tensor | None, neutral: bool
) -> Callable[..., Tensor]:
    """`pooled_heads`, but for the input and what may have to be computed for a call."""
    heads = {role: head for role, head in heads.items() if head is not None}
    linears = [head.weight for head in heads.values()], [head.bias for head in heads.values()]
    options = (layer.stride, layer.zero_padding, layer.dilation, *(layer.limits or ()))
    roles, operator = "".join(heads), torch.ops.timm_dynamic.pooled_heads.default

    def convolve(x: Tensor, squeeze: tuple[Tensor, Tensor | None], temperature: float, kernels: Tensor) -> Tensor:
        return operator(x, *squeeze, *linears, roles, neutral, temperature, kernels, bias, *options)[0]

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


# A dozen small operations in front of the convolution, whose overhead is much of the time at batch 1, and passes over
# the output behind it: a depthwise layer of DY with 480 channels at 14x14 takes 115 us, in several calls 193, the
# static one 114 (two threads of an AMD EPYC with AVX2, November 2026; benchmarks/models.py for networks).
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
