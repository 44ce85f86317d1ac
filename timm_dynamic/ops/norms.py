"""Batch norms in evaluation, as part of what comes before them."""

import torch
from torch import Tensor, nn


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Slope and offset of a batch norm in evaluation."""
    slope = torch.rsqrt(norm.running_var + norm.eps)
    slope = slope if norm.weight is None else slope * norm.weight
    offset = -norm.running_mean * slope
    return slope, offset if norm.bias is None else offset + norm.bias


def folded(linear: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of `linear`, or a convolution, with the norm behind it, or with none, an `nn.Identity`."""
    weight, bias = linear.weight, linear.bias
    if isinstance(norm, nn.Identity):
        return weight, bias
    slope, offset = affine(norm)
    weight = weight * slope.view(-1, *(1,) * (weight.ndim - 1))
    return weight, offset if bias is None else torch.addcmul(offset, bias, slope)


def has_statistics(norm: nn.Module) -> bool:
    """Whether `folded` takes it, as it is now."""
    batch_norm = isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
    statistics = batch_norm and norm.running_var is not None and not norm.training
    return statistics or isinstance(norm, nn.Identity)
