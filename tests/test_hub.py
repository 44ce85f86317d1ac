"""Where `pretrained=True` looks for weights. Nothing here touches the network: tests/test_hub_http.py does."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images

import timm_dynamic
from timm_dynamic import cli, hub
from timm_dynamic.cli.digits import write_digits
from timm_dynamic.families import FAMILIES
from timm_dynamic.layers.progress import KEY

TINY = "test_ddf_resnet"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty local weights folder, and no hub."""
    monkeypatch.setenv("TIMM_DYNAMIC_WEIGHTS", str(tmp_path))
    monkeypatch.delenv("TIMM_DYNAMIC_HUB_ORG", raising=False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args: None)

    def offline(url):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(hub, "get_hf_file_metadata", offline)
    return tmp_path


@pytest.fixture
def weights(folder):
    """A weights file of the tiny model, outside the local folder's names."""
    path = folder / "elsewhere" / "weights.safetensors"
    path.parent.mkdir()
    save_file(timm.create_model(TINY).state_dict(), path)
    return path


@pytest.fixture
def hub_tag(monkeypatch):
    """The tiny model with a tag whose weights are on the hub."""
    cfg = timm.get_pretrained_cfg(f"{TINY}.digits")
    cfg.tag, cfg.file, cfg.hf_hub_id = "hub", None, f"timm-dynamic/{TINY}.hub"
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, f"{TINY}.hub", cfg)
    return f"{TINY}.hub"


def stem(model):
    return model.conv1[0].weight


def saved_stem(path):
    return load_file(path)["conv1.0.weight"]


def test_local_folder(folder, monkeypatch):
    assert hub.local_weights("a.b") == folder / "a.b.safetensors"
    monkeypatch.delenv("TIMM_DYNAMIC_WEIGHTS")
    assert str(hub.local_weights("a.b")) == f"{constants.HF_HOME}/timm-dynamic/a.b.safetensors"


def test_local_folder_is_first(folder, weights, hub_tag):
    weights.rename(folder / f"{hub_tag}.safetensors")
    model = timm.create_model(hub_tag, pretrained=True)
    assert torch.equal(stem(model), saved_stem(folder / f"{hub_tag}.safetensors"))
    assert model.pretrained_cfg["tag"] == "hub"


@pytest.mark.parametrize("organisation", [None, "someone"])
def test_then_the_hub(weights, hub_tag, organisation, monkeypatch):
    asked = []
    if organisation:
        monkeypatch.setenv("TIMM_DYNAMIC_HUB_ORG", organisation)
    monkeypatch.setattr(hub, "get_hf_file_metadata", asked.append)

    def download(repo_id, filename, revision=None, cache_dir=None):
        asked.append((repo_id, filename, cache_dir))
        return str(weights)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = timm.create_model(hub_tag, pretrained=True, cache_dir="here")
    assert torch.equal(stem(model), saved_stem(weights))
    repository = f"{organisation or 'timm-dynamic'}/{hub_tag}"
    assert repository in asked[0] and asked[1:] == [(repository, "model.safetensors", "here")]


def test_what_to_do_when_there_are_none(folder):
    with pytest.raises(ValueError) as error:
        timm.create_model("ddf_mul_resnet50.in1k", pretrained=True)
    assert str(folder / "ddf_mul_resnet50.in1k.safetensors") in str(error.value)
    assert "`timm-dynamic convert SRC --install --model ddf_mul_resnet50.in1k`" in str(error.value)[:200]
    assert "timm-dynamic/ddf_mul_resnet50.in1k" in str(error.value) and "\n" not in str(error.value)


def test_what_to_do_for_dynconv_without_masks():
    with pytest.raises(ValueError, match="--install --model dynconv_resnet32.base_cifar10 --model-kwargs budget=-1`"):
        timm.create_model("dynconv_resnet32.base_cifar10", pretrained=True)


def test_a_tag_without_weights():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for ddf_mul_resnet152"):
        timm.create_model("ddf_mul_resnet152", pretrained=True)


@pytest.mark.parametrize("how", ["overlay file", "overlay state_dict", "cfg"])
def test_a_source_of_the_callers_wins(how, folder, weights):
    save_file(timm.create_model(TINY).state_dict(), folder / f"{TINY}.digits.safetensors")
    state = timm.models.load_state_dict(str(weights))
    kwargs = {
        "overlay file": {"pretrained_cfg_overlay": {"file": str(weights)}},
        "overlay state_dict": {"pretrained_cfg_overlay": {"state_dict": state}},
        "cfg": {"pretrained_cfg": {"file": str(weights), "num_classes": 10, "classifier": "fc"}},
    }[how]
    assert torch.equal(stem(timm.create_model(TINY, pretrained=True, **kwargs)), saved_stem(weights))


