"""ResNets that compute their residual branches where learned masks say so (Verelst and Tuytelaars, CVPR 2020).

arXiv 1912.03203. timm's ResNet with a mask unit in every residual block; the networks for 32-pixel images have three
stages.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import MaskUnit, SparseBranch
from timm_dynamic.layers.budget import BUDGET_WEIGHT
from timm_dynamic.models._cfg import shipped_cfg
from timm_dynamic.models._dynconv import MaskedModel, check_budget, checkpoint_filter_fn, dynconv_cfg
from timm_dynamic.models._resnet import stem_conv, use_small_stem

__all__ = ["DynConvResNet", "DynConvResNetSmall", "SparseBasicBlock", "SparseBottleneck"]

register(
    Family(
        name="dynconv",
        title="DynConv",
        about="residual branches computed only where a learned mask says so",
        paper="Verelst and Tuytelaars, CVPR 2020, arXiv 1912.03203; its MobileNetV2 is ours",
        tiny="dynconv_resnet8",
        routing="the mask",
        terms=("network_budget", "block_budget"),
        exact={"gumbel_noise": False},
        static={"budget": -1},
        twins={f"dynconv_resnet{n}": f"resnet{n}" for n in (18, 34, 50, 101, 152)},
        reported={"dynconv_resnet101.budget30_in1k": 75.71, "dynconv_resnet32.budget70_cifar10": 93.58},
    )
)


def _masker(block: BasicBlock | Bottleneck, kwargs: dict[str, Any], **options) -> MaskUnit:
    """The mask unit of a new block that was built with `kwargs`."""
    for name in ("attn_layer", "aa_layer"):
        if kwargs.get(name) is not None:
            raise ValueError(f"a sparse block takes no {name}, got {kwargs[name]}")
    weight = block.conv1.weight
    return MaskUnit(block.conv1.in_channels, block.stride, device=weight.device, dtype=weight.dtype, **options)


class SparseBasicBlock(SparseBranch, BasicBlock):
    """timm's `BasicBlock` with a mask.

    Args:
        *args, **kwargs: As for `BasicBlock`, without attention and anti-aliasing.
        temperature, gumbel_noise: As for `MaskUnit`.

    Raises:
        ValueError: If the block is to have what a sparse one cannot.
    """

    family = "dynconv"

    def __init__(
        self,
        *args,
        cardinality: int = 1,
        base_width: int = 64,
        temperature: float | Sequence[float] = 1.0,
        gumbel_noise: bool = True,
        **kwargs,
    ):
        if (cardinality, base_width) != (1, 64):
            raise ValueError(f"a basic block has cardinality 1 and base_width 64, got {cardinality} and {base_width}")
        super().__init__(*args, **kwargs)
        self.masker = _masker(self, kwargs, temperature=temperature, gumbel_noise=gumbel_noise)

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.bn2(self.conv2(x))
        return x if self.drop_path is None else self.drop_path(x)

    def finish(self, x: Tensor) -> Tensor:
        return self.act2(x)

    @torch.jit.unused
    def steps(self) -> list[tuple[nn.Conv2d, nn.Module, nn.Module | None]]:
        return [(self.conv1, self.bn1, self.act1), (self.conv2, self.bn2, None)]

    @torch.jit.unused
    def final_activation(self) -> nn.Module:
        return self.act2


class SparseBottleneck(SparseBranch, Bottleneck):
    """timm's `Bottleneck` with a mask.

    Args:
        *args, **kwargs: As for `Bottleneck`, without groups, attention and anti-aliasing.
        temperature, gumbel_noise: As for `MaskUnit`.

    Raises:
        ValueError: If the block is to have what a sparse one cannot.
    """

    family = "dynconv"

    def __init__(
        self,
        *args,
        cardinality: int = 1,
        temperature: float | Sequence[float] = 1.0,
        gumbel_noise: bool = True,
        **kwargs,
    ):
        if cardinality != 1:
            raise ValueError(f"a sparse bottleneck has no groups: cardinality must be 1, got {cardinality}")
        super().__init__(*args, **kwargs)
        self.masker = _masker(self, kwargs, temperature=temperature, gumbel_noise=gumbel_noise)

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        x = self.bn3(self.conv3(x))
        return x if self.drop_path is None else self.drop_path(x)

    def finish(self, x: Tensor) -> Tensor:
        return self.act3(x)

    @torch.jit.unused
    def steps(self) -> list[tuple[nn.Conv2d, nn.Module, nn.Module | None]]:
        return [(self.conv1, self.bn1, self.act1), (self.conv2, self.bn2, self.act2), (self.conv3, self.bn3, None)]

    @torch.jit.unused
    def final_activation(self) -> nn.Module:
        return self.act3


class DynConvResNet(MaskedModel, ResNet):
    """timm's `ResNet` with masks.

    Args:
        block: `SparseBasicBlock` or `SparseBottleneck`.
        layers, **kwargs: As for `ResNet`.
        budget: Share of the blocks' computations that training aims at, 0 to 1; -1 for the static network.
        temperature, gumbel_noise: As for `MaskUnit`.
        total_steps: Training forwards in the whole training, for a script that does not call
            `timm_dynamic.set_progress`. With neither, the training counts as not begun.
        aux_scale: Of the attached gradient of the budget loss; 1 / the number of batches whose gradients are summed.
        budget_weight: Of the loss for the budget.
        small_stem: For images of 32 to 64 pixels: a 3x3 convolution with stride 1 and no max-pool.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(
        self,
        block: type[SparseBasicBlock] | type[SparseBottleneck],
        layers: Sequence[int],
        *,
        budget: float = 0.5,
        temperature: float | Sequence[float] = (5.0, 2.5, 1.0),
        gumbel_noise: bool = True,
        total_steps: int | None = None,
        aux_scale: float = 1.0,
        budget_weight: float = BUDGET_WEIGHT,
        small_stem: bool = False,
        **kwargs,
    ):
        check_budget(budget)
        options = {"temperature": temperature, "gumbel_noise": gumbel_noise}
        if budget < 0:
            block, options = (BasicBlock if block is SparseBasicBlock else Bottleneck), {}
        super().__init__(block, layers, block_args={**kwargs.pop("block_args", {}), **options}, **kwargs)
        if small_stem:
            self._use_small_stem()
        stages = [f"layer{i + 1}" for i in range(len(layers))]
        self.setup_masks(stages, budget, total_steps, aux_scale, budget_weight)

    def _use_small_stem(self) -> None:
        use_small_stem(self)


