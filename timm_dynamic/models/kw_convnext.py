"""ConvNeXt with KernelWarehouse (Li and Yao, ICML 2024, arXiv 2406.07879).

timm's ConvNeXt, with all convolutions `KWConv2d`. Stem and downsampling have a warehouse each, a stage one for its
depthwise and one for its pointwise convolutions.
"""

import re
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.models._kw import fitting, kw_cfg, load_authors, make_dynamic, split_options

__all__ = ["KWConvNeXt"]

register(Family(name="kw", twins={"kw1x_convnext_tiny": "convnext_tiny"}, reported={"kw1x_convnext_tiny.in1k": 82.51}))


class KWConvNeXt(ConvNeXt):
    """timm's `ConvNeXt` with `KWConv2d`, also in the place of the linear layers of its blocks.

    Args:
        *args, **kwargs: As for `ConvNeXt`.
        cell_num_ratio, cell_out_ratio, cell_in_ratio: As for `Warehouse`.
        reduction, basis_ratio, anneal_epochs: As for `KWConv2d`.
        anneal_steps: Training forwards in which tau falls from 1 to 0.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(self, *args, **kwargs):
        options = split_options(kwargs)
        super().__init__(*args, conv_mlp=True, **kwargs)
        names = [name for name, module in self.named_modules() if isinstance(module, nn.Conv2d)]
        places = {name: re.sub(r"blocks\.\d+\.(mlp.fc)?.*", r"\1", name) for name in names}
        first = [place for place in places.values() if "stem" in place or "downsample" in place]
        make_dynamic(self, places, first, layer_norm=True, **options)


_NAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints, which have the names of ConvNeXt's own."""
    state = load_authors(state_dict, model)
    if state is state_dict:
        return state
    renamed = {}
    for key, value in state.items():
        for pattern, ours in _NAMES:
            key = re.sub(pattern, ours, key)
        renamed[key] = value.flatten() if key.endswith(".gamma") and value.ndim == 4 else value
    return renamed


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args) -> KWConvNeXt:
    return build_model(
        KWConvNeXt,
        variant,
        pretrained,
        pretrained_filter_fn=lambda state, model: fitting(checkpoint_filter_fn(state, model), model),
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**model_args, **kwargs},
    )


default_cfgs = generate_default_cfgs(
    {
        "kw1x_convnext_tiny.in1k": kw_cfg(
            "stem.0.attention.fc1", "head.fc", hf_hub_id="timm-dynamic/kw1x_convnext_tiny.in1k"
        )
    }
)


@register_model
def kw1x_convnext_tiny(pretrained: bool = False, **kwargs) -> KWConvNeXt:
    """KW-ConvNeXt-T of as many cells as mixtures."""
    return _create("kw1x_convnext_tiny", pretrained, kwargs)
