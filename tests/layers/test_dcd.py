"""DCD layers against their formula, and as replacements of static layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dcd_layers import randomise
from torch import nn

from timm_dynamic.layers import DCDConv2d, DCDLinear, load_reference
from timm_dynamic.ops.channel_fusion import terms

# Arguments and input size. In eval mode, and in training on the CPU, a weight is made for every sample where the map is
# large beside the weight: both forms are here.
CASES = {
    "large map": ((4, 6, 3), {"padding": 1}, (9, 13)),
    "small map": ((12, 16, 3), {"padding": 1}, (4, 3)),
    "1x1": ((8, 5, 1), {}, (7, 6)),
    "1x1 small map": ((24, 20, 1), {}, (2, 3)),
    "pooled to 2x2": ((6, 8, 3), {"padding": 1, "pool_size": 2}, (8, 5)),
    "pooled small map": ((16, 16, 3), {"padding": 1, "pool_size": 2}, (3, 3)),
    "pooled beyond its size": ((6, 4, 1), {"pool_size": 3}, (2, 2)),
    "stride": ((6, 8, 3), {"padding": 1, "stride": 2, "bias": False}, (11, 8)),
    "stride small map": ((12, 16, 3), {"padding": 1, "stride": 2}, (7, 5)),
    "strided 1x1": ((6, 8, 1), {"stride": (2, 3)}, (9, 10)),
    "dilation": ((6, 8, 3), {"padding": 2, "dilation": 2}, (9, 7)),
    "groups": ((6, 9, 3), {"padding": 1, "groups": 3}, (9, 7)),
    "groups and stride": ((8, 8, 5), {"padding": 2, "groups": 4, "stride": 2, "bias": False}, (9, 7)),
    "depthwise": ((8, 8, 3), {"padding": 1, "groups": 8}, (6, 6)),
    "oblong": ((6, 4, (1, 7)), {"padding": (0, 3), "stride": (2, 1)}, (8, 9)),
    "same": ((6, 4, (3, 5)), {"padding": "same", "dilation": (2, 1)}, (8, 9)),
    "valid": ((6, 4, 1), {"padding": "valid"}, (4, 4)),
    "reflect": ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (9, 8)),
    "sizes": ((8, 8, 3), {"padding": 1, "latent_dim": 5, "hidden_dim": 7}, (6, 6)),
    "one column": ((3, 2, 3), {"padding": 1}, (8, 1)),
    "one channel": ((1, 1, 3), {"padding": 1}, (5, 5)),
}


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(terms, "_LARGE_MAP", 0)  # the maps here are small: else none would have a weight a sample


@pytest.fixture(params=CASES)
def case(request):
    args, kwargs, size = CASES[request.param]
    return randomise(DCDConv2d(*args, **kwargs, dtype=torch.float64)), torch.randn(3, args[0], *size).double()


def norm(z, bn, training):
    """`[B, L, ...]`, normalised over all but L."""
    shape, dims = (-1, *[1] * (z.ndim - 2)), (0, *range(2, z.ndim))
    mean = z.mean(dims) if training else bn.running_mean
    var = z.var(dims, unbiased=False) if training else bn.running_var
    z = (z - mean.view(shape)) / (var.view(shape) + bn.eps).sqrt()
    return z * bn.weight.view(shape) + bn.bias.view(shape)


def hsig(t):
    return F.relu6(t + 3) / 3


def factors(layer, pooled):
    state = dict(layer.named_parameters())
    z = pooled @ state["fc.0.weight"].t()
    z = z * hsig(z @ state["fc.1.fc.0.weight"].t())
    phi = (z @ state["fc_phi.weight"].t()).view(len(z), *[layer.latent_dim] * 2)
    return phi, hsig(z @ state["fc_scale.weight"].t())


def formula(layer, x, training):
    phi, scale = factors(layer, F.adaptive_avg_pool2d(x, layer.pool_size).flatten(1))
    u = norm(F.conv2d(x, layer.q.weight, None, layer.stride), layer.bn1, training)
    v = norm(torch.einsum("blm,bmhw->blhw", phi, u), layer.bn2, training) + u
    return layer.conv(x) * scale[:, :, None, None] + F.conv2d(v, layer.p.weight)


def gradients(layer, x, output):
    inputs = {"x": x, **dict(layer.named_parameters())}
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return dict(zip(inputs, torch.autograd.grad((output * weights).sum(), inputs.values()), strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_formula(case, training, memory_format):
    layer, x = case
    x = x.to(memory_format=memory_format).requires_grad_()
    layer = layer.train(training).to(memory_format=memory_format)
    expected = formula(layer, x, training)
    output = layer(x)
    assert output.shape == layer.conv(x).shape
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(layer, x, output), gradients(layer, x, expected))
    with torch.no_grad():
        for batch in (x, x[:1]) if not training else (x,):
            output = layer(batch)
            torch.testing.assert_close(output, expected[: len(batch)])
            assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_weights_in_channels_last_alone(case, training):
    """In torch, 1x1 and depthwise convolutions then give channels_last maps of contiguous ones."""
    layer, x = case
    layer, x = layer.float().train(training), x.float().requires_grad_()
    expected = formula(layer, x, training)
    grads = gradients(layer, x, expected)
    layer.to(memory_format=torch.channels_last)
    for name, grad in gradients(layer, x, layer(x)).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-3 * grads[name].abs().max().item())
    with torch.no_grad():
        for batch in (x, x[:1]) if not training else (x,):
            torch.testing.assert_close(layer(batch), expected[: len(batch)], rtol=1e-4, atol=1e-4)


def test_running_statistics(case):
    layer, x = case
    u = norm(F.conv2d(x, layer.q.weight, None, layer.stride), layer.bn1, True)
    phi = factors(layer, F.adaptive_avg_pool2d(x, layer.pool_size).flatten(1))[0]
    mean = 0.9 * layer.bn2.running_mean + 0.1 * torch.einsum("blm,bmhw->blhw", phi, u).mean((0, 2, 3))
    layer(x)
    torch.testing.assert_close(layer.bn2.running_mean, mean)
    assert layer.bn1.num_batches_tracked == layer.bn2.num_batches_tracked == 1


@pytest.mark.parametrize("size", [(7, 7), (2, 2)], ids=["large map", "small map"])
def test_single_precision(size):
    layer, x = randomise(DCDConv2d(16, 24, 1)), torch.randn(4, 16, *size)
    for training in (False, True):
        layer.train(training)
        double = copy.deepcopy(layer).double()
        x64 = x.double().requires_grad_()
        expected = formula(double, x64, training)
        x32 = x.clone().requires_grad_()
        output = layer(x32)
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
        grads = gradients(layer, x32, output)
        for name, grad in gradients(double, x64, expected).items():
            torch.testing.assert_close(grads[name].double(), grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())


def test_frozen_norms_in_training():
    """Norms in eval mode within a layer in training, and the other way round."""
    layer, x = randomise(DCDConv2d(4, 6, 3, padding=1, dtype=torch.float64)), torch.randn(2, 4, 9, 9).double()
    layer.train()
    layer.bn1.eval(), layer.bn2.eval()
    torch.testing.assert_close(layer(x), formula(layer, x, False))
    layer.eval()
    layer.bn1.train(), layer.bn2.train()
    torch.testing.assert_close(layer(x), formula(layer, x, True))


def test_an_activation_may_overwrite_the_output(case):
    layer, x = case
    x.requires_grad_()
    expected = formula(layer, x, True).relu()
    output = torch.relu_(layer(x))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(layer, x, output), gradients(layer, x, expected))


def test_no_gradient_for_the_input():
    layer, x = randomise(DCDConv2d(4, 6, 3, padding=1)), torch.randn(2, 4, 9, 9)
    layer(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x.requires_grad_()).sum().backward()
    torch.testing.assert_close({name: p.grad for name, p in layer.named_parameters()}, expected)


@pytest.mark.parametrize("args", [(4, 6, 3, 1, 1), (12, 16, 3, 2, 1)], ids=["large map", "small map"])
def test_gradcheck(args):
    layer = randomise(DCDConv2d(*args, dtype=torch.float64)).train()
    nn.init.normal_(layer.fc_scale.weight, std=0.1)  # away from the ends
    names, tensors = zip(*layer.named_parameters(), strict=True)

    def function(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    x = torch.randn(2, args[0], 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *tensors), fast_mode=True)


class TestInPlaceOfAConvolution:
    @pytest.mark.parametrize("size", [(9, 9), (1, 1), (2, 3)], ids=str)
    @pytest.mark.parametrize(
        "conv",
        [
            nn.Conv2d(4, 6, 3, padding=1),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
            nn.Conv2d(8, 8, 5, padding="same", groups=4, dilation=2),
            nn.Conv2d(6, 12, 1, padding_mode="circular"),
        ],
        ids=str,
    )
    def test_starts_as_it(self, conv, size):
        conv = conv.double().eval()
        x = torch.randn(2, conv.in_channels, *size).double()
        layer = DCDConv2d.from_conv(conv, pool_size=2)
        for module in (layer.bn1, layer.bn2):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-12)
        assert layer.weight is not conv.weight and not layer.training
        assert (layer.bias is None) == (conv.bias is None)
        assert "latent_dim" not in layer.extra_repr() and layer.pool_size == 2
        x = torch.randn(4, conv.in_channels, 6, 6).double()
        layer.train()(x).square().sum().backward()
        assert layer.p.weight.grad.any() and layer.fc_scale.weight.grad.any()

    def test_device_and_dtype(self):
        layer = DCDConv2d(4, 6, 3, padding=1, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
        assert layer(torch.empty(2, 4, 8, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 6, 8, 8)

    def test_default_sizes(self):
        layer = DCDConv2d(64, 32, 3, padding=1, pool_size=2)
        assert (layer.latent_dim, layer.fc[0].out_features) == (16, 16)
        layer = DCDConv2d(3, 5, 1)
        assert (layer.latent_dim, layer.fc[0].out_features) == (1, 4)

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            ((4, 6, 3), {}, r"DCD needs padding dilation \* \(kernel_size // 2\) = \(1, 1\), got 0"),
            ((4, 6, 3), {"padding": 1, "dilation": 2}, r"= \(2, 2\), got 1"),
            ((4, 6, 3), {"padding": "valid"}, "got 'valid'"),
            ((4, 6, 2), {"padding": 1}, "kernel_size must be odd, got 2"),
            ((4, 6, (3, 4)), {"padding": "same"}, r"kernel_size must be odd, got \(3, 4\)"),
            ((4, 6, 1), {"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
            ((4, 6, 1), {"hidden_dim": -1}, "hidden_dim must be at least 1, got -1"),
            ((4, 6, 1), {"pool_size": 0}, "pool_size must be at least 1, got 0"),
            ((4, 6, 1), {"groups": 3}, "divisible by groups"),
        ],
        ids=str,
    )
    def test_what_it_cannot_be(self, args, kwargs, message):
        with pytest.raises(ValueError, match=message):
            DCDConv2d(*args, **kwargs)

    def test_convolutions_that_it_cannot_replace(self):
        with pytest.raises(ValueError, match="needs padding"):
            DCDConv2d.from_conv(nn.Conv2d(4, 6, 3))

    @pytest.mark.parametrize("shape", [(4, 8, 8), (2, 5, 8, 8), (2, 4, 8)], ids=str)
    def test_bad_input(self, shape):
        with pytest.raises(ValueError, match=r"x must be \[B, 4, H, W\], got shape"):
            DCDConv2d(4, 6, 1)(torch.randn(shape))


class TestReferenceNames:
    conv = {"conv_q": "q", "conv_p": "p"}
    linear = {"cls": "linear", "cls_q": "q", "cls_p": "p"}

    @pytest.mark.parametrize(("make", "names"), [(lambda: DCDConv2d(4, 6, 1), conv), (lambda: DCDLinear(4, 6), linear)])
    def test_are_translated(self, make, names):
        theirs = {ours: name for name, ours in names.items()}
        state = make().state_dict()
        renamed = {
            theirs.get(key.split(".")[0], key.split(".")[0]) + key[key.index(".") :]: state[key] for key in state
        }
        assert renamed.keys() != state.keys()
        for saved in (state, renamed):
            layer = make()
            load_reference(layer, saved)
            assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())

    def test_of_the_resnets(self):
        keys = DCDConv2d(4, 6, 3, padding=1, bias=False).state_dict().keys()
        assert {key for key in keys if "bn" not in key} == {
            *("conv.weight", "q.weight", "p.weight", "fc.0.weight", "fc.1.fc.0.weight"),
            *("fc_phi.weight", "fc_scale.weight"),
        }

    def test_strictly(self):
        state = DCDConv2d(4, 6, 1).state_dict()
        del state["q.weight"]
        with pytest.raises(ValueError, match="Missing.*q.weight"):
            load_reference(DCDConv2d(4, 6, 1), state)


class TestOneNumberToNormalise:
    def test_in_training(self):
        layer = DCDConv2d(4, 6, 3, stride=2, padding=1)
        with pytest.raises(ValueError, match="training needs more than one sample of 1x1 maps"):
            layer(torch.randn(1, 4, 2, 2))
        assert layer(torch.randn(2, 4, 2, 2)).isfinite().all()
        assert layer(torch.randn(1, 4, 3, 2)).isfinite().all()
        assert layer.eval()(torch.randn(1, 4, 1, 1)).isfinite().all()

    def test_classifier(self):
        layer = DCDLinear(4, 6)
        with pytest.raises(ValueError, match="training needs more than one sample"):
            layer(torch.randn(1, 4))
        assert layer.eval()(torch.randn(1, 4)).isfinite().all()

    @torch.no_grad()
    def test_empty_batch(self):
        assert DCDConv2d(4, 6, 1).eval()(torch.randn(0, 4, 5, 5)).shape == (0, 6, 5, 5)
        assert DCDLinear(4, 6).eval()(torch.randn(0, 4)).shape == (0, 6)


class TestClassifier:
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_formula(self, training, bias):
        layer = randomise(DCDLinear(10, 7, bias, latent_dim=4, hidden_dim=6, dtype=torch.float64)).train(training)
        x = torch.randn(5, 10).double().requires_grad_()
        phi, scale = factors(layer, x)
        u = norm(F.linear(x, layer.q.weight), layer.bn1, training)
        v = norm(torch.einsum("blm,bm->bl", phi, u), layer.bn2, training) + u
        expected = scale * F.linear(x, layer.linear.weight, layer.bias) + F.linear(v, layer.p.weight)
        output = layer(x)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gradients(layer, x, output), gradients(layer, x, expected))

    @pytest.mark.parametrize("name", ["in_features", "out_features", "latent_dim", "hidden_dim"])
    def test_bad_sizes(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            DCDLinear(**{"in_features": 4, "out_features": 6, name: 0})

    @pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 3, 4)], ids=str)
    def test_bad_input(self, shape):
        with pytest.raises(ValueError, match=r"x must be \[B, 4\], got shape"):
            DCDLinear(4, 6)(torch.randn(shape))
