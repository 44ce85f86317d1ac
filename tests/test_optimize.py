"""`optimize`: the same numbers as the model's, whatever it is, and what it does and leaves."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.nn.utils import prune

import timm_dynamic
from timm_dynamic.families import FAMILIES
from timm_dynamic.optimize import PackedConv2d, layout

# All kinds of blocks, and arguments that make some of them small.
MODELS = {
    "mobilenetv2_035": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "regnety_002": {},
    "densenet121": {"block_config": (2, 2, 2, 2), "growth_rate": 8},
    "mobilenetv3_small_050": {},
    "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (32, 48, 64, 96)},
    "tf_mobilenetv3_small_minimal_100": {},
    **dict.fromkeys(("test_resnet", "test_byobnet", "test_efficientnet", "test_nfnet", "test_vit"), {}),
    **{FAMILIES[name].tiny: {} for name in ("dcd", "ped", "dy", "ddf", "cotnet", "kw", "fd", "dynconv")},
}

# Also in float64, in which nothing is packed: a dynamic layer's algebra, and timm's one of each kind.
EXACTLY = [name for name in MODELS if name.startswith(("test_", "dynconv_"))]


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """The last way to run is the fastest: channels_last, everything packed, where that runs."""
    torch.manual_seed(0)
    fastest = layout._fastest

    def last(ways, seconds):
        times = fastest(ways, 0)[1]
        return list(times)[-1], times

    monkeypatch.setattr(layout, "_ROUNDS", 1)
    monkeypatch.setattr(layout, "_convs_that_gain", lambda convs, form: set(convs))
    monkeypatch.setattr(layout, "_fastest", last)


def randomize(model):
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@functools.cache
def trained(name):
    """A network whose norms are of its images; products of them, as in dynamic layers, would overflow otherwise."""
    model = timm.create_model(name, num_classes=7, **MODELS[name])
    if getattr(type(model), "__module__", "").startswith("timm.models."):
        return randomize(model)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 3, 64, 64))
    return model.eval()


def assert_same(fast, model, *inputs, tolerance=1e-5):
    with torch.no_grad():
        y, expected = fast(*inputs), model(*inputs)
    tolerance = 1e-12 if expected.dtype == torch.float64 else tolerance
    assert (y - expected).abs().max() <= tolerance * expected.std(), (y - expected).abs().max() / expected.std()


def small(*modules):
    return randomize(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), *modules))


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def kinds(model):
    return [type(module) for module in model.modules() if not any(module.children())]


class TestModels:
    @pytest.mark.parametrize(
        ("name", "dtype"),
        [*((name, torch.float32) for name in MODELS), *((name, torch.float64) for name in EXACTLY)],
        ids=str,
    )
    def test_same_numbers(self, name, dtype):
        """Also for another batch and another size."""
        model = copy.deepcopy(trained(name)).to(dtype)
        size = (160, 160) if name == "test_vit" else (64, 64)
        fast = timm_dynamic.optimize(model, torch.randn(1, 3, *size, dtype=dtype))
        odd = size if name == "test_vit" else (75, 91)
        for shape in ((1, 3, *size), (3, 3, *odd)):
            assert_same(fast, model, torch.randn(shape, dtype=dtype))

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_memory_formats(self, memory_format):
        model, x = randomize(timm.create_model("test_efficientnet")), torch.randn(2, 3, 65, 64)
        fast = timm_dynamic.optimize(model, x, memory_format=memory_format)
        assert any(conv._packed for conv in fast.modules() if isinstance(conv, PackedConv2d))
        assert_same(fast, model, x)
        assert_same(fast, model, x.to(memory_format=torch.channels_last))
        assert fast.forward_features(x).is_contiguous(memory_format=memory_format)

    @pytest.mark.skipif(timm_dynamic.ops.backend_info()["cpu"] != "loaded", reason="needs the CPU kernels")
    @pytest.mark.parametrize("family", ["dcd", "ped", "dy", "od"])
    def test_layers_run_by_kernels_in_channels_last(self, family):
        model, x = timm.create_model(FAMILIES[family].tiny).eval(), torch.randn(2, 3, 64, 64)
        fast = timm_dynamic.optimize(model, x, memory_format=torch.channels_last)
        chosen = [line for line in timm_dynamic.explain(fast, x).splitlines() if "Conv2d): " in line]
        assert chosen and all(line.endswith(": one call") for line in chosen)

    def test_is_measured(self, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setattr(layout, "_SECONDS", 0)
        model = timm.create_model("test_resnet").eval()
        fast = timm_dynamic.optimize(model)
        assert "contiguous " in str(fast.report) and "channels_last " in str(fast.report) and " ms" in str(fast.report)

    def test_is_a_model_of_timm(self):
        model = timm.create_model("test_resnet", num_classes=5).eval()
        fast, x = timm_dynamic.optimize(model), torch.randn(1, 3, 64, 64)
        assert isinstance(fast, type(model)) and fast.default_cfg == model.default_cfg and fast.num_classes == 5
        with torch.no_grad():
            torch.testing.assert_close(fast.forward_head(fast.forward_features(x)), model(x))
        assert not any(parameter.requires_grad for parameter in fast.parameters())
        assert any(parameter.requires_grad for parameter in model.parameters()), "the model is as it was"

    @pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050"])
    def test_features(self, name):
        model = randomize(timm.create_model(name, features_only=True))
        fast, x = timm_dynamic.optimize(model, torch.randn(1, 3, 64, 64)), torch.randn(2, 3, 70, 64)
        with torch.no_grad():
            for y, expected in zip(fast(x), model(x), strict=True):
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert fast.feature_info.channels() == model.feature_info.channels()

    def test_other_channels_than_the_cfg_names(self):
        model = timm.create_model("test_resnet", in_chans=1).eval()
        assert_same(timm_dynamic.optimize(model), model, torch.randn(1, 1, 64, 64))


class TestNorms:
    def test_norm_and_activation_disappear(self):
        model = small(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), BatchNormAct2d(8, act_layer=nn.SiLU))
        fast = timm_dynamic.optimize(model, X)
        assert_same(fast, model, X)
        assert [kind for kind in kinds(fast[0]) + kinds(fast[3])] == [nn.ReLU, nn.SiLU]
        assert [type(fast[i]) for i in (1, 2, 4)] == [nn.Identity] * 3
        assert "2 convolutions took over the norm" in str(fast.report)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        "norm",
        [
            nn.BatchNorm2d(8, affine=False),
            nn.BatchNorm2d(8, eps=0.1),
            nn.SyncBatchNorm(8),
            FrozenBatchNormAct2d(8),
            BatchNormAct2d(8, apply_act=False),
        ],
        ids=lambda norm: type(norm).__name__,
    )
    def test_kinds(self, norm, bias):
        model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias, padding_mode="reflect", padding=1), norm))
        fast = timm_dynamic.optimize(model.requires_grad_(False), X)
        assert_same(fast, model, X)
        assert not any(hasattr(module, "running_var") for module in fast.modules())

    @pytest.mark.parametrize("norm", [nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(2, 8)])
    def test_without_running_statistics(self, norm):
        model = small(norm, nn.ReLU())
        fast = timm_dynamic.optimize(model, X)
        assert_same(fast, model, X)
        assert type(fast[1]) is type(norm)
        if isinstance(norm, nn.BatchNorm2d):
            assert "left 1: it has no running statistics" in fast.report

    def test_in_float16_weights_stay_finite(self):
        model = small(nn.BatchNorm2d(8))
        model[1].running_var.fill_(1e-30)
        model[1].eps = 1e-30
        model = model.half()
        fast = timm_dynamic.optimize(model, X.half())
        assert "not finite in torch.float16" in str(fast.report) and type(fast[1]) is nn.BatchNorm2d


class Reads(nn.Module):
    """A convolution, a norm and an activation, and `use(conv's output, norm's output, self)`."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.use = use

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        other = self.use(self, y, z)
        return self.act(z) + other


