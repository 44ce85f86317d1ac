"""MobileNetV2 with attention over convolution kernels (Chen et al., CVPR 2020, arXiv 1912.03458).

timm's EfficientNet, with every convolution but the first one a `DynamicConv2d`.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.models._dy import dy_cfg, make_dynamic
from timm_dynamic.models._mobilenetv2 import mobilenetv2_args, timm_name

__all__ = ["DyMobileNetV2"]

_TWINS = {
    "dy_mobilenetv2": "mobilenetv2_100",
    "dy_mobilenetv2_050": "mobilenetv2_050",
    "dy_mobilenetv2_035": "mobilenetv2_035",
}
register(
    Family(
        name="dy",
        timed=("dy_mobilenetv2",),
        twins=_TWINS,
        reported={"dy_mobilenetv2": 75.2, "dy_mobilenetv2_050": 69.9},
        golden={"dy_mobilenetv2_w050": ("dy_mobilenetv2_050", {})},
    )
)


class DyMobileNetV2(EfficientNet):
    """timm's `EfficientNet` with every convolution but the first one and those of squeeze-and-excitation dynamic.

    Args:
        *args, **kwargs: As for `EfficientNet`.
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
    """Checkpoints of T. Ardelean et al.'s MobileNetV2: the usual names, within sequences called `layers`."""
    if not state_dict.keys() <= model.state_dict().keys():
        state_dict = extract_state_dict(state_dict)
        state_dict = {timm_name(key.replace("layers.", "")): value for key, value in state_dict.items()}
    return state_dict


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], width: float) -> DyMobileNetV2:
    return build_model(
        DyMobileNetV2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        **mobilenetv2_args(width, kwargs),
    )


default_cfgs = generate_default_cfgs({f"{name}.untrained": dy_cfg("conv_stem", "classifier") for name in _TWINS})


@register_model
def dy_mobilenetv2(pretrained: bool = False, **kwargs) -> DyMobileNetV2:
    """DY-MobileNetV2."""
    return _create("dy_mobilenetv2", pretrained, kwargs, 1.0)


@register_model
def dy_mobilenetv2_050(pretrained: bool = False, **kwargs) -> DyMobileNetV2:
    """DY-MobileNetV2 of half the width."""
    return _create("dy_mobilenetv2_050", pretrained, kwargs, 0.5)


@register_model
def dy_mobilenetv2_035(pretrained: bool = False, **kwargs) -> DyMobileNetV2:
    """DY-MobileNetV2 of 0.35 of the width."""
    return _create("dy_mobilenetv2_035", pretrained, kwargs, 0.35)
