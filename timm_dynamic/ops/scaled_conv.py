"""DCD's two terms in training, forwards and backwards.

    out[b] = scale[b] * (conv2d(x[b], weight) + bias) + P v[b]

(Li et al., "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021.) Scaling weights, not maps, leaves no
map to keep for the backward pass but `x`; where maps are small beside the weight, that of the convolution is kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops import scaled_sum
from timm_dynamic.ops._autocast import autocast_dtype
from timm_dynamic.ops._linear import linear
from timm_dynamic.ops.per_sample_conv import Pair, memory_format, output_size

_IN_CACHE = 2**18  # numbers of a map


def scaled_conv(
    x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor, v: Tensor, own_weights: bool, options
) -> tuple[Tensor, Tensor | None]:
    """Convolve, rescale the output channels of every sample, and add a 1x1 convolution of other maps; without autograd.

    Args:
        x: `[B, C, H, W]`.
        scale: `[B, O]`.
        weight, bias: `[O, C / groups, Kh, Kw]` and `[O]`.
        p: `[O, L, 1, 1]`.
        v: `[B, L, Ho * Wo]`.
        own_weights: Make a weight for every sample; without groups only.
        options: Stride, padding, dilation and groups as for `conv2d`; the padding is of zeros.

    Returns:
        `[B, O, Ho, Wo]`, and with `own_weights` None, else the convolution's result, for the backward pass.
    """
    if not own_weights:
        y = F.conv2d(x, weight, bias, *options)
        if scaled_sum.serves(y, scale, p, v):
            return torch.ops.timm_dynamic.scaled_sum(y, scale, p, v), y
        out = torch.empty_like(y)
        for y_, scale_, v_, out_ in in_cache(y, scale, v, out):
            combine(torch.mul(y_, scale_[:, :, None, None], out=out_), p, v_)
        return out, y
    out = None
    # Sample by sample: as long as its map is in the cache, nothing of its size is read from memory twice.
    for b in range(len(x)):
        own_bias = None if bias is None else bias * scale[b]
        y = conv_sample(x[b : b + 1], weight * scale[b, :, None, None, None], own_bias, *options[:3])
        y = combine(y, p, v[b : b + 1])
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
        if scaled_sum.serves(y, scale, p, v):
            dy, dscale, dv = torch.ops.timm_dynamic.scaled_sum_backward(grad, y, scale, p, v)
            dp = scaled_sum.grad_p(grad, p, v)
        else:
            dy, dscale, dp, dv = torch.empty_like(y), torch.empty_like(scale), torch.zeros_like(p), torch.empty_like(v)
            for g, y_, scale_, v_, dy_, dscale_, dv_ in in_cache(grad, y, scale, v, dy, dscale, dv):
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


def in_cache(*tensors: Tensor):
    """Their parts, of so many samples that the first one's maps stay in a CPU's cache from an operation to the next."""
    maps = tensors[0]
    samples = max(_IN_CACHE // max(maps[0].numel(), 1), 1) if maps.device.type == "cpu" else len(maps)
    return zip(*(t.split(samples) for t in tensors), strict=True)


def conv_sample(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """`conv2d` of one sample, without groups.

    With far more outputs than positions it is a product: oneDNN's convolution first puts its weight in another layout.
    """
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    # `linear` knows neither autograd nor autocast.
    plain = x.is_contiguous() and not torch.is_grad_enabled() and x.dtype == weight.dtype == autocast_dtype(x)
    if not plain or 4 * math.prod(size) > len(weight):
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


def combine(y: Tensor, p: Tensor, v: Tensor, scale: Tensor | None = None) -> Tensor:
    """`scale * y + P v` for y, `[B, O, H, W]`, and v, `[B, L, H, W]`; y is overwritten where autograd allows it."""
    channels_last = not y.is_contiguous()
    if channels_last:
        y = y.permute(0, 2, 3, 1)
    shape = y.shape
    # Never a view of the sum's own result: autograd would copy the whole gradient for an operation on part of a tensor.
    y = y.flatten(1, 2) if channels_last else y.flatten(2)
    if scale is not None:
        scale = scale[:, None, :] if channels_last else scale[:, :, None]
        y = y * scale if torch.is_grad_enabled() else y.mul_(scale)
    p, v = p.flatten(1).expand(len(y), -1, -1), v.flatten(2)
    y = y.baddbmm_(v.mT, p.mT) if channels_last else y.baddbmm_(p, v)
    y = y.view(shape)
    return y.permute(0, 3, 1, 2) if channels_last else y
