"""MobileNetV2 with KernelWarehouse (Li and Yao, ICML 2024, arXiv 2406.07879).

timm's EfficientNet, with all convolutions `KWConv2d`. A stage has one warehouse for its depthwise convolutions and one
for the pointwise ones, or two: for those that expand and those that project. The first block of a stage takes its cells
from the warehouses of the stage before. With half of the cells, of the pointwise convolutions only those of the last
stage are dynamic, and the classifier is, too.
"""

import re
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers.warehouse import drop_unused
from timm_dynamic.models._kw import fitting, kw_cfg, load_authors, make_dynamic, split_options
from timm_dynamic.models._mobilenetv2 import mobilenetv2_args

__all__ = ["KWMobileNetV2"]

_TOP1 = {
    "kw1d2x_mobilenetv2": 72.59,
    "kw1x_mobilenetv2": 74.68,
    "kw4x_mobilenetv2": 75.92,
    "kw1d2x_mobilenetv2_050": 65.20,
    "kw1x_mobilenetv2_050": 68.29,
    "kw4x_mobilenetv2_050": 70.26,
}
_TWIN = {name: "mobilenetv2_050" if name.endswith("_050") else "mobilenetv2_100" for name in _TOP1}
register(Family(name="kw", twins=_TWIN, reported={f"{name}.in1k": top1 for name, top1 in _TOP1.items()}))

# The stage of every block; that of the stem is 0.
_STAGES = (1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 6, 6, 6)
_LAST = 6
_KINDS = {"conv_pw": "expand", "conv_dw": "depthwise", "conv_pwl": "project"}
# cell_num_ratio, cell_out_ratio, cell_in_ratio of those warehouses of the smallest network that are no plain ones.
_HALF = {
    (_LAST, "expand"): (0.5, 0.5, 0.5),
    (_LAST, "project"): (0.5, 0.5, 0.5),
    (_LAST, "classifier"): (0.5, 1, 0.025),
}


class KWMobileNetV2(EfficientNet):
    """timm's `EfficientNet` with `KWConv2d`.

    Args:
        *args, **kwargs: As for `EfficientNet`.
        share_pointwise: The pointwise convolutions of a stage share one warehouse.
        half: Take half of the cells, where the authors do; pointwise convolutions are static but in the last stage.
        cell_num_ratio, cell_out_ratio, cell_in_ratio: As for `Warehouse`.
        reduction, basis_ratio, anneal_epochs: As for `KWConv2d`.
        anneal_steps: Training forwards in which tau falls from 1 to 0.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(self, *args, share_pointwise: bool = False, half: bool = False, **kwargs):
        options = {"anneal_epochs": 15, **split_options(kwargs)}
        super().__init__(*args, **kwargs)
        if half and isinstance(self.classifier, nn.Linear):
            self.classifier = PointwiseLinear(self.classifier)
        make_dynamic(self, _places(self, share_pointwise, half), ratios=_HALF if half else None, **options)

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """As timm's; the new classifier is static."""
        super().reset_classifier(num_classes, global_pool)
        drop_unused(self)


