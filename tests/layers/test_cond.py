"""What only CondConv has: its equation, and timm's layer, whose routing comes from outside."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from shallow import shallow
from timm.layers import CondConv2d as TimmCondConv2d
from torch import nn

import timm_dynamic
from timm_dynamic.layers import CondConv2d, RoutedConv2d, load_reference
from timm_dynamic.models.cond_efficientnet import _STAGES


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_equation():
    layer, x = CondConv2d(8, 12, 3, 2, 1, num_experts=3).double(), torch.randn(4, 8, 7, 7).double()
    routing = torch.sigmoid(layer.routing_fn(x.mean((2, 3))))
    weights = (routing @ layer.experts.weight).view(4, 12, 8, 3, 3)
    biases = routing @ layer.experts.bias
    outputs = [F.conv2d(x[b : b + 1], weights[b], biases[b], 2, 1) for b in range(4)]
    torch.testing.assert_close(layer(x), torch.cat(outputs))
    torch.testing.assert_close(layer.routing(x), routing)


@pytest.mark.parametrize("neutral", [True, False])
def test_takes_the_place_of_a_convolution(neutral):
    """And its experts go different ways."""
    conv, x = nn.Conv2d(8, 8, 3, padding=1).double(), torch.randn(4, 8, 6, 6).double()
    layer = CondConv2d.from_conv(conv, num_experts=3, neutral_gates=neutral)
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(layer.bias, conv.bias)
    before = layer.experts.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    moved = layer.experts.weight.detach() - before
    assert moved.norm(dim=1).min() > 0 and (moved[1:] - moved[:1]).abs().max() > 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:FutureWarning")
def test_graphs():
    """Compiled, scripted, traced, and exported with a dynamic batch; and a network, scripted and compiled."""
    layer, x = CondConv2d(8, 12, 3, 2, 1).eval(), torch.randn(4, 8, 9, 7)
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    graphs = (
        torch.compile(layer, backend="eager", fullgraph=True),
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
        torch.export.export(layer, (x,), dynamic_shapes=shapes).module(),
    )
    with torch.no_grad():
        for graph in graphs:
            for inputs in (x, x[:3]):
                torch.testing.assert_close(graph(inputs), layer(inputs), rtol=1e-4, atol=1e-5)
        network = timm.create_model("cond_efficientnet_b0_4e", **shallow(_STAGES)).eval()
        x = torch.randn(2, 3, 48, 48)
        expected = network(x)
        torch.testing.assert_close(torch.jit.script(network)(x), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.compile(network, backend="eager", fullgraph=True)(x), expected)


def test_parameternet_names():
    """Those of the DynamicConv that people copy."""
    layer = CondConv2d(8, 8, 3, bias=False)
    state = layer.state_dict()
    names = {"routing_fn": "routing", "experts": "cond_conv"}
    theirs = {names[key.split(".")[0]] + "." + key.split(".")[1]: value + 1 for key, value in state.items()}
    load_reference(layer, theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in zip(theirs, layer.state_dict().values(), strict=True))


ROUTED = {
    "1x1": (8, 12, 1, 1, ""),
    "same": (8, 8, 5, 2, "same", 1, 8),
    "depthwise": (8, 8, 3, 1, "same", 1, 8),
    "dilated, grouped": (8, 12, 3, 1, "", 2, 2),
}


@pytest.mark.parametrize("case", ROUTED)
@pytest.mark.parametrize("bias", [False, True])
def test_timms_layer(case, bias):
    """The same outputs and gradients as timm's code gives; in place, with the same keys."""
    static = TimmCondConv2d(*ROUTED[case], bias=bias).double()
    ours = nn.Sequential(copy.deepcopy(static))
    assert RoutedConv2d.adopt(ours) == 1 and RoutedConv2d.adopt(ours) == 0
    ours = ours[0]
    assert isinstance(ours, TimmCondConv2d) and ours.state_dict().keys() == static.state_dict().keys()
    x, r = torch.randn(3, 8, 9, 8).double(), torch.rand(3, 4).double()
    results = []
    for layer in (static, ours):
        inputs = [t.clone().requires_grad_() for t in (x, r)]
        y = layer(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*inputs, *layer.parameters()])])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    scale, shift = torch.rand(ours.out_channels).double(), torch.randn(ours.out_channels).double()
    expected = scale[:, None, None] * static(x, r) + shift[:, None, None]
    torch.testing.assert_close(ours.absorb(scale, shift)(x, r), expected)


def networks(name, device=None):
    """timm's, and ours with its weights."""
    static = timm.create_model(f"tf_efficientnet_cc_{name}", device=device).eval()
    ours = timm.create_model(f"cond_efficientnet_{name}", device=device).eval()
    ours.load_state_dict(static.state_dict())
    return static, ours


@pytest.mark.parametrize("name", ["b0_8e", "b1_8e"])
def test_modules_of_timms_networks(name, nothing_drawn_on_meta):
    static, ours = networks(name, "meta")
    assert ours.feature_info == static.feature_info
    for layer, one in zip(static.modules(), ours.modules(), strict=True):
        assert isinstance(one, type(layer)) and one.extra_repr() == layer.extra_repr()


@pytest.mark.parametrize("name", ["b0_4e", "b0_8e", "b1_8e"])
def test_timms_networks(name):
    """Ours load their weights, and give their outputs."""
    static, ours = networks(name)
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(x), static.double()(x), rtol=1e-9, atol=1e-9)


def test_timms_networks_optimized():
    """They run by our layers, and have no other keys than before."""
    static, x = timm.create_model("tf_efficientnet_cc_b0_4e").eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = static.double()(x.double())
        fast = timm_dynamic.optimize(static.float(), x)
        assert "24 convolutions of timm with routed experts in our form" in str(fast.report)
        torch.testing.assert_close(fast(x).double(), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
        assert not any(isinstance(one, RoutedConv2d) for one in static.modules())
