"""The operator of filters that depend on the position, in plain PyTorch, and its registration.

    out[b,c,p] = sum_k (filters[b,g(c),k,p] o channel_filter[b,c,k]) * x[b, c, s(p) + o_k]

with `o` a product ("mul") or a sum ("add"), `k = ky*K + kx`, `o_k = dilation * (ky - K//2, kx - K//2)`, zero padding,
and `s(p) = p*stride` or `p // upsample` in both directions. Channels are counted as (part, member, filter of the part):
channel `(i*members + m)*inner + j` reads filter `i*inner + j`. So `parts = G` gives blocks of neighbouring channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.kernels import transforms
from timm_dynamic.ops.precision import accumulation_dtype
from timm_dynamic.ops.registration import register


def definition(
    x: Tensor,
    filters: Tensor,
    channel_filter: Tensor | None,
    kernel_size: int,
    kernel_combine: str,
    parts: int,
    dilation: int,
    stride: int,
    upsample: int,
) -> Tensor:
    """A sum of shifted inputs."""
    padded, spatial, channel = _operands(x, filters, channel_filter, kernel_size, parts, dilation, upsample)
    Ho, Wo = output_size(x, stride, upsample)
    out = 0
    for k in range(kernel_size**2):
        weight = _weight(spatial, channel, k, kernel_combine)
        out = out + weight * _tap(padded, k, kernel_size, dilation * upsample, stride, Ho, Wo)
    out = out.reshape(x.shape[0], x.shape[1], Ho, Wo).to(x.dtype)
    if not torch.compiler.is_compiling() and transforms():  # vmap does not know of memory formats
        return out
    return out.contiguous(memory_format=memory_format(x))


def definition_of_gradients(
    grad: Tensor,
    x: Tensor,
    filters: Tensor,
    channel_filter: Tensor | None,
    kernel_size: int,
    kernel_combine: str,
    parts: int,
    dilation: int,
    stride: int,
    upsample: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `dynamic_filter_backward`; see `_empty_gradients` for what is not wanted."""
    padded, spatial, channel = _operands(x, filters, channel_filter, kernel_size, parts, dilation, upsample)
    grad = _cut(grad.to(padded.dtype), filters.shape[1], parts)
    grad_padded, grad_spatial, grad_channel = torch.zeros_like(padded), torch.empty_like(spatial), None
    if channel is not None:
        grad_channel = torch.empty_like(channel)
    multiply, (Ho, Wo) = kernel_combine == "mul", output_size(x, stride, upsample)
    for k in range(kernel_size**2):
        at = (k, kernel_size, dilation * upsample, stride, Ho, Wo)
        _tap(grad_padded, *at).add_(grad * _weight(spatial, channel, k, kernel_combine))
        product, s = grad * _tap(padded, *at), spatial.select(-3, k)
        if channel is None:
            grad_spatial.select(-3, k).copy_(product.sum_to_size(s.shape))
            continue
        c = channel[..., k, None, None]
        grad_spatial.select(-3, k).copy_((product * c if multiply else product).sum_to_size(s.shape))
        grad_channel.select(-1, k).copy_((product * s if multiply else product).sum_to_size(c.shape)[..., 0, 0])
    (B, C, H, W), margin = x.shape, dilation * upsample * (kernel_size // 2)
    grad_x = grad_padded.reshape(B, C, *grad_padded.shape[-2:])
    grad_x = grad_x[:, :, margin : margin + H * upsample, margin : margin + W * upsample]
    grads = (grad_x.reshape(B, C, H, upsample, W, upsample).sum((3, 5)), grad_spatial, grad_channel)
    like = _empty_gradients(x, filters, channel_filter, needs)
    return tuple(e.copy_(g.reshape(e.shape)) if need else e for e, g, need in zip(like, grads, needs, strict=True))


def _operands(
    x: Tensor,
    filters: Tensor,
    channel_filter: Tensor | None,
    kernel_size: int,
    parts: int,
    dilation: int,
    upsample: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The padded input, `[B, parts, members, inner, ...]`, and the two factors, which broadcast with it.

    Enlarging the input and the dilation is to upsample: `(p + upsample*o) // upsample = p // upsample + o`.
    """
    dtype, G = accumulation_dtype(x), filters.shape[1]
    x = x.to(dtype)
    if upsample > 1:
        B, C, H, W = x.shape
        x = x[:, :, :, None, :, None].expand(B, C, H, upsample, W, upsample).reshape(B, C, H * upsample, W * upsample)
    padded = _cut(F.pad(x, (dilation * upsample * (kernel_size // 2),) * 4), G, parts)
    spatial = filters.to(dtype)
    if G > 1:
        spatial = spatial.reshape(spatial.shape[0], parts, 1, G // parts, *spatial.shape[2:])
    if channel_filter is None:
        return padded, spatial, None
    channel = channel_filter.to(dtype)
    if channel.shape[1] > 1:
        channel = _cut(channel, G, parts)
    elif G > 1:
        channel = channel[:, :, None, None]
    return padded, spatial, channel


def _cut(t: Tensor, groups: int, parts: int) -> Tensor:
    """`[B, C, ...]` as `[B, parts, members, inner, ...]`; as it is where all channels read the same filter."""
    if groups == 1:
        return t
    return t.reshape(t.shape[0], parts, t.shape[1] // groups, groups // parts, *t.shape[2:])


def _tap(padded: Tensor, k: int, kernel_size: int, dilation: int, stride: int, Ho: int, Wo: int) -> Tensor:
    """The `[..., Ho, Wo]` view of the padded input that tap k of every output reads."""
    y, x = k // kernel_size * dilation, k % kernel_size * dilation
    return padded[..., y : y + (Ho - 1) * stride + 1 : stride, x : x + (Wo - 1) * stride + 1 : stride]


def _weight(spatial: Tensor, channel: Tensor | None, k: int, kernel_combine: str) -> Tensor:
    if channel is None:
        return spatial.select(-3, k)
    channel = channel[..., k, None, None]
    return channel * spatial.select(-3, k) if kernel_combine == "mul" else channel + spatial.select(-3, k)


def output_size(x: Tensor, stride: int, upsample: int) -> tuple[int, int]:
    """`(Ho, Wo)`."""
    return (x.shape[2] * upsample - 1) // stride + 1, (x.shape[3] * upsample - 1) // stride + 1


def memory_format(t: Tensor) -> torch.memory_format:
    """The kernels take the layout whose innermost dimension is the channels as channels_last, any other as NCHW."""
    channels_last = t.shape[1] > 1 and t.stride(1) == 1 and t.stride(3) >= t.shape[1]
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty_gradients(
    x: Tensor, filters: Tensor, channel_filter: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `dynamic_filter_backward` returns: the inputs' shapes, 0 elements where not needed; x's in its layout."""
    tensors = (x, filters, channel_filter)
    formats = (memory_format(x), torch.contiguous_format, torch.contiguous_format)
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=f) if need else x.new_empty(0)
        for t, f, need in zip(tensors, formats, needs, strict=True)
    )


