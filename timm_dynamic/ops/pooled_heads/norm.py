"""The batch norm of a hidden layer as part of the linear layer before it."""

import torch
from torch import Tensor, nn


def folded(linear: nn.Linear, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of `linear` with the batch norm behind it in evaluation, or with none, an `nn.Identity`."""
    if isinstance(norm, nn.Identity):
        return linear.weight, linear.bias
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = (-norm.running_mean if linear.bias is None else linear.bias - norm.running_mean) * scale
    return linear.weight * scale[:, None], shift if norm.bias is None else shift + norm.bias


def has_statistics(norm: nn.Module) -> bool:
    """Whether `folded` takes it, as it is now."""
    statistics = isinstance(norm, nn.BatchNorm1d) and norm.running_var is not None and not norm.training
    return statistics or isinstance(norm, nn.Identity)
