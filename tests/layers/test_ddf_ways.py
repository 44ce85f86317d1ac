"""A DDF layer is its formula: changed parts, transforms, and the faster ways to run it."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from timm_dynamic import explain, use
from timm_dynamic.layers import DDFConv2d, DDFPack


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Adapter(nn.Module):
    """A convolution with a low-rank term beside it."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, conv.stride, bias=False, dtype=conv.weight.dtype)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False, dtype=conv.weight.dtype)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


def wrap(layer, branch, i):
    getattr(layer, branch)[i] = Adapter(getattr(layer, branch)[i])


CONVOLUTIONS = pytest.mark.parametrize(
    ("branch", "i"), [("spatial_branch", 0), ("channel_branch", 1), ("channel_branch", 3)]
)


class TestParts:
    """What people do with the modules of a layer."""

    @CONVOLUTIONS
    @pytest.mark.parametrize(
        "change",
        [
            wrap,
            lambda layer, branch, i: prune.random_unstructured(getattr(layer, branch)[i], "weight", 0.5),
            lambda layer, branch, i: parametrizations.spectral_norm(getattr(layer, branch)[i]),
        ],
        ids=["adapter", "pruning", "parametrization"],
    )
    def test_changed_parts_count(self, branch, i, change):
        layer, x = DDFPack(8, stride=2, se_ratio=1), torch.randn(2, 8, 7, 7)
        before = layer.eval()(x)
        change(layer, branch, i)
        for parameter in layer.parameters():
            assert parameter.requires_grad
        with torch.no_grad():
            after = layer(x)
        assert not torch.allclose(after, before)
        for _ in range(2):
            y = layer.train()(x)
            assert all(g is not None for g in torch.autograd.grad(y.square().sum(), list(layer.parameters())))
        torch.testing.assert_close(layer.eval()(x), after, rtol=0.05, atol=0.05)  # power iteration goes on in training
        with pytest.raises(ValueError, match=f"cannot absorb a norm: .*{branch}.{i}"):
            layer.absorb(torch.ones(8), torch.zeros(8))

    @torch.no_grad()
    def test_hooks_are_called(self):
        layer, calls = DDFPack(8).eval(), []
        for name, part in layer.named_modules():
            part.register_forward_hook(lambda *args, name=name: calls.append(name))
        layer(torch.randn(1, 8, 5, 5))
        assert sorted(calls) == sorted(name for name, _ in layer.named_modules())


class TestFasterWays:
    @pytest.mark.parametrize("kernel_combine", ["mul", "add"])
    @pytest.mark.parametrize(
        ("batch", "size", "kernel_size", "stride", "head"),
        [(1, (9, 11), 3, 1, 1), (3, (7, 8), 5, 2, 2), (40, (5, 5), 3, 3, 4), (2, (1, 1), 3, 1, 1)],
    )
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @torch.no_grad()
    def test_products(self, memory_format, batch, size, kernel_size, stride, head, kernel_combine):
        layer = DDFConv2d(8, 8, kernel_size, stride, kernel_size // 2, head=head, kernel_combine=kernel_combine).eval()
        nn.init.normal_(layer.bias)
        x = torch.randn(batch, 8, *size).to(memory_format=memory_format)
        expected = copy.deepcopy(layer).double()(x.double())
        with use(ddf="products"):
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
            layer.limits = (0.0, 0.5)
            torch.testing.assert_close(layer(x).double(), expected.clamp(0, 0.5), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda layer, x: (layer, x[:0]), "empty"),
            (lambda layer, x: (layer, x.transpose(2, 3)), "the input is contiguous neither"),
            (lambda layer, x: (layer.double(), x.double()), "float64"),
            (lambda layer, x: (layer.half(), x), "float16"),
            (lambda layer, x: (layer.train(), x), "no gradient"),
        ],
    )
    def test_what_runs_by_the_formula(self, change, reason):
        layer, x = change(DDFPack(8).eval(), torch.randn(2, 8, 6, 5))
        if layer.channel_branch[1].weight.dtype == x.dtype:
            assert str(explain(layer, x)).startswith("DDFPack (DDFPack): formula")
        with torch.set_grad_enabled(layer.training), use(ddf="products"):
            with pytest.raises(ValueError, match=f"'products' of ddf cannot run: .*{reason}"):
                layer(x)

    @pytest.mark.parametrize("bias", [True, False])
    @torch.no_grad()
    def test_absorbs_a_norm(self, bias):
        layer = DDFConv2d(8, 8, 3, padding=1, head=2, bias=bias).double().eval()
        if bias:
            nn.init.normal_(layer.bias)
        x, scale, shift = torch.randn(2, 8, 5, 6).double(), torch.randn(8).double(), torch.randn(8).double()
        before = layer(x)
        torch.testing.assert_close(layer.absorb(scale, shift)(x), before * scale[:, None, None] + shift[:, None, None])
        assert torch.equal(layer(x), before)

    def test_sums_of_filters_absorb_none(self):
        with pytest.raises(ValueError, match='filters are multiplied: kernel_combine is "add"'):
            DDFPack(8, kernel_combine="add").absorb(torch.ones(8), torch.zeros(8))


class TestTransforms:
    @pytest.fixture(params=["mul", "add"])
    def case(self, request):
        layer = DDFPack(4, head=2, kernel_combine=request.param).double()
        x = torch.randn(3, 4, 4, 3, dtype=torch.float64)
        return layer, dict(layer.named_parameters()), x

    def test_grad_vjp_jacrev(self, case):
        layer, parameters, x = case
        loss = lambda p, x: functional_call(layer, p, (x,)).square().sum()  # noqa: E731
        expected = dict(zip(parameters, torch.autograd.grad(loss(parameters, x), parameters.values()), strict=True))
        torch.testing.assert_close(grad(loss)(parameters, x), expected)
        torch.testing.assert_close(vjp(lambda p: loss(p, x), parameters)[1](torch.ones((), dtype=x.dtype))[0], expected)
        torch.testing.assert_close(jacrev(loss)(parameters, x), expected)

    def test_per_sample_gradients(self, case):
        layer, parameters, x = case
        loss = lambda p, one: functional_call(layer, p, (one[None],)).square().sum()  # noqa: E731
        each = vmap(grad(loss), (None, 0))(parameters, x)
        for i, one in enumerate(x):
            expected = torch.autograd.grad(layer(one[None]).square().sum(), parameters.values())
            torch.testing.assert_close([g[i] for g in each.values()], list(expected))

    def test_jvp(self, case):
        layer, _, x = case
        tangent, step = torch.randn_like(x), 1e-6
        numeric = (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)
        torch.testing.assert_close(jvp(layer, (x,), (tangent,))[1], numeric, rtol=1e-5, atol=1e-6)

    def test_second_gradients(self, case):
        layer, _, x = case
        assert torch.autograd.gradgradcheck(layer, x[:1].requires_grad_())

    def test_flops(self, case):
        layer, _, x = case
        with FlopCounterMode(display=False) as counter:
            layer.float()(x.float())
        spatial, channel, filters = 2 * 4 * 18 * 12, 2 * 4 * 1 + 2 * 1 * 36, 2 * 9 * 4 * 12
        assert counter.get_total_flops() == 3 * (spatial + channel + filters)
