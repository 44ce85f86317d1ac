"""The operator dynamic_filter under autograd, torch.func, compilation and export."""

import functools

import pytest
import torch
from filter_cases import BACKENDS, MODULO, arranged, call, gradients, inputs, of_case, operands, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from timm_dynamic import use
from timm_dynamic.ops import ddf, dynamic_filter

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
        assert torch.autograd.gradcheck(function, args, fast_mode=True)  # the other takes seconds
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
        assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


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


@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    [
        ("ddf, one channel filter", "contiguous", torch.float32),
        ("ska", "channels_last", torch.bfloat16),
        ("involution, stride", "channels_last", torch.float32),
        ("carafe", "contiguous", torch.bfloat16),
    ],
)
def test_opcheck(name, layout, dtype):
    tensors, options = of_case(name, dtype)
    args = tuple(None if t is None else t.detach().requires_grad_() for t in arranged(*tensors, layout))
    parts = args[1].shape[1] if options.get("grouping") != "interleaved" else 1
    numbers = [options.get(key, 1) for key in ("dilation", "stride", "upsample")]
    raw = (options.get("kernel_size", 3), options.get("kernel_combine", "mul"), parts, *numbers)
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.timm_dynamic.dynamic_filter.default, (*args, *raw), **tolerance)
    detached = [None if t is None else t.detach() for t in args]
    out = torch.ops.timm_dynamic.dynamic_filter(*detached, *raw)
    torch.library.opcheck(
        torch.ops.timm_dynamic.dynamic_filter_backward.default,
        (torch.ones_like(out), *detached, *raw, [True, True, args[2] is not None]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("name", "layout", "backend"),
    [
        ("ddf, heads", "contiguous", "aot_eager"),
        ("carafe", "channels_last", "aot_eager"),
        ("ska", "channels_last", "inductor"),
    ],
)
def test_compile_fullgraph(name, layout, backend):
    tensors, options = of_case(name, torch.float32)
    tensors, function = arranged(*tensors, layout), call(dynamic_filter, **options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *a: function(x * 1.0, *a).relu(), fullgraph=True, backend=backend)
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
