"""RedNets: ResNets with involution (Li et al., CVPR 2021, arXiv 2103.06255).

timm's ResNet with a deep stem, in which the second 3x3 convolution, and that of every bottleneck, is an `Involution2d`.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import Involution2d
from timm_dynamic.models._cfg import imagenet_cfg, shipped_cfg

__all__ = ["InvolutionBottleneck", "RedNet"]

register(
    Family(
        name="involution",
        title="Involution",
        about="a filter for every position, made from the input there",
        paper="Li et al., CVPR 2021, arXiv 2103.06255",
        tiny="test_rednet",
        layer=Involution2d,
        patterns=("rednet*", "test_rednet*"),
        timed=("rednet50",),
        twins={f"rednet{n}": f"resnet{n}" for n in (50, 101, 152)},
        reported={"rednet26": 75.96, "rednet38": 77.48, "rednet50": 78.35, "rednet101": 78.92, "rednet152": 79.12},
    )
)

_STEM = ("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1")
_THEIR_STEM = ("stem.0.conv", "stem.0.bn", "stem.1", "stem.2", "stem.4.conv", "stem.4.bn")


class InvolutionBottleneck(Bottleneck):
    """timm's `Bottleneck` with an `Involution2d` as `conv2`, at that convolution's width, stride and dilation.

    Args:
        *args, **kwargs: As for `Bottleneck`.
        kernel_size, group_channels, reduction: As for `Involution2d`.

    Raises:
        ValueError: If `conv2` is grouped or changes the number of channels.
    """

    def __init__(self, *args, kernel_size: int = 7, group_channels: int = 16, reduction: int = 4, **kwargs):
        super().__init__(*args, **kwargs)
        conv = self.conv2
        if conv.groups != 1:
            raise ValueError(f"a RedNet has no grouped convolutions: cardinality must be 1, got {conv.groups}")
        options = {"group_channels": group_channels, "reduction": reduction}
        self.conv2 = _involution(conv, kernel_size, **options)


def _involution(conv: nn.Conv2d, kernel_size: int, **options) -> Involution2d:
    """What replaces a new convolution."""
    return Involution2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size,
        conv.stride,
        conv.dilation[0] * (kernel_size // 2),
        conv.dilation,
        bias=False,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **options,
    )


class RedNet(ResNet):
    """timm's `ResNet` with a deep stem and involution.

    Args:
        *args, **kwargs: As for `ResNet`, with `InvolutionBottleneck` as block and a deep stem.
        stem_kernel_size: Of the stem's involution: 3 in the authors' classifiers, 7 in their detectors. Weights on
            loading replace the stem by one of theirs.
    """

    def __init__(self, *args, stem_kernel_size: int = 3, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv1[3] = _involution(self.conv1[3], stem_kernel_size)
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints, of mmcv's runner: our stem is a sequence, and `fc` is not in a `head`.

    The stem's involution of the model becomes one with the kernel size of the weights.
    """
    state_dict = extract_state_dict(state_dict)
    if any(key.startswith(("backbone.", "stem.")) for key in state_dict):
        state_dict = {_our_name(key): value for key, value in state_dict.items()}
    taps = state_dict.get("conv1.3.conv2.conv.bias")
    if taps is not None and taps.ndim == 1 and isinstance(model, RedNet):
        stem = model.conv1[3]
        if len(taps) != len(stem.conv2.conv.bias):
            kernel_size = round((len(taps) / stem.filters) ** 0.5)
            dd = {"device": stem.conv2.conv.weight.device, "dtype": stem.conv2.conv.weight.dtype}
            args = (stem.in_channels, stem.out_channels, kernel_size, 1, kernel_size // 2)
            model.conv1[3] = Involution2d(*args, bias=False, **dd).train(stem.training)
    return state_dict


def _our_name(key: str) -> str:
    key = key.removeprefix("backbone.").removeprefix("head.")
    for theirs, ours in zip(_THEIR_STEM, _STEM, strict=True):
        if key.startswith(f"{theirs}."):
            return ours + key.removeprefix(theirs)
    return key


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args) -> RedNet:
    """Build a model; the options of the bottlenecks are arguments of the model too, and `block_args` for timm's."""
    kwargs = {"block": InvolutionBottleneck, "stem_type": "deep", "stem_width": 32, **model_args, **kwargs}
    names = ("kernel_size", "group_channels", "reduction")
    block_args = {name: kwargs.pop(name) for name in names if name in kwargs}
    kwargs["block_args"] = {**block_args, **(kwargs.get("block_args") or {})}
    return build_model(RedNet, variant, pretrained, **kwargs)


def _cfg(**kwargs) -> dict[str, Any]:
    about = {
        "interpolation": "bilinear",
        "origin_url": "https://github.com/d-li14/involution",
        "paper_ids": "arXiv:2103.06255",
    }
    return imagenet_cfg("conv1.0", "fc", **{**about, **kwargs})


_DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
default_cfgs = generate_default_cfgs(
    {
        **{f"rednet{depth}.untrained": _cfg() for depth in _DEPTHS},
        "test_rednet.digits": _cfg(**shipped_cfg("test_rednet.digits")),
    }
)


@register_model
def rednet26(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-26."""
    return _create("rednet26", pretrained, kwargs, layers=_DEPTHS[26])


@register_model
def rednet38(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-38."""
    return _create("rednet38", pretrained, kwargs, layers=_DEPTHS[38])


@register_model
def rednet50(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-50."""
    return _create("rednet50", pretrained, kwargs, layers=_DEPTHS[50])


@register_model
def rednet101(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-101."""
    return _create("rednet101", pretrained, kwargs, layers=_DEPTHS[101])


@register_model
def rednet152(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-152."""
    return _create("rednet152", pretrained, kwargs, layers=_DEPTHS[152])


@register_model
def test_rednet(pretrained: bool = False, **kwargs) -> RedNet:
    """A tiny RedNet for tests and small images, as timm's `test_resnet` is one of ResNet."""
    model_args = {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64), "stem_width": 16, "avg_down": True}
    return _create("test_rednet", pretrained, kwargs, **model_args)
