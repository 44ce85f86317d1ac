"""Weights to and from a Hub on the loopback interface, over HTTP, by huggingface_hub's own client."""

import json
import os
import subprocess
import sys
import time

import pytest
import timm
import torch
from hub_server import TOKEN, Fault, File, Repository, hub_server
from huggingface_hub import constants
from safetensors.torch import save

from timm_dynamic import cli

TAG = "dynconv_resnet32.budget70_cifar10"
TINY = "test_ddf_resnet"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process talks to, with a token; the caches are empty, and retries do not wait."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("TIMM_DYNAMIC_WEIGHTS", str(tmp_path / "weights"))
        monkeypatch.setenv("TIMM_DYNAMIC_HUB_ORG", "mirror")
        yield server


def fill(hub, name, model, config=None, private=False):
    """Put a model into a repository without pushing it."""
    files = {"model.safetensors": File(save(model.state_dict()), large=True)}
    if config:
        files["config.json"] = File(json.dumps(config).encode(), large=False)
    hub.repositories[name] = Repository(private)
    hub.repositories[name].commit("main", files)
    hub.large.update({file.etag: file.content for file in files.values() if file.large})


@pytest.fixture
def tag_on_hub(hub):
    """The weights of `TAG` in the organisation that `TIMM_DYNAMIC_HUB_ORG` names."""
    model = timm.create_model(TAG)
    fill(hub, f"mirror/{TAG}", model)
    return model


@pytest.fixture
def repository(hub):
    """`me/tiny`, in timm's format."""
    model = timm.create_model(TINY)
    cfg = {key: model.pretrained_cfg[key] for key in ("input_size", "num_classes", "first_conv", "classifier")}
    fill(hub, "me/tiny", model, {"architecture": TINY, "num_classes": 10, "pretrained_cfg": cfg})
    return model


def blobs(tmp_path):
    return [path for path in tmp_path.glob("cache/*/blobs/*") if path.is_file()]


def same_weights(model, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())


def run(capsys, *argv):
    """Exit status, stdout, stderr."""
    capsys.readouterr()
    status = cli.main([str(arg) for arg in argv])
    return status, *capsys.readouterr()


# Pushing, and pulling in another process.

PULL = """
import sys, timm, timm_dynamic, torch
from huggingface_hub import constants

@torch.no_grad()
def pull(name):
    model = timm.create_model(name, pretrained=True).eval()
    size = model.pretrained_cfg["input_size"]
    output = model(torch.linspace(-2, 2, 2 * size[0] * size[1] * size[2]).reshape(2, *size))
    return {"output": output, "cfg": model.pretrained_cfg, "budget": getattr(model, "budget", None)}

pulled = [{name: pull(name) for name in sys.argv[2:]}]
constants.HF_HUB_OFFLINE = True  # from now on, from the cache
pulled.append({name: pull(name) for name in sys.argv[2:]})
torch.save(pulled, sys.argv[1])
"""


