"""A DCD convolution's training in one piece, against autograd on the layer's single operations."""

import copy

import pytest
import torch
from torch import nn

from timm_dynamic.layers import DCDConv2d, dcd
from timm_dynamic.ops import backend_info

CASES = {
    "own weights": ((4, 6, 3, 1, 1), {}, (7, 9)),
    "own weights, 1x1": ((8, 5, 1), {}, (7, 6)),
    "own weights, stride": ((4, 6, 3, 2, 1), {"bias": False}, (15, 14)),
    "maps": ((12, 16, 3, 1, 1), {}, (3, 4)),
    "maps, no bias, stride": ((12, 16, 3, 2, 1), {"bias": False}, (5, 4)),
    "maps, groups": ((6, 9, 3, 1, 1), {"groups": 3, "pool_size": 2}, (4, 5)),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    args, kwargs, size = CASES[request.param]
    layer = DCDConv2d(*args, **kwargs, dtype=torch.float64)
    assert layer._makes_sample_weights(torch.empty(3, args[0], *size)) == request.param.startswith("own")
    nn.init.normal_(layer.fc_scale.weight, std=0.3)
    for norm in (layer.bn1, layer.bn2):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
    return layer, torch.randn(3, args[0], *size, dtype=torch.float64)


@pytest.mark.parametrize("frozen", [(), ("bn1",), ("bn2",)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_against_single_operations(case, memory_format, frozen, monkeypatch):
    layer, x = case
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    layer = layer.to(memory_format=memory_format)
    for name in frozen:
        getattr(layer, name).eval()
    other = copy.deepcopy(layer)
    output = layer(x)
    assert type(output.grad_fn).__name__ == "_DCDConvBackward"
    monkeypatch.setattr(dcd, "serves", lambda bn: False)
    expected = other(x)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(layer.state_dict(), other.state_dict())  # running statistics
    for layout in (memory_format, torch.contiguous_format):
        grad = torch.randn_like(output).contiguous(memory_format=layout)
        gradients = [
            torch.autograd.grad(result, (x, *model.parameters()), grad, retain_graph=True)
            for result, model in ((output, layer), (expected, other))
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")
@pytest.mark.parametrize("frozen", [(), ("bn1",), ("bn2",)], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"pool_size": 2}], ids=str)
def test_by_the_pointwise_kernels(kwargs, frozen, calls_of, monkeypatch):
    torch.manual_seed(0)
    layer = DCDConv2d(40, 56, 1, **kwargs)
    nn.init.normal_(layer.fc_scale.weight, std=0.3)
    other = copy.deepcopy(layer).double()
    for name in frozen:
        getattr(layer, name).eval(), getattr(other, name).eval()
    x = torch.randn(3, 40, 7, 9, requires_grad=True)
    other_x = x.detach().double().requires_grad_()
    used = calls_of("scaled_pointwise", "scaled_pointwise_grads")
    output = layer(x)
    assert type(output.grad_fn).__name__ == "_DCDConvBackward"
    grad = torch.randn(3, 56, 9, 7).transpose(2, 3)
    gradients = torch.autograd.grad(output.relu_(), (x, *layer.parameters()), grad)  # may be overwritten
    assert used == ["scaled_pointwise"] * 2 + ["scaled_pointwise_grads", "scaled_pointwise"]
    monkeypatch.setattr(dcd, "serves", lambda bn: False)
    expected = other(other_x).relu()
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-4)
    for actual, wanted in zip(
        gradients, torch.autograd.grad(expected, (other_x, *other.parameters()), grad.double()), strict=True
    ):
        torch.testing.assert_close(actual, wanted.float(), rtol=1e-4, atol=1e-5 * max(1, wanted.abs().max().item()))
    torch.testing.assert_close(layer.bn1.running_var, other.bn1.running_var.float())
    layer.zero_grad()
    layer(x.detach()).sum().backward()  # no gradient of the input is wanted
    assert layer.weight.grad.abs().sum() > 0


def test_gradcheck(case):
    layer, x = case
    names, tensors = zip(*layer.named_parameters(), strict=True)

    def function(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *tensors), fast_mode=True)


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_other_norms(case, momentum, affine, tracks):
    layer, x = case
    options = {"momentum": momentum, "affine": affine, "track_running_stats": tracks, "dtype": torch.float64}
    layer.bn1 = nn.BatchNorm2d(layer.latent_dim, **options)
    layer(x).sum().backward()
    u = nn.functional.batch_norm(layer.q(x), None, None, layer.bn1.weight, layer.bn1.bias, True)
    output = layer(x)
    phi, scale = layer._factors(layer._pool(x))
    v = layer.bn2(torch.bmm(phi, u.flatten(2))) + u.flatten(2)
    expected = layer.conv(x) * scale[:, :, None, None] + layer.p(v.view_as(u))
    torch.testing.assert_close(output, expected)
    if tracks:
        assert layer.bn1.num_batches_tracked == 2


def test_function_transform(case):
    layer, x = case

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    parameters = dict(layer.named_parameters())
    gradients = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), parameters.values())
    torch.testing.assert_close(tuple(gradients.values()), expected)
