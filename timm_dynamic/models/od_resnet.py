"""ResNets with omni-dimensional dynamic convolution (Li, Zhou and Yao, ICLR 2022, arXiv 2209.07947).

timm's ResNet, with every convolution of the residual branches an `ODConv2d`; stem, shortcuts and classifier are static.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import ODConv2d
from timm_dynamic.models._cfg import shipped_cfg
from timm_dynamic.models._od import load_authors, make_dynamic, od_cfg, od_cfgs, reported
from timm_dynamic.models._resnet import TINY, use_small_stem

__all__ = ["ODResNet"]

_TWINS = {f"od_resnet{n}{form}": f"resnet{n}" for n in (18, 34, 50) for form in ("", "_4x")}
_TWINS |= {"od_resnet101": "resnet101", "od_resnet101_2x": "resnet101"}
register(
    Family(
        name="od",
        title="ODConv",
        about="omni-dimensional dynamic convolution",
        paper="Li, Zhou and Yao, ICLR 2022, arXiv 2209.07947",
        tiny="test_od_resnet",
        layer=ODConv2d,
        keeps=0.0,
        routing="the gates",
        timed=("od_resnet18", "od_resnet18_4x"),
        twins=_TWINS,
        reported=reported("resnet"),
    )
)


class ODResNet(ResNet):
    """timm's `ResNet` with omni-dimensional dynamic convolutions in its blocks.

    Args:
        *args, **kwargs: As for `ResNet`. New blocks are not initialised as identities (`zero_init_last`).
        small_stem: For images of 32 to 64 pixels: a 3x3 convolution with stride 1 and no max-pool.
        num_kernels, reduction: As for `ODConv2d`.
        anneal_steps: Training forwards in which the temperature falls from 30 to 1.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(
        self,
        *args,
        small_stem: bool = False,
        num_kernels: int = 1,
        reduction: float = 1 / 16,
        anneal_steps: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **{"zero_init_last": False, **kwargs})
        if small_stem:
            use_small_stem(self)
        blocks = [name for name, module in self.named_modules() if isinstance(module, (BasicBlock, Bottleneck))]
        names = [f"{block}.{conv}" for block in blocks for conv in ("conv1", "conv2", "conv3")]
        modules = dict(self.named_modules())
        make_dynamic(self, [name for name in names if name in modules], num_kernels, reduction, anneal_steps)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: timm's names, but for the kernels'."""
    return state_dict if state_dict.keys() <= model.state_dict().keys() else load_authors(state_dict, model)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args) -> ODResNet:
    return build_model(ODResNet, variant, pretrained, **{**model_args, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        **od_cfgs(_TWINS, "conv1", "fc"),
        "test_od_resnet.digits": od_cfg("conv1.0", "fc", **shipped_cfg("test_od_resnet.digits")),
    }
)


@register_model
def od_resnet18(pretrained: bool = False, **kwargs) -> ODResNet:
    """OD-ResNet-18 with one kernel."""
    return _create("od_resnet18", pretrained, kwargs, block=BasicBlock, layers=(2, 2, 2, 2))


@register_model
def od_resnet18_4x(pretrained: bool = False, **kwargs) -> ODResNet:
    """OD-ResNet-18 with four kernels."""
    return _create("od_resnet18_4x", pretrained, kwargs, block=BasicBlock, layers=(2, 2, 2, 2), num_kernels=4)


@register_model
def od_resnet34(pretrained: bool = False, **kwargs) -> ODResNet:
    """OD-ResNet-34 with one kernel."""
    return _create("od_resnet34", pretrained, kwargs, block=BasicBlock, layers=(3, 4, 6, 3))


@register_model
def od_resnet34_4x(pretrained: bool = False, **kwargs) -> ODResNet:
    """OD-ResNet-34 with four kernels."""
    return _create("od_resnet34_4x", pretrained, kwargs, block=BasicBlock, layers=(3, 4, 6, 3), num_kernels=4)


@register_model
def od_resnet50(pretrained: bool = False, **kwargs) -> ODResNet:
    """OD-ResNet-50 with one kernel."""
    return _create("od_resnet50", pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3))


@register_model
def od_resnet50_4x(pretrained: bool = False, **kwargs) -> ODResNet:
    """OD-ResNet-50 with four kernels."""
    return _create("od_resnet50_4x", pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3), num_kernels=4)


@register_model
def od_resnet101(pretrained: bool = False, **kwargs) -> ODResNet:
    """OD-ResNet-101 with one kernel."""
    return _create("od_resnet101", pretrained, kwargs, block=Bottleneck, layers=(3, 4, 23, 3))


@register_model
def od_resnet101_2x(pretrained: bool = False, **kwargs) -> ODResNet:
    """OD-ResNet-101 with two kernels."""
    return _create("od_resnet101_2x", pretrained, kwargs, block=Bottleneck, layers=(3, 4, 23, 3), num_kernels=2)


@register_model
def test_od_resnet(pretrained: bool = False, **kwargs) -> ODResNet:
    """A tiny OD-ResNet with four kernels for tests and small images, as timm's `test_resnet` is one of ResNet."""
    return _create("test_od_resnet", pretrained, kwargs, block=BasicBlock, num_kernels=4, **TINY)
