"""The ddf operator against its formula, with and without the compiled kernel."""

import contextlib
import functools
import random

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from timm_dynamic import use
from timm_dynamic.ops import backend_info, ddf

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
KERNEL = pytest.param(
    contextlib.nullcontext,
    id="kernel",
    marks=pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}"),
)
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNEL, pytest.param(functools.partial(use, "formula"), id="definition")]
)


def definition(*args, **kwargs) -> Tensor:
    with use(ddf="formula"):
        return ddf(*args, **kwargs)


def formula(features, channel_filter, spatial_filter, kernel_size, dilation, stride, kernel_combine) -> Tensor:
    """The definition in the operator's docstring, one output element at a time, in float64."""
    B, C, H, W = features.shape
    K, pad = kernel_size, kernel_size // 2
    Ho, Wo = -(-H // stride), -(-W // stride)
    f = features.detach().double()
    c = channel_filter.detach().double().expand(B, C, K, K)
    s = spatial_filter.detach().double().expand(B, K * K, Ho, Wo)
    out = torch.zeros(B, C, Ho, Wo, dtype=torch.float64)
    for y in range(Ho):
        for x in range(Wo):
            for ky in range(K):
                for kx in range(K):
                    v, u = y * stride + (ky - pad) * dilation, x * stride + (kx - pad) * dilation
                    if 0 <= v < H and 0 <= u < W:
                        per_channel, per_pixel = c[:, :, ky, kx], s[:, ky * K + kx, y, x, None]
                        w = per_channel * per_pixel if kernel_combine == "mul" else per_channel + per_pixel
                        out[:, :, y, x] += w * f[:, :, v, u]
    return out


def inputs(B, C, H, W, K=3, stride=1, dtype=torch.float64, seed=0, filters=("full", "full"), requires_grad=False):
    g = torch.Generator().manual_seed(seed)
    Ho, Wo = -(-H // stride), -(-W // stride)
    channel = (B, C, K, K) if filters[0] == "full" else (1, 1, K, K)
    spatial = (B, K * K, Ho, Wo) if filters[1] == "full" else (1, K * K, 1, 1)
    tensors = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((B, C, H, W), channel, spatial))
    return tuple(t.to(dtype).requires_grad_(requires_grad) for t in tensors)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    scale = expected.abs().max().clamp(min=1).item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@BACKENDS
@pytest.mark.parametrize("kernel_combine", ["mul", "add"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_formula(backend, kernel_size, dilation, stride, kernel_combine):
    args = inputs(2, 3, 7, 9, kernel_size, stride)
    options = (kernel_size, dilation, stride, kernel_combine)
    with backend():
        assert_close(ddf(*args, *options), formula(*args, *options), torch.float64)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "offset": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
}


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 1, 5, 3), (1, 5, 1, 17), (2, 16, 33, 1), (3, 37, 8, 9), (2, 64, 7, 7)], ids=str
)
def test_shapes_layouts_dtypes(backend, shape, layout, dtype):
    for stride in (1, 2):
        args = tuple(LAYOUTS[layout](t) for t in inputs(*shape, 3, stride, dtype, seed=stride))
        with backend():
            out = ddf(*args, stride=stride)
        assert_close(out, definition(*(t.double() for t in args), stride=stride), dtype)
        if layout == "channels_last" and shape[1] > 1 and min(shape[2:]) > 1:
            assert out.is_contiguous(memory_format=torch.channels_last)


