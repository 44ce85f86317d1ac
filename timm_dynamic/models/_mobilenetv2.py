"""MobileNetV2 as several families have it: timm's architecture, and the names in common checkpoints."""

import re
from functools import partial
from typing import Any

from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from torch import nn

# Sandler et al., "MobileNetV2" (arXiv 1801.04381), table 2: kernel, stride, expansion, channels of every stage.
_STAGES = (
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s2_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
)
_BLOCKS = [(stage, block) for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)) for block in range(blocks)]
# Position in the block's sequence to timm's name: of the first block, which has no expansion, and of the others.
_FIRST = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}
_OTHERS = {"0": "conv_pw", "1": "bn1", "3": "conv_dw", "4": "bn2", "6": "conv_pwl", "7": "bn3"}
_ENDS = {"features.0.0": "conv_stem", "features.0.1": "bn1", "conv.0": "conv_head", "conv.1": "bn2"}


def mobilenetv2_args(width: float, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make timm's `EfficientNet` a MobileNetV2.

    Args:
        width: Multiplies the channels.
        kwargs: The caller's arguments, which go first; timm's abbreviations (`bn_eps`, ...) are understood.
    """
    kwargs = dict(kwargs)
    rounded = partial(round_channels, multiplier=width)
    return {
        "block_args": decode_arch_def(_STAGES),
        "num_features": max(1280, rounded(1280)),
        "stem_size": 32,
        "round_chs_fn": rounded,
        "norm_layer": kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        "act_layer": resolve_act_layer(kwargs, "relu6"),
        **kwargs,
    }


def timm_name(key: str) -> str:
    """timm's name of a tensor whose blocks are `features.N.conv.M`; any other key is returned as it is."""
    for theirs, ours in _ENDS.items():
        if key.startswith(f"{theirs}."):
            return ours + key.removeprefix(theirs)
    match = re.fullmatch(r"features\.(\d+)\.conv\.(\d+)(\..+)", key)
    if not match or not 1 <= int(match[1]) <= len(_BLOCKS):
        return key
    stage, block = _BLOCKS[int(match[1]) - 1]
    name = (_FIRST if match[1] == "1" else _OTHERS).get(match[2])
    return f"blocks.{stage}.{block}.{name}{match[3]}" if name else key
