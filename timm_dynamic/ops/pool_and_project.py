"""What the dynamic branch of a DCD convolution reads from its input: pooled features, and latent channels `Q x`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pool(x: Tensor, size: int) -> Tensor:
    """`[B, C, H, W]`, averaged down to size x size positions, as `[B, C * size * size]`."""
    return x.mean((2, 3)) if size == 1 else F.adaptive_avg_pool2d(x, size).flatten(1)


def project(x: Tensor, q: Tensor, stride: tuple[int, int]) -> Tensor:
    """A 1x1 convolution as a product for every sample: without the copies to other layouts that oneDNN makes."""
    x = x[:, :, :: stride[0], :: stride[1]]
    B, _, H, W = x.shape
    return torch.bmm(q.flatten(1).expand(B, -1, -1), x.flatten(2)).view(B, len(q), H, W)


def pool_and_project(x: Tensor, q: Tensor, pool_size: int, stride: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """`x` itself, `pool(x, pool_size)` and `project(x, q, stride)`; differentiable once, not for torch.compile.

    Whoever goes on with this `x` saves the backward pass two maps of its size: the gradients of the two small results
    are added to that of `x` in its place.
    """
    return _PoolAndProject.apply(x, q, pool_size, stride)


class _PoolAndProject(torch.autograd.Function):
    @staticmethod
    def forward(x, q, pool_size, stride):
        return x.view_as(x), pool(x, pool_size), project(x, q, stride)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, q, *ctx.options = inputs
        ctx.save_for_backward(x, q)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gx, gpooled, gz):
        x, q = ctx.saved_tensors
        pool_size, (sy, sx) = ctx.options
        gx, gz = gx.contiguous(), gz.flatten(2)
        read = x[:, :, ::sy, ::sx]
        gq = torch.bmm(gz, read.flatten(2).mT).sum(0).view_as(q)
        qt = q.flatten(1).t().expand(len(x), -1, -1)
        if read.shape == x.shape:
            gx.flatten(2).baddbmm_(qt, gz)
        else:
            gx[:, :, ::sy, ::sx].add_(torch.bmm(qt, gz).view(read.shape))
        if pool_size == 1:
            gx += (gpooled / x[0, 0].numel())[:, :, None, None]
        else:
            gx += torch.ops.aten._adaptive_avg_pool2d_backward(gpooled.view(*x.shape[:2], pool_size, -1), x)
        return gx, gq, None, None
