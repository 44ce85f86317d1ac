"""What the subcommands share: the parser, and turning its arguments into a model."""

import argparse
import difflib
from pathlib import Path

import timm
import torch
import yaml
from timm.utils import ParseKwargs
from torch import nn

import timm_dynamic  # noqa: F401 (registers our models)
from timm_dynamic.convert import load_checkpoint


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` with errors of one line, and `--config FILE.yaml` for defaults in timm's format."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"timm-dynamic {command}", description=description, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_config(self) -> None:
        self.add_argument("-c", "--config", metavar="FILE", help="YAML file of defaults, as for timm's train.py")

    def parse_args(self, args=None, namespace=None):
        config = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=None)
        config.add_argument("-c", "--config")
        path = config.parse_known_args(args)[0].config
        if path:
            self.set_defaults(**self._read_config(path))
        return super().parse_args(args, namespace)

    def _read_config(self, path: str) -> dict:
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"--config {path} must hold `key: value` lines")
        unknown = sorted(set(values) - {action.dest for action in self._actions})
        if unknown:
            raise ValueError(f"--config {path}: unknown keys {', '.join(map(str, unknown))}")
        return values


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", metavar="NAME", default="ddf_mul_resnet50", help="any timm or timm-dynamic model"
    )
    group.add_argument("--pretrained", action="store_true", help="start from the model's pretrained weights")
    group.add_argument("--num-classes", type=int, metavar="N", help="number of classes (default: the model's)")
    group.add_argument("--in-chans", type=int, metavar="N", help="image channels (default: the model's)")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", default=default, help="device to run on (default: cuda if there is one, else cpu)")
    group.add_argument("--amp", action="store_true", help="automatic mixed precision")
    group.add_argument("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="default: float16")
    group.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    group.add_argument("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the model")


def create_model(name: str, checkpoint: str = "", use_ema: bool = False, **kwargs) -> nn.Module:
    """`timm.create_model`, with a one-line `ValueError` for what a user can get wrong.

    Args:
        name: Model name, with or without a tag.
        checkpoint: File to load: ours, timm's, or an author's.
        use_ema: Take the averaged weights of the checkpoint.
        **kwargs: For the model; those that are None are left out.
    """
    arch = timm.models.get_arch_name(name)
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(arch):
        close = difflib.get_close_matches(arch, timm.list_models(), n=3)
        raise ValueError(f"unknown model {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    try:
        model = timm.create_model(name, **{k: v for k, v in kwargs.items() if v is not None})
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"cannot create {name}: {error}") from error
    if checkpoint:
        load_checkpoint(model, checkpoint, use_ema=use_ema)
    return model


def resolve_device(name: str) -> torch.device:
    """`torch.device(name)` after checking that this machine has it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
