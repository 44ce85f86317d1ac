"""The attention of dynamic convolution over its kernels (Chen et al., CVPR 2020, arXiv 1912.03458)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.layers.base import in_dtype_of
from timm_dynamic.ops.pooled_heads.definition import average
from timm_dynamic.ops.precision import no_autocast


class KernelAttention(nn.Module):
    """How much of every kernel a sample gets: `softmax(MLP(GAP(x)) / temperature)`, section 3.2 of the paper.

    Computed in float32, or float64 for float64 inputs: float16 cannot hold the scores of large activations.

    Args:
        in_channels: C.
        num_kernels: N.
        reduction: The hidden layer is `C // reduction` wide, at least 1.

    Shape:
        `[B, C, H, W]` to `[B, N]`.
    """

    def __init__(self, in_channels: int, num_kernels: int, reduction: int, device=None, dtype=None):
        super().__init__()
        hidden = max(1, in_channels // reduction)
        dd = {"device": device, "dtype": dtype}
        self.to_scores = nn.Sequential(
            nn.Linear(in_channels, hidden, **dd), nn.ReLU(), nn.Linear(hidden, num_kernels, **dd)
        )

    def forward(self, x: Tensor, temperature: Tensor | None = None) -> Tensor:
        pooled = average(x)
        if torch.jit.is_scripting():
            scores = self.to_scores(pooled.to(x.dtype))
        else:
            with no_autocast(x):
                scores = in_dtype_of(pooled, self.to_scores)
        return F.softmax(scores if temperature is None else scores / temperature, 1)
