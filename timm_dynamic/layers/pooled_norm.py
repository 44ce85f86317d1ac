"""Batch norm of pooled features, which one sample has no statistics of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalize_pooled(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)`, of a vector for each sample; a batch of one takes the running statistics, in training, too.

    Args:
        norm: A batch norm, or what stands in its place.
        x: `[B, C]` or `[B, C, 1, 1]`.
    """
    plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) and norm.running_var is not None
    if plain and norm.training and x.numel() == x.shape[1]:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)


def folded(linear: nn.Linear, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer with the batch norm behind it in evaluation, or nothing."""
    weight, bias = linear.weight, linear.bias
    if isinstance(norm, nn.Identity):
        return weight, bias
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = (-norm.running_mean if bias is None else bias - norm.running_mean) * scale
    return weight * scale[:, None], shift if norm.bias is None else shift + norm.bias
