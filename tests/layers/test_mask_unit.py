"""MaskUnit: the authors' formulas, the gradient, the noise and their schedule."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_dynamic import explain, set_progress
from timm_dynamic.layers import MaskUnit, load_reference

KINDS = [(kernel_size, stride) for kernel_size in (1, 3) for stride in (1, 2)]
X = torch.randn(3, 8, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def unit(kernel_size=3, stride=1, **kwargs):
    return MaskUnit(8, stride, kernel_size, **kwargs).double()


def logits_by_the_formulas(unit, x):
    if unit.kernel_size == 1:
        return F.conv2d(x, unit.maskconv.weight, unit.maskconv.bias, unit.stride)
    conv, fc = unit.maskconv.conv, unit.maskconv.fc
    squeezed = (x.mean((2, 3)) * fc.weight).sum(1) + fc.bias
    return F.conv2d(x, conv.weight, conv.bias, unit.stride, 1) + squeezed[:, None, None, None]


@pytest.mark.parametrize(("kernel_size", "stride"), KINDS)
class TestFormulas:
    def test_evaluation(self, kernel_size, stride):
        layer = unit(kernel_size, stride).eval()
        logits = logits_by_the_formulas(layer, X)
        torch.testing.assert_close(layer.maskconv(X), logits)
        mask = layer(X)
        assert torch.equal(mask, (logits >= 0).double()) and 0 < mask.mean() < 1
        assert torch.equal(layer.train().routing(X), mask)
        # A 1x1 convolution is a product there.
        last = X.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert torch.equal(layer.eval()(last), mask)
            way = "sparse" if kernel_size == 1 else "formula"
            assert str(explain(layer, last)).splitlines()[0] == f"MaskUnit (MaskUnit): {way}"
        for x in (X[:0], X[:1], X[:, :, :1, :1]):
            assert layer.eval()(x).shape == (len(x), 1, -(-x.shape[2] // stride), -(-x.shape[3] // stride))

    def test_straight_through_gradient(self, kernel_size, stride):
        """That of the sigmoid, at the temperature."""
        layer = unit(kernel_size, stride, temperature=2.5, gumbel_noise=False)
        inputs = [X.clone().requires_grad_(), *layer.parameters()]
        mask, soft = layer(inputs[0]), torch.sigmoid(logits_by_the_formulas(layer, inputs[0]) / 2.5)
        torch.testing.assert_close(mask, (soft >= 0.5).double(), rtol=0, atol=1e-15)
        weights = torch.randn_like(mask)
        expected = torch.autograd.grad((soft * weights).sum(), inputs)
        torch.testing.assert_close(torch.autograd.grad((mask * weights).sum(), inputs), expected)

    def test_names_are_the_authors(self, kernel_size, stride):
        layer = unit(kernel_size, stride)
        state = {"maskconv.weight": (1, 8, 1, 1), "maskconv.bias": (1,)}
        if kernel_size == 3:
            state = {"fc.weight": (1, 8), "fc.bias": (1,), "conv.weight": (1, 8, 3, 3), "conv.bias": (1,)}
            state = {f"maskconv.{key}": shape for key, shape in state.items()}
        state["progress.done"] = ()  # ours, which a network has once
        assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == state
        other = unit(kernel_size, stride)
        load_reference(other, layer.state_dict())
        assert torch.equal(other.maskconv(X), layer.maskconv(X))

    def test_initialisation_is_pytorchs(self, kernel_size, stride):
        layer = MaskUnit(8, stride, kernel_size)
        torch.manual_seed(3)
        layer.reset_parameters()
        torch.manual_seed(3)
        new = MaskUnit(8, stride, kernel_size)
        assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), new.parameters(), strict=True))


def constant(logit, size=100, **kwargs):
    """A unit whose logits are all the same, and an input for it."""
    layer = MaskUnit(1, kernel_size=1, **kwargs)
    nn.init.zeros_(layer.maskconv.weight)
    nn.init.constant_(layer.maskconv.bias, logit)
    return layer, torch.zeros(4, 1, size, size)


class TestNoise:
    @pytest.mark.parametrize("temperature", [1.0, 5.0])
    @pytest.mark.parametrize("logit", [-2.0, -0.5, 0.0, 1.0])
    @torch.no_grad()
    def test_is_logistic(self, logit, temperature):
        """P(mask = 1) is the sigmoid of the logit, at any temperature: the sign does not depend on it."""
        layer, x = constant(logit, temperature=temperature)
        p = torch.sigmoid(torch.tensor(logit)).item()
        deviation = (p * (1 - p) / x.numel()) ** 0.5
        assert layer(x).mean().item() == pytest.approx(p, abs=5 * deviation)

    def test_generator(self):
        layer, x = constant(0.0, 20)
        first = layer(x)
        torch.manual_seed(1)
        second = layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), second) and not torch.equal(first, second)
        silent, state = constant(0.0, gumbel_noise=False)[0], torch.get_rng_state()
        layer.eval()(x)
        silent(x)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_is_the_same_in_recomputation(self, reentrant):
        layer = unit()
        results = []
        for function in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
            torch.manual_seed(1)
            x = X.clone().requires_grad_()
            mask = function(x)
            mask.square().sum().backward()
            results.append((mask.detach(), x.grad))
        torch.testing.assert_close(results[0], results[1])


class TestSchedule:
    @pytest.mark.parametrize(
        ("epoch", "temperature", "noisy"),
        [(0, 5.0, True), (29, 5.0, True), (30, 2.5, True), (59.9, 2.5, True), (60, 1.0, True)]
        + [(80, 1.0, True), (81, 1.0, False), (100, 1.0, False), (120, 1.0, False)],
    )
    def test_of_imagenet(self, epoch, temperature, noisy):
        layer = unit(temperature=(5.0, 2.5, 1.0))
        set_progress(layer, epoch, 100)
        state = torch.get_rng_state()
        repeated = torch.equal(layer(X), layer(X))
        assert repeated == (not noisy)
        torch.set_rng_state(state)
        layer.gumbel_noise = False
        x = X.clone().requires_grad_()
        soft = torch.sigmoid(logits_by_the_formulas(layer, x) / temperature)
        expected = torch.autograd.grad(soft.sum(), x)
        torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x), expected)

    def test_other_lengths(self):
        """280 of 350 epochs are no more than 80 %, whatever the rounding; a lone unit starts at 0."""
        layer, x = constant(0.0, 20)
        assert layer.progress() == 0
        for epochs in (5, 10, 30, 100, 300, 350, 1000):
            for epoch, noisy in ((epochs * 4 // 5, True), (epochs * 4 // 5 + 1, False)):
                set_progress(layer, epoch, epochs)
                assert torch.equal(layer(x), layer(x)) != noisy

    def test_survives_copies_and_casts(self):
        layer = unit()
        set_progress(layer, 3, 7)
        for other in (copy.deepcopy(layer), copy.deepcopy(layer).half(), layer.bfloat16().double()):
            assert other.progress().item() == pytest.approx(3 / 7, abs=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_dtypes(dtype, training):
    layer, x = MaskUnit(8).train(training), X.float()
    for mask in (layer.to(dtype)(x.to(dtype)), autocast(layer.float(), x, dtype)):
        assert ((mask - mask.round()).abs() < 1e-3).all() and 0 <= mask.min() and mask.max() <= 1
    assert layer.to(dtype)(x.to(dtype)).dtype == dtype


def autocast(layer, x, dtype):
    with torch.autocast("cpu", dtype if dtype != torch.float32 else torch.bfloat16):
        return layer(x)


@torch.no_grad()
def test_nan_is_inactive_in_its_sample_only():
    layer, x = unit().eval(), X.clone()
    x[1, 2, 3, 3] = float("nan")
    expected = layer(X)
    assert not layer(x)[1].any() and torch.equal(layer(x)[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"kernel_size": 5}, "kernel_size must be 3 .* or 1, got 5"),
        ({"temperature": 0}, "temperature must be positive, one number or three, got 0"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"temperature": (1.0, 2.0)}, "temperature must be positive, one number or three"),
        ({"temperature": (5.0, 2.5, -1.0)}, "temperature must be positive"),
        ({"temperature": ()}, "temperature must be positive, one number or three"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MaskUnit(**{"in_channels": 8, **kwargs})


@pytest.mark.parametrize("shape", [(2, 7, 5, 5), (8, 5, 5)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r"x must be \[B, 8, H, W\], got shape \["):
        MaskUnit(8)(torch.zeros(shape))


@torch.no_grad()
@pytest.mark.parametrize(
    "x", [X.float(), X.float().to(memory_format=torch.channels_last)], ids=["NCHW", "channels_last"]
)
def test_follows_its_parts(x):
    """Changed, replaced, hooked or quantised: they are what counts."""
    layer, seen = MaskUnit(8, 2).eval(), []
    changes = (
        lambda: layer.maskconv.conv.weight.data.mul_(-1),
        lambda: nn.init.constant_(layer.maskconv.fc.bias, 1e4),
        lambda: setattr(layer.maskconv, "fc", nn.Linear(8, 1)),
        lambda: layer.maskconv.fc.register_forward_hook(lambda *args: seen.append(args)),
    )
    for change in changes:
        change()
        assert torch.equal(layer(x).double(), (logits_by_the_formulas(layer, x) >= 0).double())
    assert len(seen) == 1
    quantised = torch.ao.quantization.quantize_dynamic(MaskUnit(8, 2).eval(), {nn.Linear})
    assert quantised(x).shape == (3, 1, 5, 4)


def test_a_pointwise_unit_follows_its_part():
    layer, seen = MaskUnit(8, 2, 1).eval(), []
    x = X.float().contiguous(memory_format=torch.channels_last)
    changes = (
        lambda: layer.maskconv.weight.data.mul_(-1),
        lambda: setattr(layer, "maskconv", nn.Conv2d(8, 1, 1, 2)),
        lambda: layer.maskconv.register_forward_hook(lambda *args: seen.append(args)),
    )
    for change in changes:
        change()
        with torch.no_grad():
            assert torch.equal(layer(x), (logits_by_the_formulas(layer, x) >= 0).float())
    assert len(seen) == 1
