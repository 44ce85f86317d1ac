"""A layer in the place of a convolution starts as it and learns at its pace."""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import timm_dynamic
from timm_dynamic.families import FAMILIES, layers

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-5),
    "momentum": lambda p: torch.optim.SGD(p, 1e-5, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-5),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "timm": lambda p: create_optimizer_v2(p, "lamb", lr=1e-4),
}
CASES = {"3x3": (3, 16, 16, 1), "1x1": (1, 64, 128, 1), "grouped": (3, 32, 32, 2)}


def weights_of(layer, x):
    """`[B, O, I, K, K]`: the weight of every sample, around which the layer is a convolution."""
    if isinstance(layer, nn.Conv2d):
        return layer.weight.expand(len(x), *layer.weight.shape)
    readers = {
        "ped": gated,
        "dy": mixed,
        "dcd": fused,
        "od": omni,
        "cond": routed,
        "kw": from_cells,
        "fd": from_spectrum,
    }
    return readers[layer.family](layer, x)


def from_cells(layer, x):
    return layer.kernels(layer.factors(x.mean((2, 3))))


def from_spectrum(layer, x):
    return layer.factors(x.mean((2, 3)))


def gated(layer, x):
    a_in, a_out, a_tap = (gate[0] for gate in layer.factors(x.mean((2, 3))))
    taps = a_tap.unflatten(1, layer.kernel_size)
    return layer.kernel * a_out[:, :, None, None, None] * a_in[:, None, :, None, None] * taps[:, None, None]


def mixed(layer, x):
    attention = layer.coefficients(layer.attention(x, layer.temperature()))
    return torch.einsum("bn,noikl->boikl", attention, layer.kernels_weights)


def omni(layer, x):
    pi, a_in, a_tap, a_out = layer.factors(x.mean((2, 3)))
    weights = torch.einsum("bn,noikl->boikl", pi, layer.kernels)
    if layer.groups > 1:
        a_in = a_in.unflatten(1, (layer.groups, -1)).repeat_interleave(layer.out_channels // layer.groups, 1)
    else:
        a_in = a_in[:, None]
    weights = weights * a_out[:, :, None, None, None] * a_in[..., None, None]
    return weights if a_tap is None else weights * a_tap.unflatten(1, layer.kernel_size)[:, None, None]


def routed(layer, x):
    kernels = layer.experts.weight.view(layer.num_experts, *layer.weight.shape)
    return torch.einsum("bn,noikl->boikl", layer.coefficients(layer.routing(x)), kernels)


def fused(layer, x):
    """BN2's and BN1's slopes stand for them."""
    z, q = layer.fc(x.mean((2, 3))), layer.q(x).flatten(2)
    phi, scale = layer.fc_phi(z).unflatten(1, (layer.latent_dim, -1)), layer.factors(x)[0]
    first = slope(layer.bn1, q)
    second = slope(layer.bn2, torch.bmm(phi, layer.bn1(q[..., None]).flatten(2)))
    latent = second[:, None] * phi * first + torch.diag(first)
    rest = layer.p.weight.flatten(1) @ latent @ layer.q.weight.flatten(1)
    weights = scale[:, :, None, None, None] * layer.conv.weight
    if layer.groups > 1:  # Q reads all channels
        return weights
    center = layer.kernel_size[0] // 2
    return weights + nn.functional.pad(rest[..., None, None], (center,) * 4)


def slope(norm, z):
    return norm.weight / (z.var((0, 2), unbiased=False) + norm.eps).sqrt()


def step_of(module, x, cotangent, optimizer):
    module = copy.deepcopy(module)
    before = weights_of(module, x).detach().clone()
    optimizer = OPTIMIZERS[optimizer](module.parameters())
    (module(x) * cotangent).sum().backward()
    optimizer.step()
    return (weights_of(module, x).detach() - before).flatten(1).norm(dim=1).mean()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", [name for name in layers() if FAMILIES[name].keeps is not None])
def test_the_first_step_is_that_of_the_convolution(family, case, optimizer):
    """By 0.8 to 1.25, on what a network's layers see: positive maps of unit size, in training mode."""
    size, channels, outputs, groups = CASES[case]
    if family == "fd" and groups > 1:
        return
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outputs, size, padding=size // 2, groups=groups, dtype=torch.float64)
    x, cotangent = torch.randn(8, channels, 10, 10).double().relu(), torch.randn(8, outputs, 10, 10).double()
    options = {"noise_std": 0.0, "aux_scale": 0.0} if family == "ped" else {}
    layer = layers()[family].from_conv(conv, **options).train()
    static, ours = (step_of(module, x, cotangent, optimizer) for module in (conv, layer))
    assert 0.8 < ours / static < 1.25


@pytest.mark.parametrize("family", [name for name in layers() if FAMILIES[name].keeps is not None])
def test_neutral_gates_are_one(family):
    conv, x = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64), torch.randn(4, 8, 5, 5).double()
    layer = layers()[family].from_conv(conv).eval()
    if family == "ped":
        assert all((gates == 1).all() for gates in layer.factors(x.mean((2, 3))))
        assert torch.equal(layer.kernel, conv.weight)
    elif family == "od":
        pi, *gates = layer.factors(x.mean((2, 3)))
        assert all((gate == 1).all() for gate in gates) and (pi[:, 0] == 1).all() and (pi[:, 1:] == 0).all()
        assert torch.equal(layer.kernels[0], conv.weight) and layer.kernels[1:].std() > 0
    elif family == "cond":
        assert (layer.routing(x) == 1).all() and torch.equal(layer.experts.weight[0], conv.weight.flatten())
        assert torch.equal(layer.bias, conv.bias) and layer.experts.weight[1:].std() > 0
    elif family == "kw":
        coefficients, cells = layer.factors(x.mean((2, 3))), layer.warehouse.cells
        assert torch.equal(coefficients.count_nonzero(2), torch.ones(4, 9))
        torch.testing.assert_close(
            coefficients.amax(2).expand(4, 9) * cells[:, 0, 0], conv.weight[0, 0].flatten().expand(4, 9)
        )
    elif family == "fd":
        assert (layer.routing(x) == 1).all()
        torch.testing.assert_close(layer.factors(x.mean((2, 3)))[0], conv.weight)
    elif family == "dcd":
        assert (layer.routing(x) == 1).all() and torch.equal(layer.conv.weight, conv.weight)
    else:
        assert (layer.coefficients(layer.routing(x))[:, 0] == 1).all()
        assert torch.equal(layer.kernels_weights[0], conv.weight) and torch.equal(layer.kernels_bias[0], conv.bias)


@pytest.mark.parametrize("family", [name for name in layers() if FAMILIES[name].keeps is not None])
def test_a_step_on_one_sample(family):
    """It moves what a network gives in evaluation no further than about that of a static one does."""
    torch.manual_seed(0)
    static = timm.create_model("resnet18", zero_init_last=False)
    with torch.no_grad():
        for _ in range(3):
            static(torch.randn(8, 3, 64, 64))
    x, largest = torch.randn(3, 3, 64, 64), []
    for model in (copy.deepcopy(static), timm_dynamic.dynamize(copy.deepcopy(static), family)):
        model.train()(x[:1]).log_softmax(1)[0, 0].neg().backward()
        torch.optim.SGD(model.parameters(), 0.01).step()
        largest.append(model.eval()(x).abs().max().item())
    assert largest[1] < 5 * largest[0]
