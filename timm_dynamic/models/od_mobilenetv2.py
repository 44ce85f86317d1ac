"""MobileNetV2 with omni-dimensional dynamic convolution (Li, Zhou and Yao, ICLR 2022, arXiv 2209.07947).

timm's EfficientNet, with every convolution but the first one an `ODConv2d`.
"""

import re
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.models._mobilenetv2 import mobilenetv2_args, timm_name
from timm_dynamic.models._od import load_authors, make_dynamic, od_cfgs, reported

__all__ = ["ODMobileNetV2"]

_TWINS = {
    f"od_mobilenetv2{width}{form}": f"mobilenetv2{width or '_100'}"
    for width in ("", "_075", "_050")
    for form in ("", "_4x")
}
register(
    Family(
        name="od",
        timed=("od_mobilenetv2_4x",),
        twins=_TWINS,
        reported=reported("mobilenetv2"),
        golden={"od_mobilenetv2_w050_1x": ("od_mobilenetv2_050", {})},
    )
)


class ODMobileNetV2(EfficientNet):
    """timm's `EfficientNet` with every convolution but the first one omni-dimensional and dynamic.

    Args:
        *args, **kwargs: As for `EfficientNet`.
        num_kernels, reduction: As for `ODConv2d`.
        anneal_steps: Training forwards in which the temperature falls from 30 to 1.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(
        self, *args, num_kernels: int = 1, reduction: float = 1 / 16, anneal_steps: int | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        _, *names = [name for name, module in self.named_modules() if isinstance(module, nn.Conv2d)]
        make_dynamic(self, names, num_kernels, reduction, anneal_steps)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: torchvision's names, but for the kernels'."""
    if state_dict.keys() <= model.state_dict().keys():
        return state_dict
    return load_authors(state_dict, model, _timm_name)


def _timm_name(key: str) -> str:
    """Of a tensor in torchvision's MobileNetV2, where a convolution, its norm and ReLU6 are a sequence."""
    key = re.sub(r"^features\.18\.", "conv.", key).replace("classifier.1.", "classifier.")
    match = re.match(r"features\.(\d+)\.conv\.(\d)\.(?:([01])\.)?(.*)", key)
    if match:
        sequences = 1 if match[1] == "1" else 2
        place = 3 * int(match[2]) + int(match[3]) if match[3] else 2 * sequences + int(match[2])
        key = f"features.{match[1]}.conv.{place}.{match[4]}"
    return timm_name(key)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], width: float, num_kernels: int) -> ODMobileNetV2:
    return build_model(
        ODMobileNetV2,
        variant,
        pretrained,
        feature_cfg={"flatten_sequential": True},
        **mobilenetv2_args(width, {"num_kernels": num_kernels, **kwargs}),
    )


default_cfgs = generate_default_cfgs(od_cfgs(_TWINS, "conv_stem", "classifier"))


@register_model
def od_mobilenetv2(pretrained: bool = False, **kwargs) -> ODMobileNetV2:
    """OD-MobileNetV2 with one kernel."""
    return _create("od_mobilenetv2", pretrained, kwargs, 1.0, 1)


@register_model
def od_mobilenetv2_4x(pretrained: bool = False, **kwargs) -> ODMobileNetV2:
    """OD-MobileNetV2 with four kernels."""
    return _create("od_mobilenetv2_4x", pretrained, kwargs, 1.0, 4)


@register_model
def od_mobilenetv2_075(pretrained: bool = False, **kwargs) -> ODMobileNetV2:
    """OD-MobileNetV2 of 0.75 of the width, with one kernel."""
    return _create("od_mobilenetv2_075", pretrained, kwargs, 0.75, 1)


@register_model
def od_mobilenetv2_075_4x(pretrained: bool = False, **kwargs) -> ODMobileNetV2:
    """OD-MobileNetV2 of 0.75 of the width, with four kernels."""
    return _create("od_mobilenetv2_075_4x", pretrained, kwargs, 0.75, 4)


@register_model
def od_mobilenetv2_050(pretrained: bool = False, **kwargs) -> ODMobileNetV2:
    """OD-MobileNetV2 of half the width, with one kernel."""
    return _create("od_mobilenetv2_050", pretrained, kwargs, 0.5, 1)


@register_model
def od_mobilenetv2_050_4x(pretrained: bool = False, **kwargs) -> ODMobileNetV2:
    """OD-MobileNetV2 of half the width, with four kernels."""
    return _create("od_mobilenetv2_050_4x", pretrained, kwargs, 0.5, 4)