def test_other_classes_channels_and_features(folder, weights):
    weights.rename(folder / f"{TINY}.digits.safetensors")
    saved = saved_stem(folder / f"{TINY}.digits.safetensors")
    model = timm.create_model(TINY, pretrained=True, num_classes=3, in_chans=1)
    torch.testing.assert_close(stem(model), saved.sum(1, keepdim=True))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert torch.equal(stem(timm.create_model(TINY, pretrained=True, features_only=True)), saved)


SHIPPED = {
    tag: Path(cfg.file)
    for tag in timm.list_models(include_tags=True)
    if (cfg := timm.get_pretrained_cfg(tag)).file and hub.PACKAGE_WEIGHTS in Path(cfg.file).parents
}


def test_shipped_weights():
    """Each file of the package is small and that of one tag; every family has one, of the digits by default."""
    assert set(SHIPPED.values()) == set(hub.PACKAGE_WEIGHTS.glob("*.safetensors"))
    assert {tag: path.stem for tag, path in SHIPPED.items()} == {tag: tag for tag in SHIPPED}
    assert all(path.stat().st_size < 1.5e6 for path in SHIPPED.values())
    tiny = {family.tiny for family in FAMILIES.values()}
    assert {tag.partition(".")[0] for tag in SHIPPED} == tiny | {"dynamized", "dynconv_resnet20"}
    assert all(timm.get_pretrained_cfg(model).tag == "digits" for model in tiny)
    assert {timm.get_pretrained_cfg(tag).license for tag in SHIPPED} == {"apache-2.0"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def card(tag):
    """What the package says of weights in it."""
    return (hub.PACKAGE_WEIGHTS / "README.md").read_text().split(f"## {tag}\n")[1].split("##")[0]


@pytest.mark.parametrize("tag", [tag for tag in SHIPPED if tag.endswith("digits")])
def test_accuracy_of_shipped_weights(tag, digits, tmp_path):
    """That of its card in the package, but for one image of the 360; what masks skip as there, too."""
    results = tmp_path / "results.json"
    flags = ["--model", tag, "--pretrained", "--device", "cpu", "--workers", "0"]
    assert cli.main(["validate", str(digits), *flags, "--results-file", str(results)]) == 0
    (accuracy,) = re.findall(r"([\d.]+) % top-1 on the 360", card(tag))
    result = json.loads(results.read_text())
    assert result["top1"] == pytest.approx(float(accuracy), abs=100 / 360 + 0.01)
    macs = re.findall(r"([\d.]+) of ([\d.]+) million MACs", card(tag))
    assert bool(macs) == ("gmacs" in result)
    for executed, static in macs:
        assert 1e3 * result["gmacs"] == pytest.approx(float(executed), rel=1e-2)
        assert 1e3 * result["gmacs_static"] == pytest.approx(float(static), abs=1e-3)


@pytest.mark.parametrize("tag", SHIPPED)
def test_parameters_of_shipped_weights(tag):
    (parameters,) = re.findall(r"([\d ]+) parameters", card(tag))
    model = timm.create_model(tag, device="meta")
    assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(" ", ""))


def test_masks_on_photographs():
    """Weights for CIFAR-10 skip a clear sky, and compute a flower."""
    model = timm.create_model("dynconv_resnet8.budget50_cifar10", pretrained=True).eval()
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 127.5 - 1
    with timm_dynamic.record(model) as masks, torch.no_grad():
        model(F.interpolate(images, (128, 128), mode="bilinear", antialias=True))
    china, flower = masks["layer3.0.masker"][:, 0]
    assert china[1:4, 16:].mean() < 0.05 and flower[10:21, 10:21].mean() > 0.8


@pytest.mark.parametrize("tag", SHIPPED)
def test_shipped_weights_in_another_form(tag):
    """One channel and three classes: all but the stem's first layer and the classifier is as shipped."""
    model = timm.create_model(tag, pretrained=True, num_classes=3, in_chans=1)
    saved = {key: value for key, value in model.state_dict().items() if key == KEY} | load_file(SHIPPED[tag])
    cfg = model.default_cfg
    classifiers = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    other = {key for key, value in model.state_dict().items() if not torch.equal(value, saved[key])}
    first = f"{cfg['first_conv']}.weight"
    assert other == {first} | {key for key in saved if key.rpartition(".")[0] in classifiers}
    first_weight = model.get_submodule(cfg["first_conv"]).weight
    torch.testing.assert_close(first_weight, saved[first].sum(1, keepdim=True))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)

    features = timm.create_model(tag, pretrained=True, features_only=True).state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in features.items())
    heads = {classifier.partition(".")[0] for classifier in classifiers}
    assert set(saved) - set(features) == {key for key in saved if key.partition(".")[0] in heads}
