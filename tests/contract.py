"""What every timm model can do, every model of ours can; what a family promises by its record, it does.

A test file derives a class from one of these and gives it the fixture `name`, or `family`.
"""

import copy
import functools
import importlib.util
import re

import pytest
import timm
import torch
from timm.models import FeatureInfo, model_entrypoint
from timm.models._features_fx import create_feature_extractor
from torch import nn

import timm_dynamic
from timm_dynamic import cli
from timm_dynamic.card import model_card
from timm_dynamic.layers.base import DropInConv2d
from timm_dynamic.replace import layer_options


def image(*size, batch=1, channels=3):
    return torch.randn(batch, channels, *size)


class NameContract:
    """What costs nothing. Needs a fixture `name`: of a classifier that is registered in timm."""

    def test_registration(self, name):
        module = model_entrypoint(name).__module__
        assert importlib.util.find_spec(f"timm.models.{module.split('.')[-1]}") is None, (
            "timm has a module of this name"
        )
        assert name in importlib.import_module(module).__all__
        tags = timm.list_models(name, include_tags=True)
        assert tags and all(tag.startswith(f"{name}.") for tag in tags)
        for tag in tags:
            cfg = timm.get_pretrained_cfg(tag)
            assert cfg.hf_hub_id in (None, f"timm-dynamic/{tag}") or cfg.hf_hub_filename  # a file of the authors'
            assert cfg.paper_ids or cfg.paper_name


