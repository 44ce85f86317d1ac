"""What the subcommands share: the parser, and turning its arguments into a model."""

import argparse
import difflib
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import timm
import torch
import yaml
from timm.utils import ParseKwargs
from torch import nn

import timm_dynamic  # also registers our models
from timm_dynamic.convert import check_finite, load_checkpoint, one_line


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
        except OSError as error:
            raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"--config {path} must hold `key: value` lines")
        unknown = sorted(set(values) - {action.dest for action in self._actions})
        if unknown:
            raise ValueError(f"--config {path}: unknown keys {', '.join(map(str, unknown))}")
        for action in self._actions:  # argparse checks neither the choices nor the type of a default
            value = values.get(action.dest)
            if action.choices and value is not None and value not in action.choices:
                raise ValueError(
                    f"--config {path}: {action.dest} is {value!r}, not one of {', '.join(map(repr, action.choices))}"
                )
            if action.type in (int, positive_int, count) and isinstance(value, (bool, float)):
                raise ValueError(f"--config {path}: {action.dest} is {value!r}, not a whole number")
            if action.type in _RANGES and value is not None:
                for one in value if isinstance(value, list) else [value]:
                    try:
                        action.type(str(one))
                    except argparse.ArgumentTypeError as error:
                        raise ValueError(f"--config {path}: {action.dest}: {error}") from None
        return values


def _number(text: str, kind: type = float) -> float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None


def positive_int(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    value = _number(text, int)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def count(text: str) -> int:
    """An argparse type: a whole number from 0 on."""
    value = _number(text, int)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def non_negative(text: str) -> float:
    """An argparse type: a number from 0 on."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def share_below_one(text: str) -> float:
    """An argparse type: a number from 0 to 1, but not 1."""
    value = share(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


_RANGES = (positive_int, count, positive, non_negative, share, share_below_one)


class KeyValues(ParseKwargs):
    """`K=V ...` for a function's arguments, but for those that flags give."""

    _FLAGS = ("model_name", "name", "pretrained", "checkpoint", "checkpoint_path", "use_ema", "dynamize")

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            key, equals, _ = value.partition("=")
            if not (equals and key.isidentifier()):
                parser.error(f"argument {option_string}: expected K=V, got {value!r}")
            if key in self._FLAGS:
                parser.error(f"argument {option_string}: {key} is not for here, see --help for its flag")
        super().__call__(parser, namespace, values, option_string)


def compile_mode(name: str) -> str:
    """An argparse type: a mode of `torch.compile`."""
    import torch._inductor  # here: it takes long

    modes = list(torch._inductor.list_mode_options())
    if name not in modes:
        raise argparse.ArgumentTypeError(f"unknown mode {name!r}; there are {', '.join(modes)}")
    return name


def compile_backend(name: str) -> str:
    """An argparse type: a backend of `torch.compile`."""
    if name not in torch.compiler.list_backends(exclude_tags=()):
        usual = ", ".join(torch.compiler.list_backends())
        raise argparse.ArgumentTypeError(f"unknown backend {name!r}; the usual ones are {usual}")
    return name


def add_model_arguments(
    parser: argparse.ArgumentParser,
    default: str | None = "ddf_mul_resnet50",
    what: str = "any timm or timm-dynamic model",
    pretrained: str = "start from the model's pretrained weights",
    example: str = "budget=0.5",
) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        metavar="NAME",
        default=default,
        help=what + (f" (default: {default})" if default else ""),
    )
    group.add_argument("--pretrained", action="store_true", help=pretrained)
    group.add_argument("--num-classes", type=int, metavar="N", help="number of classes (default: the model's)")
    group.add_argument("--in-chans", type=int, metavar="N", help="image channels (default: the model's)")
    group.add_argument(
        "--dynamize",
        choices=tuple(timm_dynamic.families.layers()),
        help="put this dynamic layer into the model, after its pretrained weights are loaded and before any checkpoint",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help=f"more arguments for the model, as {example}",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", default=default, help="device to run on (default: cuda if there is one, else cpu)")
    group.add_argument("--amp", action="store_true", help="run in automatic mixed precision")
    group.add_argument(
        "--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="type for --amp (default: float16)"
    )
    group.add_argument("--channels-last", action="store_true", help="use the channels_last memory format")
    group.add_argument(
        "--torchcompile",
        nargs="?",
        const="inductor",
        type=compile_backend,
        metavar="BACKEND",
        help="torch.compile the model (BACKEND if not given: inductor)",
    )


def add_optimize_argument(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--optimize", action="store_true", help=text + " (see timm_dynamic.optimize)")


def create_model(
    name: str, /, checkpoint: str = "", use_ema: bool = False, dynamize: str | None = None, **kwargs
) -> nn.Module:
    """`timm.create_model`, with a one-line `ValueError` for what a user can get wrong.

    Args:
        name: Model name, with or without a tag.
        checkpoint: File to load: ours, timm's, or an author's.
        use_ema: Take the averaged weights of the checkpoint.
        dynamize: Layer to put into the model before the checkpoint is loaded (see `timm_dynamic.dynamize`).
        **kwargs: For the model; those that are None are left out.
    """
    from_folder = name.lower().startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    pretrained = kwargs.get("pretrained")
    if not from_folder:
        _check_name(name, pretrained)
    # Other people's files break timm in many ways; without them, anything else is a bug, and not to be hidden.
    expected = Exception if pretrained or from_folder else (RuntimeError, TypeError, OSError)
    try:
        with _safe_unpickling():
            model = timm.create_model(name, **{k: v for k, v in kwargs.items() if v is not None})
        if pretrained:
            check_finite(model.state_dict())
    except expected as error:
        raise ValueError(f"cannot create {name}: {one_line(error)}") from error
    if dynamize:
        timm_dynamic.dynamize(model, dynamize)
    if checkpoint:
        load_checkpoint(model, checkpoint, use_ema=use_ema)
    return model


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
        close = difflib.get_close_matches(arch, timm.list_models(), n=3)
        hint = (
            f"did you mean {', '.join(close)}?"
            if close
            else "to list the names: python -c \"import timm, timm_dynamic; print(timm.list_models('*resnet*'))\""
        )
        raise ValueError(f"unknown model {name!r}; {hint}")
    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(
            f"no pretrained weights exist for {name}: give a file of weights with --checkpoint (train: "
            "--initial-checkpoint, or train without --pretrained)"
        )


def resolve_device(name: str) -> torch.device:
    """`torch.device(name)` after checking that this machine has it."""
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


def check_output_file(flag: str, path: str, suffixes: tuple[str, ...]) -> None:
    """Raise a `ValueError` if `path` has none of the suffixes, or could not be written."""
    target = Path(path)
    if target.suffix not in suffixes:
        raise ValueError(f"{flag} {path}: the name must end in {' or '.join(suffixes)}")
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot write there")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it takes its place if the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
