"""Decoupled dynamic filtering: every output pixel and channel has its own K x K filter, made of two factors.

    out[b,c,y,x] = sum_k (channel_filter[b,c,k] o spatial_filter[b,k,y,x])
                         * features[b, c, y*stride + (ky - K//2)*dilation, x*stride + (kx - K//2)*dilation]

with `o` a product ("mul") or a sum ("add"), `k = ky*K + kx` and zero padding (Zhou et al., "Decoupled Dynamic Filter
Networks", CVPR 2021, eq. 3 and 4).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE, accumulation_dtype, has_kernel

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
    tensors = (features, channel_filter, spatial_filter)
    device_type = features.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        tensors = tuple(_autocast(t, torch.get_autocast_dtype(device_type)) for t in tensors)
    _check(*tensors, kernel_size, dilation, stride, kernel_combine)
    if has_kernel(device_type) and not torch.onnx.is_in_onnx_export():
        return torch.ops.timm_dynamic.ddf(*tensors, kernel_size, dilation, stride, kernel_combine)
    return ddf_reference(*tensors, kernel_size, dilation, stride, kernel_combine)


def ddf_reference(
    features: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int = 3,
    dilation: int = 1,
    stride: int = 1,
    kernel_combine: str = "mul",
) -> Tensor:
    """The same as `ddf` in plain differentiable PyTorch: a sum of shifted inputs. Defines the operator."""
    dtype = accumulation_dtype(features)
    padded = _pad(features.to(dtype), kernel_size, dilation)
    channel_filter, spatial_filter = channel_filter.to(dtype).flatten(2), spatial_filter.to(dtype)
    Ho, Wo = _output_size(features, stride)
    out = 0
    for k in range(kernel_size**2):
        weight = _combine(channel_filter[:, :, k, None, None], spatial_filter[:, k : k + 1], kernel_combine)
        out = out + weight * _tap(padded, k, kernel_size, dilation, stride, Ho, Wo)
    return out.to(features.dtype).contiguous(memory_format=_memory_format(features))


def _ddf_backward_reference(
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


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


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


# Registration: the schema, what serves without a kernel, and what torch.compile and autograd need to know.

_ARGS = "int kernel_size, int dilation, int stride, str kernel_combine"
_FILTERS = "Tensor channel_filter, Tensor spatial_filter"
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(f"{NAMESPACE}::ddf", f"(Tensor features, {_FILTERS}, {_ARGS}) -> Tensor", tags=_TAGS)
torch.library.define(
    f"{NAMESPACE}::ddf_backward",
    f"(Tensor grad, Tensor features, {_FILTERS}, {_ARGS}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.impl(f"{NAMESPACE}::ddf", "CompositeExplicitAutograd")(ddf_reference)
torch.library.impl(f"{NAMESPACE}::ddf_backward", "CompositeExplicitAutograd")(_ddf_backward_reference)


@torch.library.register_fake(f"{NAMESPACE}::ddf")
def _ddf_fake(features, channel_filter, spatial_filter, kernel_size, dilation, stride, kernel_combine):
    shape = (*features.shape[:2], *_output_size(features, stride))
    return torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=_memory_format(features))


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


@torch.library.register_fake(f"{NAMESPACE}::ddf_backward")
def _ddf_backward_fake(
    grad, features, channel_filter, spatial_filter, kernel_size, dilation, stride, kernel_combine, needs
):
    return _empty_gradients(features, channel_filter, spatial_filter, needs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _ddf_autograd(ctx, grad):
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():  # create_graph: the reference can be differentiated again
        inputs = ctx.saved_tensors
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(ddf_reference(*inputs, *ctx.options), wanted, grad, create_graph=True))
        return *(next(grads) if need else None for need in needs), None, None, None, None
    grads = torch.ops.timm_dynamic.ddf_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::ddf", _ddf_autograd, setup_context=_setup_context)
