"""PEDConv2d: the authors' formulas, what a drop-in convolution must do, and its reconstruction loss."""

import copy
import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from steps import assert_same_step
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_dynamic
from timm_dynamic.layers import PEDConv2d, load_reference
from timm_dynamic.layers.auxiliary import _warn_once
from timm_dynamic.training import auxiliary_loss

CONVS = {
    "plain": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "strided, no bias": lambda: nn.Conv2d(8, 12, 3, 2, 1, bias=False),
    "grouped": lambda: nn.Conv2d(8, 12, (3, 5), (2, 1), (2, 0), (2, 1), 4),
    "depthwise": lambda: nn.Conv2d(8, 8, 5, 2, 2, groups=8),
    "1x1": lambda: nn.Conv2d(8, 80, 1),
    "many outputs": lambda: nn.Conv2d(8, 100, 3, padding=1),
    "same": lambda: nn.Conv2d(8, 12, (3, 5), padding="same", dilation=2),
    "same, even": lambda: nn.Conv2d(8, 12, (2, 4), padding="same"),
    "valid": lambda: nn.Conv2d(8, 12, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="reflect"),
    "circular, grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2, padding_mode="circular"),
}
X = torch.randn(3, 8, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def like(conv, **kwargs):
    """A fresh layer, its linear layers random enough to matter."""
    layer = PEDConv2d.from_conv(conv.double(), **({"neutral_gates": False} | kwargs))
    for p in layer.attn.parameters():
        nn.init.normal_(p)
    return layer


def by_the_formulas(layer, x, noise=None):
    """Output and reconstruction error, from the weights written out; `layer` has zero padding of integers."""
    attn, groups, r = layer.attn, layer.groups, layer.rank
    pooled = x.mean((2, 3))
    hidden = F.relu(F.linear(pooled, attn.fc_share.weight, attn.fc_share.bias))
    values = [F.linear(hidden, fc.weight, fc.bias) for fc in (attn.fc_inp, attn.fc_oup, attn.fc_k)]
    if noise is not None:
        values = [v + n for v, n in zip(values, noise, strict=True)]
    a_in, a_out, a_k = (torch.sigmoid(v).view(len(x), -1, r) for v in values)
    gates = torch.einsum("bor,bir,bkr->boik", a_out, a_in, a_k)
    outputs = []
    for b in range(len(x)):
        own = layer.kernel * gates[b].view(layer.kernel.shape)
        outputs.append(F.conv2d(x[b], own, layer.bias, layer.stride, layer.padding, layer.dilation, groups))
    first, last = attn.decoder[0], attn.decoder[2]
    decoded = F.linear(F.relu(F.linear(torch.cat(values, 1), first.weight, first.bias)), last.weight, last.bias)
    return torch.stack(outputs), (decoded - pooled.detach()).square().mean()


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", ["plain", "strided, no bias", "grouped", "depthwise", "1x1", "many outputs"])
class TestFormulas:
    def test_evaluation(self, name, rank):
        layer = like(CONVS[name](), rank=rank).eval()
        torch.testing.assert_close(layer(X), by_the_formulas(layer, X)[0])

    def test_training(self, name, rank):
        """Output, loss term, and all gradients of the task loss plus 0.001 times the reconstruction error."""
        layer, x = like(CONVS[name](), rank=rank, noise_std=0), X.clone().requires_grad_()
        inputs = {"x": x, **dict(layer.named_parameters())}
        output = layer(x)
        expected, error = by_the_formulas(layer, x)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(auxiliary_loss(layer), {"reconstruction": 0.001 * error})
        ours = torch.autograd.grad(output.square().mean(), inputs.values())
        theirs = torch.autograd.grad(expected.square().mean() + 0.001 * error, inputs.values())
        for key, a, b in zip(inputs, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=lambda message, key=key: f"{key}: {message}")

    def test_noise(self, name, rank):
        layer = like(CONVS[name](), rank=rank, noise_std=0.3)
        torch.manual_seed(5)
        output = layer(X)
        torch.manual_seed(5)
        sizes = [getattr(layer.attn, fc).out_features for fc in ("fc_inp", "fc_oup", "fc_k")]
        noise = [0.3 * torch.randn(len(X), n, dtype=X.dtype) for n in sizes]
        torch.testing.assert_close(output, by_the_formulas(layer, X, noise)[0])


def test_randomness():
    layer = PEDConv2d(8, 8, 3, noise_std=0).double()
    state = torch.get_rng_state()
    layer(X)
    layer.noise_std = 0.1
    layer.eval()(X)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(layer.train()(X), layer(X))


class TestDropIn:
    @pytest.mark.parametrize("name", CONVS)
    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize("neutral", [True, False])
    def test_from_conv(self, name, rank, neutral):
        conv = CONVS[name]().double().eval()
        layer = PEDConv2d.from_conv(conv, rank=rank, neutral_gates=neutral)
        assert not layer.training
        assert torch.equal(layer.kernel, conv.weight if neutral else conv.weight * (8 / rank))
        for x in (X, X[:1], X[:0], X[..., :6]):
            torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-12)
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        assert all(getattr(layer, key) == getattr(conv, key) for key in names)

    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize("kernel_size", [1, 3])
    @pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.01), partial(torch.optim.Adam, lr=1e-3)])
    def test_first_step_is_the_convolutions(self, optimizer, kernel_size, rank):
        conv = nn.Conv2d(16, 24, kernel_size, padding=kernel_size // 2).double()
        layer = PEDConv2d.from_conv(conv, rank=rank, noise_std=0)
        x, target = torch.rand(8, 16, 7, 7).double(), torch.randn(8, 24, 7, 7).double()
        assert_same_step(layer, conv, x, target, optimizer)

    def test_state_dict_is_the_authors_but_for_the_kernel(self):
        layer = PEDConv2d(32, 6, 3, groups=2, rank=2, bias=False, reduction=8)
        assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
            "kernel": (6, 16, 3, 3),
            "attn.fc_share.weight": (4, 32),
            "attn.fc_share.bias": (4,),
            "attn.fc_inp.weight": (32, 4),
            "attn.fc_inp.bias": (32,),
            "attn.fc_oup.weight": (12, 4),
            "attn.fc_oup.bias": (12,),
            "attn.fc_k.weight": (18, 4),
            "attn.fc_k.bias": (18,),
            "attn.decoder.0.weight": (4, 62),
            "attn.decoder.0.bias": (4,),
            "attn.decoder.2.weight": (32, 4),
            "attn.decoder.2.bias": (32,),
        }
        other = PEDConv2d(32, 6, 3, groups=2, rank=2, bias=False, reduction=8)
        load_reference(other, {"weight" if key == "kernel" else key: p for key, p in layer.state_dict().items()})
        assert torch.equal(other.kernel, layer.kernel)

    def test_narrow(self):
        assert PEDConv2d(3, 5, 3).attn.fc_share.out_features == 1

    @pytest.mark.parametrize("Co", [8, 100])
    def test_channels_last(self, Co):
        layer = like(nn.Conv2d(8, Co, 3, padding=1)).eval()
        expected = layer(X)
        output = layer.to(memory_format=torch.channels_last)(X.to(memory_format=torch.channels_last))
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, expected)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"rank": 0}, "rank must be at least 1, got 0"),
            ({"reduction": 0}, "reduction must be at least 1, got 0"),
            ({"noise_std": -1}, "noise_std must not be negative, got -1"),
            ({"aux_scale": float("nan")}, "aux_scale must not be negative, got nan"),
        ],
    )
    def test_bad_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            PEDConv2d(4, 4, 3, **kwargs)

    def test_bad_input(self):
        layer = PEDConv2d(4, 4, 3)
        for x in (X, X[0, :4]):
            with pytest.raises(ValueError, match=r"x must be \[B, 4, H, W\]"):
                layer(x)
        with pytest.raises(ValueError, match="too small for a 3x3 kernel"):
            layer(torch.randn(1, 4, 2, 5))