def gradients(args, options, function=ddf):
    leaves = [t.detach().requires_grad_() for t in args]
    out = function(*leaves, *options)
    g = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype))
    return [t.grad for t in leaves]


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("filters", [("full", "full"), ("one", "full"), ("full", "one")], ids="-".join)
@pytest.mark.parametrize("seed", range(24))
def test_random_cases_forward_and_backward(backend, seed, filters, layout):
    r = random.Random(f"{seed}{filters}{layout}")
    K, stride, dilation = r.choice([1, 3, 5, 7]), r.choice([1, 2, 3]), r.choice([1, 2, 3])
    shape = (r.choice([1, 2, 3]), r.choice([1, 2, 7, 16, 33, 65]), r.randint(1, 20), r.randint(1, 20))
    dtype, options = r.choice(list(TOLERANCE)), (K, dilation, stride, r.choice(["mul", "add"]))
    args = tuple(LAYOUTS[layout](t) for t in inputs(*shape, K, stride, dtype, seed, filters))
    wide = [t.double() for t in args]
    with backend():
        assert_close(ddf(*args, *options), definition(*wide, *options), dtype)
        for name, actual, expected in zip(
            ("features", "channel", "spatial"),
            gradients(args, options),
            gradients(wide, options, definition),
            strict=True,
        ):
            assert actual.shape == expected.shape, name
            assert_close(actual, expected, dtype)


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
    args = inputs(3, 40, 15, 13, dtype=torch.float32)
    before = [t.clone() for t in args]
    first, second = gradients(args, (3, 1, 1, "mul")), gradients(args, (3, 1, 1, "mul"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@BACKENDS
@pytest.mark.parametrize("options", [(3, 1, 1, "mul"), (3, 2, 2, "add"), (1, 1, 1, "mul"), (5, 1, 3, "add")], ids=str)
def test_gradcheck(backend, options):
    K, _, stride, _ = options
    with backend():
        for filters in (("full", "full"), ("one", "one")):
            args = inputs(2, 3, 5, 4, K, stride, filters=filters, requires_grad=True)
            assert torch.autograd.gradcheck(lambda *a: ddf(*a, *options), args)
            assert torch.autograd.gradgradcheck(lambda *a: ddf(*a, *options), args)


@BACKENDS
@pytest.mark.parametrize("kernel_combine", ["mul", "add"])
def test_second_gradients_where_filters_depend_on_the_features(backend, kernel_combine):
    def function(x):
        channel = x.mean((2, 3))[:, :, None, None] * torch.arange(9.0, dtype=x.dtype).view(3, 3)
        spatial = (x * x).sum(1, keepdim=True).expand(-1, 9, -1, -1)
        return ddf(x, channel, spatial, kernel_combine=kernel_combine)

    x = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    with backend():
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_transforms(layout):
    args = tuple(LAYOUTS[layout](t) for t in inputs(3, 4, 6, 5))
    tangents = tuple(torch.randn_like(t) for t in args)
    weights = torch.randn_like(args[0])
    expected = torch.autograd.functional.vjp(ddf, args, weights)[1]
    torch.testing.assert_close(torch.func.vjp(ddf, *args)[1](weights), expected)
    derivative = torch.func.jvp(ddf, args, tangents)[1]
    step = 1e-6
    plus, minus = (ddf(*(t + sign * step * d for t, d in zip(args, tangents, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(derivative, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.vmap(lambda *a: ddf(*(t[None] for t in a))[0])(*args), ddf(*args))


def test_batched_gradients():
    args = inputs(2, 3, 5, 4, requires_grad=True)
    jacobian = functools.partial(torch.autograd.functional.jacobian, lambda *a: ddf(*a).mean((0, 2, 3)), args)
    for actual, expected in zip(jacobian(vectorize=True), jacobian(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_flops_are_counted():
    args = inputs(2, 4, 6, 5, stride=2, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ddf(*args, stride=2).sum().backward()
    forward = 2 * 9 * 2 * 4 * 3 * 3
    assert counter.get_total_flops() == 4 * forward


@BACKENDS
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_only_where_wanted(backend, needs):
    args = inputs(2, 5, 6, 7, requires_grad=True)
    full = gradients(args, (3, 1, 1, "mul"), definition)
    leaves = [t.detach().requires_grad_(n) for t, n in zip(args, needs, strict=True)]
    with backend():
        out = ddf(*leaves)
    g = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=g, dtype=torch.float64))
    for leaf, expected, need in zip(leaves, full, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("filters", [("full", "full"), ("one", "full"), ("full", "one")], ids="-".join)
def test_opcheck(layout, filters, dtype):
    args = tuple(LAYOUTS[layout](t).requires_grad_() for t in inputs(2, 4, 6, 5, 3, 2, dtype, filters=filters))
    args = tuple(t.detach().requires_grad_() for t in args)
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.timm_dynamic.ddf.default, (*args, 3, 1, 2, "mul"), **tolerance)
    detached = [t.detach() for t in args]
    out = torch.ops.timm_dynamic.ddf(*detached, 3, 1, 2, "mul")
    torch.library.opcheck(
        torch.ops.timm_dynamic.ddf_backward.default,
        (torch.ones_like(out), *detached, 3, 1, 2, "mul", [True, True, True]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_fullgraph(layout):
    args = tuple(LAYOUTS[layout](t) for t in inputs(2, 8, 9, 7, dtype=torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: ddf(a[0] * 1.0, *a[1:]).relu(), fullgraph=True)
    eager = gradients(args, (3, 1, 1, "mul"), lambda *a: ddf(*a).relu())
    actual = gradients(args, (3, 1, 1, "mul"), compiled)
    torch.testing.assert_close(compiled(*args, 3, 1, 1, "mul"), ddf(*args).relu())
    for a, e in zip(actual, eager, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


class Module(torch.nn.Module):
    def forward(self, features, channel_filter, spatial_filter):
        return ddf(features, channel_filter, spatial_filter, stride=2)


def test_export_with_dynamic_batch():
    args = inputs(2, 4, 9, 8, 3, 2, torch.float32)
    batch = torch.export.Dim("batch", min=2)
    shapes = {name: {0: batch} for name in ("features", "channel_filter", "spatial_filter")}
    program = torch.export.export(Module(), args, dynamic_shapes=shapes)
    assert not any("timm_dynamic" in str(node.target) for node in program.graph.nodes)
    other = inputs(5, 4, 9, 8, 3, 2, torch.float32, seed=1)
    torch.testing.assert_close(program.module()(*other), Module()(*other))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    args = inputs(2, 4, 6, 5, dtype=torch.float32, requires_grad=True)
    mixed = (args[0].to(dtype), *args[1:])  # as after an autocast convolution
    with backend(), torch.autocast("cpu", dtype):
        out = ddf(*mixed)
    out.sum().backward()
    assert_close(out, definition(*(t.detach().double() for t in args)), dtype)
    assert [t.grad.dtype for t in args] == [torch.float32] * 3


INT = torch.int32
CASES = {
    "even K": (dict(kernel_size=4), "kernel_size must be odd and positive, got 4"),
    "negative K": (dict(kernel_size=-1), "kernel_size must be odd and positive, got -1"),
    "dilation": (dict(dilation=0), "dilation must be at least 1, got 0"),
    "stride": (dict(stride=0), "stride must be at least 1, got 0"),
    "combine": (dict(kernel_combine="div"), "kernel_combine must be .*, got 'div'"),
    "features rank": (dict(features=torch.zeros(3, 4, 5)), r"features must be \[B, C, H, W\].*got shape \[3, 4, 5\]"),
    "no pixels": (dict(features=torch.zeros(2, 4, 0, 5)), r"features must be .*got shape \[2, 4, 0, 5\]"),
    "channels": (
        dict(channel_filter=torch.zeros(2, 3, 3, 3)),
        r"channel_filter must have shape \[2, 4, 3, 3\].*got \[2, 3, 3, 3\]",
    ),
    "flat channel filter": (dict(channel_filter=torch.zeros(2, 4, 9)), r"channel_filter .*got \[2, 4, 9\]"),
    "positions": (
        dict(spatial_filter=torch.zeros(2, 9, 6, 4)),
        r"spatial_filter must have shape \[2, 9, 6, 5\].*got \[2, 9, 6, 4\]",
    ),
    "taps": (dict(spatial_filter=torch.zeros(2, 1, 6, 5)), r"spatial_filter .*got \[2, 1, 6, 5\]"),
    "batch": (dict(spatial_filter=torch.zeros(3, 9, 6, 5)), r"spatial_filter .*got \[3, 9, 6, 5\]"),
    "dtype": (
        dict(channel_filter=torch.zeros(2, 4, 3, 3).double()),
        "channel_filter must have the dtype of features, torch.float32, got torch.float64",
    ),
    "integers": (
        dict(
            features=torch.zeros(2, 4, 6, 5, dtype=INT),
            channel_filter=torch.zeros(2, 4, 3, 3, dtype=INT),
            spatial_filter=torch.zeros(2, 9, 6, 5, dtype=INT),
        ),
        "features must be one of .*got torch.int32",
    ),
    "device": (
        dict(spatial_filter=torch.zeros(2, 9, 6, 5, device="meta")),
        "spatial_filter must be on the device of features, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_names_the_argument(case):
    change, message = CASES[case]
    names = ("features", "channel_filter", "spatial_filter")
    arguments = dict(zip(names, inputs(2, 4, 6, 5, dtype=torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        ddf(**arguments)


@KERNEL.marks[0]
@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(2, 4, 6)},
        {1: torch.zeros(2, 3, 3, 3)},
        {1: torch.zeros(2, 4, 3, 3, dtype=torch.float64)},
        {2: torch.zeros(2, 9, 6, 4)},
        {2: torch.zeros(2, 9, 3, 5)},
        {3: 2},
        {4: 0},
        {5: 0},
        {6: "div"},
    ],
    ids=str,
)
def test_raw_operator_refuses_what_would_read_out_of_bounds(change):
    args = [*inputs(2, 4, 6, 5, dtype=torch.float32), 3, 1, 1, "mul"]
    for index, value in change.items():
        args[index] = value
    with pytest.raises(RuntimeError):
        torch.ops.timm_dynamic.ddf(*args)
