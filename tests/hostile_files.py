"""Good checkpoints and ways to damage them. As a script, `SEED COUNT`, it loads mutated ones in the current folder."""

import argparse
import io
import json
import pickle
import random
import resource
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from timm_dynamic.convert import load_checkpoint

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


PIECES = (
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
        data = data[:start] + rng.choice(PIECES) + data[start + rng.choice((0, 0, 1, 2, 5)) :]
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


def zip_with(pickle_body: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint of torch's format around a pickle of our own."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(sources()["zip.pth"])) as old, zipfile.ZipFile(result, "w", compression) as new:
        for info in old.infolist():
            own = info.filename.endswith("data.pkl")
            new.writestr(info.filename, b"\x80\x02" + pickle_body + b"." if own else old.read(info))
    return result.getvalue()


if __name__ == "__main__":
    fuzz(int(sys.argv[1]), int(sys.argv[2]))
