"""The public functions: a filter for every position, and its forms with their arguments."""

import torch
from torch import Tensor

from timm_dynamic.ops.dynamic_filter import exported
from timm_dynamic.ops.dynamic_filter.definition import definition, output_size
from timm_dynamic.ops.kernels import exports_to_onnx, runs_kernel
from timm_dynamic.ops.precision import autocast_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dynamic_filter(
    x: Tensor,
    filters: Tensor,
    kernel_size: int = 3,
    channel_filter: Tensor | None = None,
    kernel_combine: str = "mul",
    grouping: str = "blocks",
    parts: int = 1,
    dilation: int = 1,
    stride: int = 1,
    upsample: int = 1,
) -> Tensor:
    """Filter every output position by its own K x K filters, each of which a group of channels shares.

        out[b,c,p] = sum_k filters[b,g(c),k,p] * channel_filter[b,c,k] * x[b, c, s(p) + o_k]

    with zero padding, `o_k` the offsets of the K x K taps times `dilation`, and `s(p) = p*stride` or `p // upsample`
    in both directions. Involution, SKA (LSNet), CoT's local convolution, CARAFE's reassembly and DDF are calls of it.
    Sums run in float32, or float64 for float64 inputs. Under autocast all inputs are cast to the autocast dtype.
    The batch and the positions of `filters`, and the batch and the channels of `channel_filter`, may be 1: they are
    broadcast without being materialised.

    Args:
        x: `[B, C, H, W]`; the output has its dtype and memory format.
        filters: `[B, G, K*K, Ho, Wo]`, for G groups of channels.
        kernel_size: K, odd.
        channel_filter: `[B, C, K*K]`, the other factor of the filters.
        kernel_combine: Multiply the two factors (`"mul"`), or add them (`"add"`).
        grouping: `"blocks"`: g(c) = c // (C/G); `"interleaved"`: g(c) = c mod G.
        parts: Cut the channels and the filters into this many equal parts, and group within each of them.
        dilation: Distance between taps, in input pixels.
        stride: Distance between outputs, in input pixels.
        upsample: Outputs per input pixel and direction. Only one of `stride` and `upsample` may differ from 1.

    Returns:
        `[B, C, Ho, Wo]` with `Ho = ceil(H / stride)` or `H * upsample`.

    Raises:
        ValueError: If an argument has the wrong shape, dtype, device or value.
    """
    if not torch.jit.is_scripting():
        _check_groups(filters, grouping, parts)
    if grouping == "blocks":
        parts = filters.shape[1]  # as many parts of one filter each
    if torch.jit.is_scripting():  # TorchScript knows the registered operator alone
        return torch.ops.timm_dynamic.dynamic_filter(
            x, filters, channel_filter, kernel_size, kernel_combine, parts, dilation, stride, upsample
        )
    else:
        options = (kernel_size, kernel_combine, parts, dilation, stride, upsample)
        return _dynamic_filter(x, filters, channel_filter, options)


def ddf(
    features: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int = 3,
    dilation: int = 1,
    stride: int = 1,
    kernel_combine: str = "mul",
) -> Tensor:
    """Apply decoupled dynamic filters (Zhou et al., CVPR 2021, arXiv 2104.14107, eq. 3 and 4).

        out[b,c,p] = sum_k (channel_filter[b,c,k] o spatial_filter[b,k,p]) * features[b, c, p*stride + o_k]

    It is `dynamic_filter` with one group. A filter dimension of size 1 (batch, channel or position) is broadcast
    without being materialised: a `[1, 1, K, K]` channel filter of ones gives an involution-like and a `[1, K*K, 1, 1]`
    spatial filter of ones a WeightNet-like depthwise operator.

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
    if not torch.jit.is_scripting():
        _check_ddf(channel_filter, spatial_filter, kernel_size)
    return dynamic_filter(
        features,
        spatial_filter.unsqueeze(1),
        kernel_size,
        channel_filter=channel_filter.flatten(2),
        kernel_combine=kernel_combine,
        dilation=dilation,
        stride=stride,
    )


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
        head: Number of groups.
        kernel_size, dilation, stride, kernel_combine: As for `ddf`.
    """
    B, C, taps = x.shape[0], x.shape[1], kernel_size * kernel_size
    return dynamic_filter(
        x,
        spatial_filter.reshape(B, head, taps, spatial_filter.shape[2], spatial_filter.shape[3]),
        kernel_size,
        channel_filter=channel_filter.reshape(B, C, taps),
        kernel_combine=kernel_combine,
        dilation=dilation,
        stride=stride,
    )


