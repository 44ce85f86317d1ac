"""Batch norm of pooled features, which one sample has no statistics of."""

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
