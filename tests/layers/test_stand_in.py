"""The weight that dynamic layers do not have: asked about, scaled, never computed with."""

import copy
import io

import pytest
import torch
from torch import nn

from timm_dynamic.layers import DCDConv2d, DCDLinear, DDFConv2d, DDFPack

LAYERS = {
    "ddf": lambda **dd: DDFConv2d(8, 8, 3, padding=1, groups=8, **dd),
    "ddf pack": lambda **dd: DDFPack(8, **dd),
    "dcd": lambda **dd: DCDConv2d(8, 8, 3, padding=1, groups=2, **dd),
}
REFUSED = "no static weight to read or write: timm_dynamic.optimize"


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param](dtype=torch.float64).eval()


def test_answers_as_the_weight_of_the_convolution(layer):
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    conv = nn.Conv2d(**{name: getattr(layer, name) for name in names}, dtype=torch.float64)
    for about in (
        lambda w: (w.shape, w.dtype, w.device, w.ndim, w.requires_grad, w.layout, w.is_cuda, w.grad),
        lambda w: (w.numel(), w.size(), w.size(0), len(w), w.dim(), w.stride(), w.is_floating_point()),
        lambda w: (torch.numel(w), isinstance(w, torch.Tensor)),
    ):
        assert about(layer.weight) == about(conv.weight)
    assert "weight" not in dict(layer.named_parameters())
    assert repr(layer.weight).startswith("StandInWeight(shape=[8, ")


def test_of_a_classifier_and_on_another_device():
    assert DCDLinear(8, 4).weight.shape == (4, 8)
    frozen = DDFPack(8, device="meta").requires_grad_(False)
    assert frozen.weight.device.type == "meta" and not frozen.weight.requires_grad


REFUSALS = {
    "merge a norm by hand": lambda layer: layer.weight.clone().view(8, -1),
    "data": lambda layer: layer.weight.data,
    "detach": lambda layer: layer.weight.detach(),
    "product": lambda layer: 2 * layer.weight,
    "product with inputs": lambda layer: layer.weight * torch.ones(1, layer.weight.shape[1], 1, 1),
    "product with itself": lambda layer: layer.weight * layer.weight,
    "sum of a product": lambda layer: layer.weight * torch.ones(8, 1, 1, 1) + 1,
    "product of a product": lambda layer: layer.weight * torch.ones(8, 1, 1, 1) * torch.ones(8, 1, 1, 1),
    "numbers of a product": lambda layer: (layer.weight * torch.ones(8, 1, 1, 1)).numpy(),
    "copy": lambda layer: nn.Parameter(layer.weight),
    "convolve": lambda layer: nn.functional.conv2d(torch.zeros(1, 8, 3, 3), layer.weight),
    "convert": lambda layer: layer.weight.float(),
    "initialise": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "write": lambda layer: layer.weight.copy_(torch.zeros(())),
    "write an entry": lambda layer: layer.weight.__setitem__(0, 1.0),
    "write data": lambda layer: setattr(layer.weight, "data", torch.zeros(1)),
    "freeze": lambda layer: setattr(layer.weight, "requires_grad", False),
    "set": lambda layer: setattr(layer, "weight", torch.zeros(1)),
    "set a parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(1))),
    "set another's": lambda layer: setattr(layer, "weight", LAYERS["dcd"]().weight * torch.ones(8, 1, 1, 1)),
    "set itself": lambda layer: setattr(layer, "weight", layer.weight),
    "delete": lambda layer: delattr(layer, "weight"),
    "save": lambda layer: torch.save(layer.weight, io.BytesIO()),
}


@pytest.mark.parametrize("use", REFUSALS.values(), ids=REFUSALS)
def test_all_else_is_refused_in_one_line(layer, use):
    with pytest.raises(ValueError, match=REFUSED) as error:
        use(layer)
    assert "\n" not in str(error.value)


def test_a_multiple_that_is_set_scales_the_outputs(layer):
    """All but the bias; other parameters stay what they are, and a part that somebody watches is an error."""
    scale, x = torch.rand(8, dtype=torch.float64) + 0.5, torch.randn(2, 8, 5, 5, dtype=torch.float64)
    bias = 0 if layer.bias is None else layer.bias.detach().clone()[:, None, None]
    expected = scale[:, None, None] * (layer(x) - bias) + bias
    layer.weight = nn.Parameter(layer.weight * scale.view(-1, 1, 1, 1), False)
    torch.testing.assert_close(layer(x), expected)
    layer.bias = nn.Parameter(torch.zeros_like(scale))
    torch.testing.assert_close(layer(x), expected - bias)
    torch.testing.assert_close(layer.bias, torch.zeros_like(scale))
    if layer.parts:
        layer.get_submodule(layer.parts[0][1]).register_forward_hook(print)
        with pytest.raises(ValueError, match="a dynamic layer cannot absorb a norm: hooks on "):
            layer.weight = layer.weight * scale.view(-1, 1, 1, 1)


def test_copies_files_and_optimizers_know_nothing_of_it(layer):
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False), torch.jit.script(layer)):
        torch.testing.assert_close(other(x), expected)
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
