"""DCD's branch in one operator, against the layer's own operations in float64."""

import pytest
import torch

from timm_dynamic.layers import DCDConv2d, DCDLinear, dcd
from timm_dynamic.ops import backend_info, reference_only
from timm_dynamic.ops._library import shortcut_serves

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")

CASES = {  # in, out, kernel size, stride, batch, height, width, other arguments
    "1x1, large maps": (16, 24, 1, 1, 1, 30, 29, {}),
    "3x3, large maps": (8, 8, 3, 1, 3, 21, 20, {"padding": 1, "bias": True}),
    "3x3, strided, large maps": (6, 9, 3, 2, 2, 41, 40, {"padding": 1, "pool_size": 3}),
    "1x1, small maps": (128, 256, 1, 1, 1, 7, 7, {}),
    "1x1, large maps, bias": (9, 21, 1, 1, 3, 21, 20, {"bias": True, "pool_size": 2}),
    "1x1, tiny maps": (64, 40, 1, 1, 4, 1, 1, {"bias": True}),
    "3x3, few positions": (16, 200, 3, 2, 1, 13, 11, {"padding": 1, "bias": True}),
    "3x3, small maps": (64, 32, 3, 1, 2, 9, 5, {"padding": 1, "bias": True, "pool_size": 2}),
    "3x3, strided both ways": (32, 32, 3, (1, 2), 1, 6, 7, {"padding": 2, "dilation": 2}),
    "grouped": (32, 64, 3, 2, 2, 30, 30, {"padding": 1, "groups": 4, "latent_dim": 11}),
}


def layer_and_input(case):
    in_channels, out_channels, kernel_size, stride, B, H, W, arguments = CASES[case]
    torch.manual_seed(0)
    layer = DCDConv2d(in_channels, out_channels, kernel_size, stride, **{"bias": False, **arguments})
    with torch.no_grad():
        for _ in range(3):  # statistics, unlike 0 and 1
            layer(torch.randn(8, in_channels, H, W) + 1)
        for bn in (layer.bn1, layer.bn2):
            torch.nn.init.normal_(bn.weight)
            torch.nn.init.normal_(bn.bias)
    return layer.eval().requires_grad_(False), torch.randn(B, in_channels, H, W)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_the_layer(case, calls_of):
    layer, x = layer_and_input(case)
    calls = calls_of("dcd_branch_", "dcd_pointwise", "dcd_sample_weights")
    out = layer(x)
    assert calls == ["dcd_pointwise" if "1x1" in case else "dcd_sample_weights" if "large" in case else "dcd_branch_"]
    expected = layer.double()(x.double())
    assert calls == calls[:1]
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("case", ["3x3, strided, large maps", "1x1, small maps", "grouped"])
@torch.no_grad()
def test_factors_alone(case, monkeypatch):
    """As on a GPU, where the branch is not one operator."""
    layer, x = layer_and_input(case)
    layer, x = layer.double(), x.double()
    expected = layer(x)
    calls, operator = [], torch.ops.timm_dynamic.dcd_factors
    monkeypatch.setattr(dcd, "cuda_shortcut_serves", lambda *args: True)
    monkeypatch.setattr(
        torch.ops.timm_dynamic, "dcd_factors", lambda *args: calls.append(args) or operator(*args), raising=False
    )
    torch.testing.assert_close(layer(x), expected)
    (arguments,) = calls
    monkeypatch.undo()
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_with_a_norm_behind(case):
    layer, x = layer_and_input(case)
    scale, shift = torch.randn(2, layer.out_channels)
    y = layer.double()(x.double())
    expected = (y * scale[:, None, None] + shift[:, None, None]).clamp(-0.5, 0.7)
    out = layer.float().forward_normed(x, (scale, shift, -0.5, 0.7))
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=2e-6 * y.abs().max().item())
    assert (
        layer.forward_normed(x.transpose(2, 3).contiguous().transpose(2, 3), (scale, shift, 0, 1)) is None
        or 1 in x.shape[2:]
    )


@torch.no_grad()
def test_other_tensors_in_the_layer():
    layer, x = layer_and_input("1x1, small maps")
    layer(x)
    layer.fc_scale.weight = torch.nn.Parameter(torch.randn_like(layer.fc_scale.weight))
    layer.bn1 = torch.nn.BatchNorm2d(layer.latent_dim).eval()
    layer.p.weight.mul_(2)
    torch.testing.assert_close(layer(x), layer.double()(x.double()).float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_equals_the_classifier(calls_of):
    torch.manual_seed(0)
    layer = DCDLinear(48, 10)
    for _ in range(3):
        layer(torch.randn(16, 48) + 1)
    calls, x = calls_of("dcd_branch_", "dcd_pointwise", "dcd_sample_weights"), torch.randn(3, 48)
    out = layer.eval()(x)
    assert calls == ["dcd_branch_"]
    torch.testing.assert_close(out, layer.double()(x.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        (lambda x: x, True),
        (lambda x: x.to(memory_format=torch.channels_last), False),
        (lambda x: x[:0], False),
        (lambda x: x.repeat(20, 1, 1, 1), False),
        (lambda x: x.double(), False),
    ],
    ids=["plain", "channels_last", "empty", "many", "double"],
)
def test_serves(change, serves):
    layer, x = layer_and_input("3x3, small maps")
    x = change(x)
    with torch.no_grad():
        assert shortcut_serves(x, layer.weight) == serves
        with reference_only():
            assert not shortcut_serves(x, layer.weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert not shortcut_serves(x, layer.weight)
    assert not shortcut_serves(x, layer.weight)


@pytest.mark.parametrize("case", ["3x3, small maps", "grouped", "1x1, tiny maps"])
@torch.no_grad()
def test_opcheck(case):
    layer, x = layer_and_input(case)
    common = (x, *layer._branch_arguments(layer.pool_size))
    if "1x1" in case:
        norm = (torch.rand(layer.out_channels), None, -1.0, 1.0)
        arguments = (*common, layer.weight, layer.bias, *norm)
        torch.library.opcheck(torch.ops.timm_dynamic.dcd_pointwise.default, arguments, atol=1e-5, rtol=1e-4)
        return
    y = layer.conv(x)
    torch.library.opcheck(torch.ops.timm_dynamic.dcd_branch_.default, (*common, *layer.stride, y))
    if case != "grouped":
        torch.library.opcheck(
            torch.ops.timm_dynamic.dcd_sample_weights.default, (*common, layer.weight, layer.bias), atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_bad_arguments_are_refused():
    layer, x = layer_and_input("3x3, small maps")
    common = layer._branch_arguments(2)
    with pytest.raises(RuntimeError, match="x must be"):
        torch.ops.timm_dynamic.dcd_branch_(x.double(), *common, 1, 1, layer.conv(x))
    with pytest.raises(RuntimeError, match="y must be"):
        torch.ops.timm_dynamic.dcd_branch_(x, *common, 1, 1, layer.conv(x)[:1])
    with pytest.raises(RuntimeError, match="fc must be"):
        torch.ops.timm_dynamic.dcd_branch_(x, *layer._branch_arguments(3), 1, 1, layer.conv(x))
    with pytest.raises(RuntimeError, match="weight must be"):
        torch.ops.timm_dynamic.dcd_pointwise(x, *common, layer.weight, None, None, None, 0, 1)
