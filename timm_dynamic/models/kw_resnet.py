"""ResNets with KernelWarehouse (Li and Yao, ICML 2024, arXiv 2406.07879).

timm's ResNet, with the convolutions of its blocks and the strided shortcuts `KWConv2d`. A stage has one warehouse,
which the first convolution and the shortcut of the next stage take their cells from, too. Of bottlenecks, the first
block's first convolution and shortcut are static.
"""

import re
from collections.abc import Iterator
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import KWConv2d
from timm_dynamic.models._cfg import shipped_cfg
from timm_dynamic.models._kw import kw_cfg, load_authors, make_dynamic, split_options
from timm_dynamic.models._resnet import TINY, use_small_stem

__all__ = ["KWResNet"]

_TOP1 = {
    "kw1d4x_resnet18": 72.73,
    "kw1d2x_resnet18": 73.33,
    "kw1x_resnet18": 74.77,
    "kw2x_resnet18": 75.19,
    "kw4x_resnet18": 76.05,
    "kw1d2x_resnet50": 79.30,
    "kw1x_resnet50": 80.38,
    "kw4x_resnet50": 81.05,
}
register(
    Family(
        name="kw",
        title="KernelWarehouse",
        about="kernels mixed of cells that the layers of a stage share",
        paper="Li and Yao, ICML 2024, arXiv 2406.07879",
        tiny="test_kw_resnet",
        layer=KWConv2d,
        keeps=0.0,
        routing="how much of every cell there is in a kernel",
        timed=("kw1x_resnet18",),
        twins={name: name.partition("_")[2] for name in _TOP1},
        reported={f"{name}.in1k": top1 for name, top1 in _TOP1.items()},
        patterns=("kw1d4x_*", "kw1d2x_*", "kw1x_*", "kw2x_*", "kw4x_*"),
    )
)


class KWResNet(ResNet):
    """timm's `ResNet` with `KWConv2d` in its blocks.

    Args:
        *args, **kwargs: As for `ResNet`.
        small_stem: For images of 32 to 64 pixels: a 3x3 convolution with stride 1 and no max-pool.
        cell_num_ratio, cell_out_ratio, cell_in_ratio: As for `Warehouse`.
        reduction, basis_ratio, anneal_epochs: As for `KWConv2d`.
        anneal_steps: Training forwards in which tau falls from 1 to 0.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(self, *args, small_stem: bool = False, **kwargs):
        options = split_options(kwargs)
        super().__init__(*args, **kwargs)
        if small_stem:
            use_small_stem(self)
        make_dynamic(self, dict(_places(self)), **options)


def _places(model: ResNet) -> Iterator[tuple[str, int]]:
    """The names of the convolutions that are dynamic, and the number of the warehouse of each."""
    for name, module in model.named_modules():
        match = re.fullmatch(r"layer(\d+)\.(\d+)\.(conv\d|downsample).*", name)
        if not match or not isinstance(module, nn.Conv2d):
            continue
        stage, handed_over = int(match[1]) - 1, match[2] == "0" and match[3] in ("conv1", "downsample")
        static = match[3] == "downsample" or isinstance(model.layer1[0], Bottleneck)
        if stage > 0 or not (handed_over and static):
            yield name, max(stage - handed_over, 0)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: their keys are ours, but for the warehouses."""
    return load_authors(state_dict, model)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args) -> KWResNet:
    return build_model(KWResNet, variant, pretrained, **{**model_args, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.in1k": kw_cfg("conv1", "fc", hf_hub_id=f"timm-dynamic/{name}.in1k") for name in _TOP1},
        "test_kw_resnet.digits": kw_cfg("conv1.0", "fc", **shipped_cfg("test_kw_resnet.digits")),
    }
)

_RESNET18 = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
_RESNET50 = {"block": Bottleneck, "layers": (3, 4, 6, 3)}
_HALF = {"cell_out_ratio": 0.5, "cell_in_ratio": 0.5}


@register_model
def kw1d4x_resnet18(pretrained: bool = False, **kwargs) -> KWResNet:
    """KW-ResNet-18 of a quarter of the cells."""
    return _create("kw1d4x_resnet18", pretrained, kwargs, **_RESNET18, **_HALF, cell_num_ratio=0.25)


@register_model
def kw1d2x_resnet18(pretrained: bool = False, **kwargs) -> KWResNet:
    """KW-ResNet-18 of half of the cells."""
    return _create("kw1d2x_resnet18", pretrained, kwargs, **_RESNET18, **_HALF, cell_num_ratio=0.5)


@register_model
def kw1x_resnet18(pretrained: bool = False, **kwargs) -> KWResNet:
    """KW-ResNet-18 of as many cells as mixtures."""
    return _create("kw1x_resnet18", pretrained, kwargs, **_RESNET18)


@register_model
def kw2x_resnet18(pretrained: bool = False, **kwargs) -> KWResNet:
    """KW-ResNet-18 of twice as many cells as mixtures."""
    return _create("kw2x_resnet18", pretrained, kwargs, **_RESNET18, cell_num_ratio=2)


@register_model
def kw4x_resnet18(pretrained: bool = False, **kwargs) -> KWResNet:
    """KW-ResNet-18 of four times as many cells as mixtures."""
    return _create("kw4x_resnet18", pretrained, kwargs, **_RESNET18, cell_num_ratio=4)


@register_model
def kw1d2x_resnet50(pretrained: bool = False, **kwargs) -> KWResNet:
    """KW-ResNet-50 of half of the cells, with a basis."""
    options = {**_HALF, "cell_num_ratio": 0.5, "basis_ratio": 0.0625}
    return _create("kw1d2x_resnet50", pretrained, kwargs, **_RESNET50, **options)


@register_model
def kw1x_resnet50(pretrained: bool = False, **kwargs) -> KWResNet:
    """KW-ResNet-50 of as many cells as mixtures."""
    return _create("kw1x_resnet50", pretrained, kwargs, **_RESNET50)


@register_model
def kw4x_resnet50(pretrained: bool = False, **kwargs) -> KWResNet:
    """KW-ResNet-50 of four times as many cells as mixtures."""
    return _create("kw4x_resnet50", pretrained, kwargs, **_RESNET50, cell_num_ratio=4)


@register_model
def test_kw_resnet(pretrained: bool = False, **kwargs) -> KWResNet:
    """A tiny KW-ResNet for tests and small images, as timm's `test_resnet` is one of ResNet."""
    return _create("test_kw_resnet", pretrained, kwargs, block=BasicBlock, **TINY)
