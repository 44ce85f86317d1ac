"""What the parsers of all commands share. Nothing here imports torch: a wrong flag is answered at once."""

import argparse
import ast
import math
from pathlib import Path
from typing import Any

import yaml

from timm_dynamic.suggest import did_you_mean


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` with errors of one line, and `--config FILE.yaml` for defaults in timm's format."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"timm-dynamic {command}", description=description, allow_abbrev=False)

    def error(self, message: str):
        head, colon, words = message.partition("unrecognized arguments: ")
        if colon:
            flags = [word.partition("=")[0] for word in words.split() if word.startswith("-")]
            hints = [did_you_mean(flag, self._option_string_actions) for flag in flags]
            message += "".join(f"; {hint}" for hint in hints if hint)
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
        dests = {action.dest for action in self._actions}
        fixed = self._defaults.items()  # what only other commands let their users choose; `args.yaml` has it
        unknown = sorted(str(key) for key, value in values.items() if key not in dests and (key, value) not in fixed)
        if unknown:
            hints = "".join(f"; {hint}" for key in unknown if (hint := did_you_mean(key, dests)))
            raise ValueError(f"--config {path}: unknown keys {', '.join(unknown)}{hints}")
        for action in self._actions:  # argparse checks no default but a text
            if action.dest in values:
                try:
                    values[action.dest] = _from_config(action, values[action.dest])
                except ValueError as error:
                    raise ValueError(f"--config {path}: {action.dest}{error}") from None
        return values


def _from_config(action: argparse.Action, value: Any) -> Any:
    """What the flag would give for a value of the YAML file.

    Raises:
        ValueError: The flag would not take it; what follows the flag's name.
    """
    if isinstance(action, KeyValues):
        if not isinstance(value or {}, dict):
            raise ValueError(f" is {value!r}, not a map, as in {{budget: 0.5}}")
        return value or {}
    if action.nargs == 0:
        if value not in (True, False, None):
            raise ValueError(f" is {value!r}, not true or false")
        return bool(value)
    if value is None:
        if action.default not in (None, ""):
            raise ValueError(" has no value")
        return None
    values, takes_many = value if isinstance(value, list) else [value], action.nargs not in (None, "?")
    if len(values) != action.nargs if isinstance(action.nargs, int) else isinstance(value, list) and not takes_many:
        raise ValueError(f" is {value!r}, not {action.nargs or 'one'} value{'s' * takes_many}")
    for one in values:
        if action.choices and one not in action.choices:
            raise ValueError(f" is {one!r}, not one of {', '.join(map(repr, action.choices))}")
        if action.type in (int, positive_int, count) and isinstance(one, (bool, float)):
            raise ValueError(f" is {one!r}, not a whole number")
        if not action.type and not isinstance(one, str):
            raise ValueError(f" is {one!r}, not a text: put it in quotes")
    try:
        checked = [action.type(str(one)) if action.type else one for one in values]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f": {error}") from None
    except ValueError:
        raise ValueError(f" is {value!r}, not a number") from None
    values = [after if isinstance(one, str) else one for one, after in zip(values, checked, strict=True)]
    is_list = isinstance(value, list) or (takes_many and not isinstance(action.default, float))
    return values if is_list else values[0]


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


class KeyValues(argparse.Action):
    """`K=V ...` for a function's arguments, but for those that flags give; V is a Python literal, or else text."""

    _FLAGS = ("model_name", "name", "pretrained", "checkpoint", "checkpoint_path", "use_ema", "dynamize")

    def __call__(self, parser, namespace, values, option_string=None):
        arguments = {}
        for value in values:
            key, equals, text = value.partition("=")
            if not (equals and key.isidentifier()):
                parser.error(f"argument {option_string}: expected K=V, got {value!r}")
            if key in self._FLAGS:
                parser.error(f"argument {option_string}: {key} is not for here, see --help for its flag")
            try:
                arguments[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                arguments[key] = text
        setattr(namespace, self.dest, arguments)


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
    add_dynamize_arguments(group)
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help=f"more arguments for the model, and for the layer of --dynamize, as {example}",
    )


def add_dynamize_arguments(group: argparse._ActionsContainer, what: str = "the model") -> None:
    group.add_argument(
        "--dynamize",
        metavar="LAYER",
        help=f"put this dynamic layer into {what}, as dcd or dy (`timm-dynamic list` has all); weights, "
        "from a file too, may be those of the static or of the dynamic network",
    )
    group.add_argument(
        "--where",
        nargs="+",
        metavar="PATTERN",
        help="with --dynamize: the convolutions to replace, as 'layer4.*' (default: see timm_dynamic.dynamize)",
    )


def check_dynamize(parser: Parser, args: argparse.Namespace) -> None:
    if args.where and not args.dynamize:
        parser.error("--where needs --dynamize")


def check_file(path: str) -> None:
    """Raise a `FileNotFoundError` for a checkpoint that is not there."""
    if path and not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a downloaded file")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    add_device_argument(group)
    group.add_argument("--amp", action="store_true", help="run in automatic mixed precision")
    group.add_argument(
        "--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="type for --amp (default: float16)"
    )
    group.add_argument("--channels-last", action="store_true", help="use the channels_last memory format")
    group.add_argument(
        "--torchcompile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="torch.compile the model (BACKEND if not given: inductor)",
    )


def add_device_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", help="device to run on (default: cuda if there is one, else cpu)")


def add_optimize_argument(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--optimize", action="store_true", help=text + " (see timm_dynamic.optimize)")
