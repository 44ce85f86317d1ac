"""What DCD's branch reads from its input, as one operator: its reference, its gradients, and who takes it."""

import pytest
import torch

from timm_dynamic.layers import DCDConv2d
from timm_dynamic.ops import sum_and_project

OPERATOR = torch.ops.timm_dynamic.sum_and_project
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def arguments(layout="NCHW", dtype=torch.float64, B=2):
    torch.manual_seed(0)
    return torch.randn(B, 5, 3, 4, dtype=dtype).to(memory_format=LAYOUTS[layout]), torch.randn(3, 5, 1, 1, dtype=dtype)


@every_layout
@pytest.mark.parametrize("B", [0, 1, 3])
def test_formula(B, layout):
    x, q = arguments(layout, B=B)
    sums, z = OPERATOR(x, q)
    torch.testing.assert_close(sums, x.sum((2, 3)))
    torch.testing.assert_close(z, torch.conv2d(x, q))
    assert z.is_contiguous()


@every_layout
def test_gradients(layout):
    leaves = [t.requires_grad_() for t in arguments(layout)]
    assert torch.autograd.gradcheck(OPERATOR, leaves)
    assert torch.autograd.gradgradcheck(OPERATOR, leaves)
    grad = torch.autograd.grad(OPERATOR(*leaves)[1].sum(), leaves[0])[0]
    assert grad.is_contiguous(memory_format=LAYOUTS[layout])


@every_layout
def test_opcheck(layout):
    args = arguments(layout, torch.float32)
    torch.library.opcheck(OPERATOR.default, tuple(t.clone().requires_grad_() for t in args))
    backward = torch.ops.timm_dynamic.sum_and_project_backward.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (torch.randn(2, 5), torch.randn(2, 3, 3, 4), *args), test_utils=tests)


def test_dtypes():
    x, q = arguments(dtype=torch.bfloat16)
    assert [t.dtype for t in OPERATOR(x, q)] == [torch.float32, torch.bfloat16]
    x, q = x.requires_grad_(), q.float().requires_grad_()
    sums, z = OPERATOR(x, q)
    assert sums.dtype == z.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(sums.sum() + z.sum(), (x, q))] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("training", [True, False])
@every_layout
def test_layer(layout, training, monkeypatch):
    torch.manual_seed(0)
    layer = DCDConv2d(12, 20, 3, padding=1).double().train(training)
    monkeypatch.setattr(layer, "_is_plain", lambda x: False)
    monkeypatch.setattr(layer, "_makes_sample_weights", lambda x: False)
    x = torch.randn(3, 12, 9, 7, dtype=torch.float64).to(memory_format=LAYOUTS[layout])

    def run():
        layer.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        out = layer(leaf)
        out.square().sum().backward()
        return [out.detach(), leaf.grad, *(p.grad for p in layer.parameters())]

    expected, calls = run(), []
    monkeypatch.setattr(sum_and_project, "serves", lambda *args: calls.append(args) or True)
    for one, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == 1
    strided = DCDConv2d(12, 20, 3, stride=2, padding=1).double().eval()
    with torch.no_grad():
        strided(x)
    assert len(calls) == 1
