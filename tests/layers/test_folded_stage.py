"""Stages whose norms work in place in inference: the outputs stay, whatever happened to the blocks before."""

import copy
from unittest import mock

import pytest
import timm
import torch
from torch import nn

import timm_dynamic
from timm_dynamic.layers import folded_stage
from timm_dynamic.layers.folded_stage import FoldedStage
from timm_dynamic.ops import backend_info

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")
MODELS = (
    "test_ped_resnet",
    "test_dcd_resnet",
    "test_dy_resnet",
    "dy_mobilenetv3_small_025",  # activations that are no clamps; squeeze-and-excitation
    "ped_mobilenetv2",
    "dcd_mobilenetv2_035",
)


@pytest.fixture
def norms(monkeypatch):
    """The norms that worked in place, or within the layer before them."""
    ran = []
    for kind in (folded_stage.AffineNorm, folded_stage._NormedLayer):
        run = lambda self, y, forward=kind.forward: ran.append(self) or forward(self, y)  # noqa: E731
        monkeypatch.setattr(kind, "forward", run)
    return ran


def make(name="test_ped_resnet"):
    """With statistics as after some training; in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # timm's last one in a block is 0
    with torch.no_grad():
        for _ in range(3):
            model.train()(2 * torch.randn(4, 3, 64, 64))
    return model.eval()


@torch.no_grad()
def plainly(model, x):
    """The blocks as they are."""
    with mock.patch.object(FoldedStage, "_run_folded", nn.Sequential.forward):
        return model(x)


x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["test_ped_resnet", "ped_mobilenetv2"])
@torch.no_grad()
def test_channels_last_as_on_a_gpu(name, norms, monkeypatch):
    model, own = make(name), x.to(memory_format=torch.channels_last)
    expected = model(own)
    assert not norms
    monkeypatch.setattr(folded_stage, "cuda_inference_kernel_serves", lambda *args: True)
    torch.testing.assert_close(model(own), expected, rtol=1e-4, atol=1e-4)
    assert norms


@pytest.mark.parametrize("name", MODELS)
def test_output_stays(name, norms):
    model, before, seen = make(name), x.clone(), []
    stages = [module for module in model.modules() if isinstance(module, FoldedStage)]
    hooks = [stage.register_forward_hook(lambda *args: seen.append(args)) for stage in stages]
    plainly(model, x)
    assert not norms and len(seen) == len(stages)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        for stage, (given,), expected in seen:  # random networks of DCD make much of rounding errors, so one by one
            tolerance = {"rtol": 0, "atol": 1e-4 * expected.abs().max().item()}
            torch.testing.assert_close(stage(given), expected, **tolerance)
        model(x)
    assert len(norms) >= 8 and torch.equal(x, before)


def test_state_dict_and_modules_stay():
    model = make()
    keys = list(model.state_dict())
    with torch.no_grad():
        model(x)
    assert list(model.state_dict()) == keys and isinstance(model.layer1, FoldedStage)
    assert not any(isinstance(module, folded_stage.AffineNorm) for module in model.modules())


@pytest.mark.parametrize(
    "how", ["gradients", "training", "channels_last", "double", "autocast", "hook", "compile", "no kernels"]
)
def test_not_where_it_does_not_serve(how, norms):
    model, own = make(), x
    if how == "training":
        model.train()
    elif how == "channels_last":
        own = x.to(memory_format=torch.channels_last)
    elif how == "double":
        model, own = model.double(), x.double()
    elif how == "hook":
        for block in (block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage):
            block.conv1.register_forward_hook(lambda *args: None)
    run = torch.compile(model, backend="eager") if how == "compile" else model
    with torch.set_grad_enabled(how == "gradients"), torch.autocast("cpu", torch.bfloat16, how == "autocast"):
        if how == "no kernels":
            with timm_dynamic.ops.reference_only():
                run(own)
        else:
            run(own)
    assert not norms


def test_hooks_see_what_is_theirs():
    model, seen = make(), []
    with torch.no_grad():
        y = model(x)
        model.layer2[0].conv1.register_forward_hook(lambda module, args, out: seen.append((out, out.clone())))
        torch.testing.assert_close(model(x), y)
    assert len(seen) == 1 and torch.equal(*seen[0])  # nothing has written to it since
    with torch.no_grad(), timm_dynamic.record(model) as routing:
        torch.testing.assert_close(model(x), y)
    assert len(routing) == 8


def step(model):
    model.train()(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.eval()


def statistics(model):
    model.layer1[0].bn1.running_var.mul_(3)


def weights(model):
    nn.init.normal_(model.layer1[0].conv1.weight)


def parameter(model):
    model.layer1[0].conv1.weight = nn.Parameter(torch.randn_like(model.layer1[0].conv1.weight))


def layer(model):
    model.layer2[0].conv1 = copy.deepcopy(model.layer2[0].conv1)
    nn.init.normal_(model.layer2[0].conv1.weight)


def state_dict(model):
    other = make()
    statistics(other)
    model.load_state_dict(other.state_dict(), assign=True)


def one_norm_in_training(model):
    model.layer1[0].bn2.train().momentum = 0.0


@pytest.mark.parametrize(
    "change", [step, statistics, weights, parameter, layer, state_dict, one_norm_in_training], ids=lambda f: f.__name__
)
def test_notices_changes(change):
    model = make()
    with torch.no_grad():
        before = model(x)
    with torch.no_grad() if change is not step else torch.enable_grad():
        change(model)
    expected = plainly(model, x)
    with torch.no_grad():
        after = model(x)
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, after, atol=1e-3)


def test_copies_are_their_own():
    model = make()
    with torch.no_grad():
        y = model(x)
        other = copy.deepcopy(model)
        statistics(other)
        assert not torch.allclose(other(x), y, atol=1e-3)
        assert torch.equal(model(x), y)


def test_fx_reaches_into_the_blocks():
    model = make()
    features = timm.models.create_feature_extractor(model, ["layer4.0.act2"])(x)["layer4.0.act2"]
    torch.testing.assert_close(model.forward_head(features), plainly(model, x), rtol=1e-4, atol=1e-4)
