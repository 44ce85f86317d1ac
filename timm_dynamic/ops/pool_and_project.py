"""What the dynamic branch of a DCD convolution reads from its input: pooled features, and latent channels `Q x`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.scaled_conv import in_cache


def pool(x: Tensor, size: int) -> Tensor:
    """`[B, C, H, W]`, averaged down to size x size positions, as `[B, C * size * size]`."""
    return x.mean((2, 3)) if size == 1 else F.adaptive_avg_pool2d(x, size).flatten(1)


def project(x: Tensor, q: Tensor, stride: tuple[int, int]) -> Tensor:
    """A 1x1 convolution as a product for every sample: without the copies to other layouts that oneDNN makes."""
    x = x[:, :, :: stride[0], :: stride[1]]
    B, _, H, W = x.shape
    return torch.bmm(q.flatten(1).expand(B, -1, -1), x.flatten(2)).view(B, len(q), H, W)


def pool_and_project_backward(
    dpooled: Tensor, dz: Tensor, x: Tensor, q: Tensor, pool_size: int, stride: tuple[int, int], dx: Tensor | None
) -> Tensor:
    """The gradient of `q`; that of `x` is added to `dx`, in its place: it never is a map of its own."""
    sy, sx = stride
    dq, transposed = torch.zeros_like(q), q.flatten(1).t()
    for x_, dz_, dpooled_, dx_ in in_cache(x, dz.flatten(2), dpooled, x if dx is None else dx):
        read = x_[:, :, ::sy, ::sx]
        dq += torch.bmm(dz_, read.flatten(2).mT).sum(0).view_as(q)
        if dx is None:
            continue
        matrix = transposed.expand(len(x_), -1, -1)
        if read.shape == x_.shape and dx.is_contiguous():
            dx_.flatten(2).baddbmm_(matrix, dz_)
        else:
            dx_[:, :, ::sy, ::sx].add_(torch.bmm(matrix, dz_).view(read.shape))
        add_pool_backward(dx_, dpooled_, x_, pool_size)
    return dq


def add_pool_backward(dx: Tensor, dpooled: Tensor, x: Tensor, size: int) -> None:
    """Add the gradient of `x` in `pool(x, size)` to `dx`."""
    if size == 1:
        dx += (dpooled / x[0, 0].numel())[:, :, None, None]
    else:
        dx += torch.ops.aten._adaptive_avg_pool2d_backward(dpooled.view(*x.shape[:2], size, -1), x)
