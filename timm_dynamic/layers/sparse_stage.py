"""Sequences of residual blocks, some of which have masks."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.dispatch import has_hooks
from timm_dynamic.layers.sparse_branch import PackedBlock, SparseBranch
from timm_dynamic.ops.sparse.executor import samples_at_once


@register_notrace_module
class SparseStage(nn.Sequential):
    """A sequence of residual blocks, some of them with masks.

    In an optimized model blocks work in the memory of the ones before, unless somebody may look: has hooks.

    Attributes:
        widths: Of an optimized one: channels of the widest map in each block without a mask, by name; such a block
            runs few samples at a time.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._run(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _run(self, x: Tensor) -> Tensor:
        before = None  # a block whose output nobody else has seen
        widths = self.__dict__.get("widths", {}) if not torch.compiler.is_compiling() else {}
        for name, block in self._modules.items():
            is_packed = isinstance(block, PackedBlock) and not has_hooks(block)
            if is_packed and before is not None and type(before.act) is type(block.act):
                x = block.overwrite(x)
            elif name in widths and not torch.jit.is_tracing() and not any(map(has_hooks, block.modules())):
                parts = x.split(samples_at_once(x, widths[name]))
                x = torch.cat([block(part) for part in parts]) if len(parts) > 1 else block(x)
            else:
                x = block(x)
            before = block if is_packed else None
        return x

    @torch.jit.unused
    def optimized(self) -> None:
        """For `timm_dynamic.optimize`, which goes on with what is in it."""
        others = {name: block for name, block in self._modules.items() if not isinstance(block, SparseBranch)}
        self.widths = {name: _width(block) for name, block in others.items()}


def _width(block: nn.Module) -> int:
    return max((conv.out_channels for conv in block.modules() if isinstance(conv, nn.Conv2d)), default=1)
