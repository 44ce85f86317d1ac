"""What one image costs, in multiply-accumulates (MACs)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_dynamic.ops._library import operators_only
from timm_dynamic.ops._linear import ONEDNN


class Macs(NamedTuple):
    """Multiply-accumulates per image.

    Attributes:
        static: Of convolutions and dynamic filters, each at every output position.
        executed: The same without what a model skips for this input; equal to `static` where it skips nothing.
        linear: Of matrix products (linear layers, attention), which published figures often leave out.
    """

    static: int
    executed: int
    linear: int


def count_macs(model: nn.Module, x: Tensor) -> Macs:
    """Count the multiply-accumulates of an evaluation forward, per image.

    Biases, normalisation, activations and pooling are not counted. The count looks at what runs, so functional calls
    count as layers do, and it does not depend on whether compiled kernels are installed.

    Args:
        model: Any model; it is left as it was found.
        x: `[B, C, H, W]` with B > 0, on the model's device (`meta` will do).

    Raises:
        ValueError: If the batch is empty.
    """
    if x.shape[0] == 0:
        raise ValueError(f"count_macs needs at least one image, got shape {list(x.shape)}")
    flops = _flops(model, x)
    total = sum(flops["Global"].values())
    # Whatever an nn.Conv2d runs is a convolution, a matrix product included.
    modules = model.named_modules(prefix=type(model).__name__)
    within = [name for name, module in modules if isinstance(module, nn.Conv2d)]
    convolution = sum(flops["Global"][operator] for operator in flops["Global"] if _is_convolution(operator))
    convolution += sum(
        count for name in within for operator, count in flops.get(name, {}).items() if not _is_convolution(operator)
    )
    static, linear = convolution // 2 // x.shape[0], (total - convolution) // 2 // x.shape[0]
    return Macs(static=static, executed=static, linear=linear)


def _is_convolution(operator) -> bool:
    return operator in _FORMULAS or "conv" in str(operator)


def calls_operators(model: nn.Module, x: Tensor) -> bool:
    """Whether an evaluation forward calls an operator of `timm_dynamic.ops`, so that compiled kernels matter to it."""
    return torch.ops.timm_dynamic.ddf in _flops(model, x)["Global"]


def _flops(model: nn.Module, x: Tensor) -> dict[str, dict]:
    """Floating-point operations of an evaluation forward, twice its multiply-accumulates, by module and operator."""
    modes = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    try:
        with torch.no_grad(), operators_only(), counter:
            model.eval()(x)
    finally:
        for module, training in modes.items():
            module.training = training
    return {"Global": {}, **counter.get_flop_counts()}


def _ddf_flops(features, channel_filter, spatial_filter, kernel_size, *options, out_shape) -> int:
    return 2 * kernel_size**2 * out_shape.numel()


def _factored_flops(x, weight, *options, out_shape) -> int:
    return 2 * weight[1:].numel() * out_shape[0].numel()


def _mixed_flops(x, attention, kernels, *options, out_shape) -> int:
    mixing = attention.numel() * kernels[1:].numel()
    return 2 * (kernels[2:].numel() * out_shape.numel() + mixing)


def _product_flops(rows, matrix, *options, out_shape) -> int:
    return 2 * matrix[1] * out_shape.numel()


_FORMULAS = {
    torch.ops.timm_dynamic.ddf: _ddf_flops,
    torch.ops.timm_dynamic.factored_conv2d: _factored_flops,
    torch.ops.timm_dynamic.mixed_conv2d: _mixed_flops,
}
if ONEDNN:  # its product serves 1x1 convolutions
    _FORMULAS[torch.ops.mkldnn._linear_pointwise] = _product_flops
