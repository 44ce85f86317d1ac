"""Hostile and broken weights: every file loads strictly or is refused in one line; none is run, none takes memory."""

import argparse
import collections
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save
from torch import nn

import timm_dynamic
from timm_dynamic import cli
from timm_dynamic.convert import extract_state_dict, load_checkpoint, read_checkpoint

TINY = "test_ddf_resnet"

_MEMORY = 6 << 30  # address space of the process that reads mutated files; torch alone takes 1 to 2 GB


class Model(nn.Module):
    """A few hundred bytes of weights, so that mutations hit the structure of a file as often as its data."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)


class Harm:
    """Unpickling one makes a file `canary` in the working directory."""

    def __reduce__(self):
        return exec, ("open('canary', 'w').close()",)


def sources() -> dict[str, bytes]:
    """Good checkpoints, as bytes, by file name."""
    torch.manual_seed(0)
    state = Model().state_dict()
    checkpoint = {"epoch": 1, "arch": "m", "state_dict": state, "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.99))}
    files = {}
    for name, value, is_zip in (
        ("zip.pth", state, True),
        ("zip.pth.tar", checkpoint, True),
        ("legacy.pth", {f"module.{key}": value for key, value in state.items()}, False),
        ("legacy.pth.tar", checkpoint, False),
    ):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=is_zip)
        files[name] = buffer.getvalue()
    files["plain.safetensors"] = save(state, {"format": "pt"})
    return files


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def fill(data: bytes, rng: random.Random) -> bytes:
    """A run of equal bytes: zeros as of a hole in the file, or 0xFF, which makes floats NaN and integers huge."""
    start, length = rng.randrange(len(data)), rng.randint(1, 64)
    return data[:start] + rng.choice((b"\0", b"\xff", b"\x7f")) * length + data[start + length :]


def swap(data: bytes, rng: random.Random) -> bytes:
    a, b, c = sorted(rng.sample(range(len(data) + 1), 3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.sample(range(len(data) + 1), 2))
    return data[:b] + data[a:b] + data[b:]


def resize(data: bytes, rng: random.Random) -> bytes:
    """Replace a 32- or 64-bit integer, wherever one may be, with one that claims much, or is negative."""
    width = rng.choice((4, 8))
    start = rng.randrange(len(data) - width)
    value = rng.choice((2**31 - 1, 2**31, 2**32 - 1, 2**28, 2**40, 2**62, 2**63, 2**64 - 1)) % 2 ** (8 * width)
    return data[:start] + value.to_bytes(width, "little") + data[start + width :]


def edit_end(data: bytes, rng: random.Random) -> bytes:
    """Damage near the end, where a zip archive has its directory."""
    start = max(0, len(data) - 1200)
    return data[:start] + rng.choice((flip_bits, fill, resize, truncate))(data[start:], rng)


def edit_start(data: bytes, rng: random.Random) -> bytes:
    """Damage near the start, where safetensors has its header and its length."""
    size = rng.choice((8, 9, 700))
    return rng.choice((flip_bits, fill, swap))(data[:size], rng) + data[size:]


_PIECES = (
    pickle.dumps(Harm(), protocol=2)[2:-1],
    b"cos\nsystem\nX\x0c\x00\x00\x00touch canary\x85R",
    b"cbuiltins\neval\nX\x16\x00\x00\x00open('canary','w').read\x85R",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"cargparse\nNamespace\n",
    b"ccollections\nOrderedDict\n",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x10",  # 2**60
    b"\x8a\x05\x00\x00\x00\x00\x10",  # 2**36
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    *(bytes([code]) for code in b")]}(.0NR\x81bQtu\x85\x86\x87sea2\x88\x89\x8f"),
    b"q\x00",
    b"h\x00",
    b"h\x05",
    b"r\xff\xff\xff\xff",
)


def edit_pickle(data: bytes, rng: random.Random) -> bytes:
    """Insert or replace pickle opcodes, calls of functions among them; in a zip, the archive stays a good one."""
    if not data.startswith(b"PK"):
        return insert_pieces(data, rng) if b"\x80\x02" in data[:2] else edit_header(data, rng)
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                content = insert_pieces(content, rng)
            elif rng.random() < 0.05:  # a record of another size than the pickle says, or none
                content = content[: rng.randrange(len(content) + 1)] + bytes(rng.choice((0, 4, 1000)))
                if rng.random() < 0.3:
                    continue
            new.writestr(info.filename, content)
    return result.getvalue()


def insert_pieces(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(2, min(len(data), 1500))
        data = data[:start] + rng.choice(_PIECES) + data[start + rng.choice((0, 0, 1, 2, 5)) :]
    return data


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """Another header for safetensors: good JSON with wrong types, sizes, offsets or names, of right or wrong length."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    key = rng.choice(list(header))
    odd = rng.choice((-1, 0, 2**31, 2**40, 2**63, 2**64, 1e300, None, "x", [], {}, [2**40, 2**40], [0, 2**40], [-1, 4]))
    field = rng.choice(("dtype", "shape", "data_offsets", None))
    if field is None or key == "__metadata__":
        header[rng.choice((key, "", "x" * 5000, "__metadata__", "conv\nweight"))] = odd
    elif field == "dtype":
        header[key][field] = rng.choice(("F64", "F16", "BF16", "U8", "BOOL", "I64", "C64", "F8_E4M3", "NaN", odd))
    elif rng.random() < 0.5 or not header[key][field]:
        header[key][field] = odd
    else:
        header[key][field][0] = rng.choice((0, 1, 2**33, 2**63, -1))
    text = json.dumps(header).encode()
    claimed = len(text) if rng.random() < 0.8 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**40, 2**63, 10**8))
    return struct.pack("<Q", claimed) + text + data[8 + length :]


