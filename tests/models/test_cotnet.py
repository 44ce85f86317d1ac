"""What is special about CoTNet: networks in TorchScript, with another output stride, and a batch of one."""

import pytest
import timm
import torch


@pytest.mark.parametrize("name", ["test_cotnet", "test_lsnet"])
@torch.no_grad()
def test_torchscript(name):
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 128, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_output_stride_and_groups():
    options = {"channels": (16, 32, 48, 64), "cardinality": 2, "base_width": 32}
    model = timm.create_model("test_cotnet", output_stride=8, **options).train()
    assert [block.conv2.groups for block in (model.layer1[0], model.layer4[0])] == [2, 2]
    assert model.layer4[0].conv2.dilation == 2 and model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (8, 8)
    with pytest.raises(ValueError, match="block_reduce_first must be 1"):
        timm.create_model("test_cotnet", block_reduce_first=2)