def keep(module, y, z):
    module.seen = y
    return 0


class TestWhatRuns:
    @pytest.mark.parametrize(
        "use",
        [
            lambda module, y, z: y,
            lambda module, y, z: y.mean(),
            lambda module, y, z: F.relu(y.data),
            lambda module, y, z: float(y.numpy().mean()),
            lambda module, y, z: torch.jit.script(nn.functional.hardtanh)(y),
            lambda module, y, z: module.conv.weight.mean(),
            lambda module, y, z: module.bn.running_mean.mean(),
            lambda module, y, z: y.view(-1)[3].item(),
            keep,
        ],
    )
    def test_an_output_that_something_else_reads(self, use):
        model = randomize(Reads(use))
        fast = timm_dynamic.optimize(model, X)
        assert type(fast.bn) is nn.BatchNorm2d and "left bn: " in str(fast.report)
        assert_same(fast, model, X)

    def test_a_norm_whose_output_something_else_reads(self):
        model = randomize(Reads(lambda module, y, z: z.mean() + y.shape[1]))
        fast = timm_dynamic.optimize(model, X)
        assert type(fast.bn) is nn.Identity and type(fast.act) is nn.ReLU
        assert_same(fast, model, X)

    def test_order_of_definition_means_nothing(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn1, self.bn2, self.conv = nn.BatchNorm2d(8), nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)

            def forward(self, x):
                return self.bn1(self.conv(F.relu(self.bn2(x))))

        model = randomize(Backwards())
        fast = timm_dynamic.optimize(model, X)
        assert_same(fast, model, X)
        assert [type(fast.bn1), type(fast.bn2)] == [nn.Identity, nn.BatchNorm2d]
        assert "left bn2: it is not behind a convolution" in fast.report

    @pytest.mark.parametrize("twice", ["conv", "bn", "act"])
    def test_modules_used_twice(self, twice):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU6()

            def forward(self, x):
                return getattr(self, twice)(self.act(self.bn(self.conv(x))) - 1)

        model = randomize(Twice())
        fast = timm_dynamic.optimize(model, X)
        assert_same(fast, model, X)
        if twice != "act":
            assert f"left bn: {'it' if twice == 'bn' else 'conv'} runs 2 times" in fast.report
            assert type(fast.bn) is nn.BatchNorm2d

    def test_a_module_with_two_names(self):
        model = Block()
        model.parts = nn.ModuleList(model.body)
        model = nn.Sequential(model).eval()
        fast = timm_dynamic.optimize(model, X)
        assert_same(fast, model, X)
        assert fast[0].parts[0] is fast[0].body[0] and type(fast[0].parts[1]) is nn.Identity

    @pytest.mark.parametrize("where", ["0", "1", "2"])
    def test_hooks(self, where):
        """They see what they saw."""
        model, seen = small(nn.BatchNorm2d(8), nn.ReLU()), []
        model.get_submodule(where).register_forward_hook(lambda *args: seen.append(args[2].clone()))
        fast = timm_dynamic.optimize(model, X)
        seen.clear()
        assert_same(fast, model, X)
        assert len(seen) == 2
        torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-5)
        assert ("hooks on" in str(fast.report)) == (where != "2")

    def test_hook_of_a_container(self):
        model, seen = randomize(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8))), []
        model[0].register_forward_hook(lambda *args: seen.append(args[2].clone()))
        fast = timm_dynamic.optimize(model, X)
        seen.clear()
        assert_same(fast, model, X)
        torch.testing.assert_close(*seen)
        assert "left 1: 0 also reads the output of 0.0" in fast.report

    def test_unknown_kinds_stay(self):
        class Scaled(nn.Conv2d):
            def forward(self, x):
                return super().forward(x) / self.weight.norm()

        model = randomize(nn.Sequential(Scaled(3, 8, 3), nn.BatchNorm2d(8)))
        model[0].weight.requires_grad_(False)
        fast = timm_dynamic.optimize(model, X)
        assert type(fast[0]) is Scaled and "left 1: the convolution before it is a Scaled" in fast.report
        assert_same(fast, model, X)

    def test_parametrized_and_pruned(self):
        for change in (nn.utils.parametrizations.weight_norm, lambda conv: prune.l1_unstructured(conv, "weight", 9)):
            model = small(nn.BatchNorm2d(8))
            change(model[0])
            assert_same(timm_dynamic.optimize(model, X), model, X)


