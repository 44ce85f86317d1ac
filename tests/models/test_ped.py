"""PED networks: the authors' numbers, and what is theirs beyond what every model can do."""

import itertools

import pytest
import timm
import torch

from timm_dynamic.families import static_twin
from timm_dynamic.layers import PEDConv2d
from timm_dynamic.models.ped_resnet import checkpoint_filter_fn

TINY = "test_ped_resnet"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PEDConv2d)}


def test_which_convolutions_are_dynamic():
    names = [f"layer{stage}.{block}.conv{i}" for stage, block, i in itertools.product((1, 2, 3, 4), (0, 1), (1, 2))]
    assert list(layers(timm.create_model("ped_resnet18", device="meta"))) == names
    depths = {1: 3, 2: 4, 3: 6, 4: 3}
    names = [f"layer{s}.{b}.conv{i}" for s in depths for b in range(depths[s]) for i in (1, 2, 3)]
    assert list(layers(timm.create_model("ped_resnet50", device="meta"))) == names
    mobilenet = timm.create_model("ped_mobilenetv2", device="meta")
    names = [name for name, _ in mobilenet.named_modules() if name.endswith(("conv_pw", "conv_dw", "conv_pwl"))]
    assert list(layers(mobilenet)) == [name for name in names if not name.startswith("blocks.0.")]
    assert len(layers(mobilenet)) == 48


@pytest.mark.parametrize("name", ["ped_resnet18", "ped_resnet50", "ped_mobilenetv2"])
def test_the_static_twin_has_the_same_convolutions(name):
    twin = timm.create_model(static_twin(name), device="meta")
    for key, layer in layers(timm.create_model(name, device="meta")).items():
        assert layer.extra_repr() == twin.get_submodule(key).extra_repr()


@pytest.mark.parametrize("name", [TINY, "ped_mobilenetv2"])
def test_options(name):
    model = timm.create_model(name, rank=2, reduction=4, noise_std=0.0, aux_scale=0.5)
    layer = next(iter(layers(model).values()))
    assert (layer.rank, layer.reduction, layer.noise_std, layer.aux_scale) == (2, 4, 0.0, 0.5)
    assert model.train()(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_initialisation():
    for layer in layers(timm.create_model("ped_resnet18")).values():
        fan_out = layer.out_channels * 9
        assert layer.kernel.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_small_stem():
    model = timm.create_model("ped_resnet18", small_stem=True, num_classes=10).eval()
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    features = model.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)
    assert [f.shape[-1] for f in features] == [32, 32, 16, 8, 4]
    assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4, 8]


def test_wide_and_grouped():
    assert timm.create_model("ped_resnet50", cardinality=32, base_width=4, device="meta").layer1[0].conv2.groups == 32
    for options in ({"cardinality": 2}, {"base_width": 128}):
        with pytest.raises(ValueError, match="cardinality"):
            timm.create_model("ped_resnet18", **options)


class TestCheckpoints:
    @pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
    @pytest.mark.parametrize("rename", ["{}", "module.{}", "features.module.{}"])
    def test_formats(self, wrapper, rename):
        if rename.startswith("features"):  # `module.` within the key
            theirs = {key: key.replace("layer1.", "layer1.module.") for key in timm.create_model(TINY).state_dict()}
        else:
            theirs = {key: rename.format(key) for key in timm.create_model(TINY).state_dict()}
        model = timm.create_model(TINY)
        state = model.state_dict()
        saved = {theirs[key]: value for key, value in state.items()}
        filtered = checkpoint_filter_fn({wrapper: saved, "epoch": 3} if wrapper else saved, model)
        assert filtered.keys() == state.keys()
        assert checkpoint_filter_fn(filtered, model) is filtered
        model.load_state_dict(filtered)


def test_features_train_what_they_use():
    model = timm.create_model(TINY, features_only=True, out_indices=(1, 2))
    sum(f.square().mean() for f in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())
