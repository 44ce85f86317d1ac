"""`timm.create_model("dynamized", base=..., layer=...)`."""

import copy
import json

import pytest
import timm
import torch
from pairs import in_turns
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

import timm_dynamic
from timm_dynamic.convert import load_checkpoint
from timm_dynamic.families import FAMILIES, layers
from timm_dynamic.layers import DCDConv2d

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(base="test_resnet", layer="dcd", **kwargs):
    return timm.create_model("dynamized", base=base, layer=layer, **kwargs).eval()


def at_work(model: nn.Module) -> nn.Module:
    """The model with every part of it at work, dynamic parts too."""
    for value in model.parameters():
        nn.init.normal_(value, std=0.1)
    return model


@pytest.fixture
def static(tmp_path):
    """A static network, and the file of its weights."""
    model = timm.create_model("test_resnet", num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "static.safetensors")
    return model, tmp_path / "static.safetensors"


@pytest.mark.parametrize(("layer", "base"), in_turns(layers(), ["test_resnet", "test_efficientnet", "test_convnext"]))
def test_it_is_what_dynamize_makes(base, layer):
    base = "test_resnet" if layer == "ddf" else base  # it takes 3x3 filters
    torch.manual_seed(0)
    expected = timm_dynamic.dynamize(timm.create_model(base, num_classes=7), layer).eval()
    torch.manual_seed(0)
    model = make(base, layer, num_classes=7)
    assert model.pretrained_cfg["architecture"] == "dynamized" and model.num_classes == 7
    assert model.state_dict().keys() == expected.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(X), expected(X))


def test_arguments_of_the_layer_and_of_the_base():
    model = make(where="layer2.*", latent_dim=3, in_chans=1, num_classes=5)
    found = [name for name, module in model.named_modules() if isinstance(module, DCDConv2d)]
    assert found and all(name.startswith("layer2.") for name in found)
    assert {model.get_submodule(name).latent_dim for name in found} == {3}
    assert model(X[:, :1]).shape == (2, 5)


@pytest.mark.parametrize("base", ["test_resnet", "test_efficientnet"])
def test_features(base, tmp_path):
    """Those of the network, with its weights, also where names differ."""
    model = at_work(make(base, "dy"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    features = make(base, "dy", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=(1, 2))
    with torch.no_grad():
        maps = model.forward_intermediates(X, indices=[1, 2], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(features(X), maps, strict=True))


def test_a_folder_says_how_many_classes_and_channels(tmp_path):
    """As of timm's own models; others can be asked for."""
    model = at_work(make(num_classes=7, in_chans=1))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    arguments = {"base": "test_resnet", "layer": "dcd"}  # all that older versions of timm write
    save_config_for_hf(model, tmp_path / "config.json", model_args=arguments)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": arguments}))
    pulled = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(pulled(X[:, :1]), model(X[:, :1]))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert torch.equal(other.layer1[0].conv1.conv.weight, model.layer1[0].conv1.conv.weight)
    assert other(X[:, :1]).shape == (2, 3)


def test_copies_and_pickles(tmp_path):
    model = at_work(make())
    torch.save(model, tmp_path / "whole.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert torch.equal(other(X), model(X)) and other.recipe == model.recipe


@pytest.mark.parametrize("layer", [name for name in layers() if FAMILIES[name].keeps == 0])
def test_static_weights_of_a_file(layer, static, caplog):
    """Are loaded before the network becomes dynamic: it classifies as before."""
    model, path = static
    caplog.set_level("INFO", "timm_dynamic")
    dynamic = make(layer=layer, num_classes=7)
    load_checkpoint(dynamic, path)
    assert "weights of the static test_resnet" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(dynamic(X), model(X), rtol=1e-4, atol=1e-4)
    again = make(layer=layer, num_classes=7)
    load_checkpoint(dynamic, path)
    torch.save(dynamic.state_dict(), path.with_suffix(".pth"))
    caplog.clear()
    load_checkpoint(again, path.with_suffix(".pth"))  # of the dynamic network
    assert torch.equal(again(X), dynamic(X)) and "static" not in caplog.text


def test_pretrained_weights_of_the_base():
    """Of a model of ours too, whose default tag is trained."""
    model = timm.create_model("test_ddf_resnet", pretrained=True).eval()
    dynamic = make("test_ddf_resnet.digits", "dcd", pretrained=True)
    assert dynamic.pretrained_cfg["tag"] == "digits"
    with torch.no_grad():
        torch.testing.assert_close(dynamic(X), model(X), rtol=1e-4, atol=1e-4)
    three = make("test_ddf_resnet", "dcd", pretrained=True, num_classes=3)
    assert torch.equal(three.layer1[0].conv1.conv.weight, model.layer1[0].conv1.weight) and three(X).shape == (2, 3)


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, "dynamized needs base=NAME"),
        ({"base": "test_resnet"}, "dynamized needs layer=NAME"),
        ({"base": "test_resnat", "layer": "dcd"}, "unknown base 'test_resnat'; did you mean test_resnet"),
        ({"base": "test_resnet", "layer": "dy", "num_kernel": 8}, "'num_kernel'; did you mean num_kernels?"),
        ({"base": "test_resnet", "layer": "dcc"}, "got 'dcc'; did you mean dcd?"),
        ({"base": "test_vit", "layer": "dcd"}, "by default, none of the 1 convolutions of test_vit is replaced"),
        (
            {"base": "test_resnet", "layer": "dy", "num_kernels": "many"},
            "num_kernels must be a whole number, got 'many'",
        ),
        (
            {"base": "test_resnet", "layer": "dcd", "where": 5},
            "where must be a function, a pattern of names, or several",
        ),
        ({"base": "test_resnet", "layer": "dcd", "where": "layer9.*"}, "where='layer9.*' matches no convolution"),
        ({"base": "test_resnet", "layer": "dcd", "pretrained_cfg": "in1k"}, "dynamized has no tag 'in1k'"),
    ],
)
def test_errors(kwargs, expected):
    with pytest.raises(ValueError) as error:
        timm.create_model("dynamized", **kwargs)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_base(static):
    other = make("test_convnext", num_classes=7)
    for load in (load_checkpoint, timm.models.load_checkpoint):
        with pytest.raises(
            ValueError, match=r"load into dynamized \(base=test_convnext, layer=dcd\): .* miss"
        ) as error:
            load(other, str(static[1]))
        assert "\n" not in str(error.value)


