"""The gates of a PED convolution as one operator, against the layer's own steps."""

import pytest
import torch
from fused_operators import CHANGES, assert_same_without_operator

import timm_dynamic
from timm_dynamic.layers import PEDConv2d
from timm_dynamic.ops import backend_info

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
    [*CHANGES.values(), (lambda layer, x: (layer.train(), x), False)],
    ids=[*CHANGES, "training"],
)
def test_the_layer_uses_it_where_it_serves(calls_of, change, serves):
    calls = calls_of("factored_gates")
    layer, x = layer_and_input()
    layer.noise_std = 0.0
    assert_same_without_operator(*change(layer, x))
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
