"""The terms of a DCD convolution in training, forwards and backwards.

    out[b] = scale[b] * (conv2d(x[b], weight) + bias) + P v[b]

(Li et al., "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021.) Scaling weights, not maps, leaves no
map to keep for the backward pass but `x`; where maps are small beside the weight, that of the convolution is kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.kernels import has_kernel
from timm_dynamic.ops.products import linear
from timm_dynamic.ops.shapes import Pair, memory_format, output_size

_IN_CACHE = 2**18  # numbers of a map
_LARGE_MAP = 2**15  # numbers of a sample's


def scaled_conv(
    x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor, v: Tensor, options
) -> tuple[Tensor, Tensor | None]:
    """Convolve, rescale the output channels of every sample, and add a 1x1 convolution of other maps; without autograd.

    Args:
        x: `[B, C, H, W]`.
        scale: `[B, O]`.
        weight, bias: `[O, C / groups, Kh, Kw]` and `[O]`.
        p: `[O, L, 1, 1]`.
        v: `[B, L, Ho * Wo]`.
        options: Stride, padding, dilation and groups as for `conv2d`; the padding is of zeros.

    Returns:
        `[B, O, Ho, Wo]`; and for the backward pass the convolution's result, or None where every sample got a weight.
    """
    if not _maps_exceed_weight(x, weight, options):
        y = F.conv2d(x, weight, bias, *options)
        out = torch.empty_like(y)
        for y_, scale_, v_, out_ in samples_in_cache(y, scale, v, out):
            _combine(torch.mul(y_, scale_[:, :, None, None], out=out_), p, v_)
        return out, y
    out = None
    # Sample by sample: as long as its map is in the cache, nothing of its size is read from memory twice.
    for b in range(len(x)):
        scaled_bias = None if bias is None else bias * scale[b]
        y = _conv_sample(x[b : b + 1], weight * scale[b, :, None, None, None], scaled_bias, *options[:3])
        y = _combine(y, p, v[b : b + 1])
        if out is None:  # filled at once, not joined at the end: the samples' own memory is used again and again
            shape = (len(x), *y.shape[1:])
            out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=memory_format(y))
        out[b] = y[0]
    return out, None


def scaled_conv_backward(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: Tensor,
    v: Tensor,
    needs_x: bool,
    options,
) -> tuple:
    """The gradients of `x` (or None), `scale`, `weight`, `bias`, `p` and `v`; `y` is what `scaled_conv` returned."""
    transposed = p.flatten(1).t()
    if y is not None:
        dy, dscale, dp, dv = torch.empty_like(y), torch.empty_like(scale), torch.zeros_like(p), torch.empty_like(v)
        for g, y_, scale_, v_, dy_, dscale_, dv_ in samples_in_cache(grad, y, scale, v, dy, dscale, dv):
            torch.sum(g * y_, (2, 3), out=dscale_)
            torch.mul(g, scale_[:, :, None, None], out=dy_)
            g = g.flatten(2)
            dp += torch.bmm(g, v_.mT).sum(0).view_as(p)
            torch.bmm(transposed.expand(len(g), -1, -1), g, out=dv_)
        *conv, groups = options
        sizes, mask = None if bias is None else list(bias.shape), (needs_x, True, bias is not None)
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dy, x, weight, sizes, *conv, False, (0, 0), groups, mask
        )
        return dx, dscale, dweight, dbias, dp, dv
    dx, dv, dscale = torch.empty_like(x) if needs_x else None, torch.empty_like(v), torch.empty_like(scale)
    dweight, dp = torch.zeros_like(weight), torch.zeros_like(p)
    dbias = None if bias is None else torch.zeros_like(bias)
    for b in range(len(x)):
        g, s = grad[b : b + 1], scale[b, :, None, None, None]
        dx_b, dw, _ = torch.ops.aten.convolution_backward(
            *(g, x[b : b + 1], weight * s, None, *options[:3], False, (0, 0), 1),
            (needs_x, True, False),
        )
        if needs_x:
            dx[b] = dx_b[0]
        dweight.addcmul_(dw, s)
        dscale[b] = (dw * weight).sum((1, 2, 3))
        g = g[0].flatten(1)
        if bias is not None:
            db = g.sum(1)
            dbias.addcmul_(db, scale[b])
            dscale[b].addcmul_(db, bias)
        dp.flatten(1).addmm_(g, v[b].t())
        torch.mm(transposed, g, out=dv[b])
    return dx, dscale, dweight, dbias, dp, dv


def samples_in_cache(*tensors: Tensor):
    """Their parts, of so many samples that the first one's maps stay in a CPU's cache from an operation to the next."""
    maps = tensors[0]
    samples = max(_IN_CACHE // max(maps[0].numel(), 1), 1) if maps.device.type == "cpu" else len(maps)
    return zip(*(t.split(samples) for t in tensors), strict=True)


def _conv_sample(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """`conv2d` of one sample, without groups.

    With far more outputs than positions it is a product: oneDNN's convolution first puts its weight in another layout.
    """
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if not x.is_contiguous() or 4 * math.prod(size) > len(weight):
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    padded = F.pad(x[0], (padding[1], padding[1], padding[0], padding[0]))
    columns = _columns(padded, weight.shape[1:], size, stride, dilation)
    y = linear(weight.flatten(1), columns.t()).view(1, -1, *size)
    return y if bias is None else y.add_(bias[:, None, None])


def _columns(padded: Tensor, kernel: torch.Size, size: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """`[C * Kh * Kw, Ho * Wo]`: what the taps of a kernel, `[C, Kh, Kw]`, read at the output positions."""
    map_, row, column = padded.stride()
    strides = (map_, row * dilation[0], column * dilation[1], row * stride[0], column * stride[1])
    return padded.as_strided((*kernel, *size), strides).reshape(kernel.numel(), -1)


def _combine(y: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """`y + P v` in the place of y, `[B, O, H, W]`, for v, `[B, L, H * W]`."""
    channels_last = not y.is_contiguous()
    if channels_last:
        y = y.permute(0, 2, 3, 1)
    shape = y.shape
    y = y.flatten(1, 2) if channels_last else y.flatten(2)
    p = p.flatten(1).expand(len(y), -1, -1)
    y = y.baddbmm_(v.mT, p.mT) if channels_last else y.baddbmm_(p, v)
    y = y.view(shape)
    return y.permute(0, 3, 1, 2) if channels_last else y


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
    for x_, dz_, dpooled_, dx_ in samples_in_cache(x, dz.flatten(2), dpooled, x if dx is None else dx):
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


def is_pointwise(x: Tensor, weight: Tensor, options: tuple) -> bool:
    """Whether the CPU kernels run this convolution: 1x1, without padding, stride and groups."""
    stride, padding, _, groups = options
    pointwise = (*weight.shape[2:], *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1) and x.numel() > 0
    dense = x.dtype == weight.dtype == torch.float32 and x.is_contiguous() and weight.is_contiguous()
    return pointwise and dense and x.device.type == "cpu" and has_kernel("cpu", "channel_fusion")


def _maps_exceed_weight(x: Tensor, weight: Tensor, options: tuple) -> bool:
    """Whether a weight for every sample is the lesser evil (benchmarks/models.py, on a CPU).

    For maps of 32 pixels and few channels it is not: 1.7 times the training step of ResNet-8 for CIFAR-10 at batch 128
    (one thread of an AMD EPYC, November 2026).
    """
    stride, *_, groups = options
    if x.numel() < len(x) * _LARGE_MAP:
        return False
    positions = (x.shape[2] // stride[0]) * (x.shape[3] // stride[1])
    return groups == 1 and len(x) > 0 and 2 * weight.numel() <= positions * (weight.shape[1] + weight.shape[0])