def pull(folder, names, **environment):
    """What another process gets, from the Hub and then offline: for each name the output, the cfg and the budget."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TIMM_DYNAMIC_")) or k == "HF_TOKEN"}
    environment = {**kept, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", PULL, folder / "pulled.pt", *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "pulled.pt")


@torch.no_grad()
def output(model):
    """As in `PULL`."""
    size = model.pretrained_cfg["input_size"]
    return model.eval()(torch.linspace(-2, 2, 2 * size[0] * size[1] * size[2]).reshape(2, *size))


def test_push_and_pull_in_another_process(hub, tmp_path, capsys):
    models = {
        "me/labels": (timm.create_model(TINY), "", TINY + ".digits"),
        "me/head": (
            timm.create_model("test_dcd_resnet", in_chans=1),
            "--num-classes 5 --model-kwargs in_chans=1",
            None,
        ),
        "me/masks": (
            timm.create_model("dynconv_resnet8", budget=0.3),
            "--model-kwargs budget=0.3 global_pool=max",
            None,
        ),
        "me/stem": (
            timm.create_model("test_dy_resnet", num_kernels=2, small_stem=True),
            "--model-kwargs num_kernels=2 small_stem=True --private --revision v2",
            None,
        ),
        f"mirror/{TAG}": (timm.create_model(TAG), "--license mit", TAG),
    }
    models["me/head"][0].reset_classifier(5)
    models["me/head"][0].pretrained_cfg["input_size"] = (1, 64, 64)
    models["me/masks"][0].reset_classifier(10, "max")
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"n{i}\tdigit {i}\n" for i in range(10)))
    for repo, (model, flags, name) in models.items():
        checkpoint = tmp_path / "last.pth.tar"
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, checkpoint)
        argv = ["push", name or model.pretrained_cfg["architecture"], checkpoint, repo, *flags.split()]
        if repo == "me/labels":
            argv += ["--labels", labels]
        status, out, err = run(capsys, *argv)
        assert status == 0, err
        assert f"{hub.url}/{repo}/commit/" in out and f"hf-hub:{repo}" in out
        branch = "v2" if "--revision" in argv else "main"
        assert set(hub.repositories[repo].files(branch)) == {"README.md", "config.json", "model.safetensors"}
    assert hub.repositories["me/stem"].private and not hub.repositories["me/head"].private
    assert hub.repositories["me/stem"].files("main") == {}

    names = {repo: f"hf-hub:{repo}" for repo in models}
    names["me/stem"] += "@v2"
    names[f"mirror/{TAG}"] = TAG
    pulled, offline = pull(tmp_path, names.values(), HF_ENDPOINT=hub.url, TIMM_DYNAMIC_HUB_ORG="mirror")
    for repo, (model, *_) in models.items():
        expected = output(model)
        assert torch.equal(pulled[names[repo]]["output"], expected), repo
        assert torch.equal(offline[names[repo]]["output"], expected), repo
    cfg = pulled["hf-hub:me/labels"]["cfg"]
    assert list(cfg["label_names"])[:2] == ["n0", "n1"] and cfg["label_descriptions"]["n9"] == "digit 9"
    assert cfg["tag"] == "digits" and "tag" not in pulled["hf-hub:me/masks"]["cfg"]
    assert pulled["hf-hub:me/masks"]["budget"] == 0.3


def test_offline_with_a_cold_cache(tag_on_hub, hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="did not give mirror/.*HF_HUB_OFFLINE is set, and the cache does not have it"):
        timm.create_model(TAG, pretrained=True)
    status, _, err = run(capsys, "validate", tmp_path, "--model", "hf-hub:me/tiny")
    assert status == 2 and err.count("\n") == 1 and "cannot create hf-hub:me/tiny" in err
    assert hub.requests == []


# Faults while pulling. Each ends in one line or well, and leaves nothing that a later run takes for the weights.


@pytest.mark.parametrize(
    "pattern, kind, expected",
    [
        ("HEAD .*model.safetensors", 500, "HTTP 500"),
        ("HEAD .*model.safetensors", 503, "HTTP 503"),
        ("HEAD .*model.safetensors", 401, "HTTP 401: it is not there, or you need access: `hf auth login` or HF_TOKEN"),
        ("HEAD .*model.safetensors", 403, "HTTP 403: it is not there, or you need access"),
        ("HEAD .*model.safetensors", 404, "HTTP 404: it is not there"),
        ("HEAD .*model.safetensors", "close", "RemoteProtocolError"),
        ("GET /large", 500, "HTTP 500"),
        ("GET /large", "close", "RemoteProtocolError"),
        ("GET /large", "truncate", "RemoteProtocolError"),
        ("GET /large", "short", "Consistency check failed"),
        ("GET /large", "corrupt", "has not the SHA-256 that the Hub states; it was removed, try again"),
        ("HEAD .*model.safetensors", "etag", "has not the SHA-256 that the Hub states; it was removed, try again"),
    ],
)
def test_faults_of_the_hub(tag_on_hub, hub, tmp_path, pattern, kind, expected):
    hub.faults.append(Fault(pattern, kind))
    with pytest.raises(ValueError) as error:
        timm.create_model(TAG, pretrained=True)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert blobs(tmp_path) == []
    hub.faults.clear()
    assert same_weights(timm.create_model(TAG, pretrained=True), tag_on_hub)


def test_a_download_cut_once_is_resumed(tag_on_hub, hub):
    hub.faults.append(Fault("GET /large", "truncate", times=1))
    hub.faults.append(Fault("GET /large", "close", times=1))
    assert same_weights(timm.create_model(TAG, pretrained=True), tag_on_hub)
    assert sum("GET /large" in request for request in hub.requests) == 3


def test_a_hub_that_hangs(tag_on_hub, hub, tmp_path, monkeypatch):
    hub.faults.append(Fault("GET /large", "hang"))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="did not give .*ReadTimeout"):
        patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        timm.create_model(TAG, pretrained=True)
    assert blobs(tmp_path) == []
    hub.faults.clear()
    assert same_weights(timm.create_model(TAG, pretrained=True), tag_on_hub)


def test_weights_that_changed_in_the_cache(tag_on_hub, hub, tmp_path):
    timm.create_model(TAG, pretrained=True)
    (blob,) = blobs(tmp_path)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ValueError, match="are damaged"):
        timm.create_model(TAG, pretrained=True)
    assert same_weights(timm.create_model(TAG, pretrained=True), tag_on_hub)


def test_an_unreachable_hub_and_a_warm_cache(tag_on_hub, hub):
    timm.create_model(TAG, pretrained=True)
    hub.faults.append(Fault("", 503))
    assert same_weights(timm.create_model(TAG, pretrained=True), tag_on_hub)


@pytest.mark.parametrize(
    "pattern, kind, expected",
    [
        ("config.json", 500, "An error happened while trying to locate the file"),
        ("config.json", 403, "403"),
        ("config.json", "close", "cannot create hf-hub:me/tiny"),
        ("GET .*config.json", "truncate", "cannot create hf-hub:me/tiny"),
        ("GET .*config.json", "short", "Consistency check failed"),
        ("GET .*config.json", "corrupt", "cannot create hf-hub:me/tiny"),
        ("GET /large", 500, "500"),
        ("GET /large", "truncate", "cannot create hf-hub:me/tiny"),
        ("GET /large", "corrupt", "the weights of me/tiny are damaged"),
    ],
)
def test_faults_in_a_command(repository, hub, tmp_path, capsys, pattern, kind, expected):
    hub.faults.append(Fault(pattern, kind))
    status, out, err = run(capsys, "validate", tmp_path, "--model", "hf-hub:me/tiny")
    assert (status, out) == (2, "") and expected in err
    assert err.startswith("timm-dynamic validate: error: ") and err.count("\n") == 1
    if "config" not in pattern:
        hub.faults.clear()
        assert same_weights(timm.create_model("hf-hub:me/tiny", pretrained=True), repository)


@pytest.mark.parametrize("name, path, content", [
    (TINY, "config.json", b"{}"),
    (TINY, "config.json", b'{"architecture": "nonsense", "pretrained_cfg": {}}'),
    (TINY, "model.safetensors", b"no weights at all, but with the right checksum"),
    ("test_resnet", "model.safetensors", b"\xff" * 100),
])  # fmt: skip
def test_a_repository_of_something_else(hub, tmp_path, capsys, name, path, content):
    fill(hub, "me/x", timm.create_model(name), {"architecture": name, "pretrained_cfg": {"num_classes": 10}})
    file = File(content, large=path != "config.json")
    hub.repositories["me/x"].commit("main", {path: file})
    hub.large[file.etag] = content
    status, _, err = run(capsys, "validate", tmp_path, "--model", "hf-hub:me/x")
    assert status == 2 and "cannot create hf-hub:me/x" in err and err.count("\n") == 1


def test_a_private_repository_without_a_token(tag_on_hub, hub, monkeypatch):
    hub.repositories[f"mirror/{TAG}"].private = True
    assert same_weights(timm.create_model(TAG, pretrained=True), tag_on_hub)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "2")
    with pytest.raises(ValueError, match="HTTP 401: it is not there, or you need access"):
        timm.create_model(TAG, pretrained=True)


def test_weights_in_another_format_are_left_to_timm(repository, hub, tmp_path):
    torch.save(repository.state_dict(), tmp_path / "weights.pt")
    files = hub.repositories["me/tiny"].files("main")
    del files["model.safetensors"]
    files["pytorch_model.bin"] = File((tmp_path / "weights.pt").read_bytes(), large=False)
    assert same_weights(timm.create_model("hf-hub:me/tiny", pretrained=True), repository)


# Faults while pushing.


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": timm.create_model(TINY).state_dict()}, path)
    return path


@pytest.mark.parametrize(
    "pattern, kind, expected",
    [
        ("repos/create", 503, "HTTP 503"),
        ("repos/create", "close", "RemoteProtocolError"),
        ("repos/create", 403, "HTTP 403"),
        ("PUT /large", 500, "HTTP 500"),
        ("PUT /large", "close", "RemoteProtocolError"),
        ("POST .*/commit/", 500, "HTTP 500"),
    ],
)
def test_faults_while_pushing(hub, checkpoint, capsys, pattern, kind, expected):
    hub.faults.append(Fault(pattern, kind))
    status, out, err = run(capsys, "push", TINY, checkpoint, "me/x")
    assert (status, out) == (2, "") and expected in err
    assert "timm-dynamic push: error: cannot push to me/x: " in err
    assert "me/x" not in hub.repositories or hub.repositories["me/x"].files("main") == {}
    hub.faults.clear()
    assert run(capsys, "push", TINY, checkpoint, "me/x")[0] == 0


def test_pushing_without_a_login(hub, checkpoint, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    status, _, err = run(capsys, "push", TINY, checkpoint, "me/x")
    assert status == 2 and "HTTP 401" in err and "`hf auth login` or HF_TOKEN" in err and err.count("\n") == 1
    assert run(capsys, "push", TINY, checkpoint, "me/x", "--token", TOKEN)[0] == 0


def test_nothing_is_asked_of_the_hub_before_the_checkpoint_loads(hub, checkpoint, capsys):
    status, _, err = run(capsys, "push", "test_dcd_resnet", checkpoint, "me/x")
    assert status == 2 and "does not load into test_dcd_resnet" in err and err.count("\n") == 1
    assert hub.requests == []
