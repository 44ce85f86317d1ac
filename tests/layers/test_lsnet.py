"""Large-small convolution: its filters' groups, taps and border, and what it refuses."""

import pytest
import torch

from timm_dynamic.layers import SKA, LSConv


@pytest.mark.parametrize("size", [3, 5])
def test_aggregation(size):
    """A loop over channels, taps and positions."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 2, size**2, 4, 5).double()
    expected = torch.zeros_like(x)
    for c in range(6):
        for k in range(size**2):
            dy, dx = k // size - size // 2, k % size - size // 2
            for y in range(4):
                for z in range(5):
                    if 0 <= y + dy < 4 and 0 <= z + dx < 5:
                        expected[:, c, y, z] += w[:, c % 2, k, y, z] * x[:, c, y + dy, z + dx]
    torch.testing.assert_close(SKA(size)(x, w), expected)


def test_filters_are_normalised_over_the_image():
    layer = LSConv(16, large_kernel_size=5, kernel_size=5, groups=4).double()
    filters = layer.lkp(torch.randn(2, 16, 6, 7).double())
    assert filters.shape == (2, 4, 25, 6, 7)
    torch.testing.assert_close(filters.flatten(2).mean(2), torch.zeros(2, 4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(filters.flatten(2).var(2, correction=0), torch.ones(2, 4).double(), atol=1e-3, rtol=0)


def test_layer():
    layer, x = LSConv(16).double(), torch.randn(2, 16, 6, 7).double()
    torch.testing.assert_close(layer(x), layer.bn(layer.ska(x, layer.lkp(x))) + x)
    assert layer(x[:1]).shape == (1, 16, 6, 7) and layer(x[:0].float().double()).shape == (0, 16, 6, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 12}, "divisible by groups, got dim=12 and groups=8"),
        ({"dim": 8, "groups": 0}, "groups must be at least 1, got 0"),
        ({"dim": 8, "kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LSConv(**arguments)
    with pytest.raises(ValueError, match=r"x must be \[B, 8, H, W\], got shape \[1, 4, 2, 2\]"):
        LSConv(8)(torch.zeros(1, 4, 2, 2))
