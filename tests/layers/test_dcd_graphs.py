"""A DCD network in other precisions, and as a graph: compiled, exported, scripted."""

import copy
import warnings

import pytest
import torch
from dcd_layers import randomise
from torch import nn

from timm_dynamic.layers import DCDConv2d, DCDLinear


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[(8, 8), (2, 2)], ids=["large map", "small map"])
def network(request):
    """A layer of either form, a norm and a classifier, and an input."""
    layers = randomise(DCDConv2d(8, 16, 3, padding=1)), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, randomise(DCDLinear(16, 5))), torch.randn(4, 8, *request.param)


class TestPrecision:
    @pytest.mark.parametrize("magnitude", [1e-3, 1, 1e2, 1e4])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_gives_no_nan(self, dtype, magnitude):
        for size in ((16, 16), (2, 2)):
            layer, x = DCDConv2d(32, 16, 1, bias=False), torch.randn(4, 32, *size) * magnitude
            for training in (True, False):
                x.requires_grad_()
                with torch.autocast("cpu", dtype):
                    output = layer.train(training)(x)
                assert output.dtype == dtype and not output.isnan().any()
                if training:
                    (output.float().square().mean() / output.detach().float().square().mean()).backward()
                    assert not any(p.grad.isnan().any() for p in (x, *layer.parameters()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_autocast_is_close(self, network, dtype, training):
        model, x = network
        model.train(training)
        expected = copy.deepcopy(model)(x)
        with torch.autocast("cpu", dtype):
            output = model(x)
        assert output.dtype == dtype
        error = (output.float() - expected).norm() / expected.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_parameters(self, network, dtype):
        model, x = network
        output = model.eval().to(dtype)(x.to(dtype))
        assert output.dtype == dtype and output.isfinite().all()


class TestGraphs:
    @pytest.mark.parametrize(
        ("network", "training"), [((8, 8), True), ((2, 2), False)], indirect=["network"], ids=["train", "eval"]
    )
    def test_compile_fullgraph(self, network, training):
        model, x = network
        model.train(training)
        x.requires_grad_()
        expected = copy.deepcopy(model)(x)
        torch._dynamo.reset()
        output = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
        (grad,) = torch.autograd.grad(output.square().sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-2, atol=1e-3)

    @torch.no_grad()
    def test_export_with_a_dynamic_batch(self, network):
        model, x = network
        model.eval()
        program = torch.export.export(model, (x,), dynamic_shapes={"input": {0: torch.export.Dim("batch")}})
        for batch in (1, 3):
            x = torch.randn(batch, *x.shape[1:])
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-4)

    @torch.no_grad()
    def test_script_and_trace(self, network):
        model, x = network
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both are deprecated; the trace says that it keeps the channels' number
            graphs = torch.jit.script(model), torch.jit.trace(model, x[:2])
        for graph in graphs:
            torch.testing.assert_close(graph(x), model(x), rtol=1e-3, atol=1e-4)
