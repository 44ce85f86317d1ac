"""Which implementations were measured as right and faster on this machine's devices (`timm-dynamic check`).

A record is of one device: `{"device", "capability", "build", "torch", "names": {name: {"on", "right", "ratio", ...}}}`.
Those of the package are files in `timm_dynamic/measured`; a user's are one file in the cache folder, and count first.
"""

import hashlib
import json
import mmap
import os
from functools import lru_cache
from pathlib import Path

import torch

SHIPPED = Path(__file__).parent.parent / "measured"
_BUILD_ID = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"  # the head of an ELF file's note, 20 bytes follow
_PLACE = ("device", "capability", "build")


def path_of_user() -> Path:
    """`check.json` in `$TIMM_DYNAMIC_CACHE`, or in `timm-dynamic` of the user's cache folder."""
    folder = os.environ.get("TIMM_DYNAMIC_CACHE")
    if folder:
        return Path(folder) / "check.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm-dynamic" / "check.json"


def build_of(binary: Path) -> str:
    """What identifies a binary: its build id, which setup.py makes of the sources; "none" where there is no binary."""
    try:
        with open(binary, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            at = content.find(_BUILD_ID)
            if at >= 0:
                return content[at + 16 : at + 36].hex()
            return hashlib.sha1(content).hexdigest()
    except (OSError, ValueError):
        return "none"


def place(device_type: str, device_name: str) -> dict[str, object]:
    """What a record is of: the device and its compute capability, the binary, torch.

    Args:
        device_type: `"cpu"` or `"cuda"`; of several GPUs the current one.
        device_name: Of a CPU; a GPU says its own.
    """
    cuda = device_type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else device_name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
        "build": build_of(Path(__file__).parent.parent / f"_{device_type}.so"),
        "torch": torch.__version__,
    }


def read(path: Path) -> list[dict]:
    """The records of a file; none where it is missing or is not one."""
    try:
        records = json.loads(path.read_text())["records"]
        return [record for record in records if isinstance(record["names"], dict) and all(k in record for k in _PLACE)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def write(path: Path, record: dict) -> None:
    """Add a record to a file, whole or not at all; names that it has replace those of the same place."""
    records = read(path)
    key = [record[k] for k in (*_PLACE, "torch")]
    same = next((r for r in records if [r.get(k) for k in (*_PLACE, "torch")] == key), None)
    if same is not None:
        records.remove(same)
        others = [case for case in same.get("cases", []) if case["name"] not in record["names"]]
        record = {**record, "names": {**same["names"], **record["names"]}, "cases": others + record["cases"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"records": [*records, record]}, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def names_on(device_type: str) -> frozenset[str]:
    """The names of what is right and faster on the current device. Reads files once for each device."""
    return _names_on(device_type, torch.cuda.current_device() if device_type == "cuda" else 0)


@lru_cache
def _names_on(device_type: str, index: int) -> frozenset[str]:
    here = place(device_type, "")
    shipped = [record for path in sorted(SHIPPED.glob("*.json")) for record in read(path)]
    users = [record for record in read(path_of_user()) if record.get("torch") == here["torch"]]
    names = {}
    for record in (*shipped, *users):
        if all(record[k] == here[k] for k in _PLACE):
            names |= record["names"]
    return frozenset(name for name, verdict in names.items() if isinstance(verdict, dict) and verdict.get("on") is True)


def forget() -> None:
    """Read the files again when they are needed next."""
    _names_on.cache_clear()
