"""Attention over kernels (Chen et al., CVPR 2020, arXiv 1912.03458), and over all there is (Li et al., ICLR 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.layers.base import in_dtype_of
from timm_dynamic.layers.pooled_norm import normalize_pooled
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

    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        pooled = average(x)
        if torch.jit.is_scripting():
            scores = self.to_scores(pooled.to(x.dtype))
        else:
            with no_autocast(x):
                scores = in_dtype_of(pooled, self.to_scores)
        return F.softmax(scores / temperature, 1)


class OmniAttention(nn.Module):
    """That of ODConv (ICLR 2022, arXiv 2209.07947): pooled features to the scores of inputs, outputs, taps and kernels.

    One sample has no statistics to normalise it with: the norm takes the running ones for it, in training, too.

    Args:
        channels, hidden: Of the input, and between the linear layers.
        outputs, taps, kernels: Numbers of scores; 0: there is no such head, and None for its scores.
    """

    def __init__(self, channels: int, hidden: int, outputs: int, taps: int, kernels: int, **dd):
        super().__init__()
        self.fc = nn.Linear(channels, hidden, bias=False, **dd)
        self.bn = nn.BatchNorm1d(hidden, **dd)
        self.channel_fc = nn.Linear(hidden, channels, **dd)
        self.filter_fc = nn.Linear(hidden, outputs, **dd) if outputs else None
        self.spatial_fc = nn.Linear(hidden, taps, **dd) if taps else None
        self.kernel_fc = nn.Linear(hidden, kernels, **dd) if kernels else None

    def heads(self) -> list[nn.Linear | None]:
        return [self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc]

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        z = self.fc(pooled)
        if torch.jit.is_scripting():
            z = F.relu(self.bn(z))
        else:
            z = F.relu(normalize_pooled(self.bn, z))
        outputs = None if self.filter_fc is None else self.filter_fc(z)
        taps = None if self.spatial_fc is None else self.spatial_fc(z)
        return self.channel_fc(z), outputs, taps, None if self.kernel_fc is None else self.kernel_fc(z)
