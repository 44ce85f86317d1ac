"""Both DDF branches in one operator, against the branches themselves."""

import pytest
import torch
from fused_operators import CHANGES, assert_same_without_operator

from timm_dynamic.layers import DDFPack
from timm_dynamic.ops import backend_info
from timm_dynamic.ops._library import shortcut_serves

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")

CASES = [  # B, C, H, W, kernel size, stride, heads
    (1, 64, 29, 31, 3, 1, 1),
    (2, 8, 7, 9, 3, 2, 2),
    (4, 12, 5, 5, 5, 3, 3),
    (1, 4, 1, 1, 3, 1, 1),
    (1, 16, 33, 31, 7, 2, 1),
    (3, 512, 7, 7, 3, 1, 1),
    (1, 1, 1, 90, 3, 1, 1),
]


def layer_and_input(B, C, H, W, K, stride, heads):
    torch.manual_seed(0)
    return DDFPack(C, K, stride, head=heads).eval().requires_grad_(False), torch.randn(B, C, H, W)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_equals_the_branches(case):
    layer, x = layer_and_input(*case)
    args = arguments(layer, x)
    assert shortcut_serves(*args[:-3])
    reference = layer.double()
    expected = reference.channel_branch(x.double()), reference.spatial_branch(x.double())
    for actual, wanted in zip(torch.ops.timm_dynamic.ddf_filters(*args), expected, strict=True):
        torch.testing.assert_close(actual, wanted.float(), rtol=0, atol=2e-5)


def arguments(layer: DDFPack, x: torch.Tensor) -> tuple:
    (spatial, norm), (_, hidden, _, channel, channel_norm) = layer.spatial_branch, layer.channel_branch
    parameters = (spatial.weight, spatial.bias, hidden.weight, hidden.bias, channel.weight, channel.bias)
    parameters = tuple(p.detach().clone() for p in (*parameters, channel_norm.std))
    return x, *parameters, norm.taps, layer.stride[0], norm.scale


def test_opcheck():
    layer, x = layer_and_input(2, 8, 7, 9, 3, 2, 2)
    torch.library.opcheck(torch.ops.timm_dynamic.ddf_filters.default, arguments(layer, x))


@pytest.mark.parametrize(("change", "serves"), CHANGES.values(), ids=CHANGES)
def test_the_layer_uses_it_where_it_serves(calls_of, change, serves):
    calls = calls_of("ddf_filters")
    assert_same_without_operator(*change(*layer_and_input(1, 8, 6, 6, 3, 1, 1)))
    assert bool(calls) == serves


def test_bad_arguments_are_refused():
    layer, x = layer_and_input(1, 8, 6, 6, 3, 1, 1)
    args = arguments(layer, x)
    with pytest.raises(RuntimeError, match="spatial_weight must be 72 contiguous float32"):
        torch.ops.timm_dynamic.ddf_filters(x, args[1][:, :4].contiguous(), *args[2:])
    with pytest.raises(RuntimeError, match="x must be"):
        torch.ops.timm_dynamic.ddf_filters(x.double(), *args[1:])
