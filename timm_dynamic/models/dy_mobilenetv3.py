"""MobileNetV3 with attention over convolution kernels (Chen et al., CVPR 2020, arXiv 1912.03458).

timm's MobileNetV3, with every convolution but the first one and those of squeeze-and-excitation a `DynamicConv2d`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.models._dy import dy_cfg, make_dynamic

__all__ = ["DyMobileNetV3"]

_TWINS = {
    "dy_mobilenetv3": "mobilenetv3_large_100",
    "dy_mobilenetv3_small": "mobilenetv3_small_100",
    "dy_mobilenetv3_small_050": "mobilenetv3_small_050",
}
register(Family(name="dy", twins=_TWINS, reported={"dy_mobilenetv3_small": 70.3}))

# Howard et al., "Searching for MobileNetV3" (arXiv 1905.02244), tables 1 and 2, with the expansion as a ratio.
_LARGE = (
    ["ds_r1_k3_s1_e1_c16_nre"],
    ["ir_r1_k3_s2_e4_c24_nre", "ir_r1_k3_s1_e3_c24_nre"],
    ["ir_r3_k5_s2_e3_c40_se0.25_nre"],
    ["ir_r1_k3_s2_e6_c80", "ir_r1_k3_s1_e2.5_c80", "ir_r2_k3_s1_e2.3_c80"],
    ["ir_r2_k3_s1_e6_c112_se0.25"],
    ["ir_r3_k5_s2_e6_c160_se0.25"],
    ["cn_r1_k1_s1_c960"],
)
_SMALL = (
    ["ds_r1_k3_s2_e1_c16_se0.25_nre"],
    ["ir_r1_k3_s2_e4.5_c24_nre", "ir_r1_k3_s1_e3.67_c24_nre"],
    ["ir_r1_k5_s2_e4_c40_se0.25", "ir_r2_k5_s1_e6_c40_se0.25"],
    ["ir_r2_k5_s1_e3_c48_se0.25"],
    ["ir_r3_k5_s2_e6_c96_se0.25"],
    ["cn_r1_k1_s1_c576"],
)


class DyMobileNetV3(MobileNetV3):
    """timm's `MobileNetV3` with every convolution but the first one and those of squeeze-and-excitation dynamic.

    Args:
        *args, **kwargs: As for `MobileNetV3`.
        num_kernels: Of every dynamic convolution, or a number for each (see `make_dynamic`).
        reduction: Of the attention's hidden layers.
        anneal_steps: Training forwards in which the temperature falls from 30 to 1.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(
        self,
        *args,
        num_kernels: int | Sequence[int] = 4,
        reduction: int = 4,
        anneal_steps: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        make_dynamic(self, num_kernels, reduction, anneal_steps)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Checkpoints with our key names, in any wrapper."""
    if not state_dict.keys() <= model.state_dict().keys():
        state_dict = extract_state_dict(state_dict)
    return state_dict


def _create(
    variant: str, pretrained: bool, kwargs: dict[str, Any], stages: Sequence[list[str]], features: int, width: float
) -> DyMobileNetV3:
    kwargs = dict(kwargs)
    model_args = {
        "block_args": decode_arch_def(stages),
        "num_features": features,
        "stem_size": 16,
        "fix_stem": width < 0.75,
        "round_chs_fn": partial(round_channels, multiplier=width),
        "norm_layer": kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        "act_layer": resolve_act_layer(kwargs, "hard_swish"),
        "se_layer": partial(
            SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round_channels
        ),
        **kwargs,
    }
    return build_model(
        DyMobileNetV3,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        **model_args,
    )


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": dy_cfg("conv_stem", "classifier") for name in (*_TWINS, "dy_mobilenetv3_small_025")}
)


@register_model
def dy_mobilenetv3(pretrained: bool = False, **kwargs) -> DyMobileNetV3:
    """DY-MobileNetV3, large."""
    return _create("dy_mobilenetv3", pretrained, kwargs, _LARGE, 1280, 1.0)


@register_model
def dy_mobilenetv3_small(pretrained: bool = False, **kwargs) -> DyMobileNetV3:
    """DY-MobileNetV3, small."""
    return _create("dy_mobilenetv3_small", pretrained, kwargs, _SMALL, 1024, 1.0)


@register_model
def dy_mobilenetv3_small_050(pretrained: bool = False, **kwargs) -> DyMobileNetV3:
    """DY-MobileNetV3, small, of half the width."""
    return _create("dy_mobilenetv3_small_050", pretrained, kwargs, _SMALL, 1024, 0.5)


@register_model
def dy_mobilenetv3_small_025(pretrained: bool = False, **kwargs) -> DyMobileNetV3:
    """DY-MobileNetV3, small, of a quarter of the width."""
    return _create("dy_mobilenetv3_small_025", pretrained, kwargs, _SMALL, 1024, 0.25)
