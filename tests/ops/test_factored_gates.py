"""The gates of a PED convolution as one operator, against the layer's own steps."""

import pytest
import torch

import timm_dynamic
from timm_dynamic.layers import PEDConv2d
from timm_dynamic.ops import backend_info, reference_only

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")


def layer_and_input(B=2, C=8, H=7, W=9, rank=1, reduction=2, Co=12):
    torch.manual_seed(0)
    layer = PEDConv2d(C, Co, 3, padding=1, rank=rank, reduction=reduction)
    return layer.eval().requires_grad_(False), torch.randn(B, C, H, W)


@pytest.mark.parametrize(
    "case",
    [(1, 64, 29, 31), (2, 8, 7, 9, 3), (16, 12, 5, 5, 1, 3), (3, 512, 3, 3, 1, 16), (5, 33, 1, 90, 4, 1)],
    ids=str,
)
@torch.no_grad()
def test_equals_the_module(case):
    layer, x = layer_and_input(*case)
    for head in (layer.attn.fc_inp, layer.attn.fc_oup, layer.attn.fc_k):
        head.weight.mul_(20)
    actual = torch.ops.timm_dynamic.factored_gates(x, *layer.attn.parameters_of_heads())
    layer.double()
    expected = layer.routing(x.double()).float()
    torch.testing.assert_close(torch.cat(actual, 1), expected, rtol=0, atol=2e-6)


def test_opcheck():
    layer, x = layer_and_input()
    torch.library.opcheck(torch.ops.timm_dynamic.factored_gates.default, (x, *layer.attn.parameters_of_heads()))


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        (lambda layer, x: (layer, x), True),
        (lambda layer, x: (layer, x.to(memory_format=torch.channels_last)), False),
        (lambda layer, x: (layer, x[:0]), False),
        (lambda layer, x: (layer, x.repeat(17, 1, 1, 1)), False),
        (lambda layer, x: (layer.double(), x.double()), False),
        (lambda layer, x: (layer, x.requires_grad_()), False),
        (lambda layer, x: (layer.requires_grad_(), x), False),
        (lambda layer, x: (layer.train(), x), False),
    ],
    ids=["plain", "channels_last", "empty", "many", "double", "input gradient", "parameter gradient", "training"],
)
def test_the_layer_uses_it_where_it_serves(monkeypatch, change, serves):
    calls = []
    operator = torch.ops.timm_dynamic.factored_gates
    monkeypatch.setattr(
        torch.ops.timm_dynamic, "factored_gates", lambda *args: calls.append(args) or operator(*args), raising=False
    )
    layer, x = layer_and_input()
    layer.noise_std = 0.0
    layer, x = change(layer, x)
    with torch.set_grad_enabled(x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        out = layer(x)
        with reference_only():
            torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-5)
    assert bool(calls) == serves


def test_macs_are_counted_as_the_modules():
    layer, x = layer_and_input()
    counted = timm_dynamic.count_macs(layer, x)
    assert counted == timm_dynamic.count_macs(layer.requires_grad_(), x.to(memory_format=torch.channels_last))
    assert counted.linear == 8 * 4 + 4 * (8 + 12 + 9)


def test_bad_arguments_are_refused():
    layer, x = layer_and_input()
    heads = layer.attn.parameters_of_heads()
    with pytest.raises(RuntimeError, match="hidden_weight must be"):
        torch.ops.timm_dynamic.factored_gates(x, heads[0][:, :4].contiguous(), *heads[1:])
    with pytest.raises(RuntimeError, match="x must be"):
        torch.ops.timm_dynamic.factored_gates(x.double(), *heads)
