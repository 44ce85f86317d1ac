"""Every way on which a command reads weights: hostile and broken ones are refused in one line, and none is run."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from hostile_files import PIECES, Harm, zip_with
from pairs import in_turns
from safetensors.torch import load_file, save

import timm_dynamic
from timm_dynamic import cli

TINY = "test_ddf_resnet"


def fails(capsys, *argv) -> str:
    """The one line on stderr of a command that ends with status 2."""
    assert cli.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith(f"timm-dynamic {argv[0]}: error: ") and len(err) < 1200
    return err


def model_folder(folder: Path) -> Path:
    """What timm reads as `local-dir:FOLDER`, and what it downloads for `hf-hub:NAME`, but for the weights."""
    folder.mkdir()
    cfg = {"num_classes": 10, "input_size": [3, 64, 64], "first_conv": "conv1.0", "classifier": "fc"}
    (folder / "config.json").write_text(json.dumps({"architecture": TINY, "num_classes": 10, "pretrained_cfg": cfg}))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository on the Hub, as a folder, and no way to the real one."""
    folder = model_folder(tmp_path / "hub")

    def download(repo_id, filename, **kwargs):
        if not (folder / filename).exists():
            raise timm.models._hub.EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    monkeypatch.setattr(timm_dynamic.hub, "_download", lambda repo_id, *args: download(repo_id, "model.safetensors"))
    return folder


def harmful() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": timm.create_model(TINY).state_dict(), "epoch": Harm(), "optimizer": {}}, buffer)
    return buffer.getvalue()


def damaged(kind: str) -> bytes:
    """A pickle for `pytorch_model.bin` or `--checkpoint`, or safetensors, by the kind of damage."""
    state = timm.create_model("test_vit" if kind == "other model" else TINY, num_classes=10).state_dict()
    if kind == "nan":
        state["layer1.0.conv1.weight"].fill_(torch.nan)
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 1, "optimizer": {}}, buffer)
    return buffer.getvalue()[: -20_000 if kind == "truncated" else None]


COMMANDS = {
    "convert": "convert FILE out.safetensors --model {}",
    "validate": "validate DATA --workers 0 --model {} --checkpoint FILE",
    "inspect": "inspect DATA --workers 0 --model {} --dynamize ped --checkpoint FILE",
    "train": "train DATA --workers 0 -b 20 --model {} --initial-checkpoint FILE",
    "resume": "train DATA --workers 0 -b 20 --model {} --resume FILE",
    "local-dir": "validate DATA --workers 0 --model local-dir:FOLDER",
    "local-dir train": "train DATA --workers 0 --model local-dir:FOLDER --pretrained",
    "hf-hub": "validate DATA --workers 0 --model hf-hub:a/b",
    "hf-hub train": "train DATA --workers 0 --model hf-hub:a/b --pretrained",
}


REFUSALS = {
    "harmful": r"refused: it needs 'exec'|blocked loading.*exec",
    "truncated": "damaged|failed|archive",
    "nan": "holds NaN or infinity|keys missing",
    "other model": "keys missing|loading state_dict",
}


# Every command gets harmful weights, and one of the other kinds.
@pytest.mark.parametrize(
    ("command", "kind"), [*((name, "harmful") for name in COMMANDS), *in_turns(COMMANDS, list(REFUSALS)[1:])]
)
def test_commands_refuse(tmp_path, monkeypatch, capsys, small_digits, hub, command, kind):
    monkeypatch.chdir(tmp_path)
    content = harmful() if kind == "harmful" else damaged(kind)
    folder = model_folder(tmp_path / "folder")
    for path in (tmp_path / "a.pth", folder / "pytorch_model.bin", hub / "pytorch_model.bin"):
        path.write_bytes(content)
    words = {"FILE": "a.pth", "DATA": str(small_digits)}
    argv = [words.get(word, word.format(TINY).replace("FOLDER", str(folder))) for word in COMMANDS[command].split()]
    error = fails(capsys, *argv)
    assert re.search(REFUSALS[kind], error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "folder", "hub"]


def test_harmful_files_would_be_run_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(harmful()), weights_only=False)
    assert Path("canary").exists()


