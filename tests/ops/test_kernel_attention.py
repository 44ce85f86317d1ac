"""The attention of a dynamic convolution as one operator, against the module's own steps."""

import pytest
import torch
from fused_operators import CHANGES, assert_same_without_operator

import timm_dynamic
from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.ops import backend_info, reference_only
from timm_dynamic.ops._library import shortcut_serves

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")

CASES = [  # B, C, H, W, kernels, reduction, temperature
    (1, 64, 29, 31, 4, 4, 1.0),
    (2, 8, 7, 9, 1, 2, 30.0),
    (16, 12, 5, 5, 7, 3, 0.5),
    (1, 3, 1, 1, 4, 4, 1.0),
    (3, 512, 7, 7, 4, 16, 1.0),
    (5, 33, 1, 90, 5, 1, 2.0),
]


def layer_and_input(B, C, H, W, N=4, reduction=4):
    torch.manual_seed(0)
    layer = DynamicConv2d(C, 5, 1, num_kernels=N, reduction=reduction)
    return layer.eval().requires_grad_(False), torch.randn(B, C, H, W)


def arguments(layer, x, temperature=1.0):
    squeeze, _, expand = layer.attention.to_scores
    return x, squeeze.weight, squeeze.bias, expand.weight, expand.bias, temperature


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_equals_the_module(case):
    *shape, temperature = case
    layer, x = layer_and_input(*shape)
    layer.attention.to_scores[2].weight.mul_(100)
    args = arguments(layer, x, temperature)
    assert shortcut_serves(*args[:-1])
    actual = torch.ops.timm_dynamic.kernel_attention(*args)
    expected = layer.attention.double()(x.double(), torch.tensor(temperature))
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=2e-5)


@torch.no_grad()
def test_large_scores():
    layer, x = layer_and_input(2, 8, 3, 3)
    layer.attention.to_scores[2].weight.mul_(1e6)
    assert layer.attention(x).isfinite().all()


@pytest.mark.parametrize("epoch", [0, 3])
@torch.no_grad()
def test_the_layers_temperature(epoch):
    layer, x = layer_and_input(3, 8, 5, 5)
    layer.attention.to_scores[2].weight.mul_(100)
    timm_dynamic.set_progress(layer, epoch, 10)
    out = layer(x)
    with reference_only():
        torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-5)


def test_opcheck():
    torch.library.opcheck(torch.ops.timm_dynamic.kernel_attention.default, arguments(*layer_and_input(2, 8, 7, 9)))


@pytest.mark.parametrize(("change", "serves"), CHANGES.values(), ids=CHANGES)
def test_the_layer_uses_it_where_it_serves(calls_of, change, serves):
    calls = calls_of("kernel_attention")
    assert_same_without_operator(*change(*layer_and_input(2, 8, 6, 6)))
    assert bool(calls) == serves


def test_macs_are_counted_as_the_modules():
    layer, x = layer_and_input(2, 8, 6, 6)
    counted = timm_dynamic.count_macs(layer, x)
    assert counted == timm_dynamic.count_macs(layer.requires_grad_(), x.to(memory_format=torch.channels_last))
    assert counted.linear == 8 * 2 + 2 * 4 + 4 * 5  # the last: the mixed bias


def test_bad_arguments_are_refused():
    layer, x = layer_and_input(1, 8, 6, 6)
    args = arguments(layer, x)
    with pytest.raises(RuntimeError, match="hidden_weight must be 16 contiguous float32"):
        torch.ops.timm_dynamic.kernel_attention(x, args[1][:, :4].contiguous(), *args[2:])
    with pytest.raises(RuntimeError, match="x must be"):
        torch.ops.timm_dynamic.kernel_attention(x.double(), *args[1:])
