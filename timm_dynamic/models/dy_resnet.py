"""ResNets with attention over convolution kernels (Chen et al., CVPR 2020, arXiv 1912.03458).

timm's ResNet, with every convolution but the first one a `DynamicConv2d`.
"""

import re
from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.models._cfg import shipped_cfg
from timm_dynamic.models._dy import dy_cfg, make_dynamic
from timm_dynamic.models._resnet import stem_conv, use_small_stem

__all__ = ["DyResNet"]

register(
    Family(
        name="dy",
        title="DY",
        about="a mixture of several kernels, by attention",
        paper="Chen et al., CVPR 2020, arXiv 1912.03458, as T. Ardelean implemented it",
        tiny="test_dy_resnet",
        layer=DynamicConv2d,
        keeps=0.05,
        routing="the attention over kernels",
        twins={"dy_resnet18": "resnet18", "dy_resnet50": "resnet50"},
        reported={"dy_resnet10": 67.7, "dy_resnet18": 72.7},
        golden={"dy_resnet18_w100": ("dy_resnet18", {"small_stem": True})},
    )
)


class DyResNet(ResNet):
    """timm's `ResNet` with every convolution but the first one dynamic.

    Args:
        block, layers, channels, stem_width, stem_type, **kwargs: As for `ResNet`.
        width_multiplier: Multiplies the channels of the stages and of the stem.
        small_stem: For images of 32 to 64 pixels: a 3x3 convolution with stride 1 and no max-pool.
        num_kernels: Of every dynamic convolution, or a number for each (see `make_dynamic`).
        reduction: Of the attention's hidden layers.
        anneal_steps: Training forwards in which the temperature falls from 30 to 1.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        stem_width: int = 64,
        stem_type: str = "",
        width_multiplier: float = 1.0,
        small_stem: bool = False,
        num_kernels: int | Sequence[int] = 4,
        reduction: int = 4,
        anneal_steps: int | None = None,
        **kwargs,
    ):
        cardinality, base_width = kwargs.get("cardinality", 1), kwargs.get("base_width", 64)
        if block is BasicBlock and (cardinality, base_width) != (1, 64):
            raise ValueError(
                f"a basic block has cardinality 1 and base_width 64, got {cardinality} and {base_width}: "
                "use a bottleneck"
            )
        channels = tuple(int(n * width_multiplier) for n in channels)
        # timm's plain stem always has 64 channels; a deep one has twice `stem_width`, and can be made plain afterwards.
        stem_width = int((stem_width if stem_type else 32) * width_multiplier)
        if min(stem_width, *channels) < 1:
            raise ValueError(f"width_multiplier is too small, no channels are left: {width_multiplier}")
        super().__init__(
            block, layers, channels=channels, stem_width=stem_width, stem_type=stem_type or "deep", **kwargs
        )
        if not stem_type:
            self.conv1 = stem_conv(self.conv1[0], 2 * stem_width, kernel_size=7, stride=2)
        if small_stem:
            use_small_stem(self)
        make_dynamic(self, num_kernels, reduction, anneal_steps)


_AUTHORS_NAMES = (
    (r"^(layer\d+)\.layers\.", r"\1."),
    (r"\.shortcut\.layers\.", ".downsample."),
    (r"^linear\.", "fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Checkpoints of T. Ardelean et al.'s ResNets, which are those with `small_stem`."""
    if not state_dict.keys() <= model.state_dict().keys():
        state_dict = extract_state_dict(state_dict)
        for pattern, ours in _AUTHORS_NAMES:
            state_dict = {re.sub(pattern, ours, key): value for key, value in state_dict.items()}
    return state_dict


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args) -> DyResNet:
    kwargs = {"block": BasicBlock, **model_args, **kwargs}
    return build_model(DyResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "dy_resnet10.untrained": dy_cfg("conv1", "fc"),
        "dy_resnet18.untrained": dy_cfg("conv1", "fc"),
        "dy_resnet50.untrained": dy_cfg("conv1", "fc"),
        "test_dy_resnet.digits": dy_cfg("conv1.0", "fc", **shipped_cfg("test_dy_resnet.digits")),
    }
)


@register_model
def dy_resnet10(pretrained: bool = False, **kwargs) -> DyResNet:
    """DY-ResNet-10."""
    return _create("dy_resnet10", pretrained, kwargs, layers=(1, 1, 1, 1))


@register_model
def dy_resnet18(pretrained: bool = False, **kwargs) -> DyResNet:
    """DY-ResNet-18."""
    return _create("dy_resnet18", pretrained, kwargs, layers=(2, 2, 2, 2))


@register_model
def dy_resnet50(pretrained: bool = False, **kwargs) -> DyResNet:
    """DY-ResNet-50."""
    return _create("dy_resnet50", pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3))


@register_model
def test_dy_resnet(pretrained: bool = False, **kwargs) -> DyResNet:
    """A tiny DY-ResNet for tests and small images, as timm's `test_resnet` is one of ResNet."""
    model_args = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48), "stem_width": 8, "stem_type": "deep"}
    return _create("test_dy_resnet", pretrained, kwargs, avg_down=True, **model_args)
