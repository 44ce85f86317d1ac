"""A tiny ResNet with frequency dynamic convolution (Chen et al., CVPR 2025, arXiv 2503.18783).

The authors publish detectors; `timm_dynamic.dynamize(model, "fd")` puts the layer into any backbone.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import FDConv2d
from timm_dynamic.models._cfg import imagenet_cfg, shipped_cfg
from timm_dynamic.models._resnet import TINY

__all__ = ["FDResNet"]

register(
    Family(
        name="fd",
        title="FDConv",
        about="gates of a kernel's frequencies",
        paper="Chen et al., CVPR 2025, arXiv 2503.18783",
        tiny="test_fd_resnet",
        layer=FDConv2d,
        keeps=1e-5,
        routing="the gates",
    )
)


class FDResNet(ResNet):
    """timm's `ResNet` with `FDConv2d` in its blocks.

    Args:
        *args, **kwargs: As for `ResNet`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in (module for module in self.modules() if isinstance(module, BasicBlock)):
            for name in ("conv1", "conv2"):
                setattr(block, name, FDConv2d.from_conv(getattr(block, name), orthonormal=False))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints lack the groups of frequencies: those of the model stay."""
    groups = {key: value for key, value in model.state_dict().items() if key.endswith("frequency_group")}
    return {**groups, **state_dict}


default_cfgs = generate_default_cfgs(
    {
        "test_fd_resnet.digits": imagenet_cfg(
            "conv1.0",
            "fc",
            **{
                "origin_url": "https://github.com/Linwei-Chen/FDConv",
                "paper_ids": "arXiv:2503.18783",
                **shipped_cfg("test_fd_resnet.digits"),
            },
        )
    }
)


@register_model
def test_fd_resnet(pretrained: bool = False, **kwargs) -> FDResNet:
    """A tiny FD-ResNet for tests and small images, as timm's `test_resnet` is one of ResNet."""
    return build_model(FDResNet, "test_fd_resnet", pretrained, **{"block": BasicBlock, **TINY, **kwargs})
