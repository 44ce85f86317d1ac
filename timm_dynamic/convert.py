"""Checkpoints: reading ours, timm's and the original authors' without running what is in them, and converting them."""

import argparse
import logging
import mmap
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from timm_dynamic.layers.progress import KEY, check_done
from timm_dynamic.version import __version__

_logger = logging.getLogger(__name__)

_EMA_KEYS = ("state_dict_ema", "model_ema")  # timm's, and its scripts' older name
_STATE_KEYS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile
_SHOWN = 3  # names given per kind of mismatch
# Allowed by torch, needed by no checkpoint of weights, and able to turn a small file into any amount of memory.
_ENLARGING = re.compile(
    rb"c(_codecs\nencode|(?:__builtin__|builtins)\nbytearray|torch\._utils\n_rebuild_device_tensor_from_\w+)\n"
)


def read_checkpoint(path: str | os.PathLike) -> dict:
    """What a checkpoint file holds, on the CPU, without running any code in it.

    A `.safetensors` file is read as such, any other through `torch.load(weights_only=True)` with `argparse.Namespace`
    (timm's scripts save their arguments as one) as the only class allowed beyond torch's own list. Sizes that the file
    merely claims take no memory. (A pickle made for that can still take time; safetensors cannot.)

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, is damaged, or needs something else to be unpickled.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a downloaded file")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of a checkpoint file")
    with path.open("rb") as file:
        head = file.read(64).lstrip(b"\0 \t\r\n")
    if not head:
        raise ValueError(f"{path} is empty or starts with zeros: download it again")
    if head.lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not a checkpoint: download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not a checkpoint: run `git lfs pull`")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file or is damaged ({error}): download it again") from error
    _refuse_enlarging(path)
    _check_sums(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint fail in about every way there is
        raise ValueError(f"{path} {_why_unreadable(str(error))}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}: expected a dict with the model's weights")
    # Unpickling can set attributes on an OrderedDict, `items` among them; a plain dict has none.
    return dict(dict.items(checkpoint))


def _refuse_enlarging(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # no zip archive, or a damaged one
        members = []
    if any(member.filename.endswith("/constants.pkl") for member in members):
        return  # TorchScript compresses; torch.load refuses it without reading on
    # torch.save does not compress; what is compressed, or lies in the file twice, can be far larger than the file.
    size = path.stat().st_size
    if any(member.compress_type for member in members) or sum(member.file_size for member in members) > size:
        raise ValueError(f"{path} is refused: it unpacks to more than its {size} bytes. Save it with torch.save again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if found := _ENLARGING.search(data):
            name = found[1].decode().replace("\n", ".")
            raise ValueError(f"{path} is refused: it calls {name!r}, which weights do not need. Save the weights alone")


def _check_sums(path: Path) -> None:
    """Compare the checksums in an archive of torch.save with its content, which torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # no archive: an older format. Or a damaged one
        with path.open("rb") as file:
            if file.read(4) == b"PK\3\4":
                raise ValueError(f"{path} {_why_unreadable(str(error))}") from error
        return
    if damaged:
        raise ValueError(f"{path} is damaged (the checksum of {damaged[:80]!r} in it is wrong): download it again")


def _why_unreadable(message: str) -> str:
    refused = re.search(r"GLOBAL (.+?) (?:was not an allowed|whose module)", message, re.DOTALL)
    if refused:
        return (
            f"is refused: it needs {refused[1][:80]!r} to be unpickled, which could run any code. Tensors, plain "
            "containers and argparse.Namespace are allowed; if you trust the file, save its state dict alone"
        )
    for kind in ("TorchScript", ".tar"):
        if kind in message:
            return f"is a {kind} archive, which weights_only=True cannot read: save its state dict with torch.save"
    return "is not a PyTorch checkpoint or is damaged: download it again"


def extract_state_dict(checkpoint: Mapping[str, Any], use_ema: bool = False) -> dict[str, Tensor]:
    """The model's weights out of what a training script saved, keys without the prefixes of wrappers.

    Args:
        checkpoint: With the weights under `state_dict` or `model`, or a bare state dict.
        use_ema: Take the averaged weights (`state_dict_ema`, `model_ema`) instead.

    Raises:
        ValueError: There are no such weights, or some are no dense tensors.
    """
    wanted = _EMA_KEYS if use_ema else _STATE_KEYS
    state = next((checkpoint[key] for key in wanted if isinstance(checkpoint.get(key), dict)), None)
    if use_ema and state is None:
        raise ValueError(
            f"the checkpoint has no averaged weights ({' or '.join(wanted)}): load it without use_ema (--use-ema)"
        )
    state = checkpoint if state is None else dict(dict.items(state))
    if not any(isinstance(value, Tensor) for value in state.values()):
        names = ", ".join(map(_name, list(state)[:8])) or "nothing"
        raise ValueError(f"no weights found under {' or '.join(wanted)}, nor at the top, which holds {names}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"the state dict holds a {type(value).__name__} at '{_name(key)}': expected a tensor")
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"the tensor '{_name(key)}' is sparse, quantized or without data: expected a dense one")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    # Not `value.detach()`: unpickling can set attributes on a tensor too.
    return {key: torch.Tensor.detach(value) for key, value in state.items()}


