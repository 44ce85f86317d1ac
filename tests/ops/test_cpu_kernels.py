"""The CPU kernels of channel_fusion and dcd_conv, against their formulas in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import INF, LAYOUTS, OPS, check, double
from torch import Tensor

from timm_dynamic.ops import backend_info
from timm_dynamic.ops.registration import OPERATORS

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def channel_fusion(x, weight, in_scale, out_scale, p, v, shift, low, high):
    columns = x.flatten(2)
    out = torch.matmul(weight, columns if in_scale is None else columns * in_scale[:, :, None])
    if out_scale is not None:
        out = out * out_scale[:, :, None]
    if p is not None:
        out = out + torch.matmul(p, v)
    if shift is not None:
        out = out + shift[:, :, None]
    return out.clamp(low, high).view(len(x), -1, *x.shape[2:])


SHAPES = [(1, 3, 5, 1, 1), (2, 17, 9, 5, 7), (9, 8, 33, 3, 4), (1, 130, 66, 14, 14), (5, 40, 24, 28, 28)]


@pytest.mark.parametrize("each", [False, True], ids=["one weight", "a weight each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_fusion(shape, each):
    B, C, Co, H, W = shape
    L = 6
    weight = torch.randn(*(B,) * each, Co, C)
    extras = (torch.randn(B, C), torch.randn(B, Co), torch.randn(Co, L), torch.randn(B, L, H * W))
    for used, shift, limits in itertools.product([0, 1], [None, 1, B], [(-INF, INF), (0.0, 6.0)]):
        options = extras if used else (None,) * 4
        maps, others = (torch.randn(B, C, H, W), weight), (*options, None if shift is None else torch.randn(shift, Co))
        expected = channel_fusion(*double(maps), *double(others), *limits)
        check(OPS.channel_fusion(*maps, None, *others, *limits), expected)


# (B, N, C, O, kernel, H, W, stride, padding, dilation): maps of some samples at a time, and in parts of one's; depths
# of some blocks.
MIXTURES = {
    "1x1": (3, 4, 300, 21, (1, 1), 5, 7, (1, 1), (0, 0), (1, 1)),
    "1x1, strided": (2, 3, 9, 40, (1, 1), 9, 7, (2, 3), (0, 0), (1, 1)),
    "1x1, padded": (2, 3, 9, 5, (1, 1), 4, 3, (1, 2), (1, 2), (1, 1)),
    "one pixel": (5, 2, 3, 17, (3, 3), 1, 1, (1, 1), (1, 1), (1, 1)),
    "small maps": (37, 4, 65, 18, (3, 3), 7, 7, (1, 1), (1, 1), (1, 1)),
    "small maps, strided": (3, 5, 35, 33, (3, 3), 14, 14, (2, 2), (1, 1), (1, 1)),
    "large map": (1, 4, 5, 20, (3, 3), 41, 50, (1, 1), (1, 1), (1, 1)),
    "large map, oblong and dilated": (2, 4, 6, 3, (5, 2), 70, 45, (1, 2), (0, 3), (3, 2)),
    "wide": (2, 1, 3, 4, (3, 3), 3, 900, (1, 1), (1, 1), (1, 1)),
    "one kernel, strided": (3, 1, 19, 29, (3, 3), 9, 8, (2, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MIXTURES)
def test_mixtures(case, layout):
    B, N, C, Co, kernel, H, W, *options = MIXTURES[case]
    x = torch.randn(B, C, H, W).contiguous(memory_format=LAYOUTS[layout])
    kernels, attention = torch.randn(N, Co, C, *kernel), torch.rand(B, N)
    kernels *= kernels[0, 0].numel() ** -0.5
    weights = torch.einsum("bn,noikl->boikl", attention.double(), kernels.double())
    pairs, a_out = torch.randn(B, kernels[0, 0].numel()), torch.randn(B, Co)
    gated = weights * pairs.view(B, 1, C, *kernel) * a_out.view(B, Co, 1, 1, 1)
    for gates, used, shift, limits in (
        ((None, None), weights, None, (-INF, INF)),
        ((pairs, None), weights * pairs.view(B, 1, C, *kernel), torch.randn(1, Co), (-0.5, INF)),
        ((pairs, a_out), gated, torch.randn(B, Co), (-1.0, 1.0)),
    ):
        each = zip(x.double().split(1), used, strict=True)
        expected = torch.cat([F.conv2d(one, weight, None, *options) for one, weight in each])
        expected = (expected if shift is None else expected + shift[:, :, None, None]).clamp(*limits)
        out = OPS.channel_fusion(x, kernels, attention, *gates, None, None, shift, *limits, *options)
        check(out, expected, layout)
    for gates in [None, pairs] if N == 1 else []:  # and without an attention
        weights = kernels.double() * (1 if gates is None else gates.view(B, 1, C, *kernel))
        each = zip(x.double().split(1), weights.expand(B, *kernels.shape[1:]), strict=True)
        expected = torch.cat([F.conv2d(one, weight, None, *options) for one, weight in each])
        out = OPS.channel_fusion(x, kernels, None, gates, a_out, None, None, None, -INF, INF, *options)
        check(out, expected * a_out[:, :, None, None], layout)


# (B, N, outputs and inputs of a cell, cells of a kernel, kernel, H, W, stride, padding, dilation): cells
# whose outputs are no whole vectors, some samples, parts of a large map.
CELLS = {
    "whole": (3, 27, 32, 40, 1, 1, (3, 3), 7, 7, (1, 1), (1, 1), (1, 1)),
    "blocks": (2, 7, 12, 20, 2, 3, (3, 3), 9, 8, (2, 2), (1, 1), (1, 1)),
    "small blocks": (5, 3, 5, 7, 3, 2, (5, 2), 4, 6, (1, 1), (2, 1), (1, 1)),
    "1x1": (17, 9, 48, 24, 1, 2, (1, 1), 5, 3, (1, 1), (0, 0), (1, 1)),
    "one pixel": (2, 1, 3, 1, 1, 1, (3, 3), 1, 1, (1, 1), (1, 1), (1, 1)),
    "large map": (1, 4, 16, 8, 1, 1, (3, 3), 41, 50, (1, 2), (2, 3), (2, 3)),
}


@pytest.mark.parametrize("case", CELLS)
def test_cells(case):
    B, N, outputs, inputs, rows, columns, kernel, H, W, *options = CELLS[case]
    Co, C = rows * outputs, columns * inputs
    x = torch.randn(B, C, H, W).contiguous(memory_format=torch.channels_last)
    attention, cells = torch.randn(B, *kernel, rows, columns, N), torch.randn(N, outputs, inputs)
    attention *= (N * C * math.prod(kernel)) ** -0.5
    weights = torch.einsum("byxoin,npq->bopiqyx", attention.double(), cells.double()).reshape(B, Co, C, *kernel)
    each = zip(x.double().split(1), weights, strict=True)
    expected = torch.cat([F.conv2d(one, weight, None, *options) for one, weight in each])
    for a_out, shift, limits in (
        (None, None, (-INF, INF)),
        (torch.randn(1, Co), torch.randn(1, Co), (-0.5, 0.5)),
        (torch.randn(B, Co), torch.randn(B, Co), (0.0, INF)),
    ):
        wanted = expected if a_out is None else expected * a_out[:, :, None, None] + shift[:, :, None, None]
        args = (x, cells, attention, None, a_out, None, None, shift, *limits, *options)
        check(OPS.channel_fusion(*args), wanted.clamp(*limits), "channels_last")
        assert OPERATORS["channel_fusion"].definition(*double(args)).allclose(wanted.clamp(*limits))


def test_cells_refuse():
    x, cells = torch.randn(2, 6, 5, 5), torch.randn(4, 8, 3)
    attention = torch.randn(2, 3, 3, 1, 2, 4)
    nothing = (None,) * 5

    def run(x, cells, attention):
        return OPS.channel_fusion(x, cells, attention, *nothing, -INF, INF, (1, 1), (1, 1), (1, 1))

    with pytest.raises(RuntimeError, match="x must be channels_last"):
        run(x, cells, attention)
    x = x.contiguous(memory_format=torch.channels_last)
    for wrong in (torch.randn(2, 4), torch.randn(2, 3, 3, 1, 1, 4)):
        with pytest.raises(RuntimeError, match="the attention must be"):
            run(x, cells, wrong)
    with pytest.raises(RuntimeError, match="attention must be"):
        run(x, cells, attention[:1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_fusion_backward(shape):
    B, C, Co, H, W = shape
    grad, dz, x, v = (
        torch.randn(B, Co, H, W),
        torch.randn(B, 6, H * W),
        torch.randn(B, C, H, W),
        torch.randn(B, 6, H * W),
    )
    args = grad, dz, x, v, torch.randn(B, Co), torch.randn(Co, C)
    grad, dz, x, v, scale, weight = double(args)
    each = torch.bmm(grad.flatten(2), x.flatten(2).mT)
    expected = (each * scale[:, :, None]).sum(0), (each * weight).sum(2)
    expected += torch.bmm(grad.flatten(2), v.mT).sum(0), torch.bmm(dz, x.flatten(2).mT).sum(0)
    for ours, wanted in zip(OPS.channel_fusion_backward(*args), expected, strict=True):
        check(ours, wanted)


def hsig(t):
    return (t + 3).clamp(0, 6) / 3


def dcd_conv(
    x, heads, q, norm1, norm2, eps1, eps2, pool, p, shift, weight, bias, stride, padding, dilation, groups, low, high,
    q_bias=None,
):  # fmt: skip
    z = F.linear(F.adaptive_avg_pool2d(x, pool).flatten(1), heads[0])
    z = z * hsig(F.linear(z, heads[1]))
    L = len(q)
    phi, scale = F.linear(z, heads[2]).view(-1, L, L), hsig(F.linear(z, heads[3]))
    u = F.conv2d(x, q.flatten(1)[:, :, None, None], q_bias, stride)
    size = u.shape
    u = (F.batch_norm(u, *norm1[2:], *norm1[:2], eps=eps1) if norm1 else u).flatten(2)
    v = torch.bmm(phi, u)
    v = (F.batch_norm(v, *norm2[2:], *norm2[:2], eps=eps2) if norm2 else v) + u
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups) * scale[:, :, None, None]
    return (y + F.conv2d(v.view(size), p[:, :, None, None], shift)).clamp(low, high)


def dcd_arguments(B, C, Co, H, W, kernel, stride, dilation=(1, 1), groups=1, pool=1, extras=True, limits=(0.0, 6.0)):
    L, hidden = max(int((C * pool**2) ** 0.5), 2), 7
    heads = [(hidden, C * pool**2), (hidden, hidden), (L * L, hidden), (Co, hidden)]
    heads = [torch.randn(s) * s[1] ** -0.5 for s in heads]
    norms = [[torch.rand(L) + 0.5, torch.randn(L), torch.randn(L), torch.rand(L) + 0.5] for _ in range(2)]
    weight = torch.randn(Co, C // groups, *kernel) * (C // groups * kernel[0] * kernel[1]) ** -0.5
    shift, bias = (torch.randn(Co), torch.randn(Co)) if extras else (None, None)
    padding = [d * (k // 2) for k, d in zip(kernel, dilation, strict=True)]
    return (
        *(torch.randn(B, C, H, W), heads, torch.randn(L, C) * C**-0.5, *norms, 1e-5, 1e-3, pool, torch.randn(Co, L)),
        *(shift, weight, bias, stride, padding, dilation, groups, *limits),
    )


DCD_CASES = {
    "1x1 large": (8, 24, 20, 20, (1, 1), (1, 1)),
    "1x1 small": (60, 130, 3, 5, (1, 1), (1, 1)),
    "1x1 strided large": (8, 24, 21, 20, (1, 1), (2, 2)),
    "1x1 strided small": (60, 130, 5, 4, (1, 1), (2, 3)),
    "3x3 large": (8, 12, 17, 16, (3, 3), (1, 1)),
    "3x3 small": (40, 24, 7, 6, (3, 3), (1, 1)),
    "3x3 few positions": (40, 70, 4, 3, (3, 3), (1, 1)),
    "3x3 strided, few positions": (40, 70, 7, 5, (3, 3), (2, 2)),
    "3x3 strided small": (40, 24, 9, 8, (3, 3), (2, 2)),
    "3x3 strided large": (4, 6, 33, 32, (3, 3), (2, 1)),
    "dilated": (6, 5, 19, 11, (3, 5), (1, 1), (2, 3)),
    "dilated, few positions": (30, 50, 4, 3, (3, 5), (1, 1), (2, 3)),
    "depthwise": (24, 24, 9, 8, (3, 3), (1, 1), (1, 1), 24),
    "depthwise strided": (24, 24, 9, 8, (3, 3), (2, 2), (1, 1), 24),
    "pooled to 2x2": (8, 24, 9, 10, (1, 1), (1, 1), (1, 1), 1, 2),
    "one position": (8, 40, 1, 1, (1, 1), (1, 1)),
}


@pytest.mark.parametrize("B", [1, 2, 5, 33])
@pytest.mark.parametrize("case", DCD_CASES)
def test_dcd_conv(case, B):
    for extras, limits in ((True, (0.0, 6.0)), (False, (-INF, INF))):
        x, *args = dcd_arguments(B, *DCD_CASES[case], extras=extras, limits=limits)
        expected = dcd_conv(*double([x, *args]))
        for layout, form in LAYOUTS.items():
            check(OPS.dcd_conv(x.contiguous(memory_format=form), *args), expected, layout)


@pytest.mark.parametrize("absorbed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("case", ["1x1 large", "1x1 small", "3x3 large", "3x3 small", "depthwise"])
def test_dcd_conv_without_norms(case, absorbed):
    x, *args = dcd_arguments(3, *DCD_CASES[case])
    for i, gone in enumerate(absorbed):
        args[2 + i] = [] if gone else args[2 + i]
    q_bias = torch.randn(len(args[1]))
    expected = dcd_conv(*double([x, *args]), q_bias=q_bias.double())
    for layout, form in LAYOUTS.items():
        check(OPS.dcd_conv(x.contiguous(memory_format=form), *args, q_bias), expected, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["1x1 large", "3x3 small", "3x3 strided large", "depthwise"])
def test_dcd_conv_changes_no_argument(case, layout):
    x, *others = dcd_arguments(2, *DCD_CASES[case])
    args = x.contiguous(memory_format=LAYOUTS[layout]), *others
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
    with torch.enable_grad():
        args[0].requires_grad_(), args[10].requires_grad_()
        OPS.dcd_conv(*args)
    for t, old in zip((t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)), before, strict=True):
        assert torch.equal(t, old)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.randn(2, 8, 5, 5).half(), "x must be"),
        (13, [0, 0], "central tap"),
        (10, torch.randn(24, 7, 3, 3), "weight must be"),
        (8, torch.randn(24, 9), "p must be"),
        (15, 3, "weight must be"),
        (0, torch.randn(2, 8, 5, 10)[..., ::2], "x must be .* contiguous or channels_last"),
    ],
)
def test_dcd_conv_refuses(index, value, message):
    args = list(dcd_arguments(2, 8, 24, 5, 5, (3, 3), (1, 1)))
    args[index] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.dcd_conv(*args)


def test_a_single_pixel():
    """It is contiguous in both layouts; the padding is what makes positions of it."""
    x, kernels = torch.randn(2, 16, 1, 1), torch.randn(1, 5, 16, 3, 3)
    y = OPS.channel_fusion(x, kernels, *(None,) * 6, -INF, INF, (1, 1), (2, 2), (1, 1))
    check(y, F.conv2d(x.double(), kernels[0].double(), padding=2))
