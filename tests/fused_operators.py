"""Tests of operators that take the place of a layer's own steps in inference."""

import torch

from timm_dynamic.ops import reference_only

# What may become of a float32 layer without gradients and its contiguous input, and whether the operator still serves.
CHANGES = {
    "plain": (lambda layer, x: (layer, x), True),
    "channels_last": (lambda layer, x: (layer, x.to(memory_format=torch.channels_last)), False),
    "empty": (lambda layer, x: (layer, x[:0]), False),
    "many": (lambda layer, x: (layer, x.repeat(40, 1, 1, 1)), False),
    "double": (lambda layer, x: (layer.double(), x.double()), False),
    "input gradient": (lambda layer, x: (layer, x.requires_grad_()), False),
    "parameter gradient": (lambda layer, x: (layer.requires_grad_(), x), False),
}


def assert_same_without_operator(layer, x):
    """Gradients are enabled where something wants one."""
    with torch.set_grad_enabled(x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        out = layer(x)
        with reference_only():
            torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-5)
