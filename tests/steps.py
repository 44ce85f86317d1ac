"""How far an optimizer's first step moves a dynamic layer, beside the convolution that it was made from."""

import copy

import torch
from torch import nn


def assert_same_step(layer: nn.Module, conv: nn.Conv2d, x: torch.Tensor, target: torch.Tensor, optimizer) -> None:
    """The step moves the layer's output, and its weight and bias, 0.8 to 1.25 times as far, in the same direction."""
    layer, conv = copy.deepcopy(layer).train(), copy.deepcopy(conv).train()
    steps = []
    for module in (layer, conv):
        weight = next((p for name, p in module.named_parameters() if name in ("weight", "kernel", "kernels_weights")))
        weight = weight[0] if weight.ndim == 5 else weight  # the mean kernel
        state = [t.detach().clone() for t in (module(x), weight, module.bias)]
        (module(x) - target).square().mean().backward()
        optimizer(module.parameters()).step()
        with torch.no_grad():
            steps.append([t - before for t, before in zip((module(x), weight, module.bias), state, strict=True)])
    for ours, theirs in zip(*steps, strict=True):
        assert 0.8 <= (ours * theirs).sum() / theirs.square().sum() <= 1.25
        assert 0.8 <= ours.norm() / theirs.norm() <= 1.25
