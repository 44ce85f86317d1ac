"""What the commands share: making a model of their flags, and where it runs."""

import argparse
import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import timm
import torch
from torch import nn

import timm_dynamic
from timm_dynamic.convert import (
    check_finite,
    classes_in,
    extract_state_dict,
    load_checkpoint,
    one_line,
    read_checkpoint,
)
from timm_dynamic.replace import layer_class, layer_options
from timm_dynamic.suggest import did_you_mean

_FOLDERS = ("hf-hub:", "hf_hub:", "local-dir:")
_COMMANDS = {"keypoint-detection": "train_pose and validate_pose", "image-segmentation": "train_segmentation"}
_UNEXPECTED = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")


def create_model(
    name: str,
    /,
    checkpoint: str = "",
    use_ema: bool = False,
    dynamize: str | None = None,
    where: list[str] | None = None,
    new_head: bool = False,
    image_size: tuple[int, int] | None = None,
    **kwargs,
) -> nn.Module:
    """`timm.create_model`, with a one-line `ValueError` for what a user can get wrong.

    Args:
        name: Model name, with or without a tag.
        checkpoint: File to load: ours, timm's, or an author's; of the static or of the dynamic network.
        use_ema: Take the averaged weights of the checkpoint.
        dynamize: Layer to put into the model; it is then `dynamized`, with the named one as its base.
        where: Which convolutions that replaces (see `timm_dynamic.dynamize`).
        new_head: Leave the classifier as it is if the checkpoint has one of another number of classes.
        image_size: Of the images, for models that are made for one size (`fixed_input_size` in timm's cfg).
        **kwargs: For the model; those that are None are left out. `num_classes` is then the checkpoint's.
    """
    shown = network_name(name, dynamize, kwargs)
    if dynamize:
        name, kwargs = "dynamized", {**kwargs, "base": name, "layer": dynamize}
    if where:
        kwargs["where"] = where
    pretrained = kwargs.get("pretrained")
    static = kwargs.get("base") or name
    from_folder = static.lower().startswith(_FOLDERS)
    if not from_folder:
        _check_name(static, pretrained)
        if checkpoint and kwargs.get("num_classes") is None:
            cfg = timm.get_pretrained_cfg(static)
            kwargs["num_classes"] = cfg and classes_in(checkpoint, cfg.classifier, use_ema)
    # Other people's files break timm in many ways; without them, anything else is a bug, and not to be hidden.
    expected = Exception if pretrained or from_folder else (RuntimeError, TypeError, OSError)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    try:
        with _safe_unpickling():
            model = timm.create_model(name, **kwargs)
            if image_size and _is_of_another_size(model, image_size) and "img_size" not in kwargs:
                model = timm.create_model(name, **kwargs, img_size=image_size)
        if pretrained:
            check_finite(model.state_dict())
    except expected as error:
        hint = _argument_hint(error, static, kwargs.get("layer"))
        raise ValueError(f"cannot create {shown}: {one_line(error)}{hint}") from error
    if checkpoint:
        with explaining(model, checkpoint, use_ema):
            load_checkpoint(model, checkpoint, use_ema, new_head)
    return model


def _is_of_another_size(model: nn.Module, size: tuple[int, int]) -> bool:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return bool(cfg.get("fixed_input_size")) and tuple(cfg["input_size"][-2:]) != tuple(size)


def network_name(name: str, dynamize: str | None = None, model_kwargs: dict[str, Any] | None = None) -> str:
    """What to call a network in logs and results: `BASE+LAYER` if it was made dynamic."""
    if name == "dynamized" and model_kwargs:
        name, dynamize = model_kwargs.get("base", name), model_kwargs.get("layer")
    return f"{name}+{dynamize}" if dynamize else name


def name_of(args: argparse.Namespace) -> str:
    """What to call the network that the flags describe."""
    return network_name(args.model, args.dynamize, args.model_kwargs)


def dynamize_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `--dynamize` and `--where` mean to `create_model`."""
    options = {"dynamize": args.dynamize, "where": args.where}
    return {key: value for key, value in options.items() if value}


@contextmanager
def explaining(model: nn.Module, checkpoint: str, use_ema: bool = False) -> Iterator[None]:
    """Add to the error of a checkpoint that does not load into a static model that it is a dynamic one's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}{_dynamized_hint(model, checkpoint, use_ema)}") from error