@pytest.mark.usefixtures("nothing_drawn_on_meta")
class CfgContract:
    """Needs such a fixture, too; a deeper network of the same file has the same cfg."""

    def test_default_cfg_describes_the_model(self, name):
        model = timm.create_model(name, device="meta")
        cfg, state = model.default_cfg, model.state_dict()
        assert f"{cfg['first_conv']}.weight" in state
        classifiers = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
        assert all(state[f"{classifier}.weight"].shape[0] == cfg["num_classes"] for classifier in classifiers)
        reduction = model.feature_info[-1]["reduction"]
        assert cfg["pool_size"] == tuple(-(-n // reduction) for n in cfg["input_size"][1:])


@pytest.mark.usefixtures("nothing_drawn_on_meta")
class ModelContract:
    """What computes. Needs a fixture `name` of such a classifier, too, with the scope of the module."""

    @pytest.fixture(autouse=True)
    def _seed(self):
        torch.manual_seed(0)

    @pytest.fixture(scope="module")
    def create(self, name):
        """`timm.create_model` of it."""
        return functools.partial(timm.create_model, name)

    @pytest.fixture(scope="module")
    def made(self, create):
        torch.manual_seed(0)
        return create().eval()

    @pytest.fixture
    def model(self, made):
        """What `create` makes, made once, in eval mode."""
        return copy.deepcopy(made)

    def test_a_training_step_reaches_every_parameter(self, create):
        model = create(num_classes=7, drop_path_rate=0.05, drop_rate=0.1).train()
        output = model(image(64, 64, batch=2))
        assert output.shape == (2, 7)
        output.square().mean().backward()
        bad = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not bad

    @torch.no_grad()
    def test_odd_sizes_features_and_intermediates(self, create, model):
        x = image(97, 65)
        output, intermediates = model.forward_intermediates(x)
        info = FeatureInfo(model.feature_info, tuple(range(len(model.feature_info))))
        for feature, channels, reduction in zip(intermediates, info.channels(), info.reduction(), strict=True):
            patches = isinstance(model, timm.models.ConvNeXt)  # which leave a rest out
            assert feature.shape == (
                1,
                channels,
                *(n // reduction if patches else -(-n // reduction) for n in (97, 65)),
            )
        torch.testing.assert_close(output, model.forward_features(x))
        if isinstance(model, timm.models.ResNet):  # the other networks have a convolution between the two
            torch.testing.assert_close(intermediates[-1], output)

        state = model.state_dict()
        for feature_cls in ("list", "getter"):
            options = {"features_only": True, "feature_cls": feature_cls, "out_indices": (1, 3)}
            extractor = create(device="meta", **options).eval()
            inner = extractor.model if feature_cls == "getter" else extractor
            names = {
                key: re.sub("^(blocks|stages|stem)_", r"\1.", key) for key in inner.state_dict()
            }  # stages taken out of a sequence
            inner.load_state_dict({key: state[name] for key, name in names.items()}, assign=True)
            assert extractor.feature_info.channels() == [info.channels()[i] for i in (1, 3)]
            for feature, expected in zip(extractor(x), (intermediates[1], intermediates[3]), strict=True):
                torch.testing.assert_close(feature, expected)

    @torch.no_grad()
    def test_head(self, create, model):
        x = image(64, 64)
        features, output = model.forward_features(x), model(x)
        torch.testing.assert_close(model.forward_head(features), output)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        model.reset_classifier(5)
        assert model(x).shape == (1, 5)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)
        if not isinstance(model, (timm.models.MobileNetV3, timm.models.ConvNeXt)):  # more than a pool in their heads
            model.reset_classifier(0, "")
            torch.testing.assert_close(model(x), features)
        assert create(num_classes=0).eval()(x).shape == pooled.shape

    @torch.no_grad()
    def test_one_input_channel(self, create):
        model = create(in_chans=1).eval()
        assert model(image(64, 64, channels=1)).isfinite().all()

    def test_gradient_checkpointing(self, model):
        x = image(64, 64)
        expected = model(x)
        expected.sum().backward()
        reached = [p.grad is not None for p in model.parameters()]  # not PED's decoder, which serves in training only
        model.zero_grad()
        model.set_grad_checkpointing()
        output = model(x)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        assert [p.grad is not None for p in model.parameters()] == reached

    @torch.no_grad()
    def test_fx_feature_extraction(self, model):
        x = image(64, 64)
        extractor = create_feature_extractor(model, {model.feature_info[2]["module"]: "feature"})
        torch.testing.assert_close(extractor(x)["feature"], model.forward_intermediates(x)[1][2])


class FamilyContract:
    """Needs a fixture `family`: a `timm_dynamic.families.Family`."""

    @pytest.fixture(autouse=True)
    def _seed(self):
        torch.manual_seed(0)

    def test_the_record_is_complete(self, family):
        assert family.title and family.about and family.paper and family.tiny in family.models
        assert set(family.timed) <= set(family.twins) <= set(family.models)
        for tag in family.reported:
            assert timm.get_pretrained_cfg(tag) is not None and tag.partition(".")[0] in family.models
        assert sum(p.numel() for p in timm.create_model(family.tiny, device="meta").parameters()) < 500_000
        assert family.layer is None or (family.layer.family, family.layer.__mro__.count(DropInConv2d)) == (
            family.name,
            1,
        )

    def test_static_twins(self, family):
        """timm's own; one in each of its files is seen to have the same features."""
        in_files = {}
        for name, twin in family.twins.items():
            assert timm_dynamic.families.static_twin(f"{name}.some_tag") == twin
            in_files[model_entrypoint(twin).__module__] = name, twin
        assert all(file.startswith("timm.models.") for file in in_files)
        for name, twin in in_files.values():
            ours, static = (timm.create_model(model, device="meta") for model in (name, twin))
            assert ours.feature_info == static.feature_info
        with pytest.raises(ValueError, match="test_resnet has no static twin"):
            timm_dynamic.families.static_twin("test_resnet")
        for find in (timm_dynamic.families.static_twin, timm_dynamic.families.family_of):
            with pytest.raises(ValueError, match=f"give the name of a model, .* {family.tiny!r} for this one; got a"):
                find(timm.create_model(family.tiny, device="meta"))

    def test_training_without_noise_repeats_itself(self, family):
        model, x = timm.create_model(family.tiny, **family.exact), image(64, 64, batch=2)
        model.train()
        assert torch.equal(model(x), model(x))
        terms = timm_dynamic.auxiliary_loss(model)
        assert {name.rpartition(".")[2] for name in terms} == set(family.terms)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.filterwarnings("ignore:timm_dynamic. in float16")
    def test_half_precision(self, family, dtype):
        """Under autocast and by itself; no image, too."""
        model, x = timm.create_model(family.tiny), 10 * image(64, 64, batch=4)
        with torch.autocast("cpu", dtype):
            loss = model(x).float().logsumexp(1).mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        model, x = model.to(dtype).eval(), x.to(dtype)
        output = model(x)
        assert output.dtype == dtype and output.isfinite().all()
        assert model(x[:0]).shape == (0, model.num_classes)

    @torch.no_grad()
    def test_what_is_recorded(self, family):
        model = timm.create_model(family.tiny).eval()
        if not family.routing:
            with pytest.raises(ValueError, match="no layer with"), timm_dynamic.record(model):
                pass
            return
        with timm_dynamic.record(model) as routing:
            model(image(64, 64, batch=2))
        assert routing and all(len(value) == 2 for value in routing.values())

    def test_macs_are_counted(self, family):
        model = timm.create_model(family.tiny, device="meta")
        macs = timm_dynamic.count_macs(model, torch.empty(2, *model.default_cfg["input_size"], device="meta"))
        assert macs.static == macs.executed > 0

    def test_model_card(self, family):
        card = model_card(timm.create_model(family.tiny), f"someone/{family.tiny}", tag="untrained")
        assert f"`{family.tiny}`" in card and card.startswith("---\nlicense:")

    def test_command_line(self, family, tmp_path):
        flags = ["--models", "test_resnet", "--baseline", "static", "--num-warm-iter", "1", "--num-bench-iter", "1"]
        if family.layer is not None and family.keeps is not None:
            assert cli.main(["benchmark", *flags, "--dynamize", family.name, "--img-size", "32"]) == 0

    def test_options_of_another_type(self, family):
        """Of the layer, and of its models: one line."""
        options = layer_options(family.layer) if family.layer is not None else []
        wrong = [name for name in options if name not in ("warehouse", "from_scratch")]  # an object; of `from_conv`
        wrong = {name: [3] if name in ("nonlinearity", "kernel_combine") else "many" for name in wrong}
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=rf"{name} must be .*, got ") as error:
                family.layer(8, 8, 3, padding=1, **{name: value})
            assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="num_classes must be a whole number, got 'many'"):
            timm.create_model(family.tiny, num_classes="many")

    @torch.no_grad()
    def test_layer_is_its_formula(self, family):
        """Whatever runs; and it stands in for a convolution."""
        if family.layer is None:
            return
        conv = nn.Conv2d(8, 8, 3, padding=1).double()
        layer, x = family.layer.from_conv(conv), image(9, 7, batch=3, channels=8).double()
        for value in layer.parameters():
            if value.ndim > 1 and value.std() == 0:  # parts that dynamize makes neutral
                nn.init.normal_(value, std=0.1)
        for mode in (True, False):
            layer.train(mode)
            state = copy.deepcopy(layer)
            torch.manual_seed(0)
            expected = state.formula(x)
            torch.manual_seed(0)
            torch.testing.assert_close(layer(x), expected)
        assert layer(x).shape == conv(x).shape and layer.extra_repr() == conv.extra_repr()
        scale, shift = torch.rand(8).double() + 0.5, torch.randn(8).double()
        expected = scale[:, None, None] * layer(x) + shift[:, None, None]
        torch.testing.assert_close(layer.absorb(scale, shift)(x), expected)

    def test_dynamize(self, family):
        if family.layer is None:
            assert family.name not in timm_dynamic.families.layers()
            return
        static, x = timm.create_model("test_resnet", num_classes=10).double(), image(64, 64, batch=2).double()
        for _ in range(3):
            static(x + 0.3)
        model = timm_dynamic.dynamize(copy.deepcopy(static), family.name)
        layers = [layer for layer in model.modules() if isinstance(layer, family.layer)]
        assert layers
        if family.keeps is not None:
            with torch.no_grad():
                expected = static.eval()(x)
                assert (model.eval()(x) - expected).abs().max() <= max(family.keeps, 1e-9) * expected.std()
        model.train()(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
