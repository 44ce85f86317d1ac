"""DCD networks: the authors' numbers, and what is theirs beyond what every model can do."""

import warnings

import pytest
import timm
import torch
from timm.layers import BlurPool2d

from timm_dynamic.families import static_twin
from timm_dynamic.layers import DCDConv2d, DCDLinear
from timm_dynamic.models import dcd_mobilenetv2, dcd_resnet

TINY = "test_dcd_resnet"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, DCDConv2d)}


def image(batch=2, size=64):
    return torch.randn(batch, 3, size, size)


@pytest.mark.parametrize(
    ("name", "number", "millions"),
    [
        ("dcd_resnet18", 16, 14.703),
        ("dcd_resnet34", 32, 27.649),
        ("dcd_resnet50", 48, 29.835),
        ("dcd_resnet101", 99, 53.227),
        ("dcd_resnet152", 150, 72.517),
        ("dcd_mobilenetv2", 32, 5.720),
        ("dcd_mobilenetv2_075", 32, 4.082),
        ("dcd_mobilenetv2_050", 32, 3.057),
        ("dcd_mobilenetv2_035", 32, 2.268),
    ],
)
def test_architecture(name, number, millions):
    """Every convolution of the residual branches but the depthwise ones is dynamic; all else is the static twin's."""
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    dynamic = layers(model)
    assert len(dynamic) == number
    assert isinstance(model.get_classifier(), DCDLinear)
    twin = timm.create_model(static_twin(name), device="meta")
    for layer_name, layer in dynamic.items():
        conv = twin.get_submodule(layer_name)
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(layer, attribute) == getattr(conv, attribute)

    def others(model):
        prefixes = (*(f"{layer_name}." for layer_name in dynamic), f"{model.default_cfg['first_conv']}.", "fc.")
        state = model.state_dict()
        return {k: v.shape for k, v in state.items() if not k.startswith((*prefixes, "classifier."))}

    assert others(model) == others(twin)


def test_fc_squeeze():
    for squeeze, width in (({}, 50), ({"fc_squeeze": 16}, 25)):  # 8 is the narrow networks' default
        model = timm.create_model("dcd_mobilenetv2_050", device="meta", **squeeze)
        layer = model.blocks[5][0].conv_pwl
        assert (layer.in_channels, layer.latent_dim, layer.fc[0].out_features) == (288, 20, width)
    with pytest.raises(ValueError, match="fc_squeeze must be at least 1, got 0"):
        timm.create_model("dcd_mobilenetv2", fc_squeeze=0)


class TestClassifier:
    def test_stays_dynamic(self):
        for name in (TINY, "dcd_mobilenetv2_035"):
            model = timm.create_model(name, num_classes=4, drop_rate=0.5).eval()
            x = image()
            for classes in (4, 7):
                head = model.get_classifier()
                assert isinstance(head, DCDLinear) and head.out_features == classes and not head.training
                assert head.latent_dim == head.fc[0].out_features == 32
                assert model(x).shape == (2, classes)
                model.reset_classifier(7)
            assert model.train()(x).shape == (2, 7) and model.get_classifier().training
            model.reset_classifier(0)
            assert isinstance(model.get_classifier(), torch.nn.Identity)

    def test_global_pool(self):
        model = timm.create_model(TINY, global_pool="catavgmax").eval()
        assert model.get_classifier().in_features == 96 and model(image()).shape == (2, 10)

    @pytest.mark.parametrize("name", [TINY, "dcd_mobilenetv2_035"])
    def test_pretrained_with_another_number_of_classes(self, name, tmp_path):
        source = timm.create_model(name)
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        overlay = {"file": str(tmp_path / "weights.pth")}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
        state, own = source.state_dict(), model.state_dict()
        other = {key for key in own if not torch.equal(own[key], state[key])}
        head = model.default_cfg["classifier"][0].split(".")[0]
        assert other == {f"{head}.{key}" for key in ("linear.weight", "linear.bias", "p.weight", "fc_scale.weight")}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class TestCheckpointFilter:
    def test_native_keys_return_at_once(self):
        for name, module in ((TINY, dcd_resnet), ("dcd_mobilenetv2_035", dcd_mobilenetv2)):
            model = timm.create_model(name, device="meta")
            state = model.state_dict()
            assert module.checkpoint_filter_fn(state, model) is state

    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize("position", [0, 1], ids=["no dropout", "dropout"])
    def test_position_of_the_classifier(self, golden, prefix, position):
        case = golden("dcd_resnet18")
        state = {key: torch.empty(shape) for key, (shape, _) in case.rows.items()}
        state = {prefix + key.replace("classifier.1.", f"classifier.{position}."): state[key] for key in state}
        model = timm.create_model("dcd_resnet18", device="meta")
        for saved in (state, {"state_dict": state, "epoch": 3}):
            filtered = dcd_resnet.checkpoint_filter_fn(saved, model)
            assert {key: value.shape for key, value in filtered.items()} == {
                key: value.shape for key, value in model.state_dict().items()
            }

    def test_foreign_keys_are_left_to_strict_loading(self):
        model = timm.create_model(TINY)
        with pytest.raises(RuntimeError, match="unknown"):
            model.load_state_dict(dcd_resnet.checkpoint_filter_fn({"unknown": torch.ones(1)}, model))


