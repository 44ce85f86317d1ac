"""DCD layers for the tests."""

from torch import nn


def randomise(layer):
    """Norms with something to do, and scales on both ends of their range."""
    for norm in (layer.bn1, layer.bn2):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 2)
    nn.init.normal_(layer.fc_scale.weight, std=6)
    return layer
