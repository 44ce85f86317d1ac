"""LSNet: lightweight networks of large-small convolutions (Wang et al., CVPR 2025, arXiv 2503.23135)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, to_2tuple
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers.lsnet import ConvNorm
from timm_dynamic.models._cfg import imagenet_cfg, shipped_cfg
from timm_dynamic.models._lsnet import Attention, Block, NormLinear, RepVGGDW

__all__ = ["LSNet", "LSNetDistilled"]

register(
    Family(
        name="lsnet",
        title="LSNet",
        about="a filter for each pixel, made from a large neighbourhood",
        paper="Wang et al., CVPR 2025, arXiv 2503.23135",
        tiny="test_lsnet",
        patterns=("test_lsnet",),
        reported={
            "lsnet_t.in1k": 74.9,
            "lsnet_s.in1k": 77.8,
            "lsnet_b.in1k": 80.3,
            "lsnet_t_distill.in1k": 76.1,
            "lsnet_s_distill.in1k": 79.0,
            "lsnet_b_distill.in1k": 81.6,
        },
    )
)


class LSNet(nn.Module):
    """Four stages of blocks at strides 8 to 64; every second block has an `LSConv`, in the last stage attention.

    The attention's biases are for each distance on a map of 1/64 of `img_size`: images may be of any size up to that
    (rounded up to a multiple of 64), square or not. Weights of another `img_size` are interpolated on loading.

    Args:
        img_size: Of the largest images: height and width, or both.
        in_chans: Channels of the images.
        num_classes: 0: no classifier.
        embed_dim: Channels of the stages.
        depth: Numbers of blocks.
        num_heads, key_dim: Of the attention.
        global_pool: As for timm's `SelectAdaptivePool2d`; "" for none, without a classifier.
        drop_rate: Of dropout before the classifier.
        drop_path_rate: Of stochastic depth, in the last block; it grows from 0. The authors do without.

    Raises:
        ValueError: If an argument has an unusable value; from the forward pass, for images that are too large.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (64, 128, 256, 384),
        depth: Sequence[int] = (0, 2, 8, 10),
        num_heads: int = 4,
        key_dim: int = 16,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not len(embed_dim) == len(depth) == 4:
            raise ValueError(f"embed_dim and depth must be four numbers each, got {embed_dim} and {depth}")
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.grad_checkpointing = False
        stem: list[nn.Module] = []
        for before, width in zip((in_chans, embed_dim[0] // 4, embed_dim[0] // 2), (4, 2, 1), strict=True):
            stem += [ConvNorm(before, embed_dim[0] // width, 3, 2, **dd), nn.ReLU()]
        self.patch_embed = nn.Sequential(*stem[:-1])
        rates = iter(torch.linspace(0, drop_path_rate, sum(depth), device="cpu").tolist())
        attention = (key_dim, num_heads, tuple(-(-size // 64) for size in to_2tuple(img_size)))
        self.feature_info, before = [], embed_dim[0]
        for i, (dim, number) in enumerate(zip(embed_dim, depth, strict=True)):
            down = [ConvNorm(before, before, 3, 2, groups=before, **dd), ConvNorm(before, dim, **dd)] if i else []
            kind = attention if i == len(depth) - 1 else None
            blocks = [Block(dim, n, kind, next(rates), **dd) for n in range(number)]
            self.add_module(f"blocks{i + 1}", nn.Sequential(*down, *blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 8 * 2**i, "module": f"blocks{i + 1}"})
            before = dim
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head = self._new_head()

    def _new_head(self) -> nn.Module:
        width = self.num_features * self.global_pool.feat_mult()
        like = self.patch_embed[0].c.weight
        if self.num_classes == 0:
            return nn.Identity()
        head = NormLinear(width, self.num_classes, self.drop_rate, like.device, like.dtype)
        return head.train(self.training)

    def _stages(self) -> list[nn.Sequential]:
        return [getattr(self, info["module"]) for info in self.feature_info]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Of timm: parameters that do not decay."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Of timm: the layers, for rates that differ between them."""
        return {"stem": r"^patch_embed", "blocks": r"^blocks(\d+)" if coarse else r"^blocks(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of timm: save memory in training."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Of timm: the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Of timm: a new classifier, or none for 0 classes."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head = self._new_head()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in self._stages():
                x = checkpoint_seq(stage, x)
            return x
        return self.blocks4(self.blocks3(self.blocks2(self.blocks1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Of timm: the last features, and those of the stages.

        Args:
            x: Images.
            indices: Of the stages: those in a list, the last so many, or all.
            norm: Without effect: there is none.
            stop_early: Do not run stages behind the last one that is wanted.
            output_fmt: "NCHW".
            intermediates_only: Return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt must be "NCHW", got {output_fmt!r}')
        stages = self._stages()
        wanted, last = feature_take_indices(len(stages), indices)
        x, intermediates = self.patch_embed(x), []
        for i, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Of timm: remove the stages behind the last one that is wanted, and the classifier."""
        stages = self._stages()
        wanted, last = feature_take_indices(len(stages), indices)
        for info in self.feature_info[last + 1 :]:
            self.set_submodule(info["module"], nn.Sequential())
        if prune_head:
            self.reset_classifier(0, "")
        return wanted


class LSNetDistilled(LSNet):
    """`LSNet` with a second classifier, for a teacher's choice; the output is the mean of both, as in timm's LeViT.

    After `set_distilled_training()` it is both of them in training (timm's `TokenDistillationTask`).

    Args:
        *args, **kwargs: As for `LSNet`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.head_dist = self._new_head()
        self.distilled_training = False

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Of timm: both classifiers."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Of timm: new classifiers, or none for 0 classes."""
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = self._new_head()

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Of timm: return the outputs of both classifiers in training."""
        self.distilled_training = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        x = self.global_pool(x)
        if pre_logits:
            return x
        y, distilled = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return y, distilled
        return (y + distilled) / 2


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints: without the attention's tables of indices, its biases interpolated to our `img_size`.

    A block without its 1x1 branch (`mixer.conv1`) gets one that gives 0.
    """
    own = model.state_dict()
    if not all(key in own for key in state_dict):
        state_dict = extract_state_dict(state_dict)
    state_dict = {key: value for key, value in state_dict.items() if not key.endswith("attention_bias_idxs")}
    for name, module in model.named_modules():
        key, branch = f"{name}.attention_biases", f"{name}.conv1."
        if isinstance(module, Attention) and key in state_dict:
            state_dict[key] = _interpolated(state_dict[key], module.resolution)
        elif isinstance(module, RepVGGDW) and f"{name}.conv.c.weight" in state_dict:
            if not any(key.startswith(branch) for key in state_dict):
                state_dict |= module.conv1.state_dict(prefix=branch)
                state_dict[f"{branch}bn.weight"] = torch.zeros_like(module.conv1.bn.weight)
    return state_dict


def _interpolated(biases: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Attention biases of another map, as the authors do it; theirs are `[heads, n * n]`, of a square map."""
    if biases.ndim == 2 and math.isqrt(biases.shape[1]) ** 2 == biases.shape[1]:
        biases = biases.unflatten(1, (math.isqrt(biases.shape[1]), -1))
    if biases.ndim != 3 or biases.shape[1:] == resolution:
        return biases
    return F.interpolate(biases[None], resolution, mode="bicubic")[0]


def _cfg(name: str, **kwargs) -> dict[str, Any]:
    """For `generate_default_cfgs`; weights on the Hub are the authors' files."""
    classifier = ("head.l", "head_dist.l") if name.endswith("_distill") else "head.l"
    about = {
        "fixed_input_size": True,  # to timm: the network is made for the size of the images
        "pool_size": (4, 4),
        "hf_hub_id": f"jameslahm/{name}",
        "hf_hub_filename": "pytorch_model.bin",
        "origin_url": "https://github.com/THU-MIG/lsnet",
        "paper_ids": "arXiv:2503.23135",
        "license": "mit",
    }
    return imagenet_cfg("patch_embed.0.c", classifier, **{**about, **kwargs})


_SIZES = {
    "t": {"embed_dim": (64, 128, 256, 384), "depth": (0, 2, 8, 10)},
    "s": {"embed_dim": (96, 192, 320, 448), "depth": (1, 2, 8, 10)},
    "b": {"embed_dim": (128, 256, 384, 512), "depth": (4, 6, 8, 10)},
    "tiny": {"embed_dim": (16, 32, 48, 64), "depth": (0, 2, 2, 2)},
}
_DIGITS = {**shipped_cfg("test_lsnet.digits"), "input_size": (3, 128, 128), "hf_hub_id": None, "hf_hub_filename": None}
default_cfgs = generate_default_cfgs(
    {f"lsnet_{size}{kind}.in1k": _cfg(f"lsnet_{size}{kind}") for size in "tsb" for kind in ("", "_distill")}
    | {"test_lsnet.digits": _cfg("test_lsnet", **_DIGITS)}
)


def _create(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> LSNet:
    model_cls = LSNetDistilled if variant.endswith("_distill") else LSNet
    options = {"feature_cfg": {"out_indices": (0, 1, 2, 3)}, **_SIZES[size], **kwargs}
    return build_model(model_cls, variant, pretrained, **options)


@register_model
def lsnet_t(pretrained: bool = False, **kwargs) -> LSNet:
    """LSNet-T."""
    return _create("lsnet_t", "t", pretrained, kwargs)


@register_model
def lsnet_s(pretrained: bool = False, **kwargs) -> LSNet:
    """LSNet-S."""
    return _create("lsnet_s", "s", pretrained, kwargs)


@register_model
def lsnet_b(pretrained: bool = False, **kwargs) -> LSNet:
    """LSNet-B."""
    return _create("lsnet_b", "b", pretrained, kwargs)


@register_model
def lsnet_t_distill(pretrained: bool = False, **kwargs) -> LSNet:
    """LSNet-T with a classifier for distillation."""
    return _create("lsnet_t_distill", "t", pretrained, kwargs)


@register_model
def lsnet_s_distill(pretrained: bool = False, **kwargs) -> LSNet:
    """LSNet-S with a classifier for distillation."""
    return _create("lsnet_s_distill", "s", pretrained, kwargs)


@register_model
def lsnet_b_distill(pretrained: bool = False, **kwargs) -> LSNet:
    """LSNet-B with a classifier for distillation."""
    return _create("lsnet_b_distill", "b", pretrained, kwargs)


@register_model
def test_lsnet(pretrained: bool = False, **kwargs) -> LSNet:
    """A tiny LSNet for tests and small images."""
    return _create("test_lsnet", "tiny", pretrained, kwargs)