class Toy(nn.Module):
    """A dynamic layer."""

    limits = None

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        y = self.bn(self.conv(x)) * x.mean()
        y = y * self.gain.view(-1, 1, 1) + self.shift.view(-1, 1, 1)
        return y if self.limits is None else y.clamp(*self.limits)

    def absorb(self, scale, shift):
        layer = copy.deepcopy(self)
        layer.gain, layer.shift = nn.Parameter(self.gain * scale), nn.Parameter(self.shift * scale + shift)
        return layer


class Block(nn.Module):
    """One with a form for inference."""

    def __init__(self, form=None):
        super().__init__()
        self.body, self.form = small(nn.BatchNorm2d(8)), form

    def forward(self, x):
        return self.body(x)

    def optimized(self):
        return self.form


class TestProtocols:
    @pytest.mark.parametrize("act, limits", [(nn.ReLU(), (0, torch.inf)), (nn.ReLU6(), (0, 6)), (nn.SiLU(), None)])
    def test_absorb(self, act, limits):
        for norm in ([nn.BatchNorm2d(8), act], [BatchNormAct2d(8, act_layer=type(act))], [act]):
            model = randomize(nn.Sequential(Toy(), *norm))
            fast = timm_dynamic.optimize(model, X)
            assert_same(fast, model, X)
            assert type(fast[0]) is Toy and fast[0].limits == limits
            assert type(fast[0].bn) is nn.BatchNorm2d and type(fast[0].conv) is nn.Conv2d, "its parts are its affair"
            assert not any(parameter.requires_grad for parameter in fast.parameters())
            assert len(norm) == 1 and norm[0] is act or "1 dynamic layer took over the norm" in str(fast.report)

    def test_absorb_that_cannot(self, monkeypatch):
        def absorb(self, scale, shift):
            raise ValueError("not with a parametrized gain")

        monkeypatch.setattr(Toy, "absorb", absorb)
        model = randomize(nn.Sequential(Toy(), nn.BatchNorm2d(8)))
        fast = timm_dynamic.optimize(model, X)
        assert "left 1: not with a parametrized gain" in fast.report
        assert_same(fast, model, X)

    def test_blocks(self):
        form = small(nn.BatchNorm2d(8))
        model = nn.Sequential(Block(form), nn.BatchNorm2d(8)).eval()
        fast = timm_dynamic.optimize(model, X)
        assert fast[0] is not model[0] and type(fast[0][1]) is nn.BatchNorm2d and "1 block in their" in str(fast.report)
        torch.testing.assert_close(fast(X), model[1](form(X)).detach())
        fast = timm_dynamic.optimize(nn.Sequential(Block(None)).eval(), X)
        assert type(fast[0]) is Block and type(fast[0].body[1]) is nn.Identity
        model[0].body.register_forward_hook(lambda *args: None)
        fast = timm_dynamic.optimize(model, X)
        assert type(fast[0]) is Block and "left 0: there are hooks within" in fast.report
