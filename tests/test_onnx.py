"""ONNX files of the layers of each family, and of a whole network by the route of timm's `onnx_export.py --dynamo`."""

import pytest
import torch
from module_cases import LAYERS, NETWORKS, make_layer, make_network, randomise, settle
from timm.utils.onnx import onnx_export, onnx_forward
from torch import nn

from timm_dynamic import optimize
from timm_dynamic.layers import CARAFE, CoTLayer, DCDConv2d, DynamicConv2d, LSConv, PEDConv2d

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package)
onnxruntime = pytest.importorskip("onnxruntime")

# Layers of families without a drop-in one.
OTHERS = {"cotnet": lambda: CoTLayer(8), "lsnet": lambda: LSConv(8, groups=4)}
X = torch.randn(4, 8, 6, 7, generator=torch.Generator().manual_seed(0))


class SideBySide(nn.ModuleDict):
    """Layers of one input. Each file takes seconds, whatever is in it: so all of them are in one."""

    def forward(self, x):
        return tuple(layer(x) for layer in self.values())


def assert_same_in_onnxruntime(layers, references):
    """Of each layer, by name: its outputs there are those of its reference here, at other batch sizes too."""
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(SideBySide(layers).eval(), (X[:2],), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (1, 4):
        outputs = session.run(None, {session.get_inputs()[0].name: X[:batch].numpy()})
        for name, output in zip(layers, outputs, strict=True):
            expected = references[name](X[:batch])
            torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def test_layers():
    torch.manual_seed(0)
    layers = {family: make_layer(family, stride=2) for family in LAYERS}
    layers |= {family: make() for family, make in OTHERS.items()}
    layers["an upsampler of odd scale"] = CARAFE(8, scale_factor=3, up_kernel=3, encoder_kernel=1, up_group=2)
    for layer in layers.values():
        settle(randomise(layer), X)
    assert_same_in_onnxruntime(layers, layers)


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in NETWORKS if family not in (*LAYERS, *OTHERS)])
def test_networks(family, tmp_path):
    """Of segmentation: tests/models/test_dy_deeplabv3plus.py."""
    model, path = make_network(family), str(tmp_path / "model.onnx")
    onnx_export(model, path, batch_size=1, use_dynamo=True)
    for batch in (1, 3):
        x = torch.randn(batch, *model.default_cfg["input_size"])
        output = torch.from_numpy(onnx_forward(path, x))
        torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)


# Layers whose graphs have another shape than those above.
OPTIMIZED = {
    "a 1x1 convolution of many positions": lambda: DCDConv2d(8, 12, 1, latent_dim=1),
    "a depthwise convolution of few positions": lambda: DynamicConv2d(8, 8, 3, padding=1, groups=8),
    "more outputs than positions": lambda: PEDConv2d(8, 16, (3, 1), stride=(2, 3), padding=(2, 1), dilation=(2, 1)),
}


@torch.no_grad()
def test_optimized_layers():
    torch.manual_seed(0)
    models = {}
    for name, make in OPTIMIZED.items():
        layer = make()
        models[name] = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU6()).eval()
        for norm in models[name].modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for t in (norm.weight, norm.bias, norm.running_mean):
                    t.normal_()
    assert_same_in_onnxruntime({name: optimize(model, X) for name, model in models.items()}, models)
