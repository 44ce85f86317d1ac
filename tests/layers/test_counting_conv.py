import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from timm_dynamic.layers import CountingConv2d


def test_counts_training_forwards_only():
    conv = nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect")
    counting = CountingConv2d.from_conv(conv)
    assert counting.weight is conv.weight and counting.bias is conv.bias
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(counting(x), conv(x))
    counting(x)
    counting.eval()(x)
    assert counting.step.item() == 2 and counting.step.dtype == torch.int64
    assert not CountingConv2d.from_conv(conv.eval()).training


def test_plain_convolutions_only():
    with pytest.raises(ValueError, match="Conv2dSame"):
        CountingConv2d.from_conv(Conv2dSame(3, 8, 3))
