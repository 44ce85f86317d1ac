"""Scaled 1x1 convolutions and their gradients: the CPU kernels against the references in float64."""

import math

import pytest
import torch
from timm_dynamic.ops.scaled_pointwise import (
    scaled_pointwise_grads_reference,
    scaled_pointwise_reference,
    scaled_pointwise_serves,
)

from timm_dynamic.ops import backend_info

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")
SHAPES = {  # B, C, O, L, H, W
    "7x7": (1, 64, 64, 8, 7, 7),
    "nothing is a multiple": (2, 17, 23, 5, 5, 9),
    "14x14": (3, 128, 40, 11, 14, 14),
    "1x1": (1, 300, 70, 45, 1, 1),
    "one output, wide": (4, 3, 1, 1, 33, 31),
    "many blocks": (2, 16, 96, 4, 112, 100),
    "deep": (1, 2100, 9, 3, 6, 6),
}


def make(shape):
    """x, weight, in_scale, out_scale, p, v, shift."""
    B, C, Co, L, H, W = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    sizes = ((B, C, H, W), (Co, C), (B, C), (B, Co), (Co, L), (B, L, H * W), (B, Co))
    return [torch.randn(size, generator=g) for size in sizes]


def double(arguments):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]


def close(actual, expected, terms=1):
    """Of sums of so many terms, of which limits may have cut off the larger ones."""
    size = max(expected.abs().max().item(), math.sqrt(terms))
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=5e-6 * size)


@pytest.mark.parametrize("which", ["all", "product alone", "own weights"])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(shape, which):
    x, weight, in_scale, out_scale, p, v, shift = make(shape)
    arguments = (x, weight, in_scale, out_scale, p, v, shift, -math.inf, math.inf)
    if which == "product alone":
        arguments = (x, weight, None, None, None, None, None, -0.5, math.inf)
    elif which == "own weights":
        own = torch.randn(len(x), *weight.shape, generator=torch.Generator().manual_seed(1))
        arguments = (x, own, None, out_scale, None, None, shift, -1.0, 2.0)
    actual = torch.ops.timm_dynamic.scaled_pointwise(*arguments)
    close(actual, scaled_pointwise_reference(*double(arguments)), x.shape[1])


def test_nan_stays():
    x, weight, *_ = make("7x7")
    x[0, 3, 2, 1] = torch.nan
    out = torch.ops.timm_dynamic.scaled_pointwise(x, weight, None, None, None, None, None, 0.0, 6.0)
    assert out.isnan().any((0, 1)).nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, threads):
    x, weight, _, scale, p, v, _ = make(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # decides how the matrices are divided
    try:
        g = torch.Generator().manual_seed(2)
        grad = torch.randn(len(x), len(weight), *x.shape[2:], generator=g)
        arguments = (grad, torch.randn(v.shape, generator=g), x, v, scale, weight)
        results = torch.ops.timm_dynamic.scaled_pointwise_grads(*arguments)
    finally:
        torch.set_num_threads(before)
    for actual, expected in zip(results, scaled_pointwise_grads_reference(*double(arguments)), strict=True):
        close(actual, expected)


def test_reference_gradients():
    x, weight, _, scale, p, v, _ = (t.double().requires_grad_() for t in make("nothing is a multiple"))
    q = torch.randn(v.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
    out = scaled_pointwise_reference(x, weight, None, scale, p, v, None, -math.inf, math.inf)
    grad, dz = torch.randn_like(out), torch.randn_like(v)
    total = (out * grad).sum() + (torch.matmul(q, x.flatten(2)) * dz).sum()
    expected = torch.autograd.grad(total, (weight, scale, p, q))
    actual = scaled_pointwise_grads_reference(grad, dz, *(t.detach() for t in (x, v, scale, weight)))
    torch.testing.assert_close(actual, expected)


def test_opcheck():
    x, weight, in_scale, out_scale, p, v, shift = make("nothing is a multiple")
    arguments = (x, weight, in_scale, out_scale, p, v, shift, -1.0, 1.0)
    torch.library.opcheck(torch.ops.timm_dynamic.scaled_pointwise.default, arguments, atol=1e-5, rtol=1e-4)
    arguments = (torch.randn(2, 23, 5, 9), v, x, v, out_scale, weight)
    torch.library.opcheck(torch.ops.timm_dynamic.scaled_pointwise_grads.default, arguments, atol=1e-4, rtol=1e-4)


def test_bad_arguments_are_refused():
    x, weight, in_scale, out_scale, p, v, shift = make("7x7")
    run = torch.ops.timm_dynamic.scaled_pointwise
    with pytest.raises(RuntimeError, match="x must be"):
        run(x.double(), weight, None, None, None, None, None, 0, 1)
    with pytest.raises(RuntimeError, match="weight must be"):
        run(x, weight[:, :3].contiguous(), None, None, None, None, None, 0, 1)
    with pytest.raises(RuntimeError, match="come together"):
        run(x, weight, None, None, p, None, None, 0, 1)
    with pytest.raises(RuntimeError, match="scale must be"):
        torch.ops.timm_dynamic.scaled_pointwise_grads(x, v, x, v, out_scale[:, :3], weight)


def test_serves():
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(8, 4, 1, 1)
    assert scaled_pointwise_serves(x, weight, (1, 1))
    assert not scaled_pointwise_serves(x, weight, (2, 2))
    assert not scaled_pointwise_serves(x.double(), weight.double(), (1, 1))
    assert not scaled_pointwise_serves(x[:0], weight, (1, 1))
    assert not scaled_pointwise_serves(x.to(memory_format=torch.channels_last), weight, (1, 1))
    assert not scaled_pointwise_serves(x, torch.randn(8, 4, 3, 3), (1, 1))
