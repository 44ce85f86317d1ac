"""ONNX files of a small network of each family, by the route of timm's `onnx_export.py --dynamo`."""

import pytest
import torch
from module_cases import NETWORKS, make_network
from timm.utils.onnx import onnx_export, onnx_forward
from torch import nn

from timm_dynamic import optimize
from timm_dynamic.layers import CARAFE, DCDConv2d, DynamicConv2d, PEDConv2d

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

# An export takes as long as its graph is large: the second stage of a ResNet stands behind the stem, which has as many
# channels as the first one would have with these; and involution has fewer taps.
OF_FIRST_STAGE = {**dict.fromkeys(NETWORKS, 32), "cotnet": 8, "ddf": 8, "dy": 16, "involution": 8}
FEW_TAPS = {"involution": {"kernel_size": 3}}


def small_network(family):
    if family in ("dynconv", "lsnet"):
        return make_network(family)
    model = make_network(family, channels=(OF_FIRST_STAGE[family], 24, 24, 24), **FEW_TAPS.get(family, {}))
    model.layer1 = torch.nn.Sequential()
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", NETWORKS)
def test_onnxruntime_agrees_at_other_batch_sizes(family, tmp_path):
    model, path = small_network(family), str(tmp_path / "model.onnx")
    onnx_export(model, path, batch_size=1, use_dynamo=True)
    for batch in (1, 3):
        x = torch.randn(batch, *model.default_cfg["input_size"])
        output = torch.from_numpy(onnx_forward(path, x))
        torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)


# Layers whose graphs have another shape than those of the networks.
LAYERS = {
    "an upsampler of odd scale": lambda: CARAFE(8, scale_factor=3, up_group=2),
    "a 1x1 convolution of many positions": lambda: DCDConv2d(8, 12, 1, latent_dim=1),
    "a depthwise convolution of few positions": lambda: DynamicConv2d(8, 8, 3, padding=1, groups=8),
    "more outputs than positions": lambda: PEDConv2d(8, 16, (3, 1), stride=(2, 3), padding=(2, 1), dilation=(2, 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_single_layers(name, tmp_path):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    model = nn.Sequential(layer, nn.BatchNorm2d(getattr(layer, "out_channels", 8)), nn.ReLU6()).eval()
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for t in (norm.weight, norm.bias, norm.running_mean):
                t.normal_()
    fast, path = optimize(model, torch.randn(2, 8, 6, 7)), str(tmp_path / "layer.onnx")
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(fast, (torch.randn(2, 8, 6, 7),), path, dynamo=True, dynamic_shapes=shapes)
    for batch in (1, 4):
        x = torch.randn(batch, 8, 6, 7)
        torch.testing.assert_close(torch.from_numpy(onnx_forward(path, x)), model(x), rtol=1e-4, atol=1e-4)
