"""The CUDA kernels of dynamic_filter against the reference on the CPU. `benchmarks/gpu.sh tests` runs these."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import needs_gpu
from torch import Tensor

from timm_dynamic import use
from timm_dynamic.ops import dynamic_filter
from timm_dynamic.ops.dynamic_filter.definition import definition as formula

pytestmark = needs_gpu()

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
FILTERS = pytest.mark.parametrize("filters", [("full", "full"), ("one", "full"), ("full", "one")], ids="-".join)
NAMES = ("output", "grad of features", "grad of channel_filter", "grad of spatial_filter")
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every second column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "every second channel": lambda t: LAYOUTS["channels_last"](t.repeat_interleave(2, 1))[:, ::2],
    "some channels": lambda t: LAYOUTS["channels_last"](torch.cat([t[:, :1]] * 4 + [t], 1))[:, 4:],
    "a channel less": lambda t: LAYOUTS["channels_last"](torch.cat([t, t[:, :1]], 1))[:, :-1],
    "gaps between planes": lambda t: F.pad(t.flatten(2), (0, 1))[..., :-1].unflatten(2, t.shape[2:]),
    "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


def forward(
    operator, features, channel_filter, spatial_filter, K=3, dilation=1, stride=1, kernel_combine="mul", **how
) -> Tensor:
    """The operator with DDF's arguments."""
    tensors = (features, spatial_filter[:, None], channel_filter.flatten(2))
    return operator(*tensors, K, kernel_combine, 1, dilation, stride, 1, **how)


def backward(
    operator, grad, features, channel_filter, spatial_filter, K, dilation, stride, kernel_combine, needs, **how
) -> tuple[Tensor, ...]:
    """The gradients of DDF's tensors."""
    tensors = (grad, features, spatial_filter[:, None], channel_filter.flatten(2))
    wanted = [needs[0], needs[2], needs[1]]
    x, spatial, channel = operator(*tensors, K, kernel_combine, 1, dilation, stride, 1, wanted, **how)
    return (
        x,
        channel.unflatten(2, (K, K)) if needs[1] else channel,
        spatial[:, 0] if needs[2] else spatial,
    )


# The registered operators: their kernels run, measured on this device or not.
ddf = functools.partial(forward, torch.ops.timm_dynamic.dynamic_filter)
ddf_backward = functools.partial(backward, torch.ops.timm_dynamic.dynamic_filter_backward)
definition = functools.partial(forward, formula)


def inputs(shape, K=3, stride=1, dtype=torch.float32, seed=0, filters=("full", "full"), layout="contiguous"):
    """Features, filters and the gradient of the output, on the CPU in float64 but rounded to `dtype`."""
    g = torch.Generator().manual_seed(seed)
    B, C, H, W = shape
    Ho, Wo = -(-H // stride), -(-W // stride)
    channel = (B, C, K, K) if filters[0] == "full" else (1, 1, K, K)
    spatial = (B, K * K, Ho, Wo) if filters[1] == "full" else (1, K * K, 1, 1)
    shapes = (shape, channel, spatial, (B, C, Ho, Wo))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype).double() for s in shapes)


