"""DeepLabV3+ with attention over convolution kernels, for semantic segmentation.

The network of L.-C. Chen et al., "Encoder-Decoder with Atrous Separable Convolution" (arXiv 1802.02611), on any of
timm's networks; the convolutions of its pyramid and decoder are those of Y. Chen et al., CVPR 2020 (arXiv 1912.03458).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.format import Format, nhwc_to
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from timm_dynamic.hub import build_model
from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.layers.progress import join
from timm_dynamic.models._dy import anneal, check_steps, dy_cfg

__all__ = ["ASPP", "Decoder", "DyDeepLabV3Plus"]

_RATES = {16: (1, 6, 12, 18), 8: (1, 12, 24, 36)}  # by output stride; 1 stands for the 1x1 convolution
_LOW_STRIDE = 4  # of the features that the decoder adds


def _conv_bn_relu(conv: Callable[..., nn.Module], *args, device=None, dtype=None, **kwargs) -> nn.Sequential:
    layer = nn.Sequential()
    layer.conv = conv(*args, bias=False, device=device, dtype=dtype, **kwargs)
    layer.bn = nn.BatchNorm2d(args[1], device=device, dtype=dtype)
    layer.act = nn.ReLU(inplace=True)
    return layer


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: parallel convolutions of several dilations, and one of the mean of the map.

    Args:
        conv: Makes a convolution, with the arguments of `nn.Conv2d`.
        in_channels: C.
        out_channels: O, of each branch and of the result.
        rates: Dilations of the 3x3 convolutions; 1 makes a 1x1 convolution.
        drop_rate: Dropout of the result.

    Shape:
        `[B, C, H, W]` to `[B, O, H, W]`.

    Raises:
        ValueError: In training, for a batch of one image.
    """

    def __init__(
        self,
        conv: Callable[..., nn.Module],
        in_channels: int,
        out_channels: int,
        rates: Sequence[int],
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        make = partial(_conv_bn_relu, conv, device=device, dtype=dtype)
        self.branches = nn.ModuleList(
            make(in_channels, out_channels, 1)
            if rate == 1
            else make(in_channels, out_channels, 3, padding=rate, dilation=rate)
            for rate in rates
        )
        self.pool = make(in_channels, out_channels, 1)
        self.project = make((len(rates) + 1) * out_channels, out_channels, 1)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        # Synchronised batch norm may have images of other processes.
        if isinstance(self.pool.bn, nn.BatchNorm2d) and self.pool.bn.training and x.shape[0] == 1:
            raise ValueError("ASPP normalises the mean of the map over the batch: training needs more than one image")
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.drop(self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1)))


class Decoder(nn.Module):
    """DeepLabV3+'s decoder but for its classifier: adds detail from features of an early stage.

    Args:
        conv: Makes a convolution, with the arguments of `nn.Conv2d`.
        low_channels: L, of the early features.
        low_width: What these are reduced to.
        channels: C, of the pyramid's features and of the result.
        drop_rate: Dropout between the two convolutions; a fifth of it after the second.

    Shape:
        Early features `[B, L, h, w]` and the pyramid's `[B, C, H, W]` to `[B, C, h, w]`.
    """

    def __init__(
        self,
        conv: Callable[..., nn.Module],
        low_channels: int,
        low_width: int,
        channels: int,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        make = partial(_conv_bn_relu, conv, device=device, dtype=dtype)
        self.low = make(low_channels, low_width, 1)
        self.conv1 = make(channels + low_width, channels, 3, padding=1)
        self.drop1 = nn.Dropout(drop_rate)
        self.conv2 = make(channels, channels, 3, padding=1)
        self.drop2 = nn.Dropout(drop_rate / 5)

    def forward(self, low: Tensor, x: Tensor) -> Tensor:
        x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True)
        x = self.drop1(self.conv1(torch.cat([x, self.low(low)], 1)))
        return self.drop2(self.conv2(x))


