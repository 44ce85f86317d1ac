"""Changes to timm's ResNet that several families offer."""

from timm.models.resnet import ResNet
from torch import nn

# Arguments of a network for tests, of the size of timm's `test_resnet`.
TINY = {
    "layers": (1, 1, 1, 1),
    "channels": (16, 24, 32, 48),
    "stem_width": 16,
    "stem_type": "deep",
    "avg_down": True,
}


def use_small_stem(model: ResNet) -> None:
    """Give a new ResNet the stem for images of 32 to 64 pixels: 3x3 with stride 1, no max-pool.

    Args:
        model: Changed in place, `feature_info` included.
    """
    if isinstance(model.conv1, nn.Sequential):
        model.conv1[0].stride = (1, 1)  # a deep stem: 3x3 already
    else:
        model.conv1 = stem_conv(model.conv1, model.conv1.out_channels, kernel_size=3, stride=1)
    model.maxpool = nn.Identity()
    for info in model.feature_info:
        info["reduction"] //= 2 if info["module"] == "act1" else 4


def stem_conv(conv: nn.Conv2d, out_channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    """A first convolution in place of `conv`, initialised as timm's ResNet does it."""
    dd = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    conv = nn.Conv2d(conv.in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False, **dd)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
