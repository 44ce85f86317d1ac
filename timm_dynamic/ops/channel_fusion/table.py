"""How a `DCDConv2d` runs faster than by its formula."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from timm_dynamic.ops.channel_fusion import exported
from timm_dynamic.ops.channel_fusion.definition import NO_LIMITS
from timm_dynamic.ops.channel_fusion.training import FusedConvolution
from timm_dynamic.ops.implementation import Implementation
from timm_dynamic.ops.kernels import has_kernel
from timm_dynamic.ops.shapes import is_dense


def _parameters(layer) -> tuple[list[Tensor], nn.Module, nn.Module]:
    """What both rows read: the heads' weights, and the norms."""
    squeeze, gate = layer.fc
    return [squeeze.weight, gate.fc[0].weight, layer.fc_phi.weight, layer.fc_scale.weight], layer.bn1, layer.bn2


def _norm_problem(norm: nn.Module, name: str) -> str | None:
    if isinstance(norm, nn.Identity):  # absorbed
        return None
    if norm.weight is None or norm.bias is None:
        return f"{name} has no weight and bias"
    if norm.running_mean is None:
        return f"{name} has no running statistics"
    return None


def _is_pointwise(conv: nn.Conv2d, stride: tuple[int, int]) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), stride, (0, 0), 1)


def _part_problem(layer) -> str | None:
    """What a part does that the rows do not, which read weights and the layer's attributes."""
    conv, q, p = layer.conv, layer.q, layer.p
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    if any(getattr(conv, name) != getattr(layer, name) for name in names):
        return "conv has other arguments than the layer"
    if not (_is_pointwise(q, layer.stride) and _is_pointwise(p, (1, 1))):
        return "q and p are other than pointwise"
    linears = (layer.fc[0], layer.fc[1].fc[0], layer.fc_phi, layer.fc_scale)
    if any(linear.bias is not None for linear in linears):
        return "a part has a bias that the layer did not give it"
    return None


def _input_problem(layer, x: Tensor) -> str | None:
    if layer.padding_mode != "zeros" or layer.explicit_padding is not None:
        return f"padding {layer.padding!r} in mode {layer.padding_mode!r}"
    if x.numel() == 0:
        return "the input is empty"
    return _part_problem(layer) or _norm_problem(layer.bn1, "bn1") or _norm_problem(layer.bn2, "bn2")


def _cannot_run_in_one_call(layer, x: Tensor) -> str | None:
    if layer.bn1.training or layer.bn2.training:
        return "its norms are in training mode"
    if not is_dense(x):
        return "the input is contiguous neither in NCHW nor in channels_last"
    if not layer.conv.weight.is_contiguous():
        return "the weight is not contiguous in NCHW"
    if not has_kernel("cpu", "dcd_conv"):
        return "the CPU kernels are not loaded"
    return _input_problem(layer, x)


def _one_call(layer) -> Callable[[Tensor], Tensor]:
    heads, bn1, bn2 = _parameters(layer)
    norms = [
        [] if isinstance(bn, nn.Identity) else [bn.weight, bn.bias, bn.running_mean, bn.running_var]
        for bn in (bn1, bn2)
    ]
    epsilons = (getattr(bn, "eps", 0.0) for bn in (bn1, bn2))
    (conv, p), limits = (layer.conv, layer.p), layer.limits or NO_LIMITS
    options = (layer.stride, layer.zero_padding, layer.dilation, layer.groups)
    given = (heads, layer.q.weight, *norms, *epsilons, layer.pool_size, p.weight, p.bias)
    given = (*given, conv.weight, conv.bias, *options, *limits, layer.q.bias)
    operator = torch.ops.timm_dynamic.dcd_conv.default
    return lambda x: operator(x, *given)


def _cannot_train(layer, x: Tensor) -> str | None:
    if layer.p.bias is not None or layer.q.bias is not None or layer.limits is not None:
        return "it is optimized for inference"
    if layer.bn1.momentum is None or layer.bn2.momentum is None:
        return "a norm averages its statistics over all batches (momentum=None)"
    if x[:, 0, :: layer.stride[0], :: layer.stride[1]].numel() == 1:
        return "there is a single number to normalise"
    return _input_problem(layer, x)


def _train(layer, x: Tensor) -> Tensor:
    heads, *norms = _parameters(layer)
    for norm in norms:
        if norm.training:
            norm.num_batches_tracked.add_(1)
    affine = (t for norm in norms for t in (norm.weight, norm.bias))
    others = ((n.running_mean, n.running_var, n.momentum, n.eps, n.training) for n in norms)
    options = (layer.stride, layer.zero_padding, layer.dilation, layer.groups)
    conv = layer.conv
    return FusedConvolution.apply(
        x, conv.weight, conv.bias, layer.q.weight, layer.p.weight, *affine, *heads, *others, layer.pool_size, options
    )[0]


def _cannot_export(layer, x: Tensor) -> str | None:
    if layer.bn1.training or layer.bn2.training:
        return "its norms are in training mode"
    if layer.padding_mode != "zeros" or layer.explicit_padding is not None:
        return f"padding {layer.padding!r} in mode {layer.padding_mode!r}"
    return _part_problem(layer) or _norm_problem(layer.bn1, "bn1") or _norm_problem(layer.bn2, "bn2")


TABLE = (
    # Some twenty small operations a layer, whose overhead is most of their time at batch 1; at batch 16 the maps are
    # read and written less often (benchmarks/models.py, on a CPU).
    Implementation("one call", prepare=_one_call, cannot=_cannot_run_in_one_call),
    # Fewer maps kept, and fewer passes over them: 1.1 instead of 1.3 of the static network's training step
    # (benchmarks/models.py, dcd_resnet50 at batch 16, on a CPU).
    Implementation(
        "training in one piece", _train, dtypes=(torch.float32, torch.float64), gradients=True, cannot=_cannot_train
    ),
    Implementation("a product or two terms", exported.convolve, ("cpu", "cuda"), exported=True, cannot=_cannot_export),
)
