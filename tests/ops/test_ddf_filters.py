"""Both DDF branches in one operator, against the branches themselves."""

import pytest
import torch

from timm_dynamic.layers import DDFPack
from timm_dynamic.ops import backend_info, reference_only
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


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        (lambda layer, x: (layer, x), True),
        (lambda layer, x: (layer, x.to(memory_format=torch.channels_last)), False),
        (lambda layer, x: (layer, x[:0]), False),
        (lambda layer, x: (layer, x.repeat(40, 1, 1, 1)), False),
        (lambda layer, x: (layer.double(), x.double()), False),
        (lambda layer, x: (layer, x.requires_grad_()), False),
        (lambda layer, x: (layer.requires_grad_(), x), False),
    ],
    ids=["plain", "channels_last", "empty", "many", "double", "input gradient", "parameter gradient"],
)
def test_the_layer_uses_it_where_it_serves(monkeypatch, change, serves):
    calls = []
    operator = torch.ops.timm_dynamic.ddf_filters
    monkeypatch.setattr(
        torch.ops.timm_dynamic, "ddf_filters", lambda *args: calls.append(args) or operator(*args), raising=False
    )
    layer, x = change(*layer_and_input(1, 8, 6, 6, 3, 1, 1))
    with torch.set_grad_enabled(x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        out = layer(x)
        with reference_only():
            torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-5)
    assert bool(calls) == serves


def test_bad_arguments_are_refused():
    layer, x = layer_and_input(1, 8, 6, 6, 3, 1, 1)
    args = arguments(layer, x)
    with pytest.raises(RuntimeError, match="spatial_weight must be 72 contiguous float32"):
        torch.ops.timm_dynamic.ddf_filters(x, args[1][:, :4].contiguous(), *args[2:])
    with pytest.raises(RuntimeError, match="x must be"):
        torch.ops.timm_dynamic.ddf_filters(x.double(), *args[1:])
