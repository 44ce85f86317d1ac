"""The operator dynamic_filter, and ddf, against their formula, with and without the compiled kernels."""

import contextlib
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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


@BACKENDS
@pytest.mark.parametrize("case", CASES)
def test_formula(backend, case):
    tensors, options = of_case(case)
    expected = call(formula, **options)(*tensors)
    with backend():
        for layout in ("contiguous", "channels_last"):
            assert_close(call(dynamic_filter, **options)(*arranged(*tensors, layout)), expected, torch.float64)


@KERNEL.marks[0]
@pytest.mark.parametrize("case", CASES)
def test_kernels_in_both_layouts_and_all_dtypes(case):
    for dtype, spatial in zip(TOLERANCE, ("one", "full", "full", "one"), strict=True):
        tensors, options = of_case(case, dtype, spatial=spatial)
        wide = [None if t is None else t.double() for t in tensors]
        expected = with_gradients(call(definition, **options), wide)
        for layout in ("contiguous", "channels_last"):
            actual = with_gradients(call(dynamic_filter, **options), arranged(*tensors, layout))
            for a, e in zip(actual, expected, strict=True):
                assert a.shape == e.shape
                assert_close(a, e, dtype)


@KERNEL.marks[0]
@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)  # small sums of large numbers are inexact
def test_kernels_in_random_cases(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    parts, members, inner = draw(1, 1, 2, 3), draw(1, 2, 3, 5, 8, 16, 17), draw(1, 1, 2, 3, 8, 12, 16)
    C, G, K = parts * members * inner, parts * inner, draw(1, 3, 3, 5, 7)
    stride, upsample = draw((1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (1, 3))
    grouping = draw("blocks", "interleaved", "interleaved")
    shape = (draw(0, 1, 2), C, data.draw(st.integers(1, 12)), data.draw(st.integers(1, 20)))
    options = {"kernel_size": K, "dilation": draw(1, 1, 2, 3), "stride": stride, "upsample": upsample}
    options |= {"grouping": grouping, "parts": parts, "kernel_combine": draw("mul", "add")}
    factors, dtype, layout = (
        (draw("none", "full", "one"), draw("full", "full", "one")),
        draw(*TOLERANCE),
        draw(*LAYOUTS),
    )
    tensors = operands(shape, G, K, stride, upsample, *factors, dtype, data.draw(st.integers(0, 9)))
    wide = [None if t is None else t.double() for t in tensors]
    expected = with_gradients(call(definition, **options), wide)
    actual = with_gradients(call(dynamic_filter, **options), arranged(*tensors, layout))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert_close(a, e, dtype)


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_ddf(backend, layout):
    shapes = ((1, 1, 1, 1), (2, 1, 5, 3), (3, 37, 8, 9), (2, 64, 7, 7))
    for shape, dtype, stride in itertools.product(shapes, TOLERANCE, (1, 2)):
        args = tuple(LAYOUTS[layout](t) for t in inputs(*shape, 3, stride, dtype, seed=stride))
        with backend():
            out = ddf(*args, stride=stride)
        with use("formula"):
            assert_close(out, ddf(*(t.double() for t in args), stride=stride), dtype)
        if layout == "channels_last" and shape[1] > 1 and min(shape[2:]) > 1:
            assert out.is_contiguous(memory_format=torch.channels_last)


def gradients(args, options, function=ddf):
    leaves = [t.detach().requires_grad_() for t in args]
    out = function(*leaves, *options)
    g = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype))
    return [t.grad for t in leaves]


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_empty_batch(backend, dtype):
    args = tuple(t.requires_grad_() for t in inputs(0, 4, 6, 5, dtype=dtype))
    with backend():
        out = ddf(*args)
        out.sum().backward()
    assert out.shape == (0, 4, 6, 5)
    assert [t.grad.shape for t in args] == [t.shape for t in args]


@BACKENDS
def test_empty_batch_with_shared_filters_gives_zero_gradients(backend):
    args = inputs(0, 4, 6, 5, filters=("one", "one"), requires_grad=True)
    with backend():
        ddf(*args).sum().backward()
    assert args[1].grad.abs().sum() == 0 and args[2].grad.abs().sum() == 0


