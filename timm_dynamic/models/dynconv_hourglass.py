"""Stacked hourglass for human pose estimation that computes its inverted residuals where learned masks say so.

Verelst and Tuytelaars, CVPR 2020 (arXiv 1912.03203, section 4.3), on the network of Newell, Yang and Deng, ECCV 2016
(arXiv 1603.06937).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers.argument_types import check_types
from timm_dynamic.layers.base import check_positive
from timm_dynamic.models import _dynconv
from timm_dynamic.models._dynconv import MaskedModel, check_budget, dynconv_cfg
from timm_dynamic.models.dynconv_mobilenetv2 import SparseInvertedResidual

__all__ = ["DynConvHourglass", "Hourglass", "HourglassStack"]

register(Family(name="dynconv", golden={"dynconv_hourglass_s0125": ("dynconv_hourglass", {"budget": 0.125})}))

_DEPTH = 4  # of an hourglass: how often it halves its map
_STRIDE = 4  # of the heat maps
_MULTIPLE = _STRIDE * 2**_DEPTH
_EXPANSION = 6
_NOISY_UNTIL = 0.8 - 1e-6  # of the training: epoch 80 of 100 is the first one without noise


def _inverted_residual(inputs: int, outputs: int, **dd) -> InvertedResidual:
    """timm's, which would make the number of its hidden channels a multiple of 8."""
    block = InvertedResidual(inputs, outputs, exp_ratio=_EXPANSION, act_layer=nn.ReLU6, **dd)
    hidden = _EXPANSION * inputs
    if block.conv_pw.out_channels != hidden:
        block.conv_pw = nn.Conv2d(inputs, hidden, 1, bias=False, **dd)
        block.bn1 = BatchNormAct2d(hidden, act_layer=nn.ReLU6, **dd)
        block.conv_dw = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False, **dd)
        block.bn2 = BatchNormAct2d(hidden, act_layer=nn.ReLU6, **dd)
        block.conv_pwl = nn.Conv2d(hidden, outputs, 1, bias=False, **dd)
    return block


def _residuals(channels: int, number: int, **dd) -> nn.Sequential:
    return nn.Sequential(*(_inverted_residual(channels, channels, **dd) for _ in range(number)))


class Hourglass(nn.Module):
    """One map at several resolutions: `y = skip(x) + upsample(up(inner(down(maxpool(x)))))`.

    Args:
        depth: How often the map is halved; `inner` is an hourglass of one less, and at last a sequence of blocks.
        channels: C.
        num_blocks: Residual blocks in each place.

    Shape:
        `[B, C, H, W]` to the same, H and W multiples of `2**depth`.
    """

    def __init__(self, depth: int, channels: int, num_blocks: int, **dd):
        super().__init__()
        self.skip = _residuals(channels, num_blocks, **dd)
        self.pool = nn.MaxPool2d(2)
        self.down = _residuals(channels, num_blocks, **dd)
        if depth > 1:
            self.inner = Hourglass(depth - 1, channels, num_blocks, **dd)
        else:
            self.inner = _residuals(channels, num_blocks, **dd)
        self.up = _residuals(channels, num_blocks, **dd)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.skip(x)
        y = self.up(self.inner(self.down(self.pool(x))))
        return skipped + F.interpolate(y, scale_factor=2.0, mode="nearest")


