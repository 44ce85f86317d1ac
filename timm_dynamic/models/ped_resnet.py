"""ResNets with parameter-efficient dynamic convolution (Hou and Kung, PEDConv, BMVC 2021).

timm's ResNet, with every convolution of the residual branches a `PEDConv2d`; stem, shortcuts and classifier are static.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import PEDConv2d
from timm_dynamic.models._cfg import imagenet_cfg, shipped_cfg
from timm_dynamic.models._resnet import TINY, use_small_stem

__all__ = ["PEDBasicBlock", "PEDBottleneck", "PEDResNet"]

register(
    Family(
        name="ped",
        title="PEDConv",
        about="gates of outputs, inputs and taps of the kernel",
        paper="Hou and Kung, BMVC 2021",
        tiny="test_ped_resnet",
        layer=PEDConv2d,
        keeps=0.0,
        routing="the gates",
        terms=("reconstruction",),
        exact={"noise_std": 0.0},
        timed=("ped_resnet18",),
        twins={"ped_resnet18": "resnet18", "ped_resnet50": "resnet50"},
        reported={"ped_resnet18.in1k": 74.1, "ped_resnet50": 80.5},
    )
)


def split_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take those of `PEDConv2d` out of a model's arguments."""
    return {name: kwargs.pop(name) for name in ("rank", "reduction", "noise_std", "aux_scale") if name in kwargs}


def make_dynamic(block: nn.Module, names: tuple[str, ...], options: dict[str, Any]) -> None:
    """Put PED convolutions in the place of a new block's own, initialised as the authors do: normal, by the fan-out."""
    for name in names:
        conv = block.get_submodule(name)
        layer = PEDConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=False,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )
        fan_out = layer.kernel[:, 0].numel() // layer.groups
        nn.init.normal_(layer.kernel, std=(2 / fan_out) ** 0.5)
        block.set_submodule(name, layer)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: in a wrapper, `module.` somewhere in the keys, and a layer's kernel named `weight`."""
    own = model.state_dict()
    if all(key in own for key in state_dict):
        return state_dict
    layers = [name for name, layer in model.named_modules() if isinstance(layer, PEDConv2d)]
    kernels = {f"{name}.weight": f"{name}.kernel" for name in layers}
    state = {key.replace("module.", ""): value for key, value in extract_state_dict(state_dict).items()}
    return {kernels.get(key, key): value for key, value in state.items()}


def ped_cfg(first_conv: str, classifier: str, **kwargs) -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    about = {
        "interpolation": "bilinear",
        "origin_url": "https://github.com/zejiangh/PEDConv",
        "paper_name": "Parameter-Efficient Dynamic Convolution via Tensor Decomposition",  # not on arXiv
    }
    return imagenet_cfg(first_conv, classifier, **{**about, **kwargs})


class PEDBasicBlock(BasicBlock):
    """timm's `BasicBlock` with PED convolutions.

    Args:
        *args, **kwargs: As for `BasicBlock`.
        ped_options: Keyword arguments of `PEDConv2d`.

    Raises:
        ValueError: If the block is to be grouped or of another width than a basic block has.
    """

    def __init__(self, *args, cardinality: int = 1, base_width: int = 64, ped_options: dict[str, Any], **kwargs):
        if (cardinality, base_width) != (1, 64):
            raise ValueError(
                f"a basic block has cardinality 1 and base_width 64, got {cardinality} and {base_width}: "
                "use a bottleneck"
            )
        super().__init__(*args, **kwargs)
        make_dynamic(self, ("conv1", "conv2"), ped_options)


class PEDBottleneck(Bottleneck):
    """timm's `Bottleneck` with PED convolutions.

    Args:
        *args, **kwargs: As for `Bottleneck`.
        ped_options: Keyword arguments of `PEDConv2d`.
    """

    def __init__(self, *args, ped_options: dict[str, Any], **kwargs):
        super().__init__(*args, **kwargs)
        make_dynamic(self, ("conv1", "conv2", "conv3"), ped_options)


class PEDResNet(ResNet):
    """timm's `ResNet` with PED convolutions in its blocks.

    Args:
        *args, **kwargs: As for `ResNet`, with `PEDBasicBlock` or `PEDBottleneck` as block.
        small_stem: For images of 32 to 64 pixels: a 3x3 convolution with stride 1 and no max-pool.
        rank, reduction, noise_std, aux_scale: As for `PEDConv2d`.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(self, *args, small_stem: bool = False, block_args: dict[str, Any] | None = None, **kwargs):
        block_args = {**(block_args or {}), "ped_options": split_options(kwargs)}
        super().__init__(*args, block_args=block_args, **kwargs)
        if small_stem:
            use_small_stem(self)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args) -> PEDResNet:
    kwargs = {**model_args, **kwargs}
    return build_model(PEDResNet, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "ped_resnet18.in1k": ped_cfg("conv1", "fc", hf_hub_id="timm-dynamic/ped_resnet18.in1k"),
        "ped_resnet50.untrained": ped_cfg("conv1", "fc"),
        "test_ped_resnet.digits": ped_cfg("conv1.0", "fc", **shipped_cfg("test_ped_resnet.digits")),
    }
)


@register_model
def ped_resnet18(pretrained: bool = False, **kwargs) -> PEDResNet:
    """PED-ResNet-18."""
    return _create("ped_resnet18", pretrained, kwargs, block=PEDBasicBlock, layers=(2, 2, 2, 2))


@register_model
def ped_resnet50(pretrained: bool = False, **kwargs) -> PEDResNet:
    """PED-ResNet-50."""
    return _create("ped_resnet50", pretrained, kwargs, block=PEDBottleneck, layers=(3, 4, 6, 3))


@register_model
def test_ped_resnet(pretrained: bool = False, **kwargs) -> PEDResNet:
    """A tiny PED-ResNet for tests and small images, as timm's `test_resnet` is one of ResNet."""
    return _create("test_ped_resnet", pretrained, kwargs, block=PEDBasicBlock, **TINY)
