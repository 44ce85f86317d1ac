"""MobileNetV2 with parameter-efficient dynamic convolution (Hou and Kung, PEDConv, BMVC 2021).

timm's EfficientNet, with the three convolutions of every inverted residual that expands its input a `PEDConv2d`.
"""

from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.efficientnet import EfficientNet

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.models._mobilenetv2 import mobilenetv2_args
from timm_dynamic.models.ped_resnet import checkpoint_filter_fn, make_dynamic, ped_cfg, split_options

__all__ = ["PEDMobileNetV2"]

register(Family(name="ped", twins={"ped_mobilenetv2": "mobilenetv2_100"}))


class PEDMobileNetV2(EfficientNet):
    """timm's `EfficientNet` with PED convolutions in its inverted residuals.

    Args:
        *args, **kwargs: As for `EfficientNet`.
        rank, reduction, noise_std, aux_scale: As for `PEDConv2d`.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(self, *args, **kwargs):
        options = split_options(kwargs)
        super().__init__(*args, **kwargs)
        for block in self.modules():
            if isinstance(block, InvertedResidual):
                make_dynamic(block, ("conv_pw", "conv_dw", "conv_pwl"), options)


default_cfgs = generate_default_cfgs({"ped_mobilenetv2.untrained": ped_cfg("conv_stem", "classifier")})


@register_model
def ped_mobilenetv2(pretrained: bool = False, **kwargs) -> PEDMobileNetV2:
    """PED-MobileNetV2."""
    return build_model(
        PEDMobileNetV2,
        "ped_mobilenetv2",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        **mobilenetv2_args(1.0, kwargs),
    )