class PointwiseLinear(nn.Module):
    """A linear layer of features or of tokens, as the 1x1 convolution `conv` of a map: which can be dynamic.

    Shape:
        `[B, ..., C]` to `[B, ..., O]`.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        dd = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x[:, None].flatten(1, -2).mT[..., None])
        return y.transpose(1, 2).reshape(x.shape[:-1] + (y.shape[1],))


def _places(model: EfficientNet, share_pointwise: bool, half: bool) -> dict[str, Any]:
    """By the names of the convolutions that are dynamic, the stage and kind of their warehouses."""
    places, stages = {"conv_stem": (0, "stem")}, iter(_STAGES)
    for i, blocks in enumerate(model.blocks):
        for j, block in enumerate(blocks):
            stage = next(stages)
            for name, kind in _KINDS.items():
                if hasattr(block, name):
                    kind = "project" if not hasattr(block, "conv_pwl") and kind == "expand" else kind
                    places[f"blocks.{i}.{j}.{name}"] = (stage, kind)
    places["conv_head"] = (_LAST, "project")
    if half:
        places = {key: place for key, place in places.items() if place[0] in (0, _LAST) or place[1] == "depthwise"}
        if isinstance(model.classifier, PointwiseLinear):
            places["classifier.conv"] = (_LAST, "classifier")
    if share_pointwise:
        places = {
            key: (place[0], "pointwise") if place[1] in ("expand", "project") else place
            for key, place in places.items()
        }
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(places.items(), key=lambda item: order[item[0]]))


_FIRST = ("conv_dw", "bn1", "conv_pw", "bn2")
_OTHERS = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
_LEAF = re.compile(r"\.(attention\..+|weight|bias|running_mean|running_var|num_batches_tracked)$")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints, whose `features` are stem, blocks and head: a block's parts come as they run."""
    blocks = [f"blocks.{i}.{j}." for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    names, ours, renamed = iter(()), {}, {}
    for key, value in load_authors(state_dict, model).items():
        key = re.sub(r"^classifier\.\d+\.", "classifier.", key)
        match, leaf = re.match(r"features\.(\d+)\.", key), _LEAF.search(key)
        if match and leaf:
            part, number = key[: leaf.start()], int(match[1])
            if part not in ours:
                if not any(seen.startswith(match[0]) for seen in ours):
                    names = iter(_parts(number, blocks))
                ours[part] = next(names, part)
            key = ours[part] + leaf[0]
        renamed[key] = value
    return renamed


def _parts(number: int, blocks: list[str]) -> list[str]:
    """Our names of the parts of an entry of the authors' `features`."""
    if number == 0:
        return ["conv_stem", "bn1"]
    if number > len(blocks):
        return ["conv_head", "bn2"]
    return [blocks[number - 1] + name for name in (_FIRST if number == 1 else _OTHERS)]


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], width: float, **model_args) -> KWMobileNetV2:
    return build_model(
        KWMobileNetV2,
        variant,
        pretrained,
        pretrained_filter_fn=lambda state, model: fitting(checkpoint_filter_fn(state, model), model),
        feature_cfg={"flatten_sequential": True},
        **mobilenetv2_args(width, {**model_args, **kwargs}),
    )


def _cfg(name: str) -> dict[str, Any]:
    classifier = () if name.startswith("kw1d2x") else "classifier"  # none with a weight of so many rows
    return kw_cfg("conv_stem.attention.fc1", classifier, hf_hub_id=f"timm-dynamic/{name}.in1k")


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg(name) for name in _TOP1})

_KW1D2X = {"half": True, "reduction": 1 / 32}
_KW4X = {"cell_num_ratio": 4}


@register_model
def kw1d2x_mobilenetv2(pretrained: bool = False, **kwargs) -> KWMobileNetV2:
    """KW-MobileNetV2 of half of the cells."""
    return _create("kw1d2x_mobilenetv2", pretrained, kwargs, 1.0, **_KW1D2X)


@register_model
def kw1x_mobilenetv2(pretrained: bool = False, **kwargs) -> KWMobileNetV2:
    """KW-MobileNetV2 of as many cells as mixtures."""
    return _create("kw1x_mobilenetv2", pretrained, kwargs, 1.0, share_pointwise=True)


@register_model
def kw4x_mobilenetv2(pretrained: bool = False, **kwargs) -> KWMobileNetV2:
    """KW-MobileNetV2 of four times as many cells as mixtures."""
    return _create("kw4x_mobilenetv2", pretrained, kwargs, 1.0, **_KW4X)


@register_model
def kw1d2x_mobilenetv2_050(pretrained: bool = False, **kwargs) -> KWMobileNetV2:
    """KW-MobileNetV2 of half of the width, and half of the cells."""
    return _create("kw1d2x_mobilenetv2_050", pretrained, kwargs, 0.5, **_KW1D2X)


@register_model
def kw1x_mobilenetv2_050(pretrained: bool = False, **kwargs) -> KWMobileNetV2:
    """KW-MobileNetV2 of half of the width, and as many cells as mixtures."""
    return _create("kw1x_mobilenetv2_050", pretrained, kwargs, 0.5, share_pointwise=True)


@register_model
def kw4x_mobilenetv2_050(pretrained: bool = False, **kwargs) -> KWMobileNetV2:
    """KW-MobileNetV2 of half of the width, and four times as many cells as mixtures."""
    return _create("kw4x_mobilenetv2_050", pretrained, kwargs, 0.5, **_KW4X)
