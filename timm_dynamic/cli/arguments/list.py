"""The flags of `timm-dynamic list`."""

import argparse

from timm_dynamic import counts
from timm_dynamic.cli.arguments.base import Parser
from timm_dynamic.suggest import did_you_mean


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "list",
        "List the models with their parameters, multiply-accumulates, static twins and weights, and the layers that "
        "--dynamize puts into any CNN of timm.",
    )
    parser.add_argument("--family", metavar="NAME", help="the models of one family, as dcd")
    parser.add_argument("--names", action="store_true", help="names alone")
    args = parser.parse_args(argv)
    known = sorted(counts.read())
    if args.family and args.family.lower() not in known:
        hint = did_you_mean(args.family.lower(), known, f"there are {', '.join(known)}")
        raise ValueError(f"--family {args.family}: no such family; {hint}")
    return args
