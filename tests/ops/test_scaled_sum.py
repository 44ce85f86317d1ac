"""DCD's two terms as one operator: its reference against the formula, its gradients, and who takes it."""

import pytest
import torch
from timm_dynamic.ops.scaled_sum import scaled_sum_reference

from timm_dynamic.layers import DCDConv2d
from timm_dynamic.ops import scaled_sum

OPERATOR = torch.ops.timm_dynamic.scaled_sum
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def arguments(B, O, L, H, W, layout="NCHW", dtype=torch.float64, flat=False):  # noqa: E741
    torch.manual_seed(0)
    y = torch.randn(B, O, H, W, dtype=dtype).to(memory_format=LAYOUTS[layout])
    v = torch.randn(B, L, H * W, dtype=dtype) if flat else torch.randn(B, L, H, W, dtype=dtype)
    return y, torch.rand(B, O, dtype=dtype), torch.randn(O, L, 1, 1, dtype=dtype), v


@every_layout
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("size", [(2, 5, 3, 4, 7), (1, 1, 1, 1, 1), (0, 4, 2, 3, 3), (3, 33, 8, 1, 5)], ids=str)
def test_formula(size, flat, layout):
    y, scale, p, v = arguments(*size, layout, flat=flat)
    out = OPERATOR(y, scale, p, v)
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    mixed = torch.einsum("ol,blyx->boyx", p[:, :, 0, 0], v.view(size[0], size[2], *size[3:]))
    torch.testing.assert_close(out, scale[:, :, None, None] * y + mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_float32(dtype):
    wide = arguments(2, 8, 40, 5, 6, dtype=torch.float32)
    y, scale, p, v = (t.to(dtype) for t in wide)
    expected = scaled_sum_reference(*(t.double() for t in (y, scale, p, v))).to(dtype)
    torch.testing.assert_close(OPERATOR(y, scale, p, v), expected, rtol=1e-2, atol=1e-3)
    beside = OPERATOR(y, scale.float(), p.float(), v.float())
    assert beside.dtype == dtype and torch.equal(beside, OPERATOR(y, scale, p, v))


def test_float16_keeps_large_numbers_finite():
    y, scale, p, v = arguments(1, 2, 3, 2, 2, dtype=torch.float32)
    assert OPERATOR(y.half(), scale, p * 0, v + 1e6).isfinite().all()


@every_layout
@pytest.mark.parametrize("flat", [False, True])
def test_gradients(layout, flat):
    leaves = [t.requires_grad_() for t in arguments(2, 3, 2, 3, 4, layout, flat=flat)]
    assert torch.autograd.gradcheck(OPERATOR, leaves)
    assert torch.autograd.gradgradcheck(OPERATOR, leaves)


@every_layout
def test_opcheck(layout):
    args = arguments(2, 8, 3, 4, 5, layout, torch.float32)
    torch.library.opcheck(OPERATOR.default, tuple(t.clone().requires_grad_() for t in args))
    tests = ("test_schema", "test_faketensor")
    backward = torch.ops.timm_dynamic.scaled_sum_backward.default
    torch.library.opcheck(backward, (torch.randn_like(args[0]), *args), test_utils=tests)


def test_gradients_of_mixed_dtypes():
    y, scale, p, v = (t.requires_grad_() for t in arguments(2, 8, 3, 4, 5, dtype=torch.float32))
    half = y.detach().bfloat16().requires_grad_()
    OPERATOR(half, scale, p, v).float().square().sum().backward()
    mixed = [t.grad for t in (half, scale, p, v)]
    assert [t.dtype for t in mixed] == [torch.bfloat16, *[torch.float32] * 3]
    scale.grad = p.grad = v.grad = None
    OPERATOR(y, scale, p, v).square().sum().backward()
    for one, other in zip(mixed, (y, scale, p, v), strict=True):
        torch.testing.assert_close(one.float(), other.grad, rtol=0.05, atol=0.02 * float(other.grad.abs().max()))


@pytest.fixture
def served(monkeypatch):
    """As on a GPU whose kernels are there."""
    monkeypatch.setattr(scaled_sum, "serves", lambda *args: True)


def run(layer, x):
    """Output and gradients."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("plain", [True, False], ids=["dcd_conv", "its operations"])
@every_layout
def test_layer(monkeypatch, layout, plain, training):
    torch.manual_seed(0)
    layer = DCDConv2d(12, 20, 3, stride=2, padding=1).double().train(training)
    monkeypatch.setattr(layer, "_is_plain", lambda x: plain)
    monkeypatch.setattr(layer, "_makes_sample_weights", lambda x: False)
    x = torch.randn(3, 12, 9, 7, dtype=torch.float64).to(memory_format=LAYOUTS[layout])
    expected = run(layer, x)
    monkeypatch.setattr(scaled_sum, "serves", lambda *args: True)
    for one, other in zip(run(layer, x), expected, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected[0])


def test_layer_compiled(served):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, x = DCDConv2d(12, 20, 3, stride=2, padding=1), torch.randn(3, 12, 9, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for one, other in zip(run(compiled, x), run(layer, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_serves_no_cpu():
    assert not scaled_sum.serves(*arguments(2, 8, 3, 4, 5, dtype=torch.float32))
