"""Decoupled dynamic filtering: every output pixel and channel has its own K x K filter, made of two factors.

    out[b,c,y,x] = sum_k (channel_filter[b,c,k] o spatial_filter[b,k,y,x])
                         * features[b, c, y*stride + (ky - K//2)*dilation, x*stride + (kx - K//2)*dilation]

with `o` a product ("mul") or a sum ("add"), `k = ky*K + kx` and zero padding (Zhou et al., "Decoupled Dynamic Filter
Networks", CVPR 2021, eq. 3 and 4).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.kernels import runs_kernel, transforms
from timm_dynamic.ops.precision import accumulation_dtype, autocast_dtype
from timm_dynamic.ops.registration import register

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def ddf(
    features: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int = 3,
    dilation: int = 1,
    stride: int = 1,
    kernel_combine: str = "mul",
) -> Tensor:
    """Apply decoupled dynamic filters.

    A filter dimension of size 1 (batch, channel or position) is broadcast without being materialised, so that a
    `[1, 1, K, K]` channel filter of ones gives an involution-like and a `[1, K*K, 1, 1]` spatial filter of ones a
    WeightNet-like depthwise operator. Sums run in float32, or float64 for float64 inputs. Under autocast all three
    inputs are cast to the autocast dtype.

    Args:
        features: `[B, C, H, W]`; the output has its dtype and memory format.
        channel_filter: `[B, C, K, K]`.
        spatial_filter: `[B, K*K, Ho, Wo]`.
        kernel_size: K, odd.
        dilation: Distance between taps, in input pixels.
        stride: Distance between outputs, in input pixels.
        kernel_combine: `"mul"` or `"add"`.

    Returns:
        `[B, C, Ho, Wo]` with `Ho = ceil(H / stride)` and `Wo = ceil(W / stride)`.

    Raises:
        ValueError: If an argument has the wrong shape, dtype, device or value.
    """
    options = (kernel_size, dilation, stride, kernel_combine)
    if torch.jit.is_scripting():  # TorchScript knows the registered operator alone
        return torch.ops.timm_dynamic.ddf(features, channel_filter, spatial_filter, *options)
    else:
        return _ddf((features, channel_filter, spatial_filter), options)


def ddf_with_heads(
    x: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    head: int,
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
) -> Tensor:
    """`ddf` where every one of `head` groups of channels has its spatial filters.

    Args:
        x: `[B, C, H, W]`.
        channel_filter: `[B, C*K*K, 1, 1]`.
        spatial_filter: `[B, head*K*K, Ho, Wo]`.
        head: Number of groups; they are taken into the batch.
        kernel_size, dilation, stride, kernel_combine: As for `ddf`.
    """
    B, C, H, W = x.shape
    Ho, Wo = spatial_filter.shape[2], spatial_filter.shape[3]
    n, c, K = B * head, C // head, kernel_size
    channel_filter, spatial_filter = channel_filter.reshape(n, c, K, K), spatial_filter.reshape(n, K * K, Ho, Wo)
    y = ddf(x.reshape(n, c, H, W), channel_filter, spatial_filter, K, dilation, stride, kernel_combine)
    return y.reshape(B, C, Ho, Wo)


def _ddf(tensors: tuple[Tensor, Tensor, Tensor], options: tuple[int, int, int, str]) -> Tensor:
    tensors = tuple(t.to(autocast_dtype(t)) if t.is_floating_point() else t for t in tensors)
    _check(*tensors, *options)
    run = torch.ops.timm_dynamic.ddf if runs_kernel("ddf", tensors[0]) else definition
    return run(*tensors, *options)


def definition(
    features: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
) -> Tensor:
    """A sum of shifted inputs."""
    dtype = accumulation_dtype(features)
    padded = _pad(features.to(dtype), kernel_size, dilation)
    channel_filter, spatial_filter = channel_filter.to(dtype).flatten(2), spatial_filter.to(dtype)
    Ho, Wo = _output_size(features, stride)
    out = 0
    for k in range(kernel_size**2):
        weight = _combine(channel_filter[:, :, k, None, None], spatial_filter[:, k : k + 1], kernel_combine)
        out = out + weight * _tap(padded, k, kernel_size, dilation, stride, Ho, Wo)
    out = out.to(features.dtype)
    if not torch.compiler.is_compiling() and transforms():  # vmap does not know of memory formats
        return out
    return out.contiguous(memory_format=_memory_format(features))


def _definition_of_gradients(
    grad: Tensor,
    features: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `ddf_backward`; see `_empty_gradients` for what is not wanted."""
    dtype = accumulation_dtype(features)
    padded, grad = _pad(features.to(dtype), kernel_size, dilation), grad.to(dtype)
    channel, spatial = channel_filter.to(dtype).flatten(2), spatial_filter.to(dtype)
    Ho, Wo = _output_size(features, stride)
    grad_padded, grad_channel, grad_spatial = torch.zeros_like(padded), [], []
    for k in range(kernel_size**2):
        c, s = channel[:, :, k, None, None], spatial[:, k : k + 1]
        _tap(grad_padded, k, kernel_size, dilation, stride, Ho, Wo).add_(grad * _combine(c, s, kernel_combine))
        product = grad * _tap(padded, k, kernel_size, dilation, stride, Ho, Wo)
        grad_channel.append((product * s if kernel_combine == "mul" else product).sum_to_size(c.shape))
        grad_spatial.append((product * c if kernel_combine == "mul" else product).sum_to_size(s.shape))
    pad, (H, W) = dilation * (kernel_size // 2), features.shape[2:]
    grads = (
        grad_padded[:, :, pad : pad + H, pad : pad + W],
        torch.stack(grad_channel, 2).reshape(channel_filter.shape),
        torch.cat(grad_spatial, 1),
    )
    like = _empty_gradients(features, channel_filter, spatial_filter, needs)
    return tuple(e.copy_(g) if need else e for e, g, need in zip(like, grads, needs, strict=True))


def _tap(padded: Tensor, k: int, kernel_size: int, dilation: int, stride: int, Ho: int, Wo: int) -> Tensor:
    """The `[B, C, Ho, Wo]` view of the padded input that tap k of every output reads."""
    y, x = k // kernel_size * dilation, k % kernel_size * dilation
    return padded[:, :, y : y + (Ho - 1) * stride + 1 : stride, x : x + (Wo - 1) * stride + 1 : stride]


def _pad(features: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return F.pad(features, (dilation * (kernel_size // 2),) * 4)


def _combine(channel: Tensor, spatial: Tensor, kernel_combine: str) -> Tensor:
    return channel * spatial if kernel_combine == "mul" else channel + spatial


def _output_size(features: Tensor, stride: int) -> tuple[int, int]:
    return (features.shape[2] - 1) // stride + 1, (features.shape[3] - 1) // stride + 1


def _memory_format(t: Tensor) -> torch.memory_format:
    """The kernels take the layout whose innermost dimension is the channels as channels_last, any other as NCHW."""
    channels_last = t.shape[1] > 1 and t.stride(1) == 1 and t.stride(3) >= t.shape[1]
    return torch.channels_last if channels_last else torch.contiguous_format


def _check(
    features: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    for name, value in (("dilation", dilation), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if kernel_combine not in ("mul", "add"):
        raise ValueError(f'kernel_combine must be "mul" or "add", got {kernel_combine!r}')
    if features.ndim != 4 or features.shape[2] == 0 or features.shape[3] == 0:
        raise ValueError(f"features must be [B, C, H, W] with H, W > 0, got shape {list(features.shape)}")
    B, C = features.shape[:2]
    K, (Ho, Wo) = kernel_size, _output_size(features, stride)
    for name, t, expected in (
        ("channel_filter", channel_filter, (B, C, K, K)),
        ("spatial_filter", spatial_filter, (B, K * K, Ho, Wo)),
    ):
        fixed = (2, 3) if name == "channel_filter" else (1,)  # the taps are never broadcast
        fits = t.ndim == 4 and all(
            t.shape[i] == n or (i not in fixed and t.shape[i] == 1) for i, n in enumerate(expected)
        )
        if not fits:
            raise ValueError(
                f"{name} must have shape {list(expected)} (1 where broadcast) for features {list(features.shape)}, "
                f"kernel_size {K} and stride {stride}, got {list(t.shape)}"
            )
        if t.dtype != features.dtype:
            raise ValueError(f"{name} must have the dtype of features, {features.dtype}, got {t.dtype}")
        if t.device != features.device:
            raise ValueError(f"{name} must be on the device of features, {features.device}, got {t.device}")
    if features.dtype not in DTYPES:
        raise ValueError(f"features must be one of {[str(d) for d in DTYPES]}, got {features.dtype}")


def _empty_gradients(
    features: Tensor, channel_filter: Tensor, spatial_filter: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `ddf_backward` returns: the inputs' shapes (0 elements where not needed), in the layout of `features`."""
    tensors = (features, channel_filter, spatial_filter)
    formats = (_memory_format(features), torch.contiguous_format, torch.contiguous_format)
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=f) if need else t.new_empty(0)
        for t, f, need in zip(tensors, formats, needs, strict=True)
    )


def _gradient(grad, inputs, outputs, options, needs) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.timm_dynamic.ddf_backward(grad, *inputs, *options, needs)


def _fake(features, channel_filter, spatial_filter, kernel_size, dilation, stride, kernel_combine):
    shape = (*features.shape[:2], *_output_size(features, stride))
    return torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=_memory_format(features))


def _fake_gradients(grad, features, channel_filter, spatial_filter, kernel_size, dilation, stride, combine, needs):
    return _empty_gradients(features, channel_filter, spatial_filter, needs)


def _flops(features, channel_filter, spatial_filter, kernel_size, *options, out_shape=None, **kwargs) -> int:
    return 2 * kernel_size**2 * math.prod(out_shape)


def _flops_of_gradients(grad, features, channel_filter, spatial_filter, kernel_size, *options, **kwargs) -> int:
    needs = options[-1]
    return 2 * kernel_size**2 * math.prod(grad) * sum(needs)


_INPUTS = "Tensor features, Tensor channel_filter, Tensor spatial_filter"
_OPTIONS = "int kernel_size, int dilation, int stride, str kernel_combine"
register("ddf", f"({_INPUTS}, {_OPTIONS}) -> Tensor", definition, _fake, gradient=_gradient, flops=_flops)
register(
    "ddf_backward",
    f"(Tensor grad, {_INPUTS}, {_OPTIONS}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _definition_of_gradients,
    _fake_gradients,
    flops=_flops_of_gradients,
    differentiable=False,
)