@BACKENDS
def test_degenerate_filters_are_known_operators(backend):
    features, channel, spatial = inputs(2, 6, 9, 8)
    with backend():
        depthwise = ddf(features, channel, torch.ones(1, 9, 1, 1, dtype=torch.float64))
        depthwise_add = ddf(features, channel, torch.zeros(1, 9, 1, 1, dtype=torch.float64), kernel_combine="add")
        involution = ddf(features, torch.ones(1, 1, 3, 3, dtype=torch.float64), spatial)
    expected = torch.nn.functional.conv2d(
        features.reshape(1, 12, 9, 8), channel.reshape(12, 1, 3, 3), padding=1, groups=12
    ).reshape(2, 6, 9, 8)
    torch.testing.assert_close(depthwise, expected)
    torch.testing.assert_close(depthwise_add, expected)
    patches = torch.nn.functional.unfold(features, 3, padding=1).reshape(2, 6, 9, 9, 8)
    torch.testing.assert_close(involution, (patches * spatial[:, None]).sum(2))


@KERNEL.marks[0]
def test_kernel_is_deterministic_and_leaves_inputs_alone():
    for name, layout in itertools.product(
        ("ddf, heads", "ska", "involution", "carafe"), ("contiguous", "channels_last")
    ):
        tensors, options = of_case(name, torch.float32)
        args = arranged(*tensors, layout)
        before = [None if t is None else t.clone() for t in args]
        first, second = (with_gradients(call(dynamic_filter, **options), args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(a is None or torch.equal(a, b) for a, b in zip(args, before, strict=True))


SMALL = {
    "ddf": (1, "full", {}),
    "ddf, added": (1, "one", {"kernel_combine": "add", "dilation": 2, "stride": 2}),
    "interleaved": (4, "none", MODULO),
    "parts": (4, "full", {**MODULO, "parts": 2, "kernel_size": 5, "stride": 3}),
    "blocks": (2, "none", {"stride": 2}),
    "up": (2, "full", {"upsample": 2, "kernel_combine": "add"}),
}


def small(name, requires_grad=True):
    """Inputs and a function of them, without those that are None."""
    G, channel, options = SMALL[name]
    sizes = (options.get("kernel_size", 3), options.get("stride", 1), options.get("upsample", 1))
    tensors = operands((2, 8, 2, 3), G, *sizes, channel)
    function = call(dynamic_filter, **options)
    args = tuple(t.requires_grad_(requires_grad) for t in tensors if t is not None)
    return args, (lambda *a: function(*(*a, None)[:3]))


@BACKENDS
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(backend, name):
    args, function = small(name)
    with backend():
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args, fast_mode=True)  # the other takes a minute


@BACKENDS
@pytest.mark.parametrize("kernel_combine", ["mul", "add"])
def test_second_gradients_where_filters_depend_on_the_features(backend, kernel_combine):
    def function(x):
        channel = x.mean((2, 3))[:, :, None, None] * torch.arange(9.0, dtype=x.dtype).view(3, 3)
        spatial = (x * x).unflatten(1, (2, 1, 2)).sum(3).expand(-1, -1, 9, -1, -1)
        options = {"kernel_combine": kernel_combine, "grouping": "interleaved"}
        return dynamic_filter(x, spatial, channel_filter=channel.flatten(2), **options)

    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    with backend():
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("name", SMALL)
def test_transforms(name):
    args, function = small(name, requires_grad=False)
    tangents = tuple(torch.randn_like(t) for t in args)
    weights = torch.randn_like(function(*args))
    expected = torch.autograd.functional.vjp(function, args, weights)[1]
    torch.testing.assert_close(torch.func.vjp(function, *args)[1](weights), expected)
    derivative = torch.func.jvp(function, args, tangents)[1]
    step = 1e-6
    plus, minus = (function(*(t + sign * step * d for t, d in zip(args, tangents, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(derivative, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-6)
    each = tuple(t.expand(2, *t.shape[1:]) for t in args)
    mapped = torch.vmap(lambda *a: function(*(t[None] for t in a))[0])(*each)
    torch.testing.assert_close(mapped, function(*args))


def test_batched_gradients():
    args = inputs(2, 3, 5, 4, requires_grad=True)
    jacobian = functools.partial(torch.autograd.functional.jacobian, lambda *a: ddf(*a).mean((0, 2, 3)), args)
    for actual, expected in zip(jacobian(vectorize=True), jacobian(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["ddf", "interleaved", "up"])
def test_flops_are_counted(name):
    args, function = small(name)
    with FlopCounterMode(display=False) as counter:
        out = function(*args)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 9 * out.numel() * (1 + len(args))


@BACKENDS
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_only_where_wanted(backend, needs):
    args = inputs(2, 5, 6, 7, requires_grad=True)
    with use("formula"):
        full = gradients(args, (3, 1, 1, "mul"))
    leaves = [t.detach().requires_grad_(n) for t, n in zip(args, needs, strict=True)]
    with backend():
        out = ddf(*leaves)
    g = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=g, dtype=torch.float64))
    for leaf, expected, need in zip(leaves, full, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["ddf, one channel filter", "ska", "involution, stride", "carafe"])
def test_opcheck(layout, name):
    for dtype, tolerance in ((torch.float32, {}), (torch.bfloat16, {"atol": 5e-2, "rtol": 5e-2})):
        tensors, options = of_case(name, dtype)
        args = tuple(None if t is None else t.requires_grad_() for t in arranged(*tensors, layout))
        args = tuple(None if t is None else t.detach().requires_grad_() for t in args)
        parts = args[1].shape[1] if options.get("grouping") != "interleaved" else 1
        numbers = [options.get(key, 1) for key in ("dilation", "stride", "upsample")]
        raw = (options.get("kernel_size", 3), options.get("kernel_combine", "mul"), parts, *numbers)
        torch.library.opcheck(torch.ops.timm_dynamic.dynamic_filter.default, (*args, *raw), **tolerance)
        detached = [None if t is None else t.detach() for t in args]
        out = torch.ops.timm_dynamic.dynamic_filter(*detached, *raw)
        torch.library.opcheck(
            torch.ops.timm_dynamic.dynamic_filter_backward.default,
            (torch.ones_like(out), *detached, *raw, [True, True, args[2] is not None]),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["ddf, heads", "ska", "carafe"])
def test_compile_fullgraph(layout, name):
    tensors, options = of_case(name, torch.float32)
    tensors, function = arranged(*tensors, layout), call(dynamic_filter, **options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *a: function(x * 1.0, *a).relu(), fullgraph=True)
    eager = with_gradients(lambda *a: function(*a).relu(), tensors)
    for a, e in zip(with_gradients(compiled, tensors), eager, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, filters):
        return self.function(x, filters, None)


@pytest.mark.parametrize("name", ["ska", "cotnext", "involution, stride", "carafe, groups"])
def test_export_with_dynamic_batch(name):
    tensors, options = of_case(name, torch.float32)
    model, batch = Module(call(dynamic_filter, **options)), torch.export.Dim("batch", min=2)
    program = torch.export.export(model, tensors[:2], dynamic_shapes={"x": {0: batch}, "filters": {0: batch}})
    assert not any("timm_dynamic" in str(node.target) for node in program.graph.nodes)
    other = [torch.cat([t, t.flip(0), t]) for t in tensors[:2]]
    torch.testing.assert_close(program.module()(*other), model(*other))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    args = inputs(2, 4, 6, 5, dtype=torch.float32, requires_grad=True)
    mixed = (args[0].to(dtype), *args[1:])  # as after an autocast convolution
    with backend(), torch.autocast("cpu", dtype):
        out = ddf(*mixed)
    out.sum().backward()
    with use("formula"):
        assert_close(out, ddf(*(t.detach().double() for t in args)), dtype)
    assert [t.grad.dtype for t in args] == [torch.float32] * 3


X, INT = torch.zeros(2, 4, 6, 5), torch.int32
BAD = {
    "even K": (dict(kernel_size=4), "kernel_size must be odd and positive, got 4"),
    "negative K": (dict(kernel_size=-1), "kernel_size must be odd and positive, got -1"),
    "dilation": (dict(dilation=0), "dilation must be at least 1, got 0"),
    "stride": (dict(stride=0), "stride must be at least 1, got 0"),
    "upsample": (dict(upsample=0), "upsample must be at least 1, got 0"),
    "both": (dict(upsample=2, stride=2), "only one of stride and upsample may differ from 1, got 2 and 2"),
    "combine": (dict(kernel_combine="div"), "kernel_combine must be .*, got 'div'"),
    "grouping": (dict(grouping="random"), "grouping must be .*, got 'random'"),
    "parts": (dict(parts=3), "parts must divide the 2 filters, got 3"),
    "groups": (dict(filters=torch.zeros(2, 3, 9, 6, 5)), "number of filters must divide the 4 channels, got 3"),
    "rank": (dict(x=torch.zeros(3, 4, 5)), r"x must be \[B, C, H, W\].*got shape \[3, 4, 5\]"),
    "no pixels": (dict(x=torch.zeros(2, 4, 0, 5)), r"x must be .*got shape \[2, 4, 0, 5\]"),
    "channels": (
        dict(channel_filter=torch.zeros(2, 3, 9)),
        r"channel_filter must have shape \[2, 4, 9\].*got \[2, 3, 9\]",
    ),
    "rank of the channel filter": (
        dict(channel_filter=torch.zeros(2, 4, 3, 3)),
        r"channel_filter .*got \[2, 4, 3, 3\]",
    ),
    "rank of the filters": (dict(filters=torch.zeros(2, 9, 6, 5)), r"filters must be .*got shape \[2, 9, 6, 5\]"),
    "positions": (
        dict(filters=torch.zeros(2, 2, 9, 6, 4)),
        r"filters must have shape \[2, 2, 9, 6, 5\].*got \[2, 2, 9, 6, 4\]",
    ),
    "taps": (dict(filters=torch.zeros(2, 2, 1, 6, 5)), r"filters .*got \[2, 2, 1, 6, 5\]"),
    "batch": (dict(filters=torch.zeros(3, 2, 9, 6, 5)), r"filters .*got \[3, 2, 9, 6, 5\]"),
    "dtype": (
        dict(channel_filter=torch.zeros(2, 4, 9).double()),
        "channel_filter must have the dtype of x, torch.float32, got torch.float64",
    ),
    "integers": (
        dict(x=X.to(INT), filters=torch.zeros(2, 2, 9, 6, 5, dtype=INT)),
        "x must be one of .*got torch.int32",
    ),
    "device": (
        dict(filters=torch.zeros(2, 2, 9, 6, 5, device="meta")),
        "filters must be on the device of x, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        dynamic_filter(**{"x": X, "filters": torch.zeros(2, 2, 9, 6, 5), **change})


def test_bad_filters_of_ddf():
    features, channel, spatial = inputs(2, 4, 6, 5)
    with pytest.raises(ValueError, match=r"channel_filter must be \[B, C, 3, 3\], got \[2, 4, 9\]"):
        ddf(features, channel.flatten(2), spatial)
    with pytest.raises(ValueError, match=r"spatial_filter must be .*got shape \[2, 1, 9, 6, 5\]"):
        ddf(features, channel, spatial[:, None])


@KERNEL.marks[0]
@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(2, 4, 6)},
        {1: torch.zeros(2, 3, 9, 6, 5)},
        {1: torch.zeros(2, 2, 9, 6, 4)},
        {1: torch.zeros(2, 9, 6, 5)},
        {2: torch.zeros(2, 4, 9, dtype=torch.float64)},
        {2: torch.zeros(2, 3, 9)},
        {3: 2},
        {4: "div"},
        {5: 3},
        {6: 0},
        {7: 0},
        {7: 2, 8: 2},
        {8: 0},
    ],
    ids=str,
)
def test_raw_operator_refuses_what_would_read_out_of_bounds(change):
    args = [X, torch.zeros(2, 2, 9, 6, 5), torch.zeros(2, 4, 9), 3, "mul", 1, 1, 1, 1]
    for index, value in change.items():
        args[index] = value
    with pytest.raises(RuntimeError):
        torch.ops.timm_dynamic.dynamic_filter(*args)