class TestOptions:
    def test_small_stem(self):
        model = timm.create_model("dcd_resnet18", small_stem=True).eval()
        x = image(1, 32)
        assert [feature.shape[-1] for feature in model.forward_intermediates(x)[1]] == [32, 32, 16, 8, 4]
        assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4, 8]
        features = timm.create_model("dcd_resnet18", small_stem=True, features_only=True).eval()
        assert features.feature_info.reduction() == [1, 1, 2, 4, 8]
        assert [feature.shape[-1] for feature in features(x)] == [32, 32, 16, 8, 4]

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"aa_layer": BlurPool2d},
            {"block_args": {"attn_layer": "se"}},
            {"block_reduce_first": 2},
            {"drop_path_rate": 0.2},
            {"output_stride": 8},
            {"act_layer": "silu"},
        ],
        ids=lambda kwargs: next(iter(kwargs)),
    )
    def test_of_timms_resnet(self, kwargs):
        model = timm.create_model(TINY, **kwargs)
        model(image()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_groups(self):
        args = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48), "cardinality": 4}
        model = timm.create_model(TINY, block=dcd_resnet.DCDBottleneck, base_width=64, **args)
        assert model.layer1[0].conv2.groups == 4
        model(image()).sum().backward()
        with pytest.raises(ValueError, match="cardinality 1 and base_width 64, got 4 and 64"):
            timm.create_model(TINY, cardinality=4)

    def test_initialisation(self):
        """timm's; the scale is 1, and a residual branch ends in a norm of zeros."""
        model = timm.create_model("dcd_resnet18")
        layer = model.layer4[1].conv2
        assert layer.conv.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.05)
        assert layer.p.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
        assert not layer.fc_scale.weight.any() and not model.layer4[1].bn2.weight.any()
        layer = timm.create_model("dcd_mobilenetv2").blocks[5][0].conv_pw
        assert layer.conv.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
        assert layer.p.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)


@pytest.fixture(params=[TINY, "dcd_mobilenetv2_035"])
def trained(request):
    """A model whose norms and scales are not as new."""
    model = timm.create_model(request.param, num_classes=10)
    for name, p in model.named_parameters():
        if "bn" in name or "fc_scale" in name:
            torch.nn.init.normal_(p, float(name.endswith("weight") and "bn" in name), 0.2)
    with torch.no_grad():
        for _ in range(8):
            model(image(8))
    return model.eval()


class TestTheWholeNetwork:
    @torch.no_grad()
    def test_odd_sizes(self, trained):
        for size in ((97, 65), (225, 33), (1, 1)):
            assert trained(torch.randn(2, 3, *size)).isfinite().all()

    @torch.no_grad()
    def test_script(self, trained):
        model, x = trained.double(), image().double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            graph = torch.jit.script(model)
        torch.testing.assert_close(graph(x), model(x))