class TestReconstructionLoss:
    """The gradient attached inside the layer is that of the explicit loss, however the layer is run."""

    def gradients(self, run, **kwargs):
        torch.manual_seed(0)
        layer = like(nn.Conv2d(8, 8, 3, padding=1), noise_std=0.1, **kwargs)
        x = X.clone().requires_grad_()
        torch.manual_seed(1)
        run(layer, x).square().mean().backward()
        return [x.grad, *(p.grad for p in layer.parameters())]

    @pytest.fixture
    def expected(self):
        return self.gradients(lambda layer, x: layer(x))

    def test_checkpointing(self, expected):
        torch.testing.assert_close(self.gradients(lambda f, x: checkpoint(f, x, use_reentrant=False)), expected)
        torch.testing.assert_close(self.gradients(lambda f, x: checkpoint(f, x, use_reentrant=True)), expected)

    def test_copy(self, expected):
        def run(layer, x):
            layer(x)
            copied = copy.deepcopy(layer)
            copied.load_state_dict(layer.state_dict())
            torch.manual_seed(1)
            return layer(x)

        torch.testing.assert_close(self.gradients(run), expected)

    @pytest.mark.parametrize("bias", [False, True])
    def test_before_an_activation_in_place(self, bias):
        layer = like(nn.Conv2d(8, 8, 3, bias=bias), noise_std=0)
        for inplace in (False, True):
            F.relu(layer(X), inplace=inplace).square().mean().backward()
            if not inplace:
                expected = [p.grad for p in layer.parameters()]
                layer.zero_grad()
        torch.testing.assert_close([p.grad for p in layer.parameters()], expected)

    def test_compiled_and_checkpointed(self):
        layer = like(nn.Conv2d(8, 8, 3, padding=1), noise_std=0)
        other = copy.deepcopy(layer)

        def run(x):
            return checkpoint(layer, x, use_reentrant=False)

        torch.compile(run, backend="aot_eager", fullgraph=True)(X).square().mean().backward()
        other(X).square().mean().backward()
        torch.testing.assert_close([p.grad for p in layer.parameters()], [p.grad for p in other.parameters()])
        torch.testing.assert_close(auxiliary_loss(layer), auxiliary_loss(other))

    def test_scale(self, expected):
        """Two half batches with half the scale, as in gradient accumulation."""
        without = self.gradients(lambda layer, x: layer(x), aux_scale=0.0)
        half = self.gradients(lambda layer, x: layer(x), aux_scale=0.5)
        for zero, some, full in zip(without, half, expected, strict=True):
            torch.testing.assert_close(
                some if zero is None else some - zero, (full - (0 if zero is None else zero)) / 2
            )

    def test_unused_output(self):
        """A layer that the loss does not depend on trains nothing."""
        layer = like(nn.Conv2d(8, 8, 3))
        layer(X)
        (X.clone().requires_grad_().sum()).backward()
        assert all(p.grad is None for p in layer.parameters())

    def test_an_empty_batch(self):
        layer = like(nn.Conv2d(8, 8, 3))
        layer(X[:0]).sum().backward()
        assert all(not p.grad.any() for p in layer.parameters())
        assert auxiliary_loss(layer)["reconstruction"] == 0

    def test_one_float16_warning(self):
        _warn_once.cache_clear()
        layer = PEDConv2d(8, 8, 3)
        with torch.autocast("cpu", torch.float16), pytest.warns(UserWarning, match="GradScaler"):
            layer(X.float())
        with torch.autocast("cpu", torch.float16), warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(X.float())
            layer.eval()(X.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [12, 3])
