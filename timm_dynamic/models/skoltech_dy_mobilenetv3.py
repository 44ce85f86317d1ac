"""The MobileNetV3 of T. Ardelean et al. (Skoltech), with attention over convolution kernels: for their checkpoints.

Howard et al., "Searching for MobileNetV3" (arXiv 1905.02244), with the convolutions of Chen et al., CVPR 2020 (arXiv
1912.03458). It differs from `dy_mobilenetv3*`, which are timm's networks, and shares no weights with them: the first
block expands, too, squeeze-and-excitation comes before the activation and has no biases, channels are rounded up, and
the small network, too, has 1280 features. Theirs ends in the logarithm of the softmax, this one in logits.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import SEModule, create_act_layer
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.models._dy import dy_cfg, make_dynamic

__all__ = ["SkoltechDyMobileNetV3"]

register(
    Family(
        name="dy",
        patterns=("skoltech_dy_*",),
        golden={"dy_mobilenetv3_small_w050": ("skoltech_dy_mobilenetv3_small_050", {"num_classes": 10})},
    )
)

# Stages of blocks: kernel, expanded channels, channels, squeeze-and-excitation, ReLU (else hard swish), stride.
_LARGE = (
    ((3, 16, 16, False, True, 1),),
    ((3, 64, 24, False, True, 2), (3, 72, 24, False, True, 1)),
    ((5, 72, 40, True, True, 2), *2 * ((5, 120, 40, True, True, 1),)),
    ((3, 240, 80, False, False, 2), (3, 200, 80, False, False, 1), *2 * ((3, 184, 80, False, False, 1),)),
    ((3, 480, 112, True, False, 1), (3, 672, 112, True, False, 1)),
    ((5, 672, 160, True, False, 2), *2 * ((5, 960, 160, True, False, 1),)),
)
_SMALL = (
    ((3, 16, 16, True, True, 2),),
    ((3, 72, 24, False, True, 2), (3, 88, 24, False, True, 1)),
    ((5, 96, 40, True, False, 2), *2 * ((5, 240, 40, True, False, 1),)),
    ((5, 120, 48, True, False, 1), (5, 144, 48, True, False, 1)),
    ((5, 288, 96, True, False, 2), *2 * ((5, 576, 96, True, False, 1),)),
)
_STEM = 16
# Position in the block's sequence to timm's name.
_BLOCK = {
    **{"0": "conv_pw", "1": "bn1", "3": "conv_dw", "4": "bn2", "7": "conv_pwl", "8": "bn3"},
    **{"5.fc.0": "se.0.fc1", "5.fc.2": "se.0.fc2"},
}


def squeeze_then_act(
    channels: int, act_layer: type[nn.Module] | str = "relu", rd_ratio: float = 0.25, device=None, dtype=None
) -> nn.Sequential:
    """timm's squeeze-and-excitation without biases, and then the activation.

    Args:
        channels: C.
        act_layer: The activation.
        rd_ratio: The hidden layer has `rd_ratio * channels` units.
    """
    dd = {"device": device, "dtype": dtype}
    squeeze = SEModule(channels, rd_ratio, rd_divisor=1, bias=False, gate_layer="hard_sigmoid", **dd)
    return nn.Sequential(squeeze, create_act_layer(act_layer, inplace=True))


class SkoltechDyMobileNetV3(MobileNetV3):
    """timm's `MobileNetV3` as T. Ardelean et al. have it; every convolution but the first one is dynamic.

    Args:
        *args, **kwargs: As for `MobileNetV3`.
        stem_stride: Of the first convolution, and in the small network of the first block: 2, or 1 for images of 64
            pixels.
        dynamic: False: the static network of the same form, which they compared with.
        num_kernels: Of every dynamic convolution, or a number for each (see `make_dynamic`).
        reduction: Of the attention's hidden layers.
        anneal_steps: Training forwards in which the temperature falls from 30 to 1.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(
        self,
        *args,
        stem_stride: int = 2,
        dynamic: bool = True,
        num_kernels: int | Sequence[int] = 4,
        reduction: int = 4,
        anneal_steps: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.conv_stem.stride = (stem_stride, stem_stride)
        for info in self.feature_info:
            info["reduction"] = info["reduction"] * stem_stride // 2
        if dynamic:
            make_dynamic(self, num_kernels, reduction, anneal_steps)
        self.apply(_initialise)
        for block in (block for stage in self.blocks for block in stage):
            if isinstance(getattr(block, "se", None), nn.Sequential):
                block.bn2.act = nn.Identity()
                for linear in (block.se[0].fc1, block.se[0].fc2):
                    nn.init.normal_(linear.weight, std=0.01)


def _initialise(layer: nn.Module) -> None:
    """Kernels normal by the fan-out, of all groups together; linear layers, attention too, nearly 0."""
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    elif isinstance(layer, (nn.Conv2d, DynamicConv2d)):
        dynamic = isinstance(layer, DynamicConv2d)
        kernels, bias = (layer.kernels_weights, layer.kernels_bias) if dynamic else (layer.weight, layer.bias)
        nn.init.normal_(kernels, std=(2 / (layer.out_channels * kernels.shape[-2:].numel())) ** 0.5)
        if bias is not None:
            nn.init.zeros_(bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Checkpoints of T. Ardelean et al.'s MobileNetV3, dynamic or static; squeeze-and-excitation is linear there."""
    if state_dict.keys() <= model.state_dict().keys():
        return state_dict
    names, state = _authors_names(model), {}
    for key, value in extract_state_dict(state_dict).items():
        theirs = next(filter(key.startswith, names), "")
        name = names.get(theirs, "") + key.removeprefix(theirs)
        state[name] = value[:, :, None, None] if ".se." in name and value.ndim == 2 else value
    return state


def _authors_names(model: nn.Module) -> dict[str, str]:
    """Their names of a model's parts to ours, with a dot behind."""
    blocks = [f"blocks.{stage}.{i}" for stage, blocks in enumerate(model.blocks) for i in range(len(blocks))]
    names = {"features.layers.0.layers.0": "conv_stem", "features.layers.0.layers.1": "bn1"}
    for number, block in enumerate(blocks[:-1], 1):
        names |= {f"features.layers.{number}.conv.layers.{key}": f"{block}.{part}" for key, part in _BLOCK.items()}
    last = len(blocks)
    names |= {f"features.layers.{last}.layers.{i}": f"{blocks[-1]}.{part}" for i, part in enumerate(("conv", "bn1"))}
    names |= {f"features.layers.{last + 2}": "conv_head", "classifier.layers.1": "classifier"}
    return {f"{theirs}.": f"{ours}." for theirs, ours in names.items()}


def _round_up(channels: float) -> int:
    return -int(-channels // 8) * 8


def _stages(rows: Sequence[Sequence[tuple]], last: int, width: float, stem_stride: int) -> list[list[str]]:
    """timm's descriptions of the blocks, with the channels of this width."""
    stages, channels = [], _STEM
    for stage in rows:
        stages.append([])
        for kernel, expanded, out, squeeze, relu, stride in stage:
            if rows is _SMALL and len(stages) == 1:
                stride = stem_stride
            expansion, channels_out = _round_up(expanded * width) / channels, _round_up(out * width)
            options = "_se0.25" * squeeze + "_nre" * relu
            stages[-1].append(f"ir_r1_k{kernel}_s{stride}_e{expansion}_c{channels_out}{options}")
            channels = channels_out
    return [*stages, [f"cn_r1_k1_s1_c{_round_up(last * width)}"]]


def _create(
    variant: str, pretrained: bool, kwargs: dict[str, Any], rows: Sequence, last: int, width: float = 1.0
) -> SkoltechDyMobileNetV3:
    kwargs = dict(kwargs)
    stem_stride = kwargs.pop("stem_stride", 2)
    if type(stem_stride) is not int or stem_stride not in (1, 2):
        raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride!r}")
    stages = _stages(rows, last, width, stem_stride)
    sizes = 1 + sum("_s2_" in block for stage in stages for block in stage)
    model_args = {
        "block_args": decode_arch_def(stages),
        "num_features": _round_up(1280 * max(1, width)),
        "stem_size": _STEM,
        "round_chs_fn": int,
        "norm_layer": kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        "act_layer": resolve_act_layer(kwargs, "hard_swish"),
        "se_layer": squeeze_then_act,
        "stem_stride": stem_stride,
        **kwargs,
    }
    return build_model(
        SkoltechDyMobileNetV3,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": tuple(range(sizes))},
        **model_args,
    )


default_cfgs = generate_default_cfgs(
    {
        f"skoltech_dy_mobilenetv3_{size}.untrained": dy_cfg("conv_stem", "classifier", crop_pct=0.7)
        for size in ("large", "small", "small_050", "small_025")
    }
)


@register_model
def skoltech_dy_mobilenetv3_large(pretrained: bool = False, **kwargs) -> SkoltechDyMobileNetV3:
    """T. Ardelean et al.'s DY-MobileNetV3, large."""
    return _create("skoltech_dy_mobilenetv3_large", pretrained, kwargs, _LARGE, 960)


@register_model
def skoltech_dy_mobilenetv3_small(pretrained: bool = False, **kwargs) -> SkoltechDyMobileNetV3:
    """T. Ardelean et al.'s DY-MobileNetV3, small."""
    return _create("skoltech_dy_mobilenetv3_small", pretrained, kwargs, _SMALL, 576)


@register_model
def skoltech_dy_mobilenetv3_small_050(pretrained: bool = False, **kwargs) -> SkoltechDyMobileNetV3:
    """T. Ardelean et al.'s DY-MobileNetV3, small, of half the width."""
    return _create("skoltech_dy_mobilenetv3_small_050", pretrained, kwargs, _SMALL, 576, 0.5)


@register_model
def skoltech_dy_mobilenetv3_small_025(pretrained: bool = False, **kwargs) -> SkoltechDyMobileNetV3:
    """T. Ardelean et al.'s DY-MobileNetV3, small, of a quarter of the width."""
    return _create("skoltech_dy_mobilenetv3_small_025", pretrained, kwargs, _SMALL, 576, 0.25)
