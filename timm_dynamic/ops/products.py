"""Matrix products on the CPU by the faster library."""

import torch
import torch.nn.functional as F
from torch import Tensor

# MKL multiplies matrices at half of oneDNN's speed on AMD's processors, and no faster on Intel's. `F.linear` uses MKL
# for float32, and oneDNN's own convolution is slower than its product for 1x1 kernels in NCHW.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(t: Tensor) -> bool:
    """Whether `linear` takes oneDNN for tensors like this."""
    return ONEDNN and t.device.type == "cpu" and t.dtype == torch.float32


def _packed(matrix: Tensor) -> Tensor:
    """Of others than dense matrices oneDNN takes 500 times as long, if it takes them."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def linear(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix.T`; either may be transposed in memory."""
    if by_onednn(rows):
        rows, matrix = map(_packed, (rows, matrix))
        return torch.ops.mkldnn._linear_pointwise(rows, matrix, None, "none", [], "")
    return F.linear(rows, matrix)
