"""MobileNetV2 that computes its residual branches where learned masks say so (Verelst and Tuytelaars, CVPR 2020).

arXiv 1912.03203, whose blocks for pose estimation are these. timm's EfficientNet, with a mask unit in every inverted
residual that has a shortcut; the others, which change size or channels, run everywhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers import MaskUnit, SparseBranch
from timm_dynamic.layers.budget import BUDGET_WEIGHT
from timm_dynamic.models._dynconv import MaskedModel, check_budget, checkpoint_filter_fn, dynconv_cfg
from timm_dynamic.models._mobilenetv2 import mobilenetv2_args

__all__ = ["DynConvMobileNetV2", "SparseInvertedResidual"]

_TWINS = {"dynconv_mobilenetv2": "mobilenetv2_100", "dynconv_mobilenetv2_050": "mobilenetv2_050"}
register(Family(name="dynconv", twins=_TWINS))


class SparseInvertedResidual(SparseBranch, InvertedResidual):
    """timm's `InvertedResidual` with a mask.

    Args:
        in_chs, out_chs, **kwargs: As for `InvertedResidual`, such that the block has a shortcut; without attention,
            anti-aliasing and space-to-depth, and with a depthwise convolution.
        temperature, gumbel_noise: As for `MaskUnit`.
        mask_kernel_size: 3, or 1 for the mask unit of the authors' pose networks.

    Raises:
        ValueError: If the block is to have what a sparse one cannot.
    """

    family = "dynconv"

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        temperature: float | Sequence[float] = 1.0,
        gumbel_noise: bool = True,
        mask_kernel_size: int = 3,
        **kwargs,
    ):
        super().__init__(in_chs, out_chs, **kwargs)
        _check(self)
        self.downsample = None
        weight = self.conv_pw.weight
        dd = {"device": weight.device, "dtype": weight.dtype}
        options = {"temperature": temperature, "gumbel_noise": gumbel_noise}
        self.masker = MaskUnit(in_chs, 1, mask_kernel_size, **dd, **options)

    @classmethod
    def from_block(cls, block: InvertedResidual, **kwargs) -> "SparseInvertedResidual":
        """A block with the modules of another one, and a mask.

        Args:
            block: As the constructor would make it.
            **kwargs: `temperature`, `gumbel_noise`, `mask_kernel_size`.

        Raises:
            ValueError: As for the constructor.
        """
        _check(block)
        weight = block.conv_pw.weight
        sparse = cls(weight.shape[1], weight.shape[1], device=weight.device, dtype=weight.dtype, **kwargs)
        for name, module in block.named_children():
            setattr(sparse, name, module)
        return sparse.train(block.training)

    def branch(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv_pw(x))
        x = self.bn2(self.conv_dw(x))
        return self.drop_path(self.bn3(self.conv_pwl(x)))

    def finish(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.unused
    def steps(self) -> list[tuple[nn.Conv2d, nn.Module, nn.Module | None]]:
        return [(self.conv_pw, self.bn1, None), (self.conv_dw, self.bn2, None), (self.conv_pwl, self.bn3, None)]

    @torch.jit.unused
    def final_activation(self) -> None:
        return None


def _check(block: InvertedResidual) -> None:
    inputs, outputs = block.conv_pw.in_channels, block.conv_pwl.out_channels
    if not block.has_skip:
        raise ValueError(
            f"a sparse block needs a shortcut: stride 1 and as many outputs as inputs, {inputs}; got {outputs}"
        )
    if block.conv_s2d is not None or not isinstance(block.aa, nn.Identity) or not isinstance(block.se, nn.Identity):
        raise ValueError("a sparse block takes no attention, anti-aliasing or space-to-depth")
    if block.conv_dw.groups != block.conv_dw.out_channels:
        raise ValueError(f"a sparse block needs a depthwise convolution, got {block.conv_dw}")


class DynConvMobileNetV2(MaskedModel, EfficientNet):
    """timm's `EfficientNet` with masks in the inverted residuals that have a shortcut.

    Args:
        *args, **kwargs: As for `EfficientNet`.
        budget, temperature, gumbel_noise, total_steps, aux_scale, budget_weight: As for `DynConvResNet`.

    Raises:
        ValueError: If an argument has an unusable value.
    """

    def __init__(
        self,
        *args,
        budget: float = 0.5,
        temperature: float | Sequence[float] = (5.0, 2.5, 1.0),
        gumbel_noise: bool = True,
        total_steps: int | None = None,
        aux_scale: float = 1.0,
        budget_weight: float = BUDGET_WEIGHT,
        **kwargs,
    ):
        check_budget(budget)
        super().__init__(*args, **kwargs)
        for name, block in list(self.named_modules()) if budget >= 0 else ():
            if isinstance(block, InvertedResidual) and block.has_skip:
                block = SparseInvertedResidual.from_block(block, temperature=temperature, gumbel_noise=gumbel_noise)
                self.set_submodule(name, block)
        stages = [f"blocks.{i}" for i in range(len(self.blocks))]
        self.setup_masks(stages, budget, total_steps, aux_scale, budget_weight)


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": dynconv_cfg("conv_stem", "classifier", interpolation="bicubic") for name in _TWINS}
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], width: float) -> DynConvMobileNetV2:
    return build_model(
        DynConvMobileNetV2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        **mobilenetv2_args(width, kwargs),
    )


@register_model
def dynconv_mobilenetv2(pretrained: bool = False, **kwargs) -> DynConvMobileNetV2:
    """DynConv-MobileNetV2."""
    return _create("dynconv_mobilenetv2", pretrained, kwargs, 1.0)


@register_model
def dynconv_mobilenetv2_050(pretrained: bool = False, **kwargs) -> DynConvMobileNetV2:
    """DynConv-MobileNetV2, half as wide."""
    return _create("dynconv_mobilenetv2_050", pretrained, kwargs, 0.5)