def _dynamized_hint(model: nn.Module, checkpoint: str, use_ema: bool) -> str:
    if hasattr(model, "recipe"):
        return ""
    try:
        content = read_checkpoint(checkpoint)
        names = set(extract_state_dict(content, use_ema))
    except ValueError:
        return ""
    if names <= set(model.state_dict()):
        return ""
    flags = content["args"] if isinstance(content.get("args"), argparse.Namespace) else argparse.Namespace()
    if isinstance(layer := getattr(flags, "dynamize", None), str):
        patterns = [str(pattern)[:80] for pattern in getattr(flags, "where", None) or ()]
        where = f" --where {' '.join(patterns)}" if patterns else ""
        return f"; it was trained with --dynamize {layer[:80]}{where}: add that"
    for layer in timm_dynamic.families.layers():
        try:
            dynamic = timm_dynamic.dynamize(copy.deepcopy(model), layer)
        except ValueError:
            continue
        if set(dynamic.state_dict()) == names:
            return f"; it holds weights of this model made dynamic: add --dynamize {layer}"
    return ""


def _argument_hint(error: Exception, model: str, layer: str | None) -> str:
    """For an argument that the model does not have: the nearest one."""
    found = _UNEXPECTED.search(str(error))
    if not found or not timm.is_model(timm.models.get_arch_name(model)):
        return ""
    entrypoint = timm.model_entrypoint(timm.models.get_arch_name(model))
    functions = (entrypoint, getattr(sys.modules[entrypoint.__module__], found[1], None))
    known = {name for function in functions if callable(function) for name in inspect.signature(function).parameters}
    known |= set(layer_options(layer_class(layer))) if layer else set()
    hint = did_you_mean(found[2], known)
    return f"; {hint}" if hint else ""


@contextmanager
def _safe_unpickling() -> Iterator[None]:
    """No `torch.load` runs code: that of timm does, for weights from a URL that begin with a `TypeError`."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def _check_name(name: str, pretrained: bool) -> None:
    arch = timm.models.get_arch_name(name)
    if not timm.is_model(arch):
        how = "to list the names: python -c \"import timm, timm_dynamic; print(timm.list_models('*resnet*'))\""
        raise ValueError(f"unknown model {name!r}; {did_you_mean(arch, timm.list_models(), how)}")
    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(
            f"no pretrained weights exist for {name}: give a file of weights with --checkpoint (train: "
            "--initial-checkpoint, or train without --pretrained)"
        )


def check_classifier(name: str, model: nn.Module | None = None) -> None:
    """Raise a `ValueError` for a network of another task, which says what its commands are.

    Args:
        name: Of the model.
        model: Of that name; else what the function that makes it says that it returns.
    """
    if model is None and timm.is_model(arch := timm.models.get_arch_name(name)):
        model = timm.model_entrypoint(arch).__annotations__.get("return")
    task = getattr(model, "pipeline_tag", None)
    if task in _COMMANDS:
        raise ValueError(f"{name} is a network for {task}: it has {_COMMANDS[task]}")


def check_classes(args: argparse.Namespace, model: nn.Module) -> None:
    """Raise a `ValueError` for a model that gives features, not one output a class."""
    if not hasattr(model, "num_classes"):
        raise ValueError(f"{name_of(args)} is a {type(model).__name__}, without classes: leave features_only out")


def resolve_device(args: argparse.Namespace) -> torch.device:
    """The device of `--device`, after checking that this machine has it; sets `args.device` where it was not given."""
    args.device = name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def amp_autocast(args: argparse.Namespace, device: torch.device) -> AbstractContextManager:
    """The context for forward passes that `--amp` and `--amp-dtype` ask for; it can be entered again and again."""
    if not args.amp or getattr(args, "amp_impl", "native") == "apex":  # which changes PyTorch's functions instead
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype))


def check_compile(args: argparse.Namespace) -> None:
    """Raise a `ValueError` for a backend or mode that torch.compile does not have."""
    name, mode = args.torchcompile, getattr(args, "torchcompile_mode", None)
    if name and name not in torch.compiler.list_backends(exclude_tags=()):
        usual = torch.compiler.list_backends()
        hint = did_you_mean(name, usual, f"the usual ones are {', '.join(usual)}")
        raise ValueError(f"argument --torchcompile: unknown backend {name!r}; {hint}")
    if mode:
        inductor = importlib.import_module("torch._inductor")  # here: it takes long
        modes = list(inductor.list_mode_options())
        if mode not in modes:
            raise ValueError(f"argument --torchcompile-mode: unknown mode {mode!r}; there are {', '.join(modes)}")