class HourglassStack(nn.Module):
    """An hourglass with its heat maps, which the next stack sees: it gets `x + merge_features(y) + merge_scores(z)`.

    Args:
        channels: C.
        num_blocks: Residual blocks in each place.
        num_joints: J.
        is_last: Whether no stack follows.

    Shape:
        `[B, C, H, W]` to the input of the next stack, of the same shape, or, of the last one, the features y that its
        heat maps are of; and to the heat maps z, `[B, J, H, W]`.
    """

    def __init__(self, channels: int, num_blocks: int, num_joints: int, is_last: bool, **dd):
        super().__init__()
        self.hourglass = Hourglass(_DEPTH, channels, num_blocks, **dd)
        self.res = _residuals(channels, num_blocks, **dd)
        self.fc = nn.Conv2d(channels, channels, 1, **dd)
        self.bn = nn.BatchNorm2d(channels, **dd)
        self.act = nn.ReLU(inplace=True)
        self.score = nn.Conv2d(channels, num_joints, 1, **dd)
        self.merge_features = None if is_last else nn.Conv2d(channels, channels, 1, **dd)
        self.merge_scores = None if is_last else nn.Conv2d(num_joints, channels, 1, **dd)

    def reset_joints(self, num_joints: int) -> None:
        """New layers for another number of joints."""
        channels, weight = self.score.in_channels, self.score.weight
        dd = {"device": weight.device, "dtype": weight.dtype}
        self.score = nn.Conv2d(channels, num_joints, 1, **dd)
        if self.merge_scores is not None:
            self.merge_scores = nn.Conv2d(num_joints, channels, 1, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.act(self.bn(self.fc(self.res(self.hourglass(x)))))
        scores = self.score(y)
        if self.merge_features is not None and self.merge_scores is not None:
            y = x + self.merge_features(y) + self.merge_scores(scores)
        return y, scores


class DynConvHourglass(MaskedModel):
    """Hourglasses in a row, each of which gives heat maps of the joints.

    Every inverted residual with a shortcut has a mask. The authors trained with images whose channels are blue, green
    and red, in this order.

    Args:
        num_features: F: the hourglasses have `2 * (F // 2)` channels, the stem `F // 4`.
        num_stacks: Hourglasses.
        num_blocks: Residual blocks in each place of them.
        num_joints: J.
        in_chans: Image channels.
        budget, gumbel_noise, total_steps, aux_scale: As for `DynConvResNet`.
        temperature: As for `MaskUnit`.
        budget_weight: Of the loss for the budget.

    Shape:
        Images `[B, in_chans, H, W]`, H and W multiples of 64, to heat maps `[B, J, H/4, W/4]`: in training a list of
        them, one for each stack, else those of the last stack.

    Raises:
        ValueError: If an argument, or the size of the images, has an unusable value.
    """

    pipeline_tag = "keypoint-detection"  # the Hub's name of what it is for

    def __init__(
        self,
        num_features: int = 96,
        num_stacks: int = 4,
        num_blocks: int = 1,
        num_joints: int = 16,
        in_chans: int = 3,
        *,
        budget: float = 0.5,
        temperature: float = 1.0,
        gumbel_noise: bool = True,
        total_steps: int | None = None,
        aux_scale: float = 1.0,
        budget_weight: float = 0.01,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_budget(budget)
        check_positive(num_stacks=num_stacks, num_blocks=num_blocks, num_joints=num_joints, in_chans=in_chans)
        if not isinstance(num_features, int) or num_features < 4:
            raise ValueError(f"num_features must be an integer and at least 4, got {num_features!r}")
        dd = {"device": device, "dtype": dtype}
        stem, channels = num_features // 4, 2 * (num_features // 2)
        self.num_classes, self.in_chans = num_joints, in_chans
        self.num_features = self.head_hidden_size = channels
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, stem, 7, 2, 3, **dd)
        self.bn1 = nn.BatchNorm2d(stem, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(_inverted_residual(stem, 2 * stem, **dd))
        self.pool = nn.MaxPool2d(2)
        self.layer2 = nn.Sequential(_inverted_residual(2 * stem, 4 * stem, **dd))
        self.layer3 = nn.Sequential(_inverted_residual(4 * stem, channels, **dd))
        last = num_stacks - 1
        self.stacks = nn.ModuleList(
            HourglassStack(channels, num_blocks, num_joints, i == last, **dd) for i in range(num_stacks)
        )
        # Of the authors' counts of multiply-accumulates.
        self.counted_biases = tuple(
            name for name, part in self.named_modules() if isinstance(part, nn.Conv2d) and part.bias is not None
        )
        options = {"temperature": temperature, "gumbel_noise": gumbel_noise, "mask_kernel_size": 1}
        for name, block in list(self.named_modules()) if budget >= 0 else ():
            if isinstance(block, InvertedResidual) and block.has_skip:
                block = SparseInvertedResidual.from_block(block, **options)
                block.masker.noisy_until = _NOISY_UNTIL
                self.set_submodule(name, block)
        stages = ["layer3", *(f"stacks.{i}" for i in range(num_stacks))]
        self.setup_masks(stages, budget, total_steps, aux_scale, budget_weight)

    def get_classifier(self) -> nn.Module:
        """The convolution that gives the last heat maps."""
        return self.stacks[-1].score

    def reset_classifier(self, num_classes: int) -> None:
        """New layers for another number of joints.

        Args:
            num_classes: Joints, at least 1; the features are what `forward_features` gives.

        Raises:
            ValueError: If there are to be none.
        """
        check_positive(num_joints=num_classes)
        self.num_classes = num_classes
        for stack in self.stacks:
            stack.reset_joints(num_classes)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every stack in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the features that the last heat maps are of, `[B, num_features, H/4, W/4]`."""
        return self._run(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to the last stack's heat maps.

        Args:
            x: Of `forward_features`.
            pre_logits: Return `x`.
        """
        return x if pre_logits else self.get_classifier()(x)

    def forward_stacks(self, x: Tensor) -> list[Tensor]:
        """Images to the heat maps of every stack, also in evaluation."""
        return self._run(x)[1]

    def forward(self, x: Tensor):
        heatmaps = self.forward_stacks(x)
        if not torch.jit.is_scripting():
            if self.training:
                return heatmaps
        return heatmaps[-1]

    @torch.jit.unused
    def _check_size(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        if height % _MULTIPLE or width % _MULTIPLE:
            raise ValueError(f"images must have sides that are multiples of {_MULTIPLE}, got {height} x {width}")

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not torch.jit.is_scripting():
            self._check_size(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.pool(self.layer1(x))))
        heatmaps: list[Tensor] = []
        for stack in self.stacks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, scores = checkpoint(stack, x)
            else:
                x, scores = stack(x)
            heatmaps.append(scores)
        return x, heatmaps


_PARTS = {  # of a block and of a stack: the authors' names, and ours
    r"\.conv\.0\.": ".conv_pw.",
    r"\.conv\.1\.": ".bn1.",
    r"\.conv\.3\.": ".conv_dw.",
    r"\.conv\.4\.": ".bn2.",
    r"\.conv\.6\.": ".conv_pwl.",
    r"\.conv\.7\.": ".bn3.",
    r"^res\.(\d+)\.": r"stacks.\1.res.",
    r"^fc\.(\d+)\.0\.": r"stacks.\1.fc.",
    r"^fc\.(\d+)\.1\.": r"stacks.\1.bn.",
    r"^score\.(\d+)\.": r"stacks.\1.score.",
    r"^fc_\.(\d+)\.": r"stacks.\1.merge_features.",
    r"^score_\.(\d+)\.": r"stacks.\1.merge_scores.",
}
_PLACES = ("skip", "down", "up", "inner")  # in the authors' order


def _our_name(key: str) -> str:
    found = re.match(rf"hg\.(\d+)\.hg\.([0-{_DEPTH - 1}])\.([0-3])\.", key)
    if found:  # the authors number the levels from the innermost one, ours contain each other
        stack, level, place = map(int, found.groups())
        inner = "inner." * (_DEPTH - 1 - level)
        key = f"stacks.{stack}.hourglass.{inner}{_PLACES[place]}.{key[found.end() :]}"
    for theirs, ours in _PARTS.items():
        key = re.sub(theirs, ours, key)
    return key


def structure_of(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Arguments of the network that weights, by our names, are of.

    Returns:
        `num_features` (or one less, which is the same network), `num_stacks`, `num_blocks` and `num_joints`.
    """
    joints, features = state_dict["stacks.0.score.weight"].shape[:2]
    stacks, blocks = (
        {int(found[1]) for key in state_dict if (found := re.match(pattern, key))}
        for pattern in (r"stacks\.(\d+)\.", r"stacks\.0\.res\.(\d+)\.")
    )
    return {
        "num_features": features,
        "num_stacks": len(stacks),
        "num_blocks": len(blocks),
        "num_joints": joints,
    }


def checkpoint_filter_fn(state_dict: dict[str, Any], model: DynConvHourglass) -> dict[str, Tensor]:
    """The authors' checkpoints, and those with or without masks into networks without or with them.

    Raises:
        ValueError: If they are of a network of other sizes.
    """
    state = {_our_name(key): value for key, value in extract_state_dict(state_dict).items()}
    score = state.get("stacks.0.score.weight")
    if score is not None and score.ndim == 4:
        theirs, ours = structure_of(state), structure_of(model.state_dict())
        other = {key: value for key, value in theirs.items() if value not in (0, ours[key]) and key != "num_joints"}
        if other:
            arguments = " ".join(f"{key}={value}" for key, value in other.items())
            raise ValueError(f"these weights are of another network: create it with {arguments} (--model-kwargs)")
    return _dynconv.checkpoint_filter_fn(state, model)


def _joint_layers(num_stacks: int) -> tuple[str, ...]:
    """Names of all that depends on the number of joints."""
    merged = (f"stacks.{i}.merge_scores" for i in range(num_stacks - 1))
    return (*(f"stacks.{i}.score" for i in range(num_stacks)), *merged)


def _cfg(tag: str) -> dict[str, Any]:
    return dynconv_cfg(
        "conv1",
        _joint_layers(4),
        hf_hub_id=f"timm-dynamic/{tag}",  # where the authors' weights will be
        num_classes=16,
        input_size=(3, 256, 256),
        pool_size=None,
        crop_pct=1.0,
        paper_ids=("arXiv:1912.03203", "arXiv:1603.06937"),
    )


_TAGS = {
    "dynconv_hourglass": ("budget12p5_mpii", "budget25_mpii", "budget50_mpii", "base_mpii"),
    "dynconv_hourglass_f48": ("base_mpii",),
}
default_cfgs = generate_default_cfgs(
    {f"{name}.{tag}": _cfg(f"{name}.{tag}") for name, tags in _TAGS.items() for tag in tags}
)


def _with_classes(num_classes: int, **kwargs) -> DynConvHourglass:
    """timm's name of the number of joints, which is in its configurations."""
    return DynConvHourglass(num_joints=num_classes, **kwargs)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> DynConvHourglass:
    if kwargs.get("features_only"):
        raise ValueError(f"{variant} has no features_only: use forward_features, or forward_stacks")
    joints = kwargs.pop("num_joints", None)
    if joints is not None and kwargs.setdefault("num_classes", joints) != joints:
        raise ValueError(f"num_joints is {joints} and num_classes, which is the same here, {kwargs['num_classes']}")
    check_types(DynConvHourglass, kwargs)
    model = build_model(_with_classes, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)
    model.pretrained_cfg["classifier"] = _joint_layers(len(model.stacks))
    return model


@register_model
def dynconv_hourglass(pretrained: bool = False, **kwargs) -> DynConvHourglass:
    """DynConv-Hourglass: four stacks of 96 channels, for human pose estimation."""
    return _create("dynconv_hourglass", pretrained, kwargs)


@register_model
def dynconv_hourglass_f48(pretrained: bool = False, **kwargs) -> DynConvHourglass:
    """DynConv-Hourglass, half as wide."""
    return _create("dynconv_hourglass_f48", pretrained, {"num_features": 48, **kwargs})
