"""Involution and CARAFE: what is theirs beyond what every layer can do; tests/test_golden.py has more."""

import pytest
import torch
import torch.nn.functional as F

from timm_dynamic.layers import CARAFE, Involution2d


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_patches(layer, x):
    """Involution as its paper defines it, with unfold."""
    B, C, K, s, d = *x.shape[:2], layer.kernel_size[0], layer.stride[0], layer.dilation[0]
    filters = layer.conv2(layer.conv1(F.avg_pool2d(x, s, ceil_mode=True)))
    Ho, Wo = filters.shape[2:]
    patches = F.unfold(x, K, d, d * (K // 2), s).view(B, layer.filters, -1, K * K, Ho, Wo)
    return (patches * filters.view(B, layer.filters, 1, K * K, Ho, Wo)).sum(3).view(B, C, Ho, Wo)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("channels", "options", "filters"),
    [
        (32, {"kernel_size": 7, "padding": 3}, 2),
        (32, {"kernel_size": 7, "padding": 3, "stride": 2}, 2),  # of maps that the stride does not divide, too
        (24, {"kernel_size": 5, "padding": 4, "dilation": 2}, 3),
        (7, {"kernel_size": 3, "padding": 1, "stride": 3, "group_channels": 7}, 1),
        (6, {"kernel_size": 1, "group_channels": 1, "reduction": 100}, 6),
    ],
    ids=str,
)
def test_involution_is_its_definition(channels, options, filters, layout):
    layer = Involution2d(channels, channels, **options).double()
    assert layer.filters == filters
    for size in ((12, 8), (9, 11)):
        x = torch.randn(2, channels, *size, dtype=torch.float64).to(memory_format=layout)
        for mode in (True, False):
            y = layer.train(mode)(x)
            torch.testing.assert_close(y, by_patches(layer, x))
            assert y.shape == (2, channels, *(-(-n // layer.stride[0]) for n in size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_channels": 32}, "out_channels must equal in_channels, 16, got 32"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"kernel_size": (3, 5)}, "same kernel_size in both directions"),
        ({"padding": 0}, "padding dilation .* = 3, got 0"),
        ({"groups": 4}, "groups must be 1 or 16, got 4"),
        ({"padding_mode": "reflect"}, "pads with zeros"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"group_channels": 0}, "group_channels must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_arguments_of_involution(arguments, message):
    with pytest.raises(ValueError, match=message):
        Involution2d(**{"in_channels": 16, "out_channels": 16, "kernel_size": 7, "padding": 3, **arguments})


def carafe_by_patches(layer, x):
    """CARAFE with unfold and a nearest-neighbour enlargement of the patches."""
    (B, C, H, W), K, s, G = x.shape, layer.up_kernel, layer.scale_factor, layer.up_group
    weights = F.pixel_shuffle(layer.content_encoder(layer.channel_compressor(x)), s)
    weights = weights.view(B, G, 1, K * K, H * s, W * s).softmax(3)
    patches = F.unfold(x, K, padding=K // 2).view(B, C * K * K, H, W)
    patches = F.interpolate(patches, scale_factor=s).view(B, G, C // G, K * K, H * s, W * s)
    return (patches * weights).sum(3).view(B, C, H * s, W * s)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_factor": 3, "up_group": 2},
        {"scale_factor": 1, "up_kernel": 3, "encoder_kernel": 1},
        {"up_kernel": 7},
    ],
    ids=str,
)
def test_carafe_is_its_definition(options, layout):
    layer = CARAFE(12, **options, compressed_channels=8).double()
    torch.nn.init.normal_(layer.content_encoder.weight)
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64).to(memory_format=layout)
    torch.testing.assert_close(layer(x), carafe_by_patches(layer, x))


def test_carafe_in_half_precision():
    """The softmax is taken in float32; at first it is nearly a mean."""
    layer = CARAFE(8)
    x = torch.randn(1, 8, 9, 9)
    mean = F.avg_pool2d(x, 5, 1)
    torch.testing.assert_close(layer(x)[..., 4:14, 4:14], F.interpolate(mean, scale_factor=2), rtol=0, atol=0.01)
    expected = layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
        assert layer.to(dtype)(x.to(dtype)).dtype == dtype
        layer.float()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"up_kernel": 4}, "up_kernel must be odd and positive, got 4"),
        ({"encoder_kernel": 0}, "encoder_kernel must be odd and positive, got 0"),
        ({"up_group": 5}, "up_group must divide the 12 channels, got 5"),
        ({"scale_factor": 0}, "scale_factor must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_arguments_of_carafe(arguments, message):
    with pytest.raises(ValueError, match=message):
        CARAFE(**{"channels": 12, **arguments})
    with pytest.raises(ValueError, match=r"x must be \[B, 12, H, W\]"):
        CARAFE(12)(torch.zeros(2, 3, 4, 4))


def test_torchscript():
    layer, x = Involution2d(16, 16, 5, 2, 2).eval(), torch.randn(2, 16, 7, 8)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
