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

    def heads(self) -> list[nn.Conv2d]:
        heads = (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc)
        return [head for head in heads if head is not None]

    def forward(self, pooled: Tensor) -> list[Tensor]:
        z = self.relu(normalize_pooled(self.bn, self.fc(pooled[:, :, None, None])))
        return [2 * torch.sigmoid(head(z)).flatten(1) for head in self.heads()]


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

    def forward(self, x: Tensor) -> Tensor:
        weights = [2 * torch.sigmoid(conv(x).to(accumulation_dtype(x))) for conv in self.freq_weight_conv_list]
        with no_autocast(x):
            low = x.to(accumulation_dtype(x))
            y, spectrum = 0, torch.fft.rfft2(low, norm="ortho")
            for weight, highest in zip(weights, _HIGHEST, strict=True):
                higher, low = low, torch.fft.irfft2(spectrum * low_pass(x, highest), s=x.shape[2:], norm="ortho")
                y = y + weight * (higher - low)
            return (y + low).to(x.dtype)


def low_pass(x: Tensor, highest: int) -> Tensor:
    """1 for the frequencies of a map's half spectrum, `[H, W // 2 + 1]`, that stand for those of 64 x 64 up to one."""
    rows, columns = (
        (torch.arange(n, dtype=torch.float32, device=x.device) * (size / n)).floor()
        for n, size in ((x.shape[2], _MASK_SIZE), (x.shape[3] // 2 + 1, _MASK_SIZE // 2 + 1))
    )
    mask = (torch.minimum(rows, _MASK_SIZE - rows) <= highest)[:, None] & (columns <= highest)
    return mask.to(accumulation_dtype(x))


def with_real_edges(spectrum: Tensor) -> Tensor:
    """The half spectrum, `[B, R, C, 2]`, of a real matrix, whose first and last column are symmetric.

    What is not symmetric in them, libraries treat in different ways.
    """
    edges = spectrum[:, :, :: spectrum.shape[2] - 1]
    mirrored = edges.flip(1).roll(1, 1) * edges.new_tensor([1.0, -1.0])
    edges = (edges + mirrored) / 2
    return torch.cat([edges[:, :, :1], spectrum[:, :, 1:-1], edges[:, :, 1:]], 2)
