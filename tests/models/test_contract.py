"""What every timm model can do, every model of ours can: run on each one that this package registers."""

import importlib.util

import pytest
import timm
import torch
from timm.models import FeatureInfo, model_entrypoint
from timm.models._features_fx import create_feature_extractor

import timm_dynamic

# Segmentation has no pooled features and no classifier of one label an image: tests/models/test_dy_deeplabv3plus.py.
MODELS = [
    name
    for name in timm.list_models(exclude_filters="*deeplab*")
    if model_entrypoint(name).__module__.startswith("timm_dynamic.")
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def image(*size, batch=1, channels=3):
    return torch.randn(batch, channels, *size)


def test_registration(name):
    module = model_entrypoint(name).__module__
    assert importlib.util.find_spec(f"timm.models.{module.split('.')[-1]}") is None, "timm has a module of this name"
    assert name in importlib.import_module(module).__all__
    tags = timm.list_models(name, include_tags=True)
    assert tags and all(tag.startswith(f"{name}.") for tag in tags)
    for tag in tags:
        cfg = timm.get_pretrained_cfg(tag)
        assert cfg.hf_hub_id in (None, f"timm-dynamic/{tag}")
        assert cfg.paper_ids or cfg.paper_name


def test_default_cfg_describes_the_model(name):
    model = timm.create_model(name, device="meta")
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    classifiers = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert all(state[f"{classifier}.weight"].shape[0] == cfg["num_classes"] for classifier in classifiers)
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])


def test_a_training_step_reaches_every_parameter(name):
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.05, drop_rate=0.1).train()
    output = model(image(64, 64, batch=2))
    assert output.shape == (2, 7)
    output.square().mean().backward()
    bad = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad


@torch.no_grad()
def test_odd_sizes_features_and_intermediates(name):
    model = timm.create_model(name).eval()
    x = image(97, 65)
    output, intermediates = model.forward_intermediates(x)
    info = FeatureInfo(model.feature_info, tuple(range(len(model.feature_info))))
    for feature, channels, reduction in zip(intermediates, info.channels(), info.reduction(), strict=True):
        assert feature.shape == (1, channels, -(-97 // reduction), -(-65 // reduction))
    torch.testing.assert_close(output, model.forward_features(x))
    if isinstance(model, timm.models.ResNet):  # the other networks have a convolution between the two
        torch.testing.assert_close(intermediates[-1], output)

    state = model.state_dict()
    for feature_cls in ("list", "getter"):
        options = {"features_only": True, "feature_cls": feature_cls, "out_indices": (1, 3)}
        extractor = timm.create_model(name, device="meta", **options).eval()
        inner = extractor.model if feature_cls == "getter" else extractor
        names = {key: key.replace("blocks_", "blocks.") for key in inner.state_dict()}  # stages taken out of a sequence
        inner.load_state_dict({key: state[name] for key, name in names.items()}, assign=True)
        assert extractor.feature_info.channels() == [info.channels()[i] for i in (1, 3)]
        for feature, expected in zip(extractor(x), (intermediates[1], intermediates[3]), strict=True):
            torch.testing.assert_close(feature, expected)


@torch.no_grad()
def test_head(name):
    model, x = timm.create_model(name).eval(), image(64, 64)
    if hasattr(model, "execution"):
        model.execution = (
            "dense"  # sparse execution folds more norms in `forward` than in its parts, and rounds otherwise
        )
    features, output = model.forward_features(x), model(x)
    torch.testing.assert_close(model.forward_head(features), output)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    model.reset_classifier(5)
    assert model(x).shape == (1, 5)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    if not isinstance(model, timm.models.MobileNetV3):  # its head has a convolution after the pool
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), features)
    assert timm.create_model(name, num_classes=0).eval()(x).shape == pooled.shape


@torch.no_grad()
def test_one_input_channel(name):
    model = timm.create_model(name, in_chans=1).eval()
    assert model(image(64, 64, channels=1)).isfinite().all()


def test_gradient_checkpointing(name):
    model, x = timm.create_model(name).eval(), image(64, 64)
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
def test_fx_feature_extraction(name):
    model, x = timm.create_model(name).eval(), image(64, 64)
    extractor = create_feature_extractor(model, {model.feature_info[2]["module"]: "feature"})
    torch.testing.assert_close(extractor(x)["feature"], model.forward_intermediates(x)[1][2])


def test_static_twin(name):
    try:
        twin = timm_dynamic.families.static_twin(f"{name}.some_tag")
    except ValueError as error:
        assert name in str(error)
    else:
        assert twin not in MODELS and timm.is_model(twin)
