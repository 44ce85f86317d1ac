"""A convolution of every sample with kernels of blocks, each a mixture of cells: for inference.

Kernels are there for some samples at a time, in memory that is used again and again.
"""

import torch
from torch import Tensor

from timm_dynamic.ops.sample_conv.samples import convolve
from timm_dynamic.ops.shapes import Pair, memory_format

# Elements of the kernels that are there at a time, or those of two samples. Four times as many: 1.24 of the time
# (kw1x_resnet18 at batch 16, one thread of a CPU, November 2026).
_CHUNK = 2**22
# Of these, so many are mixed, scaled and put in order before the next ones, in the cache.
_CACHED = 2**18


def convolve_mixtures(
    x: Tensor,
    coefficients: Tensor,
    cells: Tensor,
    grid: tuple[int, int, int],
    gain: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """The convolution, without autograd.

    Args:
        x: `[B, C, H, W]`.
        coefficients: `[B, mixtures, N]`.
        cells: `[N, O, I]`, contiguous.
        grid: How many cells a kernel is made of: by taps, outputs and inputs, in the order of the mixtures.
        gain: A factor of every output channel.
        kernel_size, stride, padding, dilation, groups: As for `conv2d`.
    """
    (taps, outputs, inputs), (_, O, I) = grid, cells.shape
    size, last = outputs * O * taps * inputs * I, _inputs_come_last(x, grid, cells)
    order = (0, 2, 4, 1, 3, 5) if last else (0, 2, 4, 3, 5, 1)
    shape = (outputs * O, *kernel_size, inputs * I) if last else (outputs * O, inputs * I, *kernel_size)
    n = min(len(x), max(2, _CHUNK // size))
    step = max(1, _CACHED * O // (n * size))
    kernels, results = x.new_empty(n, size), []
    for some, rows in zip(x.split(n), coefficients.split(n), strict=True):
        n = len(some)
        ordered = kernels[:n].view(n, outputs, O, *((taps, inputs, I) if last else (inputs, I, taps)))
        for first in range(0, O, step):
            part = slice(first, first + step)
            blocks = torch.mm(rows.flatten(0, 1), cells[:, part].flatten(1)).view(n, *grid, -1, I).permute(order)
            if gain is not None:
                blocks = blocks * gain.view(outputs, O, 1, 1, 1)[:, part]
            ordered[:, :, part] = blocks
        weight = ordered.view(n, *shape)
        weight = weight.permute(0, 1, 4, 2, 3) if last else weight
        results.append(convolve(some, weight, stride, padding, dilation, groups))
    return results[0] if len(results) == 1 else torch.cat(results)


def _inputs_come_last(x: Tensor, grid: tuple[int, int, int], cells: Tensor) -> bool:
    """Whether kernels are in channels_last, in which blocks are copied by rows."""
    if grid[0] == 1 or cells.shape[2] == 1:
        return False
    return memory_format(x) == torch.channels_last or grid[0] * cells[0].numel() * grid[1] * grid[2] > 2 * x[0].numel()
