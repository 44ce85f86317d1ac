"""DDF-ResNets: what is theirs, beyond what every model can do."""

import pytest
import timm
import torch
from timm.layers import BlurPool2d

from timm_dynamic.families import static_twin
from timm_dynamic.layers import DDFPack
from timm_dynamic.models.ddf_resnet import checkpoint_filter_fn

TINY = "test_ddf_resnet"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def packs(model):
    return [module for module in model.modules() if isinstance(module, DDFPack)]


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize(("depth", "layers", "millions"), [(50, 16, 16.8), (101, 33, 28.1), (152, 50, 37.5)])
def test_architecture(combine, depth, layers, millions):
    """Every bottleneck's conv2 is dynamic; all else is the static twin's. Parameters as published, for 50 and 101."""
    name = f"ddf_{combine}_resnet{depth}"
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert len(packs(model)) == layers
    assert {pack.kernel_combine for pack in packs(model)} == {combine}
    assert static_twin(name) == f"resnet{depth}"
    twin = timm.create_model(static_twin(name), device="meta")
    for block, static in zip(model.layer2, twin.layer2, strict=True):
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
            assert getattr(block.conv2, attribute) == getattr(static.conv2, attribute)

    def others(model):
        return {key: value.shape for key, value in model.state_dict().items() if ".conv2." not in key}

    assert others(model) == others(twin)


def test_the_tiny_model_is_tiny():
    assert sum(p.numel() for p in timm.create_model(TINY).parameters()) < 500_000


@pytest.mark.parametrize("size", [(225, 225), (97, 97), (1, 1), (33, 64)], ids=str)
@torch.no_grad()
def test_any_image_size(size):
    assert timm.create_model(TINY).eval()(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("output_stride", [8, 16])
@torch.no_grad()
def test_output_stride_dilates(output_stride):
    model = timm.create_model(TINY, output_stride=output_stride).eval()
    assert [info["reduction"] for info in model.feature_info][-1] == output_stride
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (64 // output_stride,) * 2
    dense = timm.create_model(TINY, layers=(1, 1, 2, 2), output_stride=output_stride)
    assert dense.layer4[1].conv2.dilation == (32 // output_stride,) * 2


@pytest.mark.parametrize(
    ("kwargs", "attribute", "expected"),
    [
        ({"head": 2}, "head", 2),
        ({"kernel_size": 5}, "kernel_size", (5, 5)),
        ({"kernel_combine": "add"}, "kernel_combine", "add"),
        ({"block_args": {"head": 4}}, "head", 4),
    ],
    ids=str,
)
@torch.no_grad()
def test_ddf_options_are_model_arguments(kwargs, attribute, expected):
    model = timm.create_model(TINY, **kwargs).eval()
    assert {getattr(pack, attribute) for pack in packs(model)} == {expected}
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_squeeze_ratio():
    model = timm.create_model(TINY, se_ratio=0.5)
    assert [pack.channel_branch[1].out_channels for pack in packs(model)] == [12, 16, 24, 32]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"aa_layer": BlurPool2d},
        {"block_args": {"attn_layer": "se"}},
        {"drop_block_rate": 0.1},
        {"drop_path_rate": 0.2},
        {"base_width": 128},
        {"act_layer": "silu"},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_options_of_timms_resnet(kwargs):
    model = timm.create_model(TINY, **kwargs)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_anti_aliasing_takes_over_the_stride():
    model = timm.create_model(TINY, aa_layer=BlurPool2d)
    assert {pack.stride for pack in packs(model)} == {(1, 1)}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cardinality": 2}, "cardinality must be 1, got 2"),
        ({"block_reduce_first": 2}, "block_reduce_first must be 1"),
        ({"head": 5}, "head must divide in_channels, got head=5"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"kernel_combine": "sum"}, "kernel_combine.*'sum'"),
    ],
    ids=str,
)
def test_options_it_cannot_have(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(TINY, **kwargs)


def test_initialisation_is_timms():
    """The last norm of each branch starts at zero; with it a new block is the identity plus its shortcut."""
    model = timm.create_model("ddf_mul_resnet50")
    assert not model.layer1[0].bn3.weight.any()
    assert timm.create_model(TINY, zero_init_last=False).layer1[0].bn3.weight.all()
    conv = model.layer4[1].conv2.channel_branch[3]
    assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.05)


class TestCheckpointFilter:
    def test_native_keys_return_at_once(self):
        model = timm.create_model(TINY)
        state = model.state_dict()
        assert checkpoint_filter_fn(state, model) is state

    @pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
    @pytest.mark.parametrize("prefix", ["module.", ""])
    def test_the_authors_wrappers(self, wrapper, prefix):
        model = timm.create_model(TINY)
        state = timm.create_model(TINY).state_dict()
        saved = {prefix + key: value for key, value in state.items()}
        saved = {wrapper: saved, "epoch": 3, "arch": TINY} if wrapper else saved
        filtered = checkpoint_filter_fn(saved, model)
        assert filtered.keys() == state.keys()
        assert checkpoint_filter_fn(filtered, model) is filtered
        model.load_state_dict(filtered)

    def test_foreign_keys_are_left_to_strict_loading(self):
        model = timm.create_model(TINY)
        filtered = checkpoint_filter_fn({"state_dict": {"unknown": torch.ones(1)}}, model)
        with pytest.raises(RuntimeError, match="unknown"):
            model.load_state_dict(filtered)