class DynConvResNetSmall(DynConvResNet):
    """The ResNets for 32-pixel images: a 3x3 stem and three stages (He et al., CVPR 2016, section 4.2).

    Args:
        block, layers, **kwargs: As for `DynConvResNet`.
        channels: Of the three stages; the stem has those of the first.
    """

    def __init__(self, block, layers: Sequence[int], *, channels: Sequence[int] = (16, 32, 64), **kwargs):
        # timm's plain stem always has 64 channels; a deep one has twice `stem_width`, and is made plain afterwards.
        stem = {"stem_type": "deep", "stem_width": channels[0] // 2, "small_stem": True}
        super().__init__(block, layers, channels=channels, **{**kwargs, **stem})
        self.layer4 = nn.Sequential()  # timm's forward has four stages
        for name in ("global_pool", "fc"):  # behind it, as they run
            self._modules[name] = self._modules.pop(name)

    def _use_small_stem(self) -> None:
        super()._use_small_stem()
        self.conv1 = stem_conv(self.conv1[0], self.conv1[-1].out_channels, kernel_size=3, stride=1)

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, **kwargs):
        """As timm's, of four features."""
        return super().forward_intermediates(x, feature_take_indices(4, indices)[0], **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's, of four features."""
        take_indices, last = feature_take_indices(4, indices)
        if last < 3:
            return super().prune_intermediate_layers(take_indices, prune_norm, prune_head)
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices


def _cfg(**kwargs) -> dict[str, Any]:
    return dynconv_cfg("conv1", "fc", **kwargs)


_CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "interpolation": "bilinear"}


def _small_cfg(**kwargs) -> dict[str, Any]:
    return _cfg(
        **{
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            **_CIFAR10,
            **kwargs,
        }
    )


def _shipped(tag: str, **kwargs) -> dict[str, dict[str, Any]]:
    return {tag: _cfg(**{**shipped_cfg(tag), "input_size": (3, 32, 32), "pool_size": (8, 8), **kwargs})}


def _authors(name: str, data: str, budgets: Sequence[int], cfg) -> dict[str, Any]:
    """The authors' published weights: masked ones by budget in percent, and the static ones."""
    tags = [f"{name}.budget{budget}_{data}" for budget in budgets] + [f"{name}.base_{data}"]
    return {tag: cfg(hf_hub_id=f"timm-dynamic/{tag}") for tag in tags}