MUTATIONS = (flip_bits, truncate, fill, swap, repeat, resize, edit_end, edit_start)


def check(path: Path) -> str:
    """Load one file; what came of it. Anything but what is allowed is an exception."""
    model = Model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_checkpoint(model, path)
        outcome = "loaded"
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    except (ValueError, FileNotFoundError, OSError) as error:
        outcome = str(error)
        assert outcome and len(outcome.splitlines()) == 1, repr(outcome)
        assert len(outcome) < 500 + len(str(path)), outcome
        state = model.state_dict()
        assert all(torch.equal(value, before[key]) for key, value in state.items()), "a refused file changed the model"
    assert not Path("canary").exists(), "code in the file was run"
    return outcome


def fuzz(seed: int, count: int) -> None:
    """Check `count` mutated files, in the working directory; prints one line of JSON: how many loaded, were refused."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng, files, loaded = random.Random(seed), sources(), 0
    for name, data in files.items():
        Path(name).write_bytes(data)
        assert check(Path(name)) == "loaded"
    for i in range(count):
        name, data = rng.choice(list(files.items()))
        if rng.random() < 0.4:
            data = edit_pickle(data, rng)  # first: it wants a file that can be read
        for _ in range(rng.choice((0, 1, 1, 2)) if data is not files[name] else 1):
            data = rng.choice(MUTATIONS)(data, rng) if len(data) > 16 else data
        Path(name).write_bytes(data)
        print(f"{i} {name}", file=sys.stderr, flush=True)
        loaded += check(Path(name)) == "loaded"
    print(json.dumps({"loaded": loaded, "refused": count - loaded}))


# What unpickling may do.


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


def test_mutated_files(tmp_path):
    """In a process of its own, with little memory: a crash, a hang or a huge allocation would end that one alone."""
    environment = {**os.environ, "PYTHONPATH": str(Path(timm_dynamic.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "0", "700"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["loaded"] > 30 and counts["refused"] > 500


def zip_with(pickle_body: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint of torch's format around a pickle of our own."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(sources()["zip.pth"])) as old, zipfile.ZipFile(result, "w", compression) as new:
        for info in old.infolist():
            own = info.filename.endswith("data.pkl")
            new.writestr(info.filename, b"\x80\x02" + pickle_body + b"." if own else old.read(info))
    return result.getvalue()


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


# Commands: every way on which one of them reads weights.


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


@pytest.mark.parametrize("kind, expected", [
    ("harmful", r"refused: it needs 'exec'|blocked loading.*exec"),
    ("truncated", "damaged|failed|archive"),
    ("nan", "holds NaN or infinity|keys missing"),
    ("other model", "keys missing|loading state_dict"),
])  # fmt: skip
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse(tmp_path, monkeypatch, capsys, small_digits, hub, command, kind, expected):
    monkeypatch.chdir(tmp_path)
    content = harmful() if kind == "harmful" else damaged(kind)
    folder = model_folder(tmp_path / "folder")
    for path in (tmp_path / "a.pth", folder / "pytorch_model.bin", hub / "pytorch_model.bin"):
        path.write_bytes(content)
    words = {"FILE": "a.pth", "DATA": str(small_digits)}
    argv = [words.get(word, word.format(TINY).replace("FOLDER", str(folder))) for word in COMMANDS[command].split()]
    error = fails(capsys, *argv)
    assert re.search(expected, error), error
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
    cached.write_bytes(zip_with(b"(" + provocation + _PIECES[0] + b"t"))
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


if __name__ == "__main__":
    fuzz(int(sys.argv[1]), int(sys.argv[2]))
