"""What layers that mix kernels share."""

import torch
from torch import Tensor

from timm_dynamic.layers.base import DropInConv2d


class KernelMixture(DropInConv2d):
    """Base of drop-in layers that have their kernels as parameters `[N, O, I, Kh, Kw]`."""

    def _apply(self, fn, recurse: bool = True):
        # `Module.to(memory_format=torch.channels_last)` breaks on five dimensions. The kernels stay contiguous.
        return super()._apply(lambda t: fn(t.flatten(0, 1)).contiguous().view_as(t) if t.ndim == 5 else fn(t), recurse)


def around_mean(attention: Tensor, total: Tensor) -> Tensor:
    """Coefficients of kernels that are stored as their mean, and how far all but the first one are from it.

    The deviation of the first kernel is minus the sum of the others'.

    Args:
        attention: `[B, N]`, of the kernels.
        total: `[B, 1]`, its sum.

    Returns:
        `[B, N]`, of the mean and of the deviations.
    """
    return torch.cat([total, attention[:, 1:] - attention[:, :1]], 1)