default_cfgs = generate_default_cfgs(
    {
        **_shipped("dynconv_resnet8.digits"),
        **_shipped("dynconv_resnet8.budget30_digits"),
        **_shipped("dynconv_resnet8.budget50_cifar10"),
        **_shipped("dynconv_resnet8.budget30_cifar10"),
        "dynconv_resnet14.untrained": _small_cfg(),
        **_shipped("dynconv_resnet20.budget50_cifar10", **_CIFAR10),
        "dynconv_resnet26.untrained": _small_cfg(),
        **_authors("dynconv_resnet32", "cifar10", (70, 50, 30), _small_cfg),
        "dynconv_resnet18.untrained": _cfg(),
        "dynconv_resnet34.untrained": _cfg(),
        "dynconv_resnet50.untrained": _cfg(),
        **_authors("dynconv_resnet101", "in1k", (70, 80, 50, 30), _cfg),
        "dynconv_resnet152.untrained": _cfg(),
    }
)


def _create(model_cls: type[DynConvResNet], variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args):
    # A branch whose last norm starts at zero tells its mask nothing.
    model_args = {"zero_init_last": False, **model_args, **kwargs}
    return build_model(model_cls, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **model_args)


def _create_small(variant: str, pretrained: bool, kwargs: dict[str, Any], depth: int) -> DynConvResNetSmall:
    model_args = {"block": SparseBasicBlock, "layers": (depth,) * 3, "temperature": 1.0, **kwargs}
    options = {"feature_cfg": {"out_indices": (0, 1, 2, 3)}}
    return _create(DynConvResNetSmall, variant, pretrained, model_args, **options)


@register_model
def dynconv_resnet8(pretrained: bool = False, **kwargs) -> DynConvResNetSmall:
    """DynConv-ResNet-8 for 32-pixel images."""
    return _create_small("dynconv_resnet8", pretrained, kwargs, 1)


@register_model
def dynconv_resnet14(pretrained: bool = False, **kwargs) -> DynConvResNetSmall:
    """DynConv-ResNet-14 for 32-pixel images."""
    return _create_small("dynconv_resnet14", pretrained, kwargs, 2)


@register_model
def dynconv_resnet20(pretrained: bool = False, **kwargs) -> DynConvResNetSmall:
    """DynConv-ResNet-20 for 32-pixel images."""
    return _create_small("dynconv_resnet20", pretrained, kwargs, 3)


@register_model
def dynconv_resnet26(pretrained: bool = False, **kwargs) -> DynConvResNetSmall:
    """DynConv-ResNet-26 for 32-pixel images."""
    return _create_small("dynconv_resnet26", pretrained, kwargs, 4)


@register_model
def dynconv_resnet32(pretrained: bool = False, **kwargs) -> DynConvResNetSmall:
    """DynConv-ResNet-32 for 32-pixel images."""
    return _create_small("dynconv_resnet32", pretrained, kwargs, 5)


@register_model
def dynconv_resnet18(pretrained: bool = False, **kwargs) -> DynConvResNet:
    """DynConv-ResNet-18."""
    return _create(DynConvResNet, "dynconv_resnet18", pretrained, kwargs, block=SparseBasicBlock, layers=(2, 2, 2, 2))


@register_model
def dynconv_resnet34(pretrained: bool = False, **kwargs) -> DynConvResNet:
    """DynConv-ResNet-34."""
    return _create(DynConvResNet, "dynconv_resnet34", pretrained, kwargs, block=SparseBasicBlock, layers=(3, 4, 6, 3))


@register_model
def dynconv_resnet50(pretrained: bool = False, **kwargs) -> DynConvResNet:
    """DynConv-ResNet-50."""
    return _create(DynConvResNet, "dynconv_resnet50", pretrained, kwargs, block=SparseBottleneck, layers=(3, 4, 6, 3))


@register_model
def dynconv_resnet101(pretrained: bool = False, **kwargs) -> DynConvResNet:
    """DynConv-ResNet-101."""
    return _create(DynConvResNet, "dynconv_resnet101", pretrained, kwargs, block=SparseBottleneck, layers=(3, 4, 23, 3))


@register_model
def dynconv_resnet152(pretrained: bool = False, **kwargs) -> DynConvResNet:
    """DynConv-ResNet-152."""
    return _create(DynConvResNet, "dynconv_resnet152", pretrained, kwargs, block=SparseBottleneck, layers=(3, 8, 36, 3))
