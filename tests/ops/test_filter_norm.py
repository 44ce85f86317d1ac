"""The filter_norm operator against its formula, with and without the compiled kernel."""

import contextlib
import functools

import pytest
import torch
from pairs import in_turns

from timm_dynamic import use
from timm_dynamic.ops import backend_info, filter_norm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
KERNEL = pytest.param(
    contextlib.nullcontext,
    id="kernel",
    marks=pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}"),
)
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNEL, pytest.param(functools.partial(use, "formula"), id="definition")]
)
SHAPES = [(2, 9, 5, 7), (1, 18, 1, 1), (3, 50, 1, 3), (1, 9, 13, 11), (0, 9, 4, 4), (2, 4, 9, 8), (2, 900, 1, 1)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
}


def taps_of(shape) -> int:
    return {50: 25, 4: 4}.get(shape[1], 9)


def formula(x, taps, scale):
    filters = x.double().unflatten(1, (-1, taps))
    std, mean = torch.std_mean(filters, 2, correction=1, keepdim=True)
    return (scale * (filters - mean) / (std + 1e-10)).flatten(1, 2)


@BACKENDS
@pytest.mark.parametrize(("shape", "dtype", "layout"), in_turns(SHAPES, TOLERANCE, LAYOUTS), ids=str)
def test_formula(backend, shape, dtype, layout):
    x = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype))
    with backend():
        out = filter_norm(x, taps_of(shape), 0.7)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), formula(x, taps_of(shape), 0.7), rtol=0, atol=4 * TOLERANCE[dtype])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_constant_filters_become_zero_with_finite_gradients(backend, dtype):
    x = torch.full((1, 9, 2, 2), 3.0, dtype=dtype, requires_grad=True)
    with backend():
        out = filter_norm(x, 9, 1.0)
        out.sum().backward()
    assert (out == 0).all() and x.grad.isfinite().all()


@BACKENDS
def test_gradcheck(backend):
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True)
    with backend():
        torch.autograd.gradcheck(lambda x: filter_norm(x, 4, 0.7), x)
        torch.autograd.gradgradcheck(lambda x: filter_norm(x, 4, 0.7), x)


@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", torch.float32), ("channels_last", torch.bfloat16)])
def test_opcheck(layout, dtype):
    x = LAYOUTS[layout](torch.randn(2, 18, 3, 5).to(dtype)).requires_grad_()
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.timm_dynamic.filter_norm.default, (x, 9, 0.7), **tolerance)


def test_compile_fullgraph():
    x = torch.randn(2, 18, 3, 5, requires_grad=True)
    torch._dynamo.reset()
    out = torch.compile(filter_norm, backend="aot_eager", fullgraph=True)(x, 9, 0.7)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    expected = filter_norm(x, 9, 0.7)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0], atol=1e-5, rtol=1e-4)


@KERNEL.marks[0]
def test_float32_stays_under_autocast():
    x = torch.randn(2, 18, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(filter_norm(x, 9, 0.7), filter_norm(x.clone(), 9, 0.7))
        assert filter_norm(x, 9, 0.7).dtype == torch.float32


def test_transforms():
    x, tangent = torch.randn(2, 3, 8, 3, 2, dtype=torch.float64)
    function = functools.partial(filter_norm, taps=4, scale=0.7)
    expected = torch.autograd.functional.vjp(function, x, tangent)[1]
    torch.testing.assert_close(torch.func.vjp(function, x)[1](tangent)[0], expected)
    step = 1e-6
    numeric = (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,))[1], numeric, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.vmap(lambda x: function(x[None])[0])(x), function(x))
