"""The `timm-dynamic` command: a parser in `arguments` and a module with a `main(args)` for each subcommand.

Parsers import neither torch nor timm, so that help and mistakes are answered at once.
"""

import importlib
import logging
import os
import sys

from timm_dynamic.suggest import did_you_mean
from timm_dynamic.version import __version__

COMMANDS = {
    "train": "train a model (flags as in timm's train.py)",
    "train_segmentation": "train a network for semantic segmentation on Pascal VOC or SBD",
    "train_pose": "train a network to find the joints of a person, on MPII Human Pose",
    "validate": "measure a model's accuracy on a dataset (flags as in timm's validate.py)",
    "validate_pose": "measure the PCKh of a pose network on MPII Human Pose",
    "benchmark": "time models side by side, as ratios to a baseline",
    "list": "list the models, with parameters, MACs, static twin and weights, and the layers for --dynamize",
    "convert": "turn an original author's checkpoint into safetensors that our model loads",
    "push": "upload weights and their card to the Hugging Face Hub, in timm's format",
    "card": "write the model card of weights",
    "digits": "write scikit-learn's digits as an image folder",
    "inspect": "measure the entropy of a model's attention, or draw the masks of its blocks",
    "check": "compare every implementation with its formula, time both, and record what is faster here",
    "env": "print versions and which kernels are loaded",
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Bad input ends in one line on stderr and status 2, as argparse's own errors do."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: timm-dynamic COMMAND ...\n\ncommands:")
        print("\n".join(f"  {name:<18} {text}" for name, text in COMMANDS.items()))
        print("\ntimm-dynamic COMMAND --help: its flags; timm-dynamic --version")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"timm-dynamic {__version__}")
        return 0
    command = argv[0]
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS, f"choose from {', '.join(COMMANDS)}")
        return _fail("timm-dynamic", f"unknown command {command!r}; {hint}")
    try:
        args = importlib.import_module(f"timm_dynamic.cli.arguments.{command}").parse(argv[1:])
        _begin()
        return importlib.import_module(f"timm_dynamic.cli.{command}").main(args) or 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _fail(f"timm-dynamic {command}", str(error))
    except KeyboardInterrupt:
        return 130


def run() -> None:
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # of a reader such as `head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def _begin() -> None:
    """Import the package, which takes seconds, if `timm_dynamic_start` has put that off; show what it has to say."""
    package = sys.modules["timm_dynamic"]
    if not hasattr(package, "__version__"):
        package.__spec__.loader.exec_module(package)
    logging.basicConfig(format="%(message)s")
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("timm_dynamic").setLevel(logging.INFO if first else logging.WARNING)


def _fail(program: str, message: str) -> int:
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