def load_checkpoint(model: nn.Module, path: str | os.PathLike, use_ema: bool = False, new_head: bool = False) -> None:
    """Load a checkpoint file into a model: strictly, or not at all.

    The `checkpoint_filter_fn` of the module that defines the model, ours or timm's, translates other formats.

    Args:
        model: As `timm.create_model` made it.
        path: File to load: ours, timm's, or an author's (see `read_checkpoint`).
        use_ema: Take the averaged weights of the checkpoint.
        new_head: Leave the model's classifier as it is if the file has one of another number of classes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, does not fit the model, or holds NaN or infinity. The model is as it was.
    """
    checkpoint = read_checkpoint(path)
    name = _architecture(model)
    shown = getattr(model, "recipe", name)
    try:
        state = extract_state_dict(checkpoint, use_ema)
        filter_fn = filter_fn_of(name)
        state = filter_fn(state, model) if filter_fn else state
        state = _with_head_of(model, state) if new_head else state
        check_fits(state, model)
    except ValueError as error:
        raise ValueError(f"{path} does not load into {shown}: {error}") from error
    except Exception as error:  # timm's filters expect one format and break in their own ways on others
        raise ValueError(f"{path} does not load into {shown} ({type(error).__name__}: {one_line(error)})") from error
    model.load_state_dict(state)


def _architecture(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def filter_fn_of(name: str) -> Callable | None:
    """The `checkpoint_filter_fn` of the file that defines a model, if any."""
    if not timm.is_model(name):
        return None
    return getattr(sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None)


def check_fits(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise a `ValueError` in one line if these are not all of the model's weights, finite, and no others."""
    expected = model.state_dict()
    optional = {key for key in expected if key.endswith(KEY)}
    wrong_shape = [
        f"{key} {str(list(state[key].shape))[:60]} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    kinds = {
        "missing": [key for key in expected if key not in state and key not in optional],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": wrong_shape,
    }
    if any(kinds.values()):
        problems = [f"{len(keys)} keys {kind} ({_some(keys)})" for kind, keys in kinds.items() if keys]
        raise ValueError("; ".join(problems) + _num_classes_hint(state, expected, model))
    for key in state.keys() & optional:
        check_done(state[key])
    for key, value in expected.items():
        if key in optional:
            continue
        if value.is_floating_point() and not state[key].is_floating_point():
            raise ValueError(f"{key} holds {state[key].dtype}: expected floating-point weights")
        check_finite({key: state[key].to(value.dtype)})  # in the model's dtype: a float64 can be too large for it


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` that names the first tensor with NaN or infinity, if there is one."""
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} holds NaN or infinity: the file is damaged or its training diverged")


def one_line(error: Exception) -> str:
    """The message of an error, or its type if it has none, in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]} ..."


def _some(keys: list[str]) -> str:
    return ", ".join(map(_name, keys[:_SHOWN])) + (", ..." if len(keys) > _SHOWN else "")


def _name(key: Any) -> str:
    # A key can be anything: a long text of many lines, or tuples within tuples of which a text would fill the memory.
    return repr(key)[1:-1][:100] if isinstance(key, str) else f"<{type(key).__name__}>"


def classes_in(path: str | os.PathLike, classifier: str | Sequence[str] | None, use_ema: bool = False) -> int | None:
    """How many classes a checkpoint's classifier tells apart, or None if it has none of that name.

    Args:
        path: As for `load_checkpoint`.
        classifier: Its name, or its names, as in timm's `pretrained_cfg`.
        use_ema: As for `load_checkpoint`.
    """
    state = extract_state_dict(read_checkpoint(path), use_ema)
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    weights = (state.get(f"{name}.weight") for name in names)
    return next((len(weight) for weight in weights if weight is not None and weight.ndim), None)


def _num_classes_hint(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: nn.Module) -> str:
    for name in _classifiers(model):
        key = f"{name}.weight"
        if key in state and (key not in expected or len(state[key]) != len(expected[key])):
            return f"; create the model with num_classes={len(state[key])} (--num-classes {len(state[key])})"
    return ""


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _with_head_of(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    heads = tuple(f"{name}." for name in _classifiers(model))
    head = {key: value for key, value in model.state_dict().items() if key.startswith(heads)} if heads else {}
    others = [key for key, value in head.items() if key in state and state[key].shape != value.shape]
    if not others:
        return state
    _logger.info(
        f"the file has {len(state[others[0]])} classes, the model {len(head[others[0]])}: its classifier is new"
    )
    return {**state, **head}


def convert(src: str | os.PathLike, dst: str | os.PathLike, model: nn.Module, use_ema: bool = False) -> None:
    """Convert a checkpoint file to safetensors with our key names; `model` holds its weights afterwards.

    Args:
        src: File to convert (see `read_checkpoint`).
        dst: File to write, named `*.safetensors`. Written whole or not at all; its folder is made if missing.
        model: As `timm.create_model` made it, with the file's number of classes.
        use_ema: Take the averaged weights of the checkpoint.

    Raises:
        FileNotFoundError, ValueError: As for `load_checkpoint`, or `dst` is no name for the result.
        OSError: `dst` cannot be written.
    """
    dst = Path(dst)
    if dst.suffix != ".safetensors":
        raise ValueError(f"{dst} must end in .safetensors")
    if dst.is_dir():
        raise ValueError(f"{dst} is a folder: give the name of a file")
    if dst.exists() and os.path.exists(src) and dst.samefile(src):
        raise ValueError(f"{dst} is the file to convert: give another name for the result")
    load_checkpoint(model, src, use_ema)

    # Copies: safetensors takes neither shared memory nor other layouts.
    state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}
    metadata = {"format": "pt", "model": _architecture(model), "timm_dynamic": __version__}
    unfinished = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(save(state, metadata))  # `save_file` makes files that only their owner can read
            os.replace(unfinished, dst)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {dst}: {error}") from error
