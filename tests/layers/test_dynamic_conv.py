"""DynamicConv2d, against the paper's formulas and nn.Conv2d itself."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from steps import assert_same_step
from timm.layers import Conv2dSame
from torch import nn

import timm_dynamic
from timm_dynamic.layers import DynamicConv2d, load_reference
from timm_dynamic.layers.progress import share_progress

# Positional arguments after in_channels=8, out_channels=12: kernel_size, stride, padding, dilation, groups, bias, mode
CASES = {
    "1x1": (1,),
    "3x3": (3, 1, 1),
    "strided": (3, 2, 1),
    "dilated": (3, 1, 2, 2),
    "grouped, with bias": (3, 2, 1, 1, 4, True),
    "oblong": ((3, 5), (2, 1), (1, 2), (1, 1), 2, False),
    "same": (3, 1, "same", (2, 1)),
    "same, even": (4, 1, "same"),
    "valid": (3, 1, "valid"),
    "reflect": (3, 1, (1, 2), 1, 1, True, "reflect"),
    "circular": (3, 2, 1, 1, 1, False, "circular"),
    "replicate, same": (2, 1, "same", 1, 1, True, "replicate"),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def attention(layer, x, temperature=1.0):
    squeeze, _, expand = layer.attention.to_scores
    hidden = F.relu(x.mean((2, 3)) @ squeeze.weight.T + squeeze.bias)
    return ((hidden @ expand.weight.T + expand.bias) / temperature).softmax(1)


def formula(layer, x, temperature=1.0):
    """A convolution of its own for every sample."""
    outputs = []
    for sample, pi in zip(x.split(1), attention(layer, x, temperature), strict=True):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        conv = nn.Conv2d(*(getattr(layer, name) for name in names), padding_mode=layer.padding_mode)
        weight = {"weight": torch.einsum("n,noikl->oikl", pi, layer.kernels_weights)}
        weight["bias"] = None if layer.kernels_bias is None else pi @ layer.kernels_bias
        outputs.append(torch.func.functional_call(conv, weight, sample))
    return torch.cat(outputs)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
class TestFormula:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("batch", [1, 3])
    def test_output_and_gradients(self, name, batch):
        layer = DynamicConv2d(8, 12, *CASES[name], num_kernels=3).double()
        x = torch.randn(batch, 8, 9, 6, dtype=torch.float64, requires_grad=True)
        output, expected = layer(x), formula(layer, x)
        torch.testing.assert_close(output, expected)
        wanted, grad = [x, *layer.parameters()], torch.randn_like(expected)
        grads = zip(torch.autograd.grad(output, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True)
        for own, other in grads:
            torch.testing.assert_close(own, other)

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("size", [(9, 6), (5, 5), (6, 7)], ids=str)
    def test_shape_of_the_convolution(self, name, size):
        x = torch.randn(2, 8, *size)
        assert DynamicConv2d(8, 12, *CASES[name])(x).shape == nn.Conv2d(8, 12, *CASES[name])(x).shape

    @pytest.mark.parametrize("name", CASES)
    @torch.no_grad()
    def test_around_the_mean(self, name):
        layer = DynamicConv2d(8, 12, *CASES[name], num_kernels=3, around_mean=True).double()
        other = DynamicConv2d(8, 12, *CASES[name], num_kernels=3).double()
        other.attention.load_state_dict(layer.attention.state_dict())
        for ours, theirs in ((layer.kernels_weights, other.kernels_weights), (layer.kernels_bias, other.kernels_bias)):
            if ours is not None:
                theirs.copy_(ours[0] + torch.cat([-ours[1:].sum(0, keepdim=True), ours[1:]]))
        x = torch.randn(2, 8, 9, 6, dtype=torch.float64)
        torch.testing.assert_close(layer(x), other(x))

    def test_no_sample(self):
        for kernel_size in (1, 3):
            output = DynamicConv2d(8, 12, kernel_size, padding=kernel_size // 2)(torch.randn(0, 8, 5, 5))
            assert output.shape == (0, 12, 5, 5)
            output.sum().backward()


class TestConstruction:
    def test_the_authors_parameter_names_and_widths(self):
        state = DynamicConv2d(16, 24, (3, 1), groups=2, num_kernels=5, reduction=3).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == {
            "kernels_weights": [5, 24, 8, 3, 1],
            "kernels_bias": [5, 24],
            "attention.to_scores.0.weight": [5, 16],
            "attention.to_scores.0.bias": [5],
            "attention.to_scores.2.weight": [5, 5],
            "attention.to_scores.2.bias": [5],
            "progress.done": [],
        }

    def test_narrow_layers_have_an_attention(self):
        layer = DynamicConv2d(1, 2, 3)
        assert layer.attention.to_scores[0].out_features == 1
        assert layer(torch.randn(2, 1, 5, 5)).shape == (2, 2, 3, 3)

    def test_attributes_of_a_convolution(self):
        arguments = (8, 12, 3, 2, 1, 1, 4, False, "reflect")
        layer, conv = DynamicConv2d(*arguments), nn.Conv2d(*arguments)
        for name in conv.__constants__:
            assert getattr(layer, name) == getattr(conv, name), name
        assert layer.bias is None
        assert repr(conv).removeprefix("Conv2d") in repr(layer).replace("DynamicConv2d(\n  ", "(").replace("\n", ")", 1)

    def test_kernels_start_like_convolutions(self):
        layer, conv = DynamicConv2d(32, 64, 3), nn.Conv2d(32, 64, 3)
        for kernel in layer.kernels_weights:
            assert kernel.std().item() == pytest.approx(conv.weight.std().item(), rel=0.05)
            assert kernel.abs().max().item() == pytest.approx(conv.weight.abs().max().item(), rel=0.01)
        assert not torch.equal(layer.kernels_weights[0], layer.kernels_weights[1])

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"num_kernels": 0}, "num_kernels must be at least 1, got 0"),
            ({"reduction": 0}, "reduction must be at least 1, got 0"),
            ({"stride": 0}, "stride must be at least 1, got 0"),
            ({"groups": 3}, "divisible by groups"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            DynamicConv2d(8, 8, 3, **kwargs)

    @pytest.mark.parametrize("shape", [(8, 5, 5), (2, 7, 5, 5)], ids=str)
    def test_bad_input(self, shape):
        with pytest.raises(ValueError, match=r"x must be \[B, 8, H, W\]"):
            DynamicConv2d(8, 8, 3)(torch.randn(shape))

    def test_load_reference(self):
        layer, other = DynamicConv2d(8, 4, 3), DynamicConv2d(8, 4, 3)
        load_reference(layer, other.state_dict())
        x = torch.randn(2, 8, 5, 5)
        assert torch.equal(layer(x), other(x))


class TestFromConv:
    def test_close_to_the_convolution(self):
        conv = nn.Conv2d(8, 12, 3, 2, "valid", 2, 4, dtype=torch.float64).eval()
        layer = DynamicConv2d.from_conv(conv, num_kernels=6, reduction=2)
        assert layer.num_kernels == 6 and not layer.training
        x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
        difference = (layer(x) - conv(x)).abs().max() / conv(x).std()
        assert 0 < difference < 1e-3

    @torch.no_grad()
    def test_kernels_and_their_mean(self):
        conv = nn.Conv2d(64, 64, 3)
        layer = DynamicConv2d.from_conv(conv)
        assert torch.equal(layer.kernels_weights[0], conv.weight) and torch.equal(layer.bias, conv.bias)
        apart = layer.kernels_weights[1:] / conv.weight.std()
        assert apart.std().item() == pytest.approx(1e-4, rel=0.05) and not layer.kernels_bias[1:].any()
        layer = DynamicConv2d.from_conv(conv, around_mean=False)
        for kernel, bias in zip(layer.kernels_weights, layer.kernels_bias, strict=True):
            assert ((kernel - conv.weight).double().std() / conv.weight.std()).item() == pytest.approx(1e-4, rel=0.05)
            assert torch.equal(bias, conv.bias)
        torch.testing.assert_close(layer.bias, conv.bias)

    @pytest.mark.parametrize("num_kernels", [1, 2, 4, 8])
    @pytest.mark.parametrize("kernel_size", [1, 3])
    @pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.01), partial(torch.optim.Adam, lr=1e-3)])
    def test_first_step_is_the_convolutions(self, optimizer, kernel_size, num_kernels):
        conv = nn.Conv2d(16, 24, kernel_size, padding=kernel_size // 2).double()
        layer = DynamicConv2d.from_conv(conv, num_kernels=num_kernels)
        x, target = torch.rand(8, 16, 7, 7).double(), torch.randn(8, 24, 7, 7).double()
        assert_same_step(layer, conv, x, target, optimizer)

    def test_a_single_weight(self):
        assert DynamicConv2d.from_conv(nn.Conv2d(1, 1, 1)).kernels_weights.isfinite().all()

    def test_refuses_other_convolutions(self):
        with pytest.raises(ValueError, match="Conv2dSame"):
            DynamicConv2d.from_conv(Conv2dSame(8, 8, 3))


class TestTemperature:
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    @pytest.mark.parametrize(
        ("epoch", "expected"), [(0, 30), (0.9, 30), (1, 30 - 29 / 9), (8, 1 + 29 / 9), (9, 1), (50, 1)]
    )
    def test_by_epochs(self, epoch, expected):
        layer = DynamicConv2d(8, 12, 3).double()
        timm_dynamic.set_progress(nn.Sequential(layer), epoch, 100)
        for training in (True, False):
            torch.testing.assert_close(
                layer.train(training)(self.x), formula(layer, self.x, expected), rtol=1e-6, atol=0
            )

    def test_by_steps(self):
        model = nn.Sequential(DynamicConv2d(8, 8, 1), DynamicConv2d(8, 12, 3)).double()
        share_progress(model).begin(4)
        for done in range(6):
            temperature = 30 - 29 * min(done, 4) / 4
            expected = formula(model[1], formula(model[0], self.x, temperature), temperature)
            torch.testing.assert_close(model.eval()(self.x), expected, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(model.train()(self.x), expected, rtol=1e-6, atol=1e-9)
        assert sum(key.endswith("progress.done") for key in model.state_dict()) == 1

    @pytest.mark.parametrize(("epoch", "epochs"), [(-1, 10), (0, 0)])
    def test_bad_progress(self, epoch, epochs):
        with pytest.raises(ValueError, match="epoch"):
            timm_dynamic.set_progress(DynamicConv2d(8, 8, 3), epoch, epochs)


class TestInOtherHands:
    @pytest.mark.parametrize("kernel_size", [1, 3])
    @pytest.mark.parametrize("groups", [1, 8])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_channels_last(self, kernel_size, groups, batch):
        layer = DynamicConv2d(8, 16, kernel_size, padding=kernel_size // 2, groups=groups)
        x = torch.randn(batch, 8, 6, 5)
        output = layer(x.to(memory_format=torch.channels_last))
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, layer(x), rtol=1e-4, atol=1e-5)
        converted = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        assert converted.kernels_weights.is_contiguous()
        assert torch.equal(converted(x.to(memory_format=torch.channels_last)), output)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kwargs", [{}, {"padding": 1, "groups": 8}, {"stride": 2}], ids=str)
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 2e3])
    def test_autocast_has_no_nan(self, dtype, kwargs, scale):
        layer = DynamicConv2d(8, 8, 3, **kwargs)
        x = (scale * torch.randn(2, 8, 7, 7)).requires_grad_()
        with torch.autocast("cpu", dtype):
            output = layer(x)
        assert output.dtype == dtype and output.isfinite().all()
        output.float().sigmoid().sum().backward()
        assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_scores_that_half_precision_cannot_hold(self, dtype):
        layer = DynamicConv2d(8, 8, 1, dtype=dtype)
        with torch.no_grad():
            for p in layer.attention.parameters():
                p.mul_(100)
        assert layer(torch.full((2, 8, 3, 3), 1e4, dtype=dtype)).isfinite().all()

    def test_moving_the_layer(self):
        layer = DynamicConv2d(8, 8, 3)
        layer(torch.randn(1, 8, 5, 5)).sum().backward()
        weight, storage = layer.kernels_weights, layer.kernels_weights.untyped_storage().data_ptr()
        assert layer.double().kernels_weights is weight and weight.grad.dtype == torch.float64
        assert layer.double().kernels_weights.untyped_storage().data_ptr() != storage
        storage = weight.untyped_storage().data_ptr()
        assert layer.to("cpu").kernels_weights.untyped_storage().data_ptr() == storage
        assert layer.to_empty(device="meta").kernels_weights.shape == (4, 8, 8, 3, 3)

    def test_compile(self):
        torch._dynamo.reset()  # other tests have compiled the same forward
        layer = DynamicConv2d(8, 12, 3)
        compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(2, 8, 5, 5)
        with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
            torch.testing.assert_close(compiled(x), layer(x))
            for epoch in range(10):  # another temperature is no reason to compile again
                timm_dynamic.set_progress(layer, epoch, 10)
                torch.testing.assert_close(compiled(x), layer(x))

    @pytest.mark.parametrize("groups", [1, 8])
    def test_export_with_a_dynamic_batch(self, groups):
        layer = DynamicConv2d(8, 16, 3, groups=groups).eval()
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(layer, (torch.randn(2, 8, 5, 5),), dynamic_shapes=shapes)
        for batch in (1, 3):
            x = torch.randn(batch, 8, 5, 5)
            torch.testing.assert_close(program.module()(x), layer(x))

    def test_script(self):
        layer, x = DynamicConv2d(8, 8, 3, padding="same"), torch.randn(2, 8, 5, 5)
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize("around_mean", [False, True])
@pytest.mark.parametrize("arguments", [(1,), (3, 2, 1), (3, 1, "same", 1, 4), (1, 1, 0, 1, 1, False)], ids=str)
@torch.no_grad()
class TestInference:
    def make(self, arguments, around_mean):
        layer = DynamicConv2d(8, 12, *arguments, around_mean=around_mean).eval()
        layer.set_progress(2, 20)
        return layer, torch.randn(3, 8, 9, 6)

    def test_in_one_call(self, arguments, around_mean):
        layer, x = self.make(arguments, around_mean)
        layer.limits = (-0.1, 0.3)
        for some in (x, x[:1]):
            with timm_dynamic.use(dy="one call"):
                actual = layer(some)
            with timm_dynamic.use("formula"):
                torch.testing.assert_close(actual, layer(some), rtol=1e-5, atol=1e-5)
        for other in (x[..., ::2], x.to(memory_format=torch.channels_last), x[:0], x.repeat(40, 1, 1, 1)):
            assert layer(other).isfinite().all()

    def test_absorb(self, arguments, around_mean):
        layer, x = self.make(arguments, around_mean)
        scale, shift = torch.randn(2, 12)
        expected = layer(x) * scale[:, None, None] + shift[:, None, None]
        torch.testing.assert_close(layer.absorb(scale, shift)(x), expected, rtol=1e-4, atol=1e-5)
