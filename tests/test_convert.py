"""Checkpoints: what is read, what is refused without being run, and that a failure leaves nothing behind."""

import argparse
import collections
import json
import os
import struct

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import timm_dynamic  # noqa: F401 (registers test_ddf_resnet)
from timm_dynamic.convert import convert, extract_state_dict, load_checkpoint, read_checkpoint


def make_model(name="test_resnet", seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs).eval()
    for buffer in model.buffers():  # running statistics that say something
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


def prefixed(state, prefix):
    return collections.OrderedDict((prefix + key, value) for key, value in state.items())


def authors(state, **more):
    """What timm's CheckpointSaver writes."""
    args = argparse.Namespace(model="test_resnet", lr=0.1, betas=(0.9, 0.999), aa=None, device=torch.device("cpu"))
    return {"epoch": 3, "arch": "test_resnet", "state_dict": state, "optimizer": {}, "version": 2, "args": args, **more}


WRAPPERS = {
    "timm": authors,
    "module": lambda state: {"epoch": 1, "arch": ("a", 2), "state_dict": prefixed(state, "module."), "best_prec1": 0.5},
    "model": lambda state: {"model": state, "optimizer": {}, "scheduler": {}, "epoch": 2},
    "model name": lambda state: {"model": "pose", "state_dict": prefixed(state, "module."), "perf": 0.9},
    "tensor metric": lambda state: {"state_dict": state, "epoch": 1, "best_prec1": torch.tensor(75.0)},
    "bare": lambda state: state,
    "bare module": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod.module."),
    "compiled inside": lambda state: prefixed(state, "module._orig_mod."),
    "parameters": lambda state: {key: nn.Parameter(v) if v.is_floating_point() else v for key, v in state.items()},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["test_resnet", "test_ddf_resnet"])
