"""What the PED networks share."""

from typing import Any

from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.layers import PEDConv2d
from timm_dynamic.models._cfg import imagenet_cfg


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
        fan_out = layer.weight[:, 0].numel() // layer.groups
        nn.init.normal_(layer.weight, std=(2 / fan_out) ** 0.5)
        block.set_submodule(name, layer)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: their keys are ours, within a wrapper and with `module.` somewhere in them."""
    own = model.state_dict()
    if all(key in own for key in state_dict):
        return state_dict
    return {key.replace("module.", ""): value for key, value in extract_state_dict(state_dict).items()}


def ped_cfg(first_conv: str, classifier: str, **kwargs) -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    about = {
        "interpolation": "bilinear",
        "origin_url": "https://github.com/zejiangh/PEDConv",
        "paper_name": "Parameter-Efficient Dynamic Convolution via Tensor Decomposition",  # not on arXiv
    }
    return imagenet_cfg(first_conv, classifier, **{**about, **kwargs})