def _gradient(grad, inputs, outputs, options, needs) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.timm_dynamic.dynamic_filter_backward(grad, *inputs, *options, needs)


def _fake(x, filters, channel_filter, kernel_size, kernel_combine, parts, dilation, stride, upsample):
    shape = (*x.shape[:2], *output_size(x, stride, upsample))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _fake_gradients(grad, x, filters, channel_filter, *options):
    return _empty_gradients(x, filters, channel_filter, options[-1])


def _flops(x, filters, channel_filter, kernel_size, *options, out_shape=None, **kwargs) -> int:
    return 2 * kernel_size**2 * math.prod(out_shape)


def _flops_of_gradients(grad, x, filters, channel_filter, kernel_size, *options, **kwargs) -> int:
    return 2 * kernel_size**2 * math.prod(grad) * sum(options[-1])


_INPUTS = "Tensor x, Tensor filters, Tensor? channel_filter"
_OPTIONS = "int kernel_size, str kernel_combine, int parts, int dilation, int stride, int upsample"
register("dynamic_filter", f"({_INPUTS}, {_OPTIONS}) -> Tensor", definition, _fake, gradient=_gradient, flops=_flops)
register(
    "dynamic_filter_backward",
    f"(Tensor grad, {_INPUTS}, {_OPTIONS}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    definition_of_gradients,
    _fake_gradients,
    flops=_flops_of_gradients,
    differentiable=False,
)
