"""A tiny ResNet with conditionally parameterized convolution (Yang et al., NeurIPS 2019, arXiv 1904.04971).

timm's ResNet, with every convolution of the residual branches a `CondConv2d`; stem, shortcuts, classifier are static.
"""

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import CondConv2d
from timm_dynamic.models._cfg import imagenet_cfg, shipped_cfg
from timm_dynamic.models._resnet import TINY

__all__ = ["CondBasicBlock"]

register(
    Family(
        name="cond",
        title="CondConv",
        about="conditionally parameterized convolution",
        paper="Yang et al., NeurIPS 2019, arXiv 1904.04971",
        tiny="test_cond_resnet",
        layer=CondConv2d,
        keeps=0.0,
        routing="the routing to experts",
    )
)


class CondBasicBlock(BasicBlock):
    """timm's `BasicBlock` with conditionally parameterized convolutions, of four experts.

    Args:
        *args, **kwargs: As for `BasicBlock`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("conv1", "conv2"):
            layer = CondConv2d.from_conv(getattr(self, name), from_scratch=True)
            fan_out = layer.experts.weight[0].numel() // layer.in_channels
            nn.init.normal_(layer.experts.weight, std=(2 / fan_out) ** 0.5)
            setattr(self, name, layer)


_about = {
    "origin_url": "https://github.com/tensorflow/tpu",
    "paper_ids": "arXiv:1904.04971",
    **shipped_cfg("test_cond_resnet.digits"),
}
default_cfgs = generate_default_cfgs({"test_cond_resnet.digits": imagenet_cfg("conv1.0", "fc", **_about)})


@register_model
def test_cond_resnet(pretrained: bool = False, **kwargs) -> ResNet:
    """A tiny CondConv-ResNet for tests and small images, as timm's `test_resnet` is one of ResNet."""
    return build_model(ResNet, "test_cond_resnet", pretrained, block=CondBasicBlock, **{**TINY, **kwargs})
