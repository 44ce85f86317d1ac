"""What frequency dynamic convolution is made of: gates, and the modulation of its input's bands.

Chen et al., "Frequency Dynamic Convolution for Dense Image Prediction", CVPR 2025 (arXiv 2503.18783).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.layers.pooled_norm import normalize_pooled
from timm_dynamic.ops.precision import accumulation_dtype, no_autocast

# The highest frequencies of what is subtracted, band by band: less than a half, up to a quarter and an eighth of the
# highest one of a map of so many positions.
_HIGHEST = (15, 8, 4)
_MASK_SIZE = 64


class SquaredReLU(nn.Module):
    """`scale * relu(z)**2 + bias`."""

    def __init__(self, **dd):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1, **dd)), nn.Parameter(torch.zeros(1, **dd))

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * F.relu(z) ** 2 + self.bias


class GlobalGates(nn.Module):
    """The average-pooled input, `[B, C]`, to gates of inputs, outputs, taps and groups of frequencies, `[B, n]` each.

    One sample has no statistics to normalise it with: the norm takes the running ones for it, in training, too.
    """

    def __init__(self, channels: int, hidden: int, outputs: int, taps: int, groups: int, **dd):
        super().__init__()
        self.fc = nn.Conv2d(channels, hidden, 1, bias=False, **dd)
        self.bn = nn.BatchNorm2d(hidden, **dd)
        self.relu = SquaredReLU(**dd)
        self.channel_fc = nn.Conv2d(hidden, channels, 1, **dd)
        self.filter_fc = nn.Conv2d(hidden, outputs, 1, **dd)
        self.spatial_fc = nn.Conv2d(hidden, taps, 1, **dd) if taps > 1 else None
        self.kernel_fc = nn.Conv2d(hidden, groups, 1, **dd)

    @torch.jit.unused
    def heads(self) -> list[nn.Conv2d]:
        heads = (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc)
        return [head for head in heads if head is not None]

    def forward(self, pooled: Tensor) -> list[Tensor]:
        z = self.fc(pooled[:, :, None, None])
        if torch.jit.is_scripting():
            z = self.relu(self.bn(z))
        else:
            z = self.relu(normalize_pooled(self.bn, z))
        scores = [self.channel_fc(z), self.filter_fc(z)]
        if self.spatial_fc is not None:
            scores.append(self.spatial_fc(z))
        scores.append(self.kernel_fc(z))
        return [2 * torch.sigmoid(one).flatten(1) for one in scores]


class LocalGates(nn.Module):
    """The average-pooled input, `[B, C]`, to a gate for every entry of the kernel, `[B, outputs * taps, C]`."""

    def __init__(self, channels: int, entries: int, **dd):
        super().__init__()
        size = round(math.log2(channels) / 2 + 0.5) // 2 * 2 + 1
        self.conv = nn.Conv1d(1, entries, size, padding=size // 2, bias=False, **dd)
        self.norm = nn.LayerNorm(channels, **dd)

    def forward(self, pooled: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.conv(self.norm(pooled[:, None])))


class BandModulation(nn.Module):
    """The input with its frequency bands weighed at every position, section 3.4; the lowest one is left as it is.

    Bands are those of a map of 64 x 64 positions; others take the nearest frequency's.
    """

    def __init__(self, channels: int, **dd):
        super().__init__()
        self.freq_weight_conv_list = nn.ModuleList(nn.Conv2d(channels, 1, 3, padding=1, **dd) for _ in _HIGHEST)
        self.highest, self.size = _HIGHEST, _MASK_SIZE  # for TorchScript

    def forward(self, x: Tensor) -> Tensor:
        weights = []
        for conv in self.freq_weight_conv_list:
            weights.append(2 * torch.sigmoid(conv(x).to(accumulation_dtype(x))))
        if torch.jit.is_scripting():
            return self.modulate(x, weights)
        else:
            with no_autocast(x):
                return self.modulate(x, weights)

    def modulate(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The sum of the bands, each times its weight."""
        low = x.to(accumulation_dtype(x))
        y, spectrum = torch.zeros_like(low), torch.fft.rfft2(low, norm="ortho")
        for i, highest in enumerate(self.highest):
            higher = low
            low = torch.fft.irfft2(spectrum * self.low_pass(low, highest), s=x.shape[2:], norm="ortho")
            y = y + weights[i] * (higher - low)
        return (y + low).to(x.dtype)

    def low_pass(self, x: Tensor, highest: int) -> Tensor:
        """1 for the frequencies of a map's half spectrum, `[H, W // 2 + 1]`, that stand for low ones of 64 x 64."""
        rows = nearest(x.shape[2], self.size, x)
        columns = nearest(x.shape[3] // 2 + 1, self.size // 2 + 1, x)
        return ((torch.minimum(rows, self.size - rows) <= highest)[:, None] & (columns <= highest)).to(x.dtype)


def nearest(n: int, size: int, like: Tensor) -> Tensor:
    """Which of `size` frequencies each of n stands for."""
    return (torch.arange(n, dtype=torch.float32, device=like.device) * (size / n)).floor()


def with_real_edges(spectrum: Tensor) -> Tensor:
    """The half spectrum, `[B, R, C, 2]`, of a real matrix, whose first and last column are symmetric.

    What is not symmetric in them, libraries treat in different ways.
    """
    edges = spectrum[:, :, :: spectrum.shape[2] - 1]
    mirrored = edges.flip(1).roll(1, 1) * torch.tensor([1.0, -1.0], dtype=edges.dtype, device=edges.device)
    edges = (edges + mirrored) / 2
    return torch.cat([edges[:, :, :1], spectrum[:, :, 1:-1], edges[:, :, 1:]], 2)
