"""ResNets with decoupled dynamic filters (Zhou et al., CVPR 2021, arXiv 2104.14107).

timm's ResNet, with the 3x3 convolution of every bottleneck replaced by a `DDFPack`.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import DDFConv2d, DDFPack
from timm_dynamic.models._cfg import imagenet_cfg, shipped_cfg

__all__ = ["DDFBottleneck"]

register(
    Family(
        name="ddf",
        title="DDF",
        about="a depthwise filter for each pixel, made of one for its position and one for its channel",
        paper="Zhou et al., CVPR 2021, arXiv 2104.14107",
        tiny="test_ddf_resnet",
        layer=DDFConv2d,
        timed=("ddf_mul_resnet50",),
        twins={f"ddf_{combine}_resnet{n}": f"resnet{n}" for combine in ("mul", "add") for n in (50, 101, 152)},
        reported={
            "ddf_mul_resnet50.in1k": 79.1,
            "ddf_mul_resnet101.in1k": 80.5,
            "ddf_mul_resnet101": 80.2,
            "ddf_add_resnet50.in1k": 78.8,
            "ddf_add_resnet101.in1k": 79.9,
        },
    )
)

_DDF_OPTIONS = ("kernel_size", "head", "se_ratio", "nonlinearity", "kernel_combine")


class DDFBottleneck(Bottleneck):
    """timm's `Bottleneck` with a `DDFPack` as `conv2`, at that convolution's width, stride and dilation.

    Args:
        *args, **kwargs: As for `Bottleneck`.
        kernel_size, head, se_ratio, nonlinearity, kernel_combine: As for `DDFPack`.

    Raises:
        ValueError: If `conv2` is grouped or changes the number of channels.
    """

    def __init__(
        self,
        *args,
        kernel_size: int = 3,
        head: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        kernel_combine: str = "mul",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        conv = self.conv2
        if conv.groups != 1:
            raise ValueError(f"a DDF network has no grouped convolutions: cardinality must be 1, got {conv.groups}")
        if conv.in_channels != conv.out_channels:
            raise ValueError(
                f"DDF keeps the channels, {conv.in_channels} cannot become {conv.out_channels}: "
                "block_reduce_first must be 1"
            )
        self.conv2 = DDFPack(
            conv.in_channels,
            kernel_size,
            conv.stride[0],
            conv.dilation[0],
            head,
            se_ratio,
            nonlinearity,
            kernel_combine,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: their keys are ours, within a wrapper."""
    own = model.state_dict()
    return state_dict if all(key in own for key in state_dict) else extract_state_dict(state_dict)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args) -> ResNet:
    """Build a model; the options of `DDFPack` are arguments of the model too, and `block_args` for timm's ResNet."""
    kwargs = {"block": DDFBottleneck, **model_args, **kwargs}
    block_args = {name: kwargs.pop(name) for name in _DDF_OPTIONS if name in kwargs}
    kwargs["block_args"] = {**block_args, **(kwargs.get("block_args") or {})}
    return build_model(ResNet, variant, pretrained, **kwargs)


def _cfg(first_conv: str = "conv1", **kwargs) -> dict[str, Any]:
    about = {"origin_url": "https://github.com/theFoxofSky/ddfnet", "paper_ids": "arXiv:2104.14107"}
    return imagenet_cfg(first_conv, "fc", **{**about, **kwargs})


def _in1k(name: str) -> dict[str, Any]:
    return _cfg(hf_hub_id=f"timm-dynamic/{name}.in1k")


default_cfgs = generate_default_cfgs(
    {
        "ddf_mul_resnet50.in1k": _in1k("ddf_mul_resnet50"),
        "ddf_mul_resnet101.in1k": _in1k("ddf_mul_resnet101"),
        "ddf_mul_resnet152.untrained": _cfg(),
        "ddf_add_resnet50.in1k": _in1k("ddf_add_resnet50"),
        "ddf_add_resnet101.in1k": _in1k("ddf_add_resnet101"),
        "ddf_add_resnet152.untrained": _cfg(),
        "test_ddf_resnet.digits": _cfg("conv1.0", **shipped_cfg("test_ddf_resnet.digits")),
    }
)


@register_model
def ddf_mul_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """DDF-ResNet-50, filter factors multiplied."""
    return _create("ddf_mul_resnet50", pretrained, kwargs, layers=(3, 4, 6, 3), kernel_combine="mul")


@register_model
def ddf_mul_resnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """DDF-ResNet-101, filter factors multiplied."""
    return _create("ddf_mul_resnet101", pretrained, kwargs, layers=(3, 4, 23, 3), kernel_combine="mul")


@register_model
def ddf_mul_resnet152(pretrained: bool = False, **kwargs) -> ResNet:
    """DDF-ResNet-152, filter factors multiplied."""
    return _create("ddf_mul_resnet152", pretrained, kwargs, layers=(3, 8, 36, 3), kernel_combine="mul")


@register_model
def ddf_add_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """DDF-ResNet-50, filter factors added."""
    return _create("ddf_add_resnet50", pretrained, kwargs, layers=(3, 4, 6, 3), kernel_combine="add")


@register_model
def ddf_add_resnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """DDF-ResNet-101, filter factors added."""
    return _create("ddf_add_resnet101", pretrained, kwargs, layers=(3, 4, 23, 3), kernel_combine="add")


@register_model
def ddf_add_resnet152(pretrained: bool = False, **kwargs) -> ResNet:
    """DDF-ResNet-152, filter factors added."""
    return _create("ddf_add_resnet152", pretrained, kwargs, layers=(3, 8, 36, 3), kernel_combine="add")


@register_model
def test_ddf_resnet(pretrained: bool = False, **kwargs) -> ResNet:
    """A tiny DDF-ResNet for tests and small images, as timm's `test_resnet` is one of ResNet."""
    model_args = {"layers": (1, 1, 1, 1), "channels": (24, 32, 48, 64), "stem_width": 16, "stem_type": "deep"}
    return _create("test_ddf_resnet", pretrained, kwargs, avg_down=True, **model_args)