def _dynamic_filter(x: Tensor, filters: Tensor, channel_filter: Tensor | None, options: tuple) -> Tensor:
    x, filters, channel_filter = (
        t.to(autocast_dtype(t)) if t is not None and t.is_floating_point() else t for t in (x, filters, channel_filter)
    )
    _check(x, filters, channel_filter, *options)
    if exports_to_onnx():
        return exported.dynamic_filter(x, filters, channel_filter, *options)
    if not runs_kernel("dynamic_filter", x):
        return definition(x, filters, channel_filter, *options)
    if x.device.type == "cuda":
        return _on_cuda(x, filters, channel_filter, options)
    return torch.ops.timm_dynamic.dynamic_filter(x, filters, channel_filter, *options)


def _on_cuda(x: Tensor, filters: Tensor, channel_filter: Tensor | None, options: tuple) -> Tensor:
    """The CUDA kernel knows what DDF needs: both factors, and blocks of channels, which are taken into the batch."""
    kernel_size, kernel_combine, parts, dilation, stride, upsample = options
    (B, C, H, W), G = x.shape, filters.shape[1]
    if upsample > 1 or parts < G:
        return definition(x, filters, channel_filter, *options)
    if channel_filter is None:
        channel_filter, kernel_combine = x.new_ones(1, 1, kernel_size**2), "mul"
    if G > 1:
        if filters.shape[0] < B or channel_filter.shape[0] < B or channel_filter.shape[1] < C:
            filters = filters.expand(B, *filters.shape[1:])
            channel_filter = channel_filter.expand(B, C, -1)
        x, channel_filter = x.reshape(B * G, C // G, H, W), channel_filter.reshape(B * G, C // G, -1)
        filters = filters.reshape(B * G, 1, *filters.shape[2:])
    y = torch.ops.timm_dynamic.dynamic_filter(
        x, filters, channel_filter, kernel_size, kernel_combine, 1, dilation, stride, 1
    )
    return y.reshape(B, C, *y.shape[2:])


def _check_ddf(channel_filter: Tensor, spatial_filter: Tensor, kernel_size: int) -> None:
    if channel_filter.ndim != 4 or channel_filter.shape[2:] != (kernel_size, kernel_size):
        raise ValueError(
            f"channel_filter must be [B, C, {kernel_size}, {kernel_size}], got {list(channel_filter.shape)}"
        )
    if spatial_filter.ndim != 4:
        raise ValueError(f"spatial_filter must be [B, K*K, Ho, Wo], got shape {list(spatial_filter.shape)}")


def _check_groups(filters: Tensor, grouping: str, parts: int) -> None:
    if grouping not in ("blocks", "interleaved"):
        raise ValueError(f'grouping must be "blocks" or "interleaved", got {grouping!r}')
    if filters.ndim != 5:
        raise ValueError(f"filters must be [B, G, K*K, Ho, Wo], got shape {list(filters.shape)}")
    if parts < 1 or filters.shape[1] % parts:
        raise ValueError(f"parts must divide the {filters.shape[1]} filters, got {parts}")


def _check(
    x: Tensor,
    filters: Tensor,
    channel_filter: Tensor | None,
    kernel_size: int,
    kernel_combine: str,
    parts: int,
    dilation: int,
    stride: int,
    upsample: int,
) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    for name, value in (("dilation", dilation), ("stride", stride), ("upsample", upsample)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if stride > 1 and upsample > 1:
        raise ValueError(f"only one of stride and upsample may differ from 1, got {stride} and {upsample}")
    if kernel_combine not in ("mul", "add"):
        raise ValueError(f'kernel_combine must be "mul" or "add", got {kernel_combine!r}')
    if x.ndim != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x must be [B, C, H, W] with H, W > 0, got shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be one of {[str(d) for d in DTYPES]}, got {x.dtype}")
    (B, C), taps, G = x.shape[:2], kernel_size**2, filters.shape[1]
    if G < 1 or C % G:
        raise ValueError(f"the number of filters must divide the {C} channels, got {G}")
    expected = {"filters": (filters, (B, G, taps, *output_size(x, stride, upsample)), (1, 2))}
    if channel_filter is not None:
        expected["channel_filter"] = (channel_filter, (B, C, taps), (2,))
    for name, (t, shape, fixed) in expected.items():
        fits = t.ndim == len(shape) and all(
            t.shape[i] == n or (i not in fixed and t.shape[i] == 1) for i, n in enumerate(shape)
        )
        if not fits:
            raise ValueError(
                f"{name} must have shape {list(shape)} (1 where broadcast) for x {list(x.shape)}, kernel_size "
                f"{kernel_size}, stride {stride} and upsample {upsample}, got {list(t.shape)}"
            )
        if t.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
