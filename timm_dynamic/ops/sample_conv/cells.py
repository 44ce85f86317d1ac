"""A convolution of every sample with a kernel of blocks, each a mixture of cells, with its gradient in one piece.

Kernels are there for some samples at a time: those of a batch are as large as so many networks.
"""

import torch
from torch import Tensor

from timm_dynamic.ops.channel_fusion.definition import NO_LIMITS, kernels_of_cells
from timm_dynamic.ops.products import linear
from timm_dynamic.ops.registration import differentiate
from timm_dynamic.ops.sample_conv.samples import convolve, gradients
from timm_dynamic.ops.shapes import Pair, memory_format

# Elements of the kernels that are there at a time, or those of one sample. With half as many, products of few mixtures
# take 1.3 times as long (kw1x_resnet18's last stage at batch 16, two threads of an AMD EPYC, November 2026).
_CHUNK = 2**25


class CellConvolution(torch.autograd.Function):
    """For eager training on a CPU.

    Inputs: x, `[B, C, H, W]`; coefficients, `[B, Kh, Kw, o, i, N]`; cells, `[N, O / o, C / i]`; stride, padding and
    dilation.
    """

    @staticmethod
    def forward(x: Tensor, coefficients: Tensor, cells: Tensor, *options: Pair) -> Tensor:
        return convolve_cells(x, coefficients, cells, None, None, NO_LIMITS, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, coefficients, cells, *ctx.options = inputs
        ctx.save_for_backward(x, coefficients, cells)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        nothing = (None,) * 3
        if grad is None:
            return *nothing, *nothing
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph

            def function(x: Tensor, coefficients: Tensor, cells: Tensor) -> Tensor:
                return convolve(x, kernels_of_cells(coefficients, cells), *ctx.options, 1)

            return *differentiate(function, grad, ctx.saved_tensors, needs), *nothing
        return *_gradients(grad, *ctx.saved_tensors, ctx.options, needs[0]), *nothing


def convolve_cells(x, coefficients, cells, a_out, shift, limits, options) -> Tensor:
    """By the CPU kernel, without autograd: `clamp(a_out * y + shift)`, `[O]` each or None."""
    a_out, shift = (None if t is None else t[None].contiguous() for t in (a_out, shift))
    pixels = x.contiguous(memory_format=torch.channels_last)
    with torch._C._AutoDispatchBelowAutograd():
        y = torch.ops.timm_dynamic.channel_fusion(
            pixels, cells, coefficients.contiguous(), None, a_out, None, None, shift, *limits, *options
        )
    return y.contiguous(memory_format=memory_format(x))


def _gradients(grad, x, coefficients, cells, options, needs_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    (B, *taps, o, i, N), (_, O, I) = coefficients.shape, cells.shape
    rows, flat = coefficients.reshape(B, -1, N), cells.flatten(1)
    n = min(B, max(1, _CHUNK // (rows.shape[1] * flat.shape[1])))
    kernel = x.new_empty(o, O, *taps, i, I)  # in channels_last, in which blocks are copied by rows
    weight = kernel.view(1, o * O, *taps, i * I).permute(0, 1, 4, 2, 3)
    dx = torch.empty_like(x) if needs_x else None
    drows, dflat = torch.empty_like(rows), torch.zeros_like(flat)
    for first in range(0, B, n):
        some = slice(first, first + n)
        matrix = rows[some].flatten(0, 1)
        blocks = linear(matrix, flat.t()).view(-1, *taps, o, i, O, I)
        for b, block in enumerate(blocks, first):
            kernel.copy_(block.permute(2, 4, 0, 1, 3, 5))
            maps = (t[b : b + 1].contiguous(memory_format=torch.channels_last) for t in (grad, x))
            ((_, dx_of_one, dweight),) = gradients(*maps, weight, *options, 1, needs_x)
            block.copy_(dweight.permute(0, 1, 3, 4, 2).reshape(kernel.shape).permute(2, 3, 0, 4, 1, 5))
            if needs_x:
                dx[b] = dx_of_one[0]
        dblocks = blocks.view(len(matrix), -1)
        drows[some] = linear(dblocks, flat).view_as(drows[some])
        dflat += linear(matrix.t(), dblocks.t())
    return dx, drows.view_as(coefficients), dflat.view_as(cells)
