"""EfficientNets with conditionally parameterized convolution (Yang et al., NeurIPS 2019, arXiv 1904.04971).

timm's `tf_efficientnet_cc_*`, with our operator in the place of its grouped convolution: the same parameters and
numbers.
"""

from functools import partial
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import RoutedConv2d
from timm_dynamic.models._cfg import imagenet_cfg

__all__ = ["CondEfficientNet"]

# Kernel, stride, expansion, channels of every stage; "cc": four experts in each convolution of the block.
_STAGES = (
    ["ds_r1_k3_s1_e1_c16_se0.25"],
    ["ir_r2_k3_s2_e6_c24_se0.25"],
    ["ir_r2_k5_s2_e6_c40_se0.25"],
    ["ir_r3_k3_s2_e6_c80_se0.25"],
    ["ir_r3_k5_s1_e6_c112_se0.25_cc4"],
    ["ir_r4_k5_s2_e6_c192_se0.25_cc4"],
    ["ir_r1_k3_s1_e6_c320_se0.25_cc4"],
)
register(
    Family(
        name="cond",
        timed=("cond_efficientnet_b0_4e",),
        twins={
            "cond_efficientnet_b0_4e": "tf_efficientnet_b0",
            "cond_efficientnet_b0_8e": "tf_efficientnet_b0",
            "cond_efficientnet_b1_8e": "tf_efficientnet_b1",
        },
        reported={
            "cond_efficientnet_b0_4e.in1k": 77.324,
            "cond_efficientnet_b0_8e.in1k": 77.956,
            "cond_efficientnet_b1_8e.in1k": 79.318,
        },
    )
)


class CondEfficientNet(EfficientNet):
    """timm's `EfficientNet`, whose conditionally parameterized convolutions are `RoutedConv2d`s.

    Args:
        *args, **kwargs: As for `EfficientNet`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        RoutedConv2d.adopt(self)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's files, which have our keys, and those of training scripts."""
    return state_dict if state_dict.keys() <= model.state_dict().keys() else extract_state_dict(state_dict)


def _create(
    variant: str, pretrained: bool, kwargs: dict[str, Any], depth: float = 1.0, experts: int = 1
) -> CondEfficientNet:
    kwargs = {"bn_eps": 1e-3, "pad_type": "same", **kwargs}  # TensorFlow's
    return build_model(
        CondEfficientNet,
        variant,
        pretrained,
        feature_cfg={"flatten_sequential": True},
        **{
            "block_args": decode_arch_def(_STAGES, depth, experts_multiplier=experts),
            "num_features": round_channels(1280),
            "stem_size": 32,
            "round_chs_fn": round_channels,
            "norm_layer": kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
            "act_layer": resolve_act_layer(kwargs, "swish"),
            **kwargs,
        },
    )


def _cfg(file: str, **kwargs) -> dict[str, Any]:
    """With the weights in timm's release, which its authors converted from TensorFlow."""
    return imagenet_cfg(
        "conv_stem",
        "classifier",
        mean=IMAGENET_INCEPTION_MEAN,
        std=IMAGENET_INCEPTION_STD,
        url=f"https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/{file}.pth",
        origin_url="https://github.com/tensorflow/tpu",
        paper_ids="arXiv:1904.04971",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "cond_efficientnet_b0_4e.in1k": _cfg("tf_efficientnet_cc_b0_4e-4362b6b2"),
        "cond_efficientnet_b0_8e.in1k": _cfg("tf_efficientnet_cc_b0_8e-66184a25"),
        "cond_efficientnet_b1_8e.in1k": _cfg(
            "tf_efficientnet_cc_b1_8e-f7c79ae1", input_size=(3, 240, 240), pool_size=(8, 8), crop_pct=0.882
        ),
    }
)


@register_model
def cond_efficientnet_b0_4e(pretrained: bool = False, **kwargs) -> CondEfficientNet:
    """CondConv-EfficientNet-B0 with 4 experts, timm's `tf_efficientnet_cc_b0_4e`."""
    return _create("cond_efficientnet_b0_4e", pretrained, kwargs)


@register_model
def cond_efficientnet_b0_8e(pretrained: bool = False, **kwargs) -> CondEfficientNet:
    """CondConv-EfficientNet-B0 with 8 experts, timm's `tf_efficientnet_cc_b0_8e`."""
    return _create("cond_efficientnet_b0_8e", pretrained, kwargs, experts=2)


@register_model
def cond_efficientnet_b1_8e(pretrained: bool = False, **kwargs) -> CondEfficientNet:
    """CondConv-EfficientNet-B1 with 8 experts, timm's `tf_efficientnet_cc_b1_8e`."""
    return _create("cond_efficientnet_b1_8e", pretrained, kwargs, depth=1.1, experts=2)