def test_checkpoint_path(static, tmp_path):
    """Of timm's function: a file of the static network, of the dynamic one, of another number of classes."""
    model, path = static
    dynamic = make(num_classes=7, checkpoint_path=str(path))
    with torch.no_grad():
        torch.testing.assert_close(dynamic(X), model(X), rtol=1e-4, atol=1e-4)
    at_work(dynamic)
    torch.save(dynamic.state_dict(), tmp_path / "dynamic.pth")
    for made in (make, lambda **kwargs: copy.deepcopy(make(**kwargs))):
        assert torch.equal(made(num_classes=7, checkpoint_path=str(tmp_path / "dynamic.pth"))(X), dynamic(X))
    for file in (path, tmp_path / "dynamic.pth"):
        with pytest.raises(ValueError, match=r"create the model with num_classes=7") as error:
            make(num_classes=3, checkpoint_path=str(file))
        assert "base=test_resnet, layer=dcd" in str(error.value) and "\n" not in str(error.value)
    state = dynamic.state_dict()
    counts = [key for key in state if key.endswith("num_batches_tracked")]
    make(num_classes=7).load_state_dict({key: value for key, value in state.items() if key not in counts})
    head = {key: value for key, value in state.items() if key.startswith("fc.")}
    found = make(num_classes=7).load_state_dict(head, strict=False)  # a part, as torch does it
    assert not found.unexpected_keys and len(found.missing_keys) > 9
    with pytest.raises(RuntimeError, match="Missing key"):
        make(num_classes=7).load_state_dict(head)
    body = {key: value for key, value in model.state_dict().items() if key not in (*head, *counts)}
    found, other = (one := make(num_classes=7)).load_state_dict(body, strict=False), one.fc
    assert sorted(found.missing_keys) == sorted(head) and not found.unexpected_keys
    with torch.no_grad():
        features = other.weight @ model.forward_head(model.forward_features(X), pre_logits=True).T
        torch.testing.assert_close(one(X), features.T + other.bias, rtol=1e-4, atol=1e-4)
    del body["layer1.0.conv1.weight"]  # not enough to make the layer of
    assert len(make(num_classes=7).load_state_dict(body, strict=False).unexpected_keys) > 3


@pytest.mark.parametrize("layer", ["kw", "dy"])
@pytest.mark.parametrize("base", ["test_resnet", "test_kw_resnet"])
def test_state_dicts_of_what_layers_share(base, layer):
    """They are taken as they are, though several names stand for one tensor."""
    model = at_work(make(base, layer))
    other = make(base, layer)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(X), model(X))


def test_mistakes_with_dynamize():
    with pytest.raises(ValueError, match="for a name, timm.create_model makes the model"):
        timm_dynamic.dynamize("resnet18", "dcd")
    with pytest.raises(ValueError, match="DynamicConv2d has no argument 'num_kernel'; did you mean num_kernels?"):
        timm_dynamic.dynamize(timm.create_model("test_resnet"), "dy", num_kernel=2)
    model = timm_dynamic.dynamize(timm.create_model("test_efficientnet"), "dy")
    before = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    with pytest.raises(ValueError, match="dynamic layers are in it already"):
        timm_dynamic.dynamize(model, "dy", lambda name, conv: False)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == before