def run(function, tensors, options) -> list[Tensor]:
    """The output and the three gradients."""
    *leaves, grad = (t.detach() for t in tensors)
    leaves = [t.requires_grad_() for t in leaves]
    out = function(*leaves, *options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(shape, options, dtype, layout="contiguous", seed=0, filters=("full", "full")) -> None:
    K, _, stride, _ = options
    expected = inputs(shape, K, stride, dtype, seed, filters)
    on_gpu = [t.to("cuda", dtype) for t in expected]
    on_gpu[0] = LAYOUTS[layout](on_gpu[0])
    results = zip(NAMES, run(ddf, on_gpu, options), run(definition, expected, options), strict=True)
    for name, actual, wanted in results:
        assert actual.dtype == dtype and actual.shape == wanted.shape, name
        scale = wanted.abs().max().clamp(min=1).item() if wanted.numel() else 1.0
        torch.testing.assert_close(
            actual.cpu().double(), wanted, rtol=0, atol=TOLERANCE[dtype] * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_layouts_dtypes(layout):
    shapes = ((1, 1, 1, 1), (2, 1, 5, 3), (1, 5, 1, 17), (3, 37, 8, 9), (2, 64, 7, 7), (2, 132, 14, 28))
    for shape, dtype, stride in itertools.product(shapes, TOLERANCE, (1, 2)):
        check(shape, (3, 1, stride, "mul"), dtype, layout)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_options(layout, kernel_size):
    for dilation, stride in ((1, 1), (2, 1), (1, 2), (3, 3)):
        for combine in ("mul", "add"):
            check((2, 36, 12, 20), (kernel_size, dilation, stride, combine), torch.float32, layout)


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_cases(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    K, dilation, stride = draw(1, 3, 3, 5, 7), draw(1, 1, 2, 50), draw(1, 1, 2, 3, 50)
    channels, width = draw(1, 2, 7, 16, 33, 64, 132, 260), draw(1, 7, 28, 57)
    shape = (draw(1, 2, 5), channels, data.draw(st.integers(1, 40)), width)
    options, filters = (
        (K, dilation, stride, draw("mul", "add")),
        draw(("full", "full"), ("one", "full"), ("full", "one")),
    )
    check(shape, options, draw(*TOLERANCE), draw(*LAYOUTS), data.draw(st.integers(0, 9)), filters)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(70000, 2, 3, 3), (2, 70000, 2, 4), (1, 3, 70000, 1)], ids=str)
def test_dimensions_above_65535(shape, layout):
    check(shape, (3, 1, 1, "mul"), torch.float32, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(layout):
    shape = (9, 256, 1024, 1024)
    if torch.cuda.mem_get_info()[0] < 5 * 2 * 9 * 2**28:
        pytest.skip("needs 25 GB of free GPU memory")
    features = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=_format(layout)).normal_()
    channel = torch.randn(9, 256, 3, 3, dtype=torch.bfloat16, device="cuda")
    spatial = torch.randn(9, 9, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    out = ddf(features, channel, spatial)
    grad, *_ = ddf_backward(out, features, channel, spatial, 3, 1, 1, "mul", [True, False, False])
    last = slice(8, None), slice(250, None)
    parts = features[last].detach().double().requires_grad_(), channel[last].double(), spatial[8:].double()
    expected = definition(*parts, 3, 1, 1, "mul")
    (expected_grad,) = torch.autograd.grad(expected, parts[0], out[last].double())
    for actual, wanted in ((out, expected), (grad, expected_grad)):
        atol = TOLERANCE[torch.bfloat16] * wanted.abs().max().item()
        torch.testing.assert_close(actual[last].double(), wanted.detach(), rtol=0, atol=atol)


def _format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


@DTYPES
@FILTERS
def test_empty_batch(filters, dtype):
    check((0, 4, 6, 5), (3, 1, 1, "mul"), dtype, filters=filters)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [1, 2])
def test_deterministic(layout, stride):
    tensors = [t.to("cuda", torch.float32) for t in inputs((4, 160, 57, 56), 3, stride)]
    tensors[0] = LAYOUTS[layout](tensors[0])
    first = run(ddf, tensors, (3, 1, stride, "mul"))
    for _ in range(3):
        again = run(ddf, tensors, (3, 1, stride, "mul"))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_is_what_the_results_need(layout):
    features, channel, spatial, grad = (t.to("cuda", torch.float32) for t in inputs((8, 256, 56, 56)))
    features, grad = LAYOUTS[layout](features), LAYOUTS[layout](grad)
    results = sum(t.nbytes for t in (features, channel, spatial))
    for call, needed in (
        (lambda: ddf(features, channel, spatial), features.nbytes),
        (lambda: ddf_backward(grad, features, channel, spatial, 3, 1, 1, "mul", [True, True, True]), results),
    ):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before <= needed + 0.25 * features.nbytes


def test_another_stream():
    tensors = [t.to("cuda", torch.float32) for t in inputs((8, 128, 56, 56))]
    expected = run(ddf, tensors, (3, 1, 1, "mul"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on the default stream would overtake this
        late = [t * 2 for t in tensors[:1]] + tensors[1:]
        actual = run(ddf, late, (3, 1, 1, "mul"))
    stream.synchronize()
    torch.testing.assert_close(actual[0], expected[0] * 2)
    torch.testing.assert_close(actual[1], expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_another_device():
    tensors = [t.to("cuda:1", torch.float32) for t in inputs((2, 8, 9, 8))]
    with torch.cuda.device(0):
        actual = run(ddf, tensors, (3, 1, 1, "mul"))
    expected = run(definition, [t.cpu() for t in tensors], (3, 1, 1, "mul"))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cuda_graph(layout):
    tensors = [t.to("cuda", torch.float32) for t in inputs((2, 64, 28, 28))]
    tensors[0] = LAYOUTS[layout](tensors[0])
    run(ddf, tensors, (3, 1, 1, "mul"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(ddf, tensors, (3, 1, 1, "mul"))
    tensors[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    for name, a, e in zip(NAMES, captured, run(ddf, tensors, (3, 1, 1, "mul")), strict=True):
        assert torch.equal(a, e), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_fullgraph_and_run_again(layout):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: ddf(a[0] * 1.0, *a[1:]).relu(), fullgraph=True)
    for seed in range(2):
        tensors = [t.to("cuda", torch.float32) for t in inputs((2, 32, 15, 12), seed=seed)]
        tensors[0] = LAYOUTS[layout](tensors[0])
        expected = run(lambda *a: ddf(*a).relu(), tensors, (3, 1, 1, "mul"))
        for a, e in zip(run(compiled, tensors, (3, 1, 1, "mul")), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every second column"])
@FILTERS
def test_opcheck(layout, filters):
    features, channel, spatial, grad = (
        t.to("cuda", torch.float32) for t in inputs((2, 8, 6, 5), 3, 2, filters=filters)
    )
    tensors = (LAYOUTS[layout](features), spatial[:, None], channel.flatten(2))
    args, options = tuple(t.detach().requires_grad_() for t in tensors), (3, "mul", 1, 1, 2, 1)
    torch.library.opcheck(torch.ops.timm_dynamic.dynamic_filter.default, (*args, *options))
    torch.library.opcheck(
        torch.ops.timm_dynamic.dynamic_filter_backward.default,
        (grad, *(t.detach() for t in args), *options, [True, True, True]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("options", [(3, 1, 1, "mul"), (3, 2, 2, "add"), (5, 1, 3, "add")], ids=str)
def test_gradcheck(options):
    tensors = inputs((2, 3, 5, 4), options[0], options[2], torch.float64)[:3]
    leaves = [t.cuda().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *a: ddf(*a, *options), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    leaves = [t.to("cuda", torch.float32).requires_grad_() for t in inputs((2, 16, 6, 8))[:3]]
    with torch.autocast("cuda", dtype):
        out = ddf(*leaves)
    out.float().sum().backward()
    assert out.dtype == dtype and all(t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_only_where_wanted(layout, needs):
    features, channel, spatial, grad = (t.to("cuda", torch.float32) for t in inputs((2, 36, 9, 8)))
    args = (grad, LAYOUTS[layout](features), channel, spatial, 3, 1, 1, "mul")
    every = ddf_backward(*args, [True, True, True])
    some = ddf_backward(*args, list(needs))
    for need, a, b in zip(needs, some, every, strict=True):
        assert torch.equal(a, b) if need else a.shape == (0,)


def test_bad_arguments_are_refused():
    features, channel, spatial, _ = (t.to("cuda", torch.float32) for t in inputs((2, 4, 6, 5)))
    for bad in (
        (features, channel[:, :3], spatial),
        (features, channel.half(), spatial),
        (features, channel, spatial.cpu()),
    ):
        with pytest.raises(RuntimeError, match="filter"):
            ddf(*bad, 3, 1, 1, "mul")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_the_public_function_gives_to_the_kernel(layout):
    """Heads are taken into the batch; other groups, and upsampling, are the definition's."""
    g = torch.Generator().manual_seed(0)
    x = LAYOUTS[layout](torch.randn(2, 12, 8, 9, generator=g, dtype=torch.float64))
    for options in ({}, {"grouping": "interleaved"}, {"upsample": 2}):
        u = options.get("upsample", 1)
        filters = torch.randn(2, 3, 9, 8 * u, 9 * u, generator=g, dtype=torch.float64)
        channel = torch.randn(2, 12, 9, generator=g, dtype=torch.float64)
        for factor in (channel, None):
            expected = dynamic_filter(x, filters, channel_filter=factor, **options)
            with use(dynamic_filter="kernel"):
                on_gpu = None if factor is None else factor.cuda()
                actual = dynamic_filter(x.cuda(), filters.cuda(), channel_filter=on_gpu, **options)
            torch.testing.assert_close(actual.cpu(), expected)
