"""Inference of blocks with dynamic convolutions: batch norms in the place of the convolutions' output."""

import copy
from collections.abc import Iterable

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from timm_dynamic.layers.base import DropInConv2d
from timm_dynamic.layers.folding import LIMITS, KeepsFolded, activation, affine, has_hooks, normed_pairs
from timm_dynamic.ops._library import cuda_inference_kernel_serves, inference_kernel_serves
from timm_dynamic.ops.affine import affine_reference_


class AffineNorm(nn.Module):
    """A batch norm in eval mode, and the activation within or behind it, in the place of its input."""

    def __init__(self, norm: nn.BatchNorm2d, act: nn.Module | None = None):
        super().__init__()
        self.scale, self.shift = (t.detach() for t in affine(norm))
        act = activation(norm, act)
        self.low, self.high = LIMITS.get(type(act), LIMITS[nn.Identity])
        self.act = nn.Identity() if type(act) in LIMITS else act

    def forward(self, y: Tensor) -> Tensor:
        channels_last = y.device.type == "cuda" and y.is_contiguous(memory_format=torch.channels_last)
        run = torch.ops.timm_dynamic.affine_ if channels_last or y.is_contiguous() else affine_reference_
        run(y, self.scale, self.shift, self.low, self.high)
        return self.act(y)


class _NormedLayer(nn.Module):
    """A dynamic convolution with the norm behind it, which it may do itself."""

    def __init__(self, layer: DropInConv2d, norm: AffineNorm):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        y = self.layer.forward_normed(x, (norm.scale, norm.shift, norm.low, norm.high))
        return norm(self.layer(x)) if y is None else norm.act(y)


class FoldedStage(KeepsFolded, nn.Sequential):
    """A sequence of blocks with dynamic convolutions; in inference, the norms behind convolutions work in place.

    That is float32 and NCHW on a CPU, anything on a GPU, in eval mode and without gradients. The results are the same
    up to rounding. Not if somebody may look: a block with hooks in it runs as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if isinstance(x, Tensor):  # not a proxy of torch.fx
                on_cpu = inference_kernel_serves(x) and x.is_contiguous()
                if not self.training and (on_cpu or cuda_inference_kernel_serves(x, x)):
                    return self._run_folded(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _run_folded(self, x: Tensor) -> Tensor:
        folded = self._keep(None, self._within_layers, self._fold)
        for name, block in self._modules.items():
            x = folded.get(name, block)(x)
        return x

    @torch.jit.unused
    def _within_layers(self) -> Iterable[nn.Module]:
        """What the folded blocks share with the blocks themselves."""
        return [part for layer in self.modules() if isinstance(layer, DropInConv2d) for part in layer.children()]

    @torch.jit.unused
    def _fold(self) -> dict[str, nn.Module]:
        return {
            name: _folded(block) for name, block in self._modules.items() if not any(map(has_hooks, block.modules()))
        }


# What follows norms at once in timm's residual blocks, in which dropping is training's.
_ACTIVATED = {BasicBlock: {"bn1": "act1"}, Bottleneck: {"bn1": "act1", "bn2": "act2"}}


def _folded(block: nn.Module) -> nn.Module:
    """The block with other norms behind its convolutions; all else in it is its own."""
    own = [module for module in block.modules() if isinstance(module, DropInConv2d) or not module._modules]
    folded = copy.deepcopy(block, {id(item): item for item in (*own, *block.parameters(), *block.buffers())})
    for parent, conv_name, name in normed_pairs(folded, (DropInConv2d, nn.Conv2d)):
        conv, norm = getattr(parent, conv_name), getattr(parent, name)
        if norm.running_mean.dtype != torch.float32:
            continue
        act = next((acts.get(name) for kind, acts in _ACTIVATED.items() if isinstance(parent, kind)), None)
        norm = AffineNorm(norm, act and getattr(parent, act))
        if act:
            setattr(parent, act, nn.Identity())
        if hasattr(conv, "forward_normed"):
            setattr(parent, conv_name, _NormedLayer(conv, norm))
            norm = nn.Identity()
        setattr(parent, name, norm)
    return folded


def fold_stages(model: nn.Module) -> None:
    """Make a `FoldedStage` of every stage of a new ResNet, EfficientNet or MobileNetV3 of timm's."""
    efficient = hasattr(model, "blocks")
    for name in [f"blocks.{i}" for i in range(len(model.blocks))] if efficient else [f"layer{i}" for i in range(1, 5)]:
        model.set_submodule(name, FoldedStage(*model.get_submodule(name)))