def test_weights_from_a_url(tmp_path, monkeypatch, capsys, small_digits):
    """timm answers a TypeError from the safe unpickler, which a file can provoke, with the one that runs code."""
    provocation = b"ccollections\nOrderedDict\n)RN}X\x01\x00\x00\x00xK\x01s\x86b"  # BUILD with the state of slots
    cached = tmp_path / "hub" / "checkpoints" / "w.pth"  # as if downloaded
    cached.parent.mkdir(parents=True)
    cached.write_bytes(zip_with(b"(" + provocation + PIECES[0] + b"t"))
    cfg = timm.get_pretrained_cfg("test_resnet")
    cfg.url, cfg.hf_hub_id = "http://127.0.0.1/w.pth", None
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, f"test_resnet.{cfg.tag}", cfg)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fails(capsys, "validate", small_digits, "--model", f"test_resnet.{cfg.tag}")
    assert not Path("canary").exists()
    with pytest.raises(TypeError):
        timm.create_model(f"test_resnet.{cfg.tag}", pretrained=True)
    assert Path("canary").exists(), "the trap does not work"


@pytest.mark.parametrize("name", ["local-dir:{}", "hf-hub:a/b"])
def test_good_pickles_of_folders_load(tmp_path, small_digits, hub, name):
    folder = model_folder(tmp_path / "folder")
    state = load_file(Path(timm_dynamic.__file__).parent / "weights" / f"{TINY}.digits.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    shutil.copy(folder / "pytorch_model.bin", hub)
    flags = ["--workers", "0", "--device", "cpu", "--results-file", str(tmp_path / "r.json")]
    assert cli.main(["validate", str(small_digits), "--model", name.format(folder), *flags]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["param_count"] > 0


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"architecture": 3}', '{"architecture": "no_such_model"}'])
def test_broken_configs_of_folders(tmp_path, capsys, small_digits, text):
    folder = model_folder(tmp_path / "folder")
    (folder / "config.json").write_text(text)
    assert "cannot create local-dir:" in fails(capsys, "validate", small_digits, "--model", f"local-dir:{folder}")


def broken_safetensors(kind: str) -> bytes:
    state = timm.create_model(TINY).state_dict()
    if kind == "nan":
        state["layer1.0.conv1.weight"].fill_(torch.inf)
    if kind == "mismatched":
        del state["layer1.0.conv1.weight"]
    data = save(state)
    return {"truncated": data[:-1000], "header": b"\xff" * 8 + data[8:], "pickle": harmful()}.get(kind, data)


@pytest.mark.parametrize("kind, expected", [
    ("truncated", "is damaged"),
    ("header", "is damaged"),
    ("pickle", "is damaged"),
    ("nan", "layer1.0.conv1.weight holds NaN or infinity"),
    ("mismatched", "Missing key.*layer1.0.conv1.weight"),
])  # fmt: skip
def test_local_weights_folder(tmp_path, monkeypatch, capsys, small_digits, kind, expected):
    monkeypatch.setenv("TIMM_DYNAMIC_WEIGHTS", str(tmp_path))
    path = tmp_path / f"{TINY}.digits.safetensors"
    path.write_bytes(broken_safetensors(kind))
    with pytest.raises(ValueError, match=expected) as error:
        timm.create_model(TINY, pretrained=True)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert str(path) in fails(capsys, "validate", small_digits, "--model", TINY)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("change", [
    {"epoch": "one"}, {"epoch": None}, {"optimizer": []}, {"optimizer": {"state": 1, "param_groups": [1]}},
    {"state_dict": {}}, {"state_dict": None}, {"task_state": 5}, {"version": "x"},
], ids=str)  # fmt: skip
def test_resume_from_junk(tmp_path, monkeypatch, capsys, small_digits, change):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model(TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    content = {"state_dict": model.state_dict(), "epoch": 0, "optimizer": optimizer.state_dict(), "version": 2}
    torch.save({**content, **change}, "a.pth")
    flags = ["--workers", "0", "-b", "20", "--device", "cpu", "--model", TINY, "--resume", "a.pth"]
    assert "--resume a.pth does not fit this run: " in fails(capsys, "train", small_digits, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
