"""The `timm-dynamic` command: one module a subcommand, each with a `main(argv)`."""

import importlib
import sys

COMMANDS = {
    "train": "train a model (flags as in timm's train.py)",
    "train_segmentation": "train a network for semantic segmentation on Pascal VOC or SBD",
    "validate": "measure a model's accuracy on a dataset (flags as in timm's validate.py)",
    "benchmark": "time models side by side, as ratios to a baseline",
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
        return 0 if argv else 2
    command = argv[0]
    if command not in COMMANDS:
        return _fail("timm-dynamic", f"unknown command {command!r}; choose from {', '.join(COMMANDS)}")
    try:
        return importlib.import_module(f"timm_dynamic.cli.{command}").main(argv[1:]) or 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _fail(f"timm-dynamic {command}", str(error))
    except KeyboardInterrupt:
        return 130


def run() -> None:
    sys.exit(main())


def _fail(program: str, message: str) -> int:
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
