"""MobileNetV2 with dynamic channel fusion (Li et al., ICLR 2021, arXiv 2103.08756).

timm's EfficientNet, with both 1x1 convolutions of every inverted residual that expands its input a `DCDConv2d` and the
classifier a `DCDLinear`.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import DCDConv2d
from timm_dynamic.models._mobilenetv2 import mobilenetv2_args, timm_name
from timm_dynamic.models.dcd_resnet import DynamicClassifier, dcd_cfg, load_authors

__all__ = ["DCDMobileNetV2"]

register(
    Family(
        name="dcd",
        timed=("dcd_mobilenetv2",),
        twins={
            "dcd_mobilenetv2": "mobilenetv2_100",
            "dcd_mobilenetv2_075": "mobilenetv2_075",
            "dcd_mobilenetv2_050": "mobilenetv2_050",
            "dcd_mobilenetv2_035": "mobilenetv2_035",
        },
        reported={"dcd_mobilenetv2_050": 70.2},
        golden={"dcd_mobilenetv2_w100": ("dcd_mobilenetv2", {})},
    )
)


class DCDMobileNetV2(DynamicClassifier, EfficientNet):
    """timm's `EfficientNet` with DCD convolutions in its inverted residuals and a dynamic classifier.

    Q, P and the static convolutions are initialised as timm does it. A new layer's scale is 1.

    Args:
        *args, **kwargs: As for `EfficientNet`.
        fc_squeeze: What the width of the layers' hidden vector is divided by.

    Raises:
        ValueError: If `fc_squeeze` is less than 1.
    """

    classifier_name = "classifier"

    def __init__(self, *args, fc_squeeze: int = 16, **kwargs):
        if fc_squeeze < 1:
            raise ValueError(f"fc_squeeze must be at least 1, got {fc_squeeze}")
        super().__init__(*args, **kwargs)
        for block in self.modules():
            if isinstance(block, InvertedResidual):
                for name in ("conv_pw", "conv_pwl"):
                    setattr(block, name, _make_dynamic(getattr(block, name), fc_squeeze))


def _make_dynamic(conv: nn.Conv2d, fc_squeeze: int) -> DCDConv2d:
    """The layer with the authors' sizes: fewer latent channels than the default, most for expanding convolutions."""
    pool_size, reduction = (2, 8) if conv.in_channels < conv.out_channels else (1, 2)
    pooled = conv.in_channels * pool_size**2
    width = min(pooled, conv.out_channels)
    while (width // reduction) ** 2 > 2 * pooled:
        reduction *= 2
    latent_dim = max(width // reduction, 4)
    hidden_dim = max(max(pooled, latent_dim**2) // fc_squeeze, 4)
    layer = DCDConv2d.from_conv(conv, latent_dim=latent_dim, hidden_dim=hidden_dim, pool_size=pool_size)
    for new in (layer.q, layer.p):
        nn.init.normal_(new.weight, std=(2 / new.out_channels) ** 0.5)
    return layer


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: within a wrapper, with the common names of MobileNetV2's parts and their own below."""
    own = model.state_dict()
    if all(key in own for key in state_dict):
        return state_dict
    return {timm_name(key): value for key, value in load_authors(state_dict, model).items()}


def _create(
    variant: str, pretrained: bool, kwargs: dict[str, Any], width: float, fc_squeeze: int = 16
) -> DCDMobileNetV2:
    return build_model(
        DCDMobileNetV2,
        variant,
        pretrained,
        feature_cfg={"flatten_sequential": True},
        **mobilenetv2_args(width, {"fc_squeeze": fc_squeeze, **kwargs}),
    )


default_cfgs = generate_default_cfgs(
    {
        "dcd_mobilenetv2.in1k": dcd_cfg("conv_stem", "classifier", hf_hub_id="timm-dynamic/dcd_mobilenetv2.in1k"),
        "dcd_mobilenetv2_075.untrained": dcd_cfg("conv_stem", "classifier"),
        "dcd_mobilenetv2_050.untrained": dcd_cfg("conv_stem", "classifier"),
        "dcd_mobilenetv2_035.untrained": dcd_cfg("conv_stem", "classifier"),
    }
)


@register_model
def dcd_mobilenetv2(pretrained: bool = False, **kwargs) -> DCDMobileNetV2:
    """DCD-MobileNetV2."""
    return _create("dcd_mobilenetv2", pretrained, kwargs, 1.0)


@register_model
def dcd_mobilenetv2_075(pretrained: bool = False, **kwargs) -> DCDMobileNetV2:
    """DCD-MobileNetV2 of 0.75 of the width."""
    return _create("dcd_mobilenetv2_075", pretrained, kwargs, 0.75)


@register_model
def dcd_mobilenetv2_050(pretrained: bool = False, **kwargs) -> DCDMobileNetV2:
    """DCD-MobileNetV2 of half the width."""
    return _create("dcd_mobilenetv2_050", pretrained, kwargs, 0.5, fc_squeeze=8)


@register_model
def dcd_mobilenetv2_035(pretrained: bool = False, **kwargs) -> DCDMobileNetV2:
    """DCD-MobileNetV2 of 0.35 of the width."""
    return _create("dcd_mobilenetv2_035", pretrained, kwargs, 0.35, fc_squeeze=8)
