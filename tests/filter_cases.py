"""Cases of dynamic_filter and ddf, their formula, and with and without the compiled kernels."""

import contextlib
import functools
import itertools

import pytest
import torch
from torch import Tensor

from timm_dynamic import use
from timm_dynamic.ops import backend_info, ddf, dynamic_filter

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
KERNEL = pytest.param(
    contextlib.nullcontext,
    id="kernel",
    marks=pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}"),
)
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNEL, pytest.param(functools.partial(use, "formula"), id="definition")]
)
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "offset": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
}


def definition(*args, **kwargs) -> Tensor:
    with use("formula"):
        return dynamic_filter(*args, **kwargs)


def groups_of_channels(C, G, grouping, parts) -> Tensor:
    """The filter of every channel."""
    part, channel = torch.arange(C) // (C // parts), torch.arange(C) % (C // parts)
    return part * (G // parts) + (channel // (C // G) if grouping == "blocks" else channel % (G // parts))


def formula(
    x,
    filters,
    kernel_size=3,
    *,
    channel_filter=None,
    kernel_combine="mul",
    grouping="blocks",
    parts=1,
    dilation=1,
    stride=1,
    upsample=1,
) -> Tensor:
    """The definition in the operator's docstring, one position at a time, in float64."""
    (B, C, H, W), K = x.shape, kernel_size
    Ho, Wo = -(-H * upsample // stride), -(-W * upsample // stride)
    x, f = x.detach().double(), filters.detach().double().expand(B, -1, -1, Ho, Wo)
    f = f[:, groups_of_channels(C, filters.shape[1], grouping, parts)]
    if channel_filter is not None:
        c = channel_filter.detach().double().expand(B, C, K * K)[..., None, None]
        f = f * c if kernel_combine == "mul" else f + c
    out = torch.zeros(B, C, Ho, Wo, dtype=torch.float64)
    for py, px, ky, kx in itertools.product(range(Ho), range(Wo), range(K), range(K)):
        y = py * stride // upsample + (ky - K // 2) * dilation
        z = px * stride // upsample + (kx - K // 2) * dilation
        if 0 <= y < H and 0 <= z < W:
            out[:, :, py, px] += f[:, :, ky * K + kx, py, px] * x[:, :, y, z]
    return out


def operands(shape, G=1, K=3, stride=1, upsample=1, channel="full", spatial="full", dtype=torch.float64, seed=0):
    """`x`, filters and the channel filter, which may be None."""
    g = torch.Generator().manual_seed(seed)
    B, C, Ho, Wo = (*shape[:2], *(-(-n * upsample // stride) for n in shape[2:]))
    shapes = [shape, (B, G, K * K, Ho, Wo) if spatial == "full" else (1, G, K * K, 1, 1)]
    if channel != "none":
        shapes.append((B, C, K * K) if channel == "full" else (1, 1, K * K))
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    return (*tensors, None)[:3]


def arranged(x, filters, channel_filter, layout):
    """In another order in memory, filters as a convolution in channels_last makes them."""
    B, G, taps, Ho, Wo = filters.shape
    filters = LAYOUTS[layout](filters.flatten(1, 2)).unflatten(1, (G, taps))
    return LAYOUTS[layout](x), filters, channel_filter


def inputs(B, C, H, W, K=3, stride=1, dtype=torch.float64, seed=0, filters=("full", "full"), requires_grad=False):
    """Those of `ddf`."""
    x, spatial, channel = operands((B, C, H, W), 1, K, stride, 1, *filters, dtype, seed)
    tensors = (x, channel.unflatten(2, (K, K)), spatial[:, 0])
    return tuple(t.requires_grad_(requires_grad) for t in tensors)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    scale = expected.abs().max().clamp(min=1).item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def with_gradients(function, tensors) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def call(function, **options):
    return lambda x, filters, channel: function(x, filters, channel_filter=channel, **options)


# (shape, number of filters, channel filter, options of dynamic_filter)
BLOCKS, MODULO = {"grouping": "blocks"}, {"grouping": "interleaved"}
CASES = {
    "one filter": ((2, 3, 7, 9), 1, "none", {}),
    "ddf": ((2, 3, 7, 9), 1, "full", {}),
    "ddf, added": ((2, 3, 7, 9), 1, "full", {"kernel_combine": "add", "stride": 2, "dilation": 2}),
    "ddf, heads": ((2, 12, 7, 9), 3, "full", {"stride": 2}),
    "ddf, one channel filter": ((2, 12, 7, 9), 3, "one", {"kernel_combine": "add"}),
    "ska": ((2, 64, 9, 12), 8, "none", MODULO),
    "ska, 16 filters": ((1, 128, 8, 8), 16, "none", MODULO),
    "ska, 12 filters": ((1, 96, 7, 7), 12, "none", MODULO),
    "ska, stride": ((2, 24, 9, 11), 3, "full", {**MODULO, "stride": 2, "kernel_size": 5}),
    "ska, stride 3": ((2, 24, 9, 11), 6, "none", {**MODULO, "stride": 3, "dilation": 2}),
    "ska, added": ((2, 40, 5, 9), 20, "one", {**MODULO, "kernel_combine": "add"}),
    "cotnext": ((2, 64, 9, 8), 8, "none", {**MODULO, "parts": 2}),
    "cotnext, wide": ((1, 160, 5, 11), 20, "full", {**MODULO, "parts": 2}),
    "three parts": ((2, 36, 6, 5), 6, "full", {**MODULO, "parts": 3, "kernel_size": 5}),
    "blocks in parts": ((2, 24, 6, 5), 4, "none", {**BLOCKS, "parts": 2}),
    "involution": ((2, 32, 11, 10), 2, "none", {"kernel_size": 7}),
    "involution, stride": ((2, 64, 11, 9), 4, "none", {"kernel_size": 7, "stride": 2}),
    "blocks of 3": ((2, 15, 8, 9), 5, "none", {"kernel_size": 5}),
    "blocks of 8": ((2, 24, 8, 20), 3, "full", {"dilation": 3}),
    "blocks of 5, stride 3": ((2, 20, 10, 7), 4, "one", {"stride": 3, "kernel_size": 5}),
    "a filter a channel": ((2, 18, 7, 9), 18, "none", {"kernel_size": 5}),
    "a filter a channel, modulo": ((2, 10, 6, 9), 10, "full", {**MODULO, "stride": 2}),
    "K = 1": ((2, 12, 5, 7), 3, "full", {"kernel_size": 1}),
    "K = 13": ((1, 16, 8, 9), 2, "none", {"kernel_size": 13}),
    "K = 13, modulo": ((1, 24, 15, 9), 6, "full", {**MODULO, "kernel_size": 13}),
    "carafe": ((2, 10, 5, 7), 1, "none", {"kernel_size": 5, "upsample": 2}),
    "carafe, groups": ((2, 12, 5, 4), 3, "none", {"kernel_size": 5, "upsample": 3}),
    "up, factors": ((2, 12, 5, 9), 3, "full", {**MODULO, "upsample": 2, "dilation": 2}),
    "up, added": ((1, 12, 4, 3), 6, "one", {**MODULO, "parts": 2, "upsample": 3, "kernel_combine": "add"}),
    "one pixel": ((2, 8, 1, 1), 4, "full", {**MODULO, "kernel_size": 5}),
    "one pixel, up": ((1, 4, 1, 1), 2, "none", {"upsample": 2}),
    "a row": ((2, 16, 1, 17), 2, "none", MODULO),
    "a column": ((1, 16, 33, 1), 4, "full", {"stride": 2}),
    "far taps": ((2, 16, 5, 6), 8, "none", {**MODULO, "dilation": 4}),
}


def of_case(name, dtype=torch.float64, **more):
    shape, G, channel, options = CASES[name]
    sizes = (options.get("kernel_size", 3), options.get("stride", 1), options.get("upsample", 1))
    return operands(shape, G, *sizes, channel, dtype=dtype, **more), options


def gradients(args, options, function=ddf):
    leaves = [t.detach().requires_grad_() for t in args]
    out = function(*leaves, *options)
    g = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype))
    return [t.grad for t in leaves]
