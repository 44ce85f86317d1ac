"""CoTNet: ResNets of contextual transformer layers (Li et al., TPAMI 2022, arXiv 2107.12292).

timm's ResNet, with the 3x3 convolution of every bottleneck replaced by a `CoTLayer`.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import CoTLayer
from timm_dynamic.models._cfg import imagenet_cfg, shipped_cfg

__all__ = ["CoTBottleneck"]

register(
    Family(
        name="cotnet",
        title="CoTNet",
        about="a filter for each pixel, made from its context",
        paper="Li et al., TPAMI 2022, arXiv 2107.12292",
        tiny="test_cotnet",
        patterns=("cotnet*", "cotnext*", "test_cotnet"),
        timed=("cotnet50",),
        twins={"cotnet50": "resnet50", "cotnet101": "resnet101"},
        reported={
            "cotnet50.in1k": 81.3,
            "cotnet101.in1k": 82.8,
            "cotnext50_2x48d.in1k": 82.1,
            "cotnext101_2x48d.in1k": 83.2,
        },
    )
)


class CoTBottleneck(Bottleneck):
    """timm's `Bottleneck` with a `CoTLayer` as `conv2`, without norm and activation behind it.

    Args:
        *args, **kwargs: As for `Bottleneck`.

    Raises:
        ValueError: If `conv2` changes the number of channels.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        conv = self.conv2
        if conv.in_channels != conv.out_channels:
            raise ValueError(
                f"a CoT layer keeps the channels, {conv.in_channels} cannot become {conv.out_channels}: "
                "block_reduce_first must be 1"
            )
        dd = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.conv2 = CoTLayer(conv.in_channels, conv.groups, conv.stride[0], conv.dilation[0], **dd)
        self.bn2, self.act2 = nn.Identity(), nn.Identity()


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: their keys are ours, within a wrapper."""
    own = model.state_dict()
    return state_dict if all(key in own for key in state_dict) else extract_state_dict(state_dict)


def _cfg(first_conv: str = "conv1", **kwargs) -> dict[str, Any]:
    about = {"origin_url": "https://github.com/JDAI-CV/CoTNet", "paper_ids": "arXiv:2107.12292"}
    return imagenet_cfg(first_conv, "fc", **{**about, **kwargs})


_MODELS = ("cotnet50", "cotnet101", "cotnext50_2x48d", "cotnext101_2x48d")
default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg(hf_hub_id=f"timm-dynamic/{name}.in1k") for name in _MODELS}
    | {"test_cotnet.digits": _cfg("conv1.0", **shipped_cfg("test_cotnet.digits"))}
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args) -> ResNet:
    return build_model(ResNet, variant, pretrained, **{"block": CoTBottleneck, **model_args, **kwargs})


@register_model
def cotnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """CoTNet-50."""
    return _create("cotnet50", pretrained, kwargs, layers=(3, 4, 6, 3))


@register_model
def cotnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """CoTNet-101."""
    return _create("cotnet101", pretrained, kwargs, layers=(3, 4, 23, 3))


@register_model
def cotnext50_2x48d(pretrained: bool = False, **kwargs) -> ResNet:
    """CoTNeXt-50, in two groups."""
    model_args = {"layers": (3, 4, 6, 3), "cardinality": 2, "base_width": 48}
    return _create("cotnext50_2x48d", pretrained, kwargs, **model_args)


@register_model
def cotnext101_2x48d(pretrained: bool = False, **kwargs) -> ResNet:
    """CoTNeXt-101, in two groups."""
    model_args = {"layers": (3, 4, 23, 3), "cardinality": 2, "base_width": 48}
    return _create("cotnext101_2x48d", pretrained, kwargs, **model_args)


@register_model
def test_cotnet(pretrained: bool = False, **kwargs) -> ResNet:
    """A tiny CoTNet for tests and small images, as timm's `test_resnet` is one of ResNet."""
    model_args = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48), "stem_width": 16, "stem_type": "deep"}
    return _create("test_cotnet", pretrained, kwargs, avg_down=True, **model_args)
