"""RedNets: what is theirs beyond what every model can do. tests/test_golden.py has the authors' numbers."""

import pytest
import timm
import torch

import timm_dynamic
from timm_dynamic.layers import Involution2d
from timm_dynamic.models.rednet import checkpoint_filter_fn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("depth", "count", "params"),
    [(26, 9, 9_233_166), (38, 13, 12_386_986), (50, 17, 15_540_806), (101, 34, 25_652_950), (152, 51, 33_984_582)],
)
def test_sizes(depth, count, params):
    model = timm.create_model(f"rednet{depth}", device="meta")
    layers = [module for module in model.modules() if isinstance(module, Involution2d)]
    assert len(layers) == count and sum(p.numel() for p in model.parameters()) == params
    assert [layer.kernel_size[0] for layer in layers] == [3] + [7] * (count - 1)
    assert sum(layer.stride[0] == 2 for layer in layers) == 3


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_stem_is_that_of_the_weights(wrapped):
    """Detectors' weights have a stem of 7 x 7, in the authors' format or, once loaded, in ours."""
    source = timm.create_model("test_rednet", stem_kernel_size=7).eval()
    state = {key: torch.randn_like(v) if v.ndim > 1 else v for key, v in source.state_dict().items()}
    source.load_state_dict(state)
    if wrapped:
        stem = {"conv1.0": "stem.0.conv", "conv1.1": "stem.0.bn", "conv1.3": "stem.1", "conv1.4": "stem.2"}
        stem |= {"conv1.6": "stem.4.conv", "bn1": "stem.4.bn"}
        theirs = {}
        for key, value in state.items():
            ours = next((name for name in stem if key.startswith(f"{name}.")), None)
            key = stem[ours] + key.removeprefix(ours) if ours else key
            theirs[f"head.{key}" if key.startswith("fc.") else f"backbone.{key}"] = value
        state = {"meta": {}, "state_dict": theirs, "optimizer": {}}
    model = timm.create_model("test_rednet").eval()
    model.load_state_dict(checkpoint_filter_fn(state, model))
    assert model.conv1[3].kernel_size == (7, 7)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), source(x))


def test_initialisation():
    model = timm.create_model("rednet26")
    for layer in (module for module in model.modules() if isinstance(module, Involution2d)):
        assert layer.conv2.conv.bias.abs().sum() == 0
        std = (2 / layer.conv2.conv.out_channels) ** 0.5
        assert layer.conv2.conv.weight.std().item() == pytest.approx(std, rel=0.2)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05) and model.fc.bias.abs().sum() == 0
    assert model.layer4[0].bn3.weight.abs().sum() == 0


@torch.no_grad()
def test_optimized():
    """The norms behind involution become scale and bias of it."""
    model, x = timm.create_model("test_rednet.digits", pretrained=True).eval(), torch.randn(2, 3, 64, 64)
    fast = timm_dynamic.optimize(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    layers = [module for module in fast.modules() if isinstance(module, Involution2d)]
    assert len(layers) == 5 and all(layer.scale is not None for layer in layers)


def test_cardinality_is_refused():
    with pytest.raises(ValueError, match="cardinality must be 1, got 2"):
        timm.create_model("rednet26", cardinality=2, device="meta")
