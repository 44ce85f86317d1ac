"""The attention of KernelWarehouse's layers to the cells of a warehouse.

Li and Yao, "KernelWarehouse: Rethinking the Design of Dynamic Convolution", ICML 2024 (arXiv 2406.07879).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.layers.pooled_norm import normalize_pooled


class CellAttention(nn.Module):
    """The average-pooled input, `[B, C]`, to scores of all cells and of none, `[B, mixtures, N + 1]`, section 3.3.

    With a basis, those of the cells that other layers begin with are linear in fewer numbers, by one map for all
    mixtures. One sample has no statistics to normalise it with: a batch norm takes the running ones, in training, too.

    Args:
        channels, hidden: Of the input, and between the linear layers.
        mixtures: That there are scores for.
        cells: N.
        local: The cells that the layer begins with, if there is a basis.
        basis: Numbers that scores of other cells are made of, or 0.
        layer_norm: Instead of a batch norm.
    """

    def __init__(
        self, channels: int, hidden: int, mixtures: int, cells: int, local: slice, basis: int, layer_norm: bool, **dd
    ):
        super().__init__()
        self.mixtures, self.local = mixtures, local
        self.sizes = (local.stop - local.start, basis, 1)
        if basis:
            self.basis_bias = nn.Parameter(torch.zeros(mixtures * (cells + 1), **dd))
        self.fc1 = nn.Linear(channels, hidden, bias=layer_norm, **dd)
        self.norm1 = (nn.LayerNorm if layer_norm else nn.BatchNorm1d)(hidden, **dd)
        self.fc2 = nn.Linear(hidden, mixtures * (sum(self.sizes) if basis else cells + 1), bias=not basis, **dd)
        self.fc3 = nn.Linear(basis, cells - self.sizes[0], bias=False, **dd) if basis else None
        for linear in (one for one in (self.fc1, self.fc2, self.fc3) if one is not None):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        hidden = self.fc1(pooled)
        if torch.jit.is_scripting():
            hidden = F.relu(self.norm1(hidden))
        else:
            hidden = F.relu(normalize_pooled(self.norm1, hidden))
        scores = self.fc2(hidden).unflatten(1, (self.mixtures, -1))
        if self.fc3 is None:
            return scores
        local, basis, none = scores.split(self.sizes, 2)
        others, start = self.fc3(basis), self.local.start
        scores = torch.cat([others[..., :start], local, others[..., start:], none], 2)
        return scores + self.basis_bias.unflatten(0, (self.mixtures, -1))
