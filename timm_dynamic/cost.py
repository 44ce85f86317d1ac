"""What one image costs, in multiply-accumulates (MACs)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_dynamic.ops._library import operators_only


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
    macs = {"convolution": 0, "linear": 0}
    for operator, flops in _flops(model, x).items():
        macs["convolution" if operator in _FORMULAS or "conv" in str(operator) else "linear"] += flops // 2
    convolution, linear = (total // x.shape[0] for total in macs.values())
    return Macs(static=convolution, executed=convolution, linear=linear)


def calls_operators(model: nn.Module, x: Tensor) -> bool:
    """Whether an evaluation forward calls an operator of `timm_dynamic.ops`, so that compiled kernels matter to it."""
    return not _FORMULAS.keys().isdisjoint(_flops(model, x))


def _flops(model: nn.Module, x: Tensor) -> dict:
    """Floating-point operations of an evaluation forward by operator, twice its multiply-accumulates."""
    modes = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    try:
        with torch.no_grad(), operators_only(), counter:
            model.eval()(x)
    finally:
        for module, training in modes.items():
            module.training = training
    return counter.get_flop_counts().get("Global", {})


def _ddf_flops(features, channel_filter, spatial_filter, kernel_size, *options, out_shape) -> int:
    return 2 * kernel_size**2 * out_shape.numel()


_FORMULAS = {torch.ops.timm_dynamic.ddf: _ddf_flops}
