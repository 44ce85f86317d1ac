"""What the drop-in layers share."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from timm_dynamic.layers import DDFConv2d, DDFPack, load_reference


def test_from_conv_refuses_what_has_its_own_forward():
    for module in (Conv2dSame(8, 8, 3), nn.Linear(8, 8)):
        with pytest.raises(ValueError, match=type(module).__name__):
            DDFConv2d.from_conv(module)


def test_load_reference():
    layer, other = DDFPack(8), DDFPack(8)
    load_reference(layer, other.state_dict())
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("channel_branch.4.std"), "channel_branch.4.std"),
        (lambda state: state.update(extra=torch.ones(1)), "extra"),
        (lambda state: state.update({"spatial_branch.0.bias": torch.ones(3)}), "spatial_branch.0.bias"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_load_reference_is_strict(change, message):
    state = dict(DDFPack(8).state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        load_reference(DDFPack(8), state)
