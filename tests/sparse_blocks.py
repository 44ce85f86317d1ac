"""Blocks with masks, and running them, for the tests."""

import copy
from unittest import mock

import torch
from timm.models.resnet import downsample_avg, downsample_conv
from torch import nn

from timm_dynamic.layers import SparseBranch
from timm_dynamic.models.dynconv_mobilenetv2 import SparseInvertedResidual
from timm_dynamic.models.dynconv_resnet import SparseBasicBlock, SparseBottleneck
from timm_dynamic.ops.sparse import table


def basic(stride=1, shortcut=None, **kwargs):
    downsample = shortcut and shortcut(24, 20 if stride > 1 else 24, 1, stride)
    return SparseBasicBlock(24, 20 if stride > 1 else 24, stride, downsample, **kwargs)


def bottleneck(stride=1, shortcut=None, kernel_size=1, **kwargs):
    downsample = shortcut and shortcut(24, 24, kernel_size, stride)
    return SparseBottleneck(24, 6, stride, downsample, **kwargs)


def inverted(**kwargs):
    return SparseInvertedResidual(24, 24, **{"exp_ratio": 2.0, "act_layer": nn.ReLU6, **kwargs})


BLOCKS = {
    "basic": basic,
    "basic, stride 2": lambda: basic(2, downsample_conv),
    "basic, stride 2, average": lambda: basic(2, downsample_avg),
    "basic, dilated": lambda: basic(dilation=2),
    "basic, dilated first": lambda: basic(dilation=2, first_dilation=3),
    "basic, reduced": lambda: basic(reduce_first=2),
    "bottleneck": bottleneck,
    "bottleneck, stride 2": lambda: bottleneck(2, downsample_conv),
    "bottleneck, stride 2, average": lambda: bottleneck(2, downsample_avg),
    "bottleneck, stride 2, 3x3": lambda: bottleneck(2, downsample_conv, 3),
    "bottleneck, convolved shortcut": lambda: bottleneck(1, downsample_conv),
    "bottleneck, dilated": lambda: bottleneck(dilation=2),
    "inverted": inverted,
    "inverted, 5x5, dilated": lambda: inverted(dw_kernel_size=5, dilation=2),
    "inverted, ReLU": lambda: inverted(act_layer=nn.ReLU, exp_ratio=1.5, mask_kernel_size=1),
}


class Fixed(nn.Module):
    """Instead of a mask unit."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return self.mask.to(x.dtype)


def randomize(module):
    """Norms as after some training; in eval mode."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, mean in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0)):
                nn.init.normal_(tensor, mean, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval()


def make(name, dtype=torch.float64):
    return randomize(BLOCKS[name]()).to(dtype)


def give_mask(block, x, density=0.3):
    """A random mask, the same at every call; all of it or nothing in some samples."""
    size = [-(-n // block.masker.stride) for n in x.shape[2:]]
    mask = torch.rand(len(x), 1, *size) < torch.tensor([density, 0.0, 1.0, 0.5])[: len(x), None, None, None]
    stride = block.masker.stride
    block.masker = Fixed(mask)
    block.masker.stride = stride
    return mask


@torch.no_grad()
def run(block, x, execution="sparse", sparse_runs=True):
    """The output; which of the two executions it was is checked."""
    for module in block.modules():
        module.execution = execution
    with mock.patch.object(table, "execute", wraps=table.execute) as spy:
        y = block(x)
    assert spy.called == (execution == "sparse" and sparse_runs and x.numel() > 0)
    return y


def optimized(block):
    """Its form for inference, of a copy."""
    return copy.deepcopy(block).optimized().eval().requires_grad_(False)


def assert_sparse_is_dense(block, x, sparse_runs=True, **close):
    """And so is the form for inference, if there is one."""
    before = x.clone()
    y = run(block, x, sparse_runs=sparse_runs)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y, run(block, x, "dense"), equal_nan=True, **close)
    if isinstance(block, SparseBranch) and sparse_runs and torch.is_autocast_enabled("cpu") is False:
        form = optimized(block)
        for execution in ("sparse", "sparse", "dense"):
            torch.testing.assert_close(run(form, x, execution), y, equal_nan=True, **close)
            torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    return y