class DyDeepLabV3Plus(nn.Module):
    """DeepLabV3+ whose pyramid and decoder have dynamic convolutions only, the classifier included.

    Args:
        num_classes: Classes, of which one is usually the background; 0 for the features before the classifier.
        in_chans: Image channels.
        backbone: Any timm model with `features_only`, of this package too. One that cannot be dilated to
            `output_stride` is used up to its last stage of that stride.
        pretrained_backbone: Load the backbone's pretrained weights.
        backbone_kwargs: More arguments of the backbone.
        output_stride: Of the features that the pyramid sees: 16 or 8.
        width_multiplier: Of the channels of pyramid and decoder, not of the backbone.
        drop_rate: Dropout after the pyramid and in the decoder; a fifth of it before the classifier.
        drop_path_rate: Of the backbone.
        dynamic: False: with static convolutions, for comparison.
        num_kernels, reduction: As for `DynamicConv2d`.
        anneal_steps: Training forwards in which the temperature falls from 30 to 1, in a dynamic backbone too; without
            it, it is 1 (unless `set_progress` is called).

    Shape:
        Images `[B, in_chans, H, W]` to logits `[B, num_classes, H, W]`, of any size; without classes, to
        `[B, num_features, h, w]`, where the early features have a quarter of the image's size.

    Raises:
        ValueError: If an argument has an unusable value, or in training for a batch of one image.
    """

    pipeline_tag = "image-segmentation"  # the Hub's name of what it is for

    def __init__(
        self,
        num_classes: int = 21,
        in_chans: int = 3,
        backbone: str = "mobilenetv2_100",
        pretrained_backbone: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
        output_stride: int = 16,
        width_multiplier: float = 1.0,
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        dynamic: bool = True,
        num_kernels: int = 4,
        reduction: int = 4,
        anneal_steps: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if output_stride not in _RATES:
            raise ValueError(f"output_stride must be 16 or 8, got {output_stride!r}")
        if round(48 * width_multiplier) < 1:
            raise ValueError(f"width_multiplier {width_multiplier} leaves no channels: use 0.02 or more")
        check_steps(anneal_steps)
        dd = {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
        options = {"pretrained": pretrained_backbone, "in_chans": in_chans, **dd, **(backbone_kwargs or {})}
        if drop_path_rate:
            options["drop_path_rate"] = drop_path_rate
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = round(256 * width_multiplier)
        self.grad_checkpointing = False
        self.backbone, self._low, self._high = _create_backbone(backbone, output_stride, options)
        self._conv = nn.Conv2d
        if dynamic:
            self._conv = partial(DynamicConv2d, num_kernels=num_kernels, reduction=reduction)
        channels = self.backbone.feature_info.channels()
        self.aspp = ASPP(self._conv, channels[self._high], self.num_features, _RATES[output_stride], drop_rate, **dd)
        self.decoder = Decoder(
            self._conv, channels[self._low], round(48 * width_multiplier), self.num_features, drop_rate, **dd
        )
        for part in (self.aspp, self.decoder):
            self.initialise(part)
        anneal(self, anneal_steps)
        for layer in self.backbone.modules() if anneal_steps is not None else ():
            if isinstance(layer, DynamicConv2d):
                layer.progress.begin(anneal_steps)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last convolution."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last convolution; 0 classes leave none.

        Args:
            num_classes: Of the new one.
        """
        self.num_classes, self.classifier = num_classes, nn.Identity()
        if not num_classes:
            return
        like = self.decoder.conv2.bn.weight
        self.classifier = self._conv(self.num_features, num_classes, 1, device=like.device, dtype=like.dtype)
        self.initialise(self.classifier.train(self.training))
        if isinstance(self.classifier, DynamicConv2d):
            join(self.classifier, self.decoder.conv2.conv.progress)

    def initialise(self, part: nn.Module) -> None:
        """Convolutions normal by the fan-in, each kernel of a dynamic one as if it were alone.

        Args:
            part: Of the new network.
        """
        for layer in part.modules():
            if isinstance(layer, (nn.Conv2d, DynamicConv2d)):
                kernels = layer.kernels_weights if isinstance(layer, DynamicConv2d) else layer.weight
                nn.init.normal_(kernels, std=(2 / kernels.shape[-3:].numel()) ** 0.5)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Biases that do not look like one: they are of two dimensions."""
        return {"classifier.kernels_bias"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute backbone, pyramid and decoder in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable
        self.backbone.set_grad_checkpointing(enable)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to the decoder's features, `[B, num_features, h, w]`."""
        features = self.backbone(x)
        low, high = features[self._low], features[self._high]
        if getattr(self.backbone, "output_fmt", Format.NCHW) == Format.NHWC:
            low, high = nhwc_to(low, Format.NCHW), nhwc_to(high, Format.NCHW)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self.decoder, low, checkpoint(self.aspp, high))
        return self.decoder(low, self.aspp(high))

    def forward_head(self, x: Tensor, size: Sequence[int] | None = None, pre_logits: bool = False) -> Tensor:
        """The decoder's features to logits `[B, num_classes, *size]`.

        Args:
            x: Of `forward_features`, `[B, num_features, h, w]`.
            size: Height and width of the image (default: four times those of `x`).
            pre_logits: Return `x`.
        """
        if pre_logits or not self.num_classes:
            return x
        size = [_LOW_STRIDE * side for side in x.shape[2:]] if size is None else size
        return F.interpolate(self.classifier(x), size, mode="bilinear", align_corners=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x), x.shape[2:])


def _create_backbone(name: str, output_stride: int, options: dict[str, Any]) -> tuple[nn.Module, int, int]:
    """A feature extractor, and the indices of its early and of its last features."""
    create = partial(timm.create_model, name, features_only=True, **options)
    if not timm.is_model(timm.models.get_arch_name(name)) and ":" not in name:
        raise ValueError(f"backbone {name!r} is no timm model: timm.list_models() names them")
    try:
        backbone = create(output_stride=output_stride)
    except (TypeError, AssertionError, NotImplementedError):  # it cannot be dilated
        try:
            backbone = create()
        except (TypeError, AssertionError, NotImplementedError, RuntimeError, AttributeError) as error:
            raise ValueError(f"backbone {name} cannot be created with features_only: {error}") from error
    strides = backbone.feature_info.reduction()
    if _LOW_STRIDE not in strides or output_stride not in strides:
        found = ", ".join(map(str, strides))
        raise ValueError(
            f"backbone {name} has features of strides {found}: DeepLabV3+ needs {_LOW_STRIDE} and {output_stride}"
        )
    low, high = (len(strides) - 1 - strides[::-1].index(stride) for stride in (_LOW_STRIDE, output_stride))
    if high < len(strides) - 1:  # without the stages that nothing would use
        backbone, low, high = create(out_indices=(low, high)), 0, 1
    return backbone, low, high


def _pretrained_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Drops a classifier of another number of classes; timm knows no name of a weight but `weight`."""
    own = model.state_dict()
    other = any(key in own and state_dict[key].shape != own[key].shape for key in _CLASS_SIZED if key in state_dict)
    return {key: value for key, value in state_dict.items() if not (other and key in _CLASS_SIZED)}


_CLASS_SIZED = ("classifier.kernels_weights", "classifier.kernels_bias")


def create_deeplab(
    variant: str,
    pretrained: bool,
    kwargs: dict[str, Any],
    model_cls: type[DyDeepLabV3Plus] = DyDeepLabV3Plus,
) -> DyDeepLabV3Plus:
    """A registered model of a class, whose cfg follows the backbone."""
    if kwargs.get("features_only"):
        raise ValueError(f"{variant} has no features_only: create its backbone with it, or use forward_features")
    model = build_model(model_cls, variant, pretrained, pretrained_filter_fn=_pretrained_filter_fn, **kwargs)
    # What images the network expects depends on its backbone.
    cfg = model.backbone.pretrained_cfg
    first = cfg["first_conv"]
    names = tuple(f"backbone.{name}" for name in ((first,) if isinstance(first, str) else first))
    model.pretrained_cfg |= {"first_conv": names[0] if isinstance(first, str) else names}
    if not pretrained:
        model.pretrained_cfg |= {key: cfg[key] for key in ("mean", "std")}
    return model


def deeplab_cfg() -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    return dy_cfg(
        "backbone.conv_stem",
        "classifier",
        num_classes=21,
        input_size=(3, 513, 513),
        pool_size=None,
        crop_pct=1.0,
        interpolation="bilinear",
        paper_ids=("arXiv:1912.03458", "arXiv:1802.02611"),
    )


_NAMES = ("dy_deeplabv3plus_mobilenetv2", "dy_deeplabv3plus_mobilenetv2_050")
default_cfgs = generate_default_cfgs({f"{name}.untrained": deeplab_cfg() for name in _NAMES})


@register_model
def dy_deeplabv3plus_mobilenetv2(pretrained: bool = False, **kwargs) -> DyDeepLabV3Plus:
    """DeepLabV3+ with a dynamic pyramid and decoder, on a static MobileNetV2."""
    return create_deeplab("dy_deeplabv3plus_mobilenetv2", pretrained, kwargs)


@register_model
def dy_deeplabv3plus_mobilenetv2_050(pretrained: bool = False, **kwargs) -> DyDeepLabV3Plus:
    """The same with a pyramid and decoder of half the width."""
    return create_deeplab("dy_deeplabv3plus_mobilenetv2_050", pretrained, {"width_multiplier": 0.5, **kwargs})
