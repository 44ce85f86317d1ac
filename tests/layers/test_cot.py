"""The contextual transformer layer: its groups, strides and a batch of one; the authors' numbers are a golden case."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_dynamic.layers import CoTLayer


@pytest.mark.parametrize("groups", [1, 2])
def test_is_what_the_paper_says(groups):
    """With unfolded windows, group after group."""
    torch.manual_seed(0)
    layer, x = CoTLayer(32, groups).double().eval(), torch.randn(2, 32, 5, 6).double()
    k = layer.key_embed(x)
    parts = [one for pair in zip(x.chunk(groups, 1), k.chunk(groups, 1), strict=True) for one in pair]
    both = torch.cat(parts, 1)  # every group's channels of x, then of k
    first = layer.embed[0].weight.unflatten(0, (groups, -1)).unflatten(2, (-1, 2))
    first = torch.cat([first[:, :, :, 0], first[:, :, :, 1]], 2).flatten(0, 1) if groups > 1 else layer.embed[0].weight
    w = layer.embed[1:](F.conv2d(both, first, groups=groups)).unflatten(1, (groups, 4 // groups, 9))
    v = F.unfold(layer.conv1x1(x), 3, padding=1).unflatten(1, (groups, -1, 4 // groups, 9)).unflatten(-1, (5, 6))
    y = F.silu(layer.bn((v * w[:, :, None]).sum(4).flatten(1, 3)))
    shares = layer.se((y + k).mean((2, 3), keepdim=True)).view(2, 32, 2, 1, 1).softmax(2)
    torch.testing.assert_close(layer(x), shares[:, :, 0] * y + shares[:, :, 1] * k)


def test_stride_and_dilation():
    layer, x = CoTLayer(16, stride=2).eval(), torch.randn(1, 16, 7, 5)
    dense = CoTLayer(16).eval()
    dense.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), dense(F.avg_pool2d(x, 3, 2, 1)))
    dilated = CoTLayer(16, dilation=2).eval()
    dilated.load_state_dict(layer.state_dict())
    assert dilated(x).shape == x.shape
    # A layer with gaps is one without, on every other position, but for what depends on all of them.
    torch.testing.assert_close(dilated.key_embed(x)[:, :, ::2, ::2], dense.key_embed(x[:, :, ::2, ::2]))


def test_a_batch_of_one_in_training():
    """The gate's norm takes its running statistics, and leaves them; with two samples it does not."""
    layer, x = CoTLayer(16).train(), torch.randn(2, 16, 4, 4)
    before = copy.deepcopy(layer.se)
    layer(x[:1]).sum().backward()
    assert torch.equal(layer.se[1].running_var, before[1].running_var)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    layer(x)
    assert not torch.equal(layer.se[1].running_var, before[1].running_var)
    layer.se[1] = nn.Identity()  # as after folding
    layer(x[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 24, "groups": 2}, r"dim must be divisible by 8 \* groups = 16, got 24"),
        ({"dim": 16, "stride": 3}, "stride must be 1 or 2, got 3"),
        ({"dim": 16, "dilation": 0}, "dilation must be at least 1, got 0"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoTLayer(**arguments)
