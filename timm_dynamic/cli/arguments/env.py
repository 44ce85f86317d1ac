"""The flags of `timm-dynamic env`: none."""

import argparse

from timm_dynamic.cli.arguments.base import Parser


def parse(argv: list[str]) -> argparse.Namespace:
    return Parser("env", "Print versions, devices, and which kernels are loaded or why not.").parse_args(argv)