def test_large_and_small_activations_in_half_precision(dtype, size):
    for scale, under_autocast in itertools.product((6e4, 1.0, 1e-7), (True, False)):
        layer = PEDConv2d(16, 32, 3, padding=1, dtype=torch.float32 if under_autocast else dtype)
        nn.init.normal_(layer.kernel, std=0.01)
        x = (torch.rand(2, 16, size, size) * scale).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=under_autocast):
            output = layer(x)
        assert output.dtype == dtype
        assert output.isfinite().all()
        output.float().mean().backward()
        assert x.grad.isfinite().all()
        if scale < 1e4 or under_autocast:  # the square of a large error is too large for a float16 gradient
            assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_export_with_a_dynamic_batch():
    layer = like(nn.Conv2d(8, 100, 3, padding=1)).eval()
    program = torch.export.export(layer, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}})
    for x in (X[:1], torch.cat([X, X])):
        torch.testing.assert_close(program.module()(x), layer(x))


def test_torchscript():
    layer = like(nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), rank=2).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(X), layer(X))


@pytest.mark.parametrize("neutral", [False, True])
@pytest.mark.parametrize("name", ["plain", "depthwise", "1x1", "many outputs", "reflect", "circular, grouped"])
@torch.no_grad()
class TestInference:
    def test_in_one_call(self, name, neutral):
        layer, x = like(CONVS[name](), neutral_gates=neutral).float().eval(), X.float()
        layer.limits = (-0.1, 0.3)
        for some in (x, x[:1], x[:1, :, :3, :3]):
            with timm_dynamic.use(ped="one call"):
                actual = layer(some)
            with timm_dynamic.use("formula"):
                torch.testing.assert_close(actual, layer(some), rtol=1e-5, atol=1e-5)

    def test_absorb(self, name, neutral):
        layer = like(CONVS[name](), neutral_gates=neutral, rank=2).eval()
        scale, shift = torch.randn(2, layer.out_channels, dtype=X.dtype)
        expected = layer(X) * scale[:, None, None] + shift[:, None, None]
        torch.testing.assert_close(layer.absorb(scale, shift)(X), expected)
