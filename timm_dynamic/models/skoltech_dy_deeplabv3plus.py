"""The DeepLabV3+ of T. Ardelean et al. (Skoltech), with attention over convolution kernels: for their checkpoints.

It is `dy_deeplabv3plus_mobilenetv2` with another padding and dilation within the MobileNetV2, which comes from
github.com/jfzhang95/pytorch-deeplab-xception.
"""

import re
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.models._mobilenetv2 import timm_name
from timm_dynamic.models.dy_deeplabv3plus import DyDeepLabV3Plus, create_deeplab, deeplab_cfg

__all__ = ["SkoltechDyDeepLabV3Plus"]

register(Family(name="dy", golden={"dy_deeplabv3plus_w050": ("skoltech_dy_deeplabv3plus_050", {"drop_rate": 0.0})}))

_STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of MobileNetV2's stages


class SkoltechDyDeepLabV3Plus(DyDeepLabV3Plus):
    """DeepLabV3+ whose MobileNetV2 pads the input of a block, not that of its depthwise convolution.

    What that convolution sees beyond the border is therefore not 0, but what the expansion's norm makes of 0; in
    training its statistics have the border, too. The dilation grows after a stage that would have a stride, not within
    it.

    Args:
        pretrained_backbone: Load timm's pretrained weights of the backbone. Its names and shapes are the same; theirs
            started from other weights.
        output_stride, **kwargs: As for `DyDeepLabV3Plus`, but for its backbone.

    Raises:
        ValueError: If an argument has an unusable value, or in training for a batch of one image.
    """

    def __init__(self, pretrained_backbone: bool = False, output_stride: int = 16, **kwargs):
        if "backbone" in kwargs:
            raise ValueError(
                f"backbone={kwargs['backbone']!r}: this network has a MobileNetV2 alone; "
                "dy_deeplabv3plus_mobilenetv2 takes others"
            )
        super().__init__(pretrained_backbone=pretrained_backbone, output_stride=output_stride, **kwargs)
        stride, dilation = 2, 1
        for stage, of_stage in zip(self.backbone.blocks, _STRIDES, strict=True):
            dilated = stride == output_stride
            for block in stage:
                if isinstance(block, InvertedResidual):
                    block.conv_dw.dilation = block.conv_pw.padding = (dilation, dilation)
                    block.conv_dw.padding = (0, 0)
            stride, dilation = (stride, dilation * of_stage) if dilated else (stride * of_stage, dilation)
        if not pretrained_backbone:
            self.initialise(self.backbone)

    def initialise(self, part: nn.Module) -> None:
        """Static convolutions normal by the fan-in, kernels of dynamic ones by the fan-out; biases 0.

        Args:
            part: Of the new network.
        """
        super().initialise(part)
        for layer in part.modules():
            if isinstance(layer, DynamicConv2d):
                nn.init.normal_(layer.kernels_weights, std=(2 / layer.kernels_weights[0, :, 0].numel()) ** 0.5)
                if layer.kernels_bias is not None:
                    nn.init.zeros_(layer.kernels_bias)


_AUTHORS_NAMES = (
    (r"^aspp\.aspp([1-4])\.bn\.", lambda match: f"aspp.branches.{int(match[1]) - 1}.bn."),
    (r"^aspp\.aspp([1-4])\.atrous_conv\.", lambda match: f"aspp.branches.{int(match[1]) - 1}.conv."),
    (r"^aspp\.global_avg_pool\.layers\.1\.", "aspp.pool.conv."),
    (r"^aspp\.global_avg_pool\.layers\.2\.", "aspp.pool.bn."),
    (r"^aspp\.(conv|bn)1\.", r"aspp.project.\1."),
    (r"^decoder\.(conv|bn)1\.", r"decoder.low.\1."),
    (r"^decoder\.last_conv\.layers\.0\.", "decoder.conv1.conv."),
    (r"^decoder\.last_conv\.layers\.1\.", "decoder.conv1.bn."),
    (r"^decoder\.last_conv\.layers\.4\.", "decoder.conv2.conv."),
    (r"^decoder\.last_conv\.layers\.5\.", "decoder.conv2.bn."),
    (r"^decoder\.last_conv\.layers\.8\.", "classifier."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Checkpoints of T. Ardelean et al.'s DeepLabV3+, dynamic or static; they hold the backbone twice."""
    if state_dict.keys() <= model.state_dict().keys():
        return state_dict
    return {_our_name(key): value for key, value in extract_state_dict(state_dict).items()}


def _our_name(key: str) -> str:
    if key.startswith("backbone."):
        key = re.sub(r"^backbone\.(low_level_|high_level_)?features\.", "features.", key)
        return f"backbone.{timm_name(key)}"
    for pattern, ours in _AUTHORS_NAMES:
        name, found = re.subn(pattern, ours, key)
        if found:
            return name
    return key


_NAMES = ("skoltech_dy_deeplabv3plus", "skoltech_dy_deeplabv3plus_050")
default_cfgs = generate_default_cfgs({f"{name}.untrained": deeplab_cfg() for name in _NAMES})


@register_model
def skoltech_dy_deeplabv3plus(pretrained: bool = False, **kwargs) -> SkoltechDyDeepLabV3Plus:
    """T. Ardelean et al.'s DeepLabV3+ with a dynamic pyramid and decoder, on their static MobileNetV2."""
    return create_deeplab("skoltech_dy_deeplabv3plus", pretrained, kwargs, SkoltechDyDeepLabV3Plus)


@register_model
def skoltech_dy_deeplabv3plus_050(pretrained: bool = False, **kwargs) -> SkoltechDyDeepLabV3Plus:
    """The same with a pyramid and decoder of half the width."""
    kwargs = {"width_multiplier": 0.5, **kwargs}
    return create_deeplab("skoltech_dy_deeplabv3plus_050", pretrained, kwargs, SkoltechDyDeepLabV3Plus)
