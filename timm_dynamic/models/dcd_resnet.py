"""ResNets with dynamic channel fusion (Li et al., ICLR 2021, arXiv 2103.08756).

timm's ResNet, with every convolution of the residual branches a `DCDConv2d` and the classifier a `DCDLinear`; stem and
shortcuts are static.
"""

import re
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import DCDConv2d, DCDLinear
from timm_dynamic.layers.base import rename
from timm_dynamic.models._cfg import imagenet_cfg, shipped_cfg
from timm_dynamic.models._resnet import TINY, use_small_stem

__all__ = ["DCDBasicBlock", "DCDBottleneck", "DCDResNet"]

register(
    Family(
        name="dcd",
        title="DCD",
        about="the scale of output channels, and a residual of low rank",
        paper="Li et al., ICLR 2021, arXiv 2103.08756",
        tiny="test_dcd_resnet",
        layer=DCDConv2d,
        keeps=0.0,
        routing="the scale of the output channels",
        timed=("dcd_resnet50",),
        twins={f"dcd_resnet{n}": f"resnet{n}" for n in (18, 34, 50, 101, 152)},
    )
)


class DynamicClassifier:
    """To inherit from before a class of timm's: its classifier is a `DCDLinear`, also after `reset_classifier`."""

    classifier_name: str

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._make_classifier_dynamic()

    def reset_classifier(self, num_classes: int, *args, **kwargs) -> None:
        """As timm's, with a dynamic classifier."""
        super().reset_classifier(num_classes, *args, **kwargs)
        self._make_classifier_dynamic()

    def _make_classifier_dynamic(self) -> None:
        static = getattr(self, self.classifier_name)
        if isinstance(static, nn.Linear):
            dd = {"device": static.weight.device, "dtype": static.weight.dtype}
            dynamic = DCDLinear(static.in_features, static.out_features, **dd)
            setattr(self, self.classifier_name, dynamic.train(static.training))


def load_authors(state_dict: dict[str, Any], model: DynamicClassifier) -> dict[str, Tensor]:
    """The weights in an author's checkpoint: those of dynamic layers with our names, the others as they are.

    Args:
        state_dict: Wrapped or not, with or without `module.` (see `extract_state_dict`).
        model: The one to load it into.
    """
    state = {}
    for key, value in extract_state_dict(state_dict).items():
        # After the dropout, or first where there was none.
        classifier = re.fullmatch(r"classifier\.[01]\.(.+)", key)
        if classifier:
            key = f"{model.classifier_name}.{rename(classifier[1], DCDLinear.reference_names)}"
        else:
            layer, dot, leaf = key.rpartition(".conv_")
            key = layer + "." + rename(f"conv_{leaf}", DCDConv2d.reference_names) if dot else key
        state[key] = value
    return state


def dcd_cfg(first_conv: str, classifier: str, **kwargs) -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    about = {
        "interpolation": "bilinear",
        "origin_url": "https://github.com/liyunsheng13/dcd",
        "paper_ids": "arXiv:2103.08756",
    }
    classifiers = tuple(f"{classifier}.{name}" for name in ("linear", "p", "fc_scale"))
    return imagenet_cfg(first_conv, classifiers, **{**about, **kwargs})


class DCDBasicBlock(BasicBlock):
    """timm's `BasicBlock` with DCD convolutions, which see their input pooled to 2x2.

    Args:
        *args, **kwargs: As for `BasicBlock`.

    Raises:
        ValueError: If the block is to be grouped or of another width than a basic block has.
    """

    def __init__(self, *args, cardinality: int = 1, base_width: int = 64, **kwargs):
        if (cardinality, base_width) != (1, 64):
            raise ValueError(f"a basic block has cardinality 1 and base_width 64, got {cardinality} and {base_width}")
        super().__init__(*args, **kwargs)
        for name in ("conv1", "conv2"):
            setattr(self, name, DCDConv2d.from_conv(getattr(self, name), pool_size=2))


class DCDBottleneck(Bottleneck):
    """timm's `Bottleneck` with DCD convolutions.

    Args:
        *args, **kwargs: As for `Bottleneck`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("conv1", "conv2", "conv3"):
            setattr(self, name, DCDConv2d.from_conv(getattr(self, name)))


class DCDResNet(DynamicClassifier, ResNet):
    """timm's `ResNet` with a dynamic classifier; its blocks make the convolutions dynamic.

    Q, P and the static convolutions are initialised as timm does it. A new layer's scale is 1.

    Args:
        *args, **kwargs: As for `ResNet`, with `DCDBasicBlock` or `DCDBottleneck` as block.
        small_stem: For images of 32 to 64 pixels: a 3x3 convolution with stride 1 and no max-pool.
    """

    classifier_name = "fc"

    def __init__(self, *args, small_stem: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        if small_stem:
            use_small_stem(self)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: within a wrapper, the classifier and its parts named otherwise."""
    own = model.state_dict()
    return state_dict if all(key in own for key in state_dict) else load_authors(state_dict, model)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args) -> DCDResNet:
    kwargs = {**model_args, **kwargs}
    return build_model(DCDResNet, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "dcd_resnet18.untrained": dcd_cfg("conv1", "fc"),
        "dcd_resnet34.untrained": dcd_cfg("conv1", "fc"),
        "dcd_resnet50.in1k": dcd_cfg("conv1", "fc", hf_hub_id="timm-dynamic/dcd_resnet50.in1k"),
        "dcd_resnet101.untrained": dcd_cfg("conv1", "fc"),
        "dcd_resnet152.untrained": dcd_cfg("conv1", "fc"),
        "test_dcd_resnet.digits": dcd_cfg("conv1.0", "fc", **shipped_cfg("test_dcd_resnet.digits")),
    }
)


@register_model
def dcd_resnet18(pretrained: bool = False, **kwargs) -> DCDResNet:
    """DCD-ResNet-18."""
    return _create("dcd_resnet18", pretrained, kwargs, block=DCDBasicBlock, layers=(2, 2, 2, 2))


@register_model
def dcd_resnet34(pretrained: bool = False, **kwargs) -> DCDResNet:
    """DCD-ResNet-34."""
    return _create("dcd_resnet34", pretrained, kwargs, block=DCDBasicBlock, layers=(3, 4, 6, 3))


@register_model
def dcd_resnet50(pretrained: bool = False, **kwargs) -> DCDResNet:
    """DCD-ResNet-50."""
    return _create("dcd_resnet50", pretrained, kwargs, block=DCDBottleneck, layers=(3, 4, 6, 3))


@register_model
def dcd_resnet101(pretrained: bool = False, **kwargs) -> DCDResNet:
    """DCD-ResNet-101."""
    return _create("dcd_resnet101", pretrained, kwargs, block=DCDBottleneck, layers=(3, 4, 23, 3))


@register_model
def dcd_resnet152(pretrained: bool = False, **kwargs) -> DCDResNet:
    """DCD-ResNet-152."""
    return _create("dcd_resnet152", pretrained, kwargs, block=DCDBottleneck, layers=(3, 8, 36, 3))


@register_model
def test_dcd_resnet(pretrained: bool = False, **kwargs) -> DCDResNet:
    """A tiny DCD-ResNet for tests and small images, as timm's `test_resnet` is one of ResNet."""
    return _create("test_dcd_resnet", pretrained, kwargs, block=DCDBasicBlock, **TINY)
