"""The flags of `timm-dynamic list`."""

import argparse

from timm_dynamic.cli.arguments.base import Parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "list",
        "List the models with their parameters, multiply-accumulates, static twins and weights, and the layers that "
        "--dynamize puts into any CNN of timm.",
    )
    parser.add_argument("--family", metavar="NAME", help="the models of one family, as dcd")
    parser.add_argument("--names", action="store_true", help="names alone: nothing is counted")
    return parser.parse_args(argv)
