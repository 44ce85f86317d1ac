"""What layers that mix kernels share."""

from timm_dynamic.layers.base import DropInConv2d


class KernelMixture(DropInConv2d):
    """Base of drop-in layers that have their kernels as parameters `[N, O, I, Kh, Kw]`."""

    def _apply(self, fn, recurse: bool = True):
        # `Module.to(memory_format=torch.channels_last)` breaks on five dimensions. The kernels stay contiguous.
        return super()._apply(lambda t: fn(t.flatten(0, 1)).contiguous().view_as(t) if t.ndim == 5 else fn(t), recurse)
