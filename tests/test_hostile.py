"""Hostile and broken weights: every file loads strictly or is refused in one line; none is run, none takes memory."""

import argparse
import collections
import io
import json
import os
import pickle
import resource
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_files import Model, zip_with
from torch import nn

from timm_dynamic.convert import extract_state_dict, load_checkpoint, read_checkpoint


class Malicious:
    """Unpickling one calls `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class OtherNamespace(argparse.Namespace):
    """Not exactly argparse's."""


def save_tar(value, path):
    """torch's oldest format."""
    members = {"storages": pickle.dumps(value), "tensors": pickle.dumps(0), "pickle": pickle.dumps(value)}
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


FORMATS = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    "tar": save_tar,
}
HIDING_PLACES = {
    "top": lambda thing: thing,
    "value": lambda thing: {"state_dict": {}, "epoch": thing},
    "namespace": lambda thing: dict(state_dict={"w": torch.ones(1)}, args=argparse.Namespace(lr=0.1, aa=[(thing,)])),
    "nested namespace": lambda thing: {"args": argparse.Namespace(inner=argparse.Namespace(deep={"x": thing}))},
    "tensor attribute": lambda thing: {"w": nn.Parameter(torch.ones(1)), "o": collections.OrderedDict(a=thing)},
}


@pytest.mark.parametrize("place", HIDING_PLACES)
@pytest.mark.parametrize("format", FORMATS)
def test_malicious_files_are_not_run(tmp_path, format, place):
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    calls = [
        (os.mkdir, str(trace)),
        (os.system, f"mkdir {trace}"),
        (subprocess.getoutput, f"mkdir {trace}"),
        (exec, f"import os; os.mkdir({str(trace)!r})"),
        (open, str(trace), "w"),
        (io.FileIO, str(trace), "w"),
        (np.save, str(trace) + ".npy", 0),
    ]
    for call in calls:
        FORMATS[format](HIDING_PLACES[place](Malicious(*call)), path)
        if call[0] is os.mkdir and format in ("zip", "legacy"):  # the trap works
            torch.load(path, weights_only=False)
            trace.rmdir()
        with pytest.raises(ValueError, match="refused|archive|not a PyTorch checkpoint") as error:
            load_checkpoint(Model(), path)
        assert "\n" not in str(error.value)
        if format in ("zip", "legacy"):
            assert "refused: it needs '" in str(error.value)
        assert [left.name for left in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("harmless", [OtherNamespace(a=1), argparse.FileType("w"), argparse.Action])
def test_nothing_but_namespace_is_allowed(tmp_path, harmless):
    torch.save({"args": harmless}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="refused"):
        read_checkpoint(tmp_path / "a.pth")


def test_namespace_is_not_allowed_afterwards(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    read_checkpoint(tmp_path / "a.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Attributed:
    """Unpickles as `cls()` with the given instance attributes and items."""

    def __init__(self, cls, attributes, **items):
        self.reduced = cls, (), attributes, None, iter(items.items())

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("attribute", ["items", "keys", "get", "copy", "__iter__", "__class__", "__setstate__"])
def test_attributes_set_by_unpickling_are_not_used(tmp_path, attribute):
    """BUILD can put anything on an OrderedDict or a Namespace; none of it may reach the loader."""
    harm = {attribute: "harmful"}
    weights = Attributed(collections.OrderedDict, harm, w=torch.ones(2))
    args = Attributed(argparse.Namespace, harm)
    torch.save(Attributed(collections.OrderedDict, harm, state_dict=weights, args=args), tmp_path / "a.pth")
    state = extract_state_dict(read_checkpoint(tmp_path / "a.pth"))
    assert type(state) is dict and torch.equal(state["w"], torch.ones(2))


@pytest.mark.parametrize("attribute", ["detach", "to", "clone"])
def test_attributes_of_tensors_are_not_used(tmp_path, attribute):
    source, model = Model(), Model()
    state = source.state_dict()
    state["fc.bias"] = nn.Parameter(state["fc.bias"])
    state["fc.bias"].__dict__[attribute] = "harmful"
    torch.save(state, tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth")
    assert torch.equal(model.fc.bias, source.fc.bias)


def test_mutated_files(tmp_path, processes):
    """In a process of its own, with little memory: a crash, a hang or a huge allocation would end that one alone."""
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {tests!r}); import hostile_files; hostile_files.fuzz(0, 700)"
    status, log = processes.run(folder=tmp_path, code=code)
    assert status == 0, log[-2000:]
    counts = json.loads(log.splitlines()[-1])
    assert counts["loaded"] > 30 and counts["refused"] > 500


_CPU_COPY = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n"
_ENCODE = b"c_codecs\nencode\n"
_HEX = b"X\x03\x00\x00\x00hex\x86R"
BOMBS = {
    "bytearray": (zip_with(b"}K\x01cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x04\x85Rs"), "builtins.bytearray"),
    "bytearray of Python 2": (zip_with(b"}K\x01c__builtin__\nbytearray\nK\x01\x85Rs"), "bytearray"),
    "doubled again and again": (zip_with(_ENCODE * 41 + b"X\x01\x00\x00\x00aX\x05\x00\x00\x00ascii\x86R" + _HEX * 40),
        "_codecs.encode"),
    "copied tensor": (zip_with(b"}K\x01" + _CPU_COPY + b")Rs"), "_rebuild_device_tensor_from_cpu_tensor"),
    "compressed": (zip_with(b"}X\x00\x00\x40\x00" + bytes(2**22) + b"Ns", zipfile.ZIP_DEFLATED), "unpacks to more"),
    "tuples within tuples": (zip_with(b"})" + b"q\x00h\x00\x86" * 14 + b"Ns"), "which holds <tuple>"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_files_take_little_memory(tmp_path, bomb):
    content, expected = BOMBS[bomb]
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=expected) as error:
        load_checkpoint(Model(), path)
    assert len(str(error.value)) < 400 + len(str(path)) and "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_claimed_sizes_take_no_memory(tmp_path):
    """A tensor of one stored element that says it is 2**40 long."""
    state = Model().state_dict()
    state["fc.bias"] = torch.zeros(1).expand(2**40)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"fc.bias \[1099511627776\] instead of \[3\]"):
        load_checkpoint(Model(), tmp_path / "a.pth")


@pytest.mark.parametrize("key", ["a\nb", "x" * 10**6, (1, (2, 3)), b"c", None])
def test_odd_names_are_shown_in_one_short_line(tmp_path, key):
    for content in ({key: 1}, {key: torch.ones(1)}, {"a": torch.ones(1), key: 1}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError) as error:
            load_checkpoint(Model(), tmp_path / "a.pth")
        assert len(str(error.value)) < 600 + len(str(tmp_path)) and "\n" not in str(error.value)
