"""Layers and networks of every family for the tests of what people do with PyTorch modules."""

import copy
import functools

import timm
import torch
from torch import nn

from timm_dynamic.families import FAMILIES
from timm_dynamic.layers.base import DynamicLayer
from timm_dynamic.models.dynconv_resnet import SparseBasicBlock

LAYERS = sorted(name for name, family in FAMILIES.items() if family.layer is not None)
NETWORKS = sorted(FAMILIES)

# Two stages of a ResNet have what four have, the strided block too, and take half the time.
_TWO_STAGES = {"layers": (1, 1, 0, 0), "channels": (16, 24, 24, 24)}


def randomise(model):
    """Nothing is zero, one, or in an initial state that hides what is ignored."""
    with torch.no_grad():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    value.copy_(torch.rand_like(value) + 0.5 if name == "weight" else torch.randn_like(value) * 0.1)
                elif value.ndim > 1 and value.std() == 0:
                    nn.init.normal_(value, std=0.1)
                elif value.std() == 0:
                    value.add_(0.1 * torch.randn_like(value))
    return model


def settle(model, x):
    """Running statistics of what there is to normalise."""
    with torch.no_grad():
        for _ in range(8):
            model.train()(x)
    return model.eval()


def make_layer(family, channels=8, outputs=8, kernel_size=3, dtype=None, stride=1, **kwargs):
    """As `from_conv` makes it, but for parts that are neutral."""
    torch.manual_seed(0)
    record = FAMILIES[family]
    conv = nn.Conv2d(channels, outputs, kernel_size, stride, kernel_size // 2, dtype=dtype)
    exact = {key: value for key, value in record.exact.items() if key == "noise_std"}
    return settle(randomise(record.layer.from_conv(conv, **exact, **kwargs)), images(4, channels, 6, dtype))


def create_network(family, **kwargs):
    """The family's tiny one, of two stages where it has four of a ResNet, without noise."""
    record = FAMILIES[family]
    stages = {} if family in ("dynconv", "lsnet") else _TWO_STAGES
    return timm.create_model(record.tiny, num_classes=5, **{**stages, **record.exact, **kwargs})


def make_network(family, dtype=None, **kwargs):
    """Such a network in eval mode, in which no part is neutral."""
    return copy.deepcopy(_made(family, dtype, tuple(kwargs.items())))


@functools.cache
def _made(family, dtype, kwargs):
    torch.manual_seed(0)
    return settle(randomise(create_network(family, **dict(kwargs)).to(dtype)), images(8, dtype=dtype))


def images(batch=2, channels=3, size=32, dtype=None):
    return torch.randn(batch, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def run(model, x, training=False):
    """One call, with a backward pass in training."""
    model.train(training)
    with torch.set_grad_enabled(training):
        y = model(x)
    if training:
        y.square().mean().backward()
    return y


def leaves(model):
    """Modules without others that hold parameters, by name."""
    return {
        name: part
        for name, part in model.named_modules()
        if next(part.parameters(recurse=False), None) is not None and not list(part.children())
    }


def leaves_of_layers(model, count=None):
    """Those that are part of a dynamic layer, or of a block with a mask; of so many layers only."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, (DynamicLayer, SparseBasicBlock))]
    return {
        name: part
        for name, part in leaves(model).items()
        if any(name.startswith(f"{layer}.") for layer in layers[:count])
    }


def close(actual, expected, tolerance=1e-3):
    """Up to a share of what is largest."""
    difference, largest = (actual - expected).abs().max(), expected.abs().max()
    assert difference <= tolerance * largest, f"off by {difference} of {largest}"