def test_convert_is_exact(tmp_path, name, wrapper, legacy):
    source = make_model(name, seed=1)
    src, dst = tmp_path / "a.pth.tar", tmp_path / "new" / "folder" / "b.safetensors"
    torch.save(WRAPPERS[wrapper](source.state_dict()), src, _use_new_zipfile_serialization=not legacy)
    convert(src, dst, make_model(name, seed=2))

    assert [path.name for path in dst.parent.iterdir()] == ["b.safetensors"]
    assert load_file(dst).keys() == source.state_dict().keys()
    with safe_open(dst, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["model"] == name

    model = make_model(name, seed=3)
    load_checkpoint(model, dst)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def test_convert_of_shared_and_channels_last_weights(tmp_path):
    model = make_model(seed=1).to(memory_format=torch.channels_last)
    model.layer1[0].bn1 = model.layer1[0].bn2 = nn.BatchNorm2d(32)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", model)
    converted = load_file(tmp_path / "b.safetensors")
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(value, converted[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_averaged_weights_only_when_asked(tmp_path, key):
    plain, averaged = make_model(seed=1).state_dict(), make_model(seed=2).state_dict()
    torch.save(authors(plain, **{key: prefixed(averaged, "module.")}), tmp_path / "a.pth")
    for use_ema, expected in ((False, plain), (True, averaged)):
        model = make_model()
        load_checkpoint(model, tmp_path / "a.pth", use_ema=use_ema)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    torch.save(authors(plain), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no averaged weights"):
        load_checkpoint(make_model(), tmp_path / "a.pth", use_ema=True)


def test_the_filter_of_the_model_applies(tmp_path):
    """timm's vision transformer resizes position embeddings in its `checkpoint_filter_fn`."""
    source = timm.create_model("test_vit", img_size=160)
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    model = timm.create_model("test_vit", img_size=64)
    load_checkpoint(model, tmp_path / "a.pth")
    assert torch.equal(model.head.weight, source.head.weight)
    assert model.pos_embed.shape != source.pos_embed.shape


def test_a_filter_that_breaks_is_one_line(tmp_path, monkeypatch):
    def filter_fn(state_dict, model):
        return {"fc.weight": state_dict["absent"]}

    monkeypatch.setattr(timm.models.resnet, "checkpoint_filter_fn", filter_fn, raising=False)
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not load into test_resnet \\(KeyError: 'absent'\\)"):
        load_checkpoint(make_model(), tmp_path / "a.pth")


def test_a_model_that_timm_does_not_know(tmp_path):
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth")
    assert torch.equal(model.weight, source.weight)


@pytest.mark.parametrize(
    "checkpoint, expected",
    [
        ({}, "holds nothing"),
        ({"epoch": 3, "optimizer": {}}, "holds epoch, optimizer"),
        ({"state_dict": {}}, "holds nothing"),
        ({"state_dict": {"a": torch.ones(1), "b": 3}}, "a int at 'b'"),
        ({"a": torch.ones(1), 5: torch.ones(1)}, "at '<int>'"),
        ({"a": torch.ones(3).to_sparse()}, "'a' is sparse"),
        ({"a": torch.ones(3, device="meta")}, "'a' is sparse, quantized or without data"),
    ],
)
def test_no_state_dict(checkpoint, expected):
    with pytest.raises(ValueError, match=expected):
        extract_state_dict(checkpoint)


def test_only_common_prefixes_are_stripped():
    state = {"module.a": torch.ones(1), "b": torch.zeros(1)}
    assert extract_state_dict(state).keys() == state.keys()


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


BAD_STATES = {
    "other classes": (lambda s: make_model(num_classes=10).state_dict(), r"fc.weight \[10, .*num_classes=10 \(--num-"),
    "missing": (lambda s: without(s, "conv1.0.weight"), r"1 keys missing \(conv1.0.weight\)"),
    "unexpected": (lambda s: {**s, **{f"x{i}": torch.ones(1) for i in range(9)}}, r"9 keys unexpected \(x0, x1, x2, "),
    "transposed": (lambda s: {**s, "fc.weight": s["fc.weight"].t()}, r"of another shape \(fc.weight"),
    "foreign": (lambda s: {"something.weight": torch.ones(3)}, "keys missing .*; 1 keys unexpected"),
    "nan": (lambda s: {**s, "fc.bias": torch.full_like(s["fc.bias"], torch.nan)}, "fc.bias holds NaN or infinity"),
    "too large": (lambda s: {**s, "fc.bias": s["fc.bias"].double() + 1e300}, "fc.bias holds NaN or infinity"),
    "integers": (lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.int8)}, "fc.bias holds torch.int8"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_changes_nothing(tmp_path, case):
    change, expected = BAD_STATES[case]
    torch.save(authors(change(make_model(seed=1).state_dict())), tmp_path / "a.pth")
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=expected) as error:
        convert(tmp_path / "a.pth", tmp_path / "new" / "b.safetensors", model)
    assert str(tmp_path / "a.pth") in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_half_precision_weights_load(tmp_path):
    source = make_model(seed=1).half()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = make_model()
    load_checkpoint(model, tmp_path / "a.pth")
    assert torch.equal(model.fc.weight, source.fc.weight.float())


def write_bytes(content):
    return lambda path: path.write_bytes(content)


def truncated(legacy):
    def write(path):
        torch.save(make_model().state_dict(), path, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(path.read_bytes()[:-5000])

    return write


UNREADABLE = {
    "missing": ("a.pth", lambda path: None, "no checkpoint at"),
    "folder": ("a.pth", lambda path: path.mkdir(), "is not a file"),
    "empty": ("a.pth", write_bytes(b""), "is empty"),
    "page": ("a.pth", write_bytes(b"\n<!DOCTYPE html><html></html>"), "is a web page"),
    "lfs": ("a.safetensors", write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
    "text": ("a.pth", write_bytes(b"hello, this is no checkpoint"), "is not a PyTorch checkpoint"),
    "zeros": ("a.pth", write_bytes(bytes(5000)), "is empty or starts with zeros"),
    "truncated": ("a.pth", truncated(legacy=False), "is damaged"),
    "truncated legacy": ("a.pth", truncated(legacy=True), "is damaged"),
    "tensor": ("a.pth", lambda path: torch.save(torch.ones(3), path), "holds a Tensor"),
    "module": ("a.pth", lambda path: torch.save(nn.Linear(2, 2), path), "'torch.nn.modules.linear.Linear'"),
    "numpy": ("a.pth", lambda path: torch.save({"acc": np.float64(3)}, path), r"calls '_codecs\.encode'"),
    "pickle as safetensors": ("a.safetensors", lambda path: torch.save({}, path), "is not a safetensors file"),
    "torchscript": ("a.pth", lambda path: torch.jit.save(torch.jit.script(nn.ReLU()), path), "TorchScript archive"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files(tmp_path, case):
    name, write, expected = UNREADABLE[case]
    write(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
        read_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, expected", [("b.pth", "must end in .safetensors"), ("d.safetensors", "is a folder")])
def test_bad_destinations(tmp_path, name, expected):
    torch.save(make_model().state_dict(), tmp_path / "a.pth")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(ValueError, match=expected):
        convert(tmp_path / "a.pth", tmp_path / name, make_model())


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_source_is_never_overwritten(tmp_path, link):
    src = dst = tmp_path / "a.safetensors"
    save_file(make_model().state_dict(), src)
    if link:
        dst = tmp_path / "b.safetensors"
        link(src, dst)
    before = src.read_bytes()
    with pytest.raises(ValueError, match="is the file to convert"):
        convert(src, dst, make_model())
    assert src.read_bytes() == before


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    def full_disk(source, destination):
        raise OSError("no space left on device")

    torch.save(make_model().state_dict(), tmp_path / "a.pth")
    (tmp_path / "b.safetensors").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="cannot write .*b.safetensors: no space"):
        convert(tmp_path / "a.pth", tmp_path / "b.safetensors", make_model())
    assert (tmp_path / "b.safetensors").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.safetensors"]


def test_the_result_has_ordinary_permissions(tmp_path):
    """safetensors' own writer makes files for the owner alone; weights are shared."""
    torch.save(make_model().state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", make_model())
    assert (tmp_path / "b.safetensors").stat().st_mode == (tmp_path / "a.pth").stat().st_mode


def test_safetensors_that_start_like_a_page(tmp_path):
    """The file starts with its header's length, here the bytes of `\\0<`."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x3C00)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 2))
    assert read_checkpoint(tmp_path / "a.safetensors")["w"].item() == 2
