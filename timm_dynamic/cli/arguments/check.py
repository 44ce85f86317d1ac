"""The flags of `timm-dynamic check`."""

import argparse
import math

from timm_dynamic.cli.arguments.base import Parser, positive, positive_int
from timm_dynamic.cli.arguments.files import check_output_file


def make_parser() -> Parser:
    parser = Parser(
        "check",
        "Run every implementation of this machine (rows of layers' tables, operators' kernels) on calls of the models, "
        "in a process apart; compare with the formula in float64, forwards and backwards; time both; and "
        "record for this user what is right and faster. On a GPU nothing else runs by default. Ends with status 1 if "
        "something is wrong.",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="kind of device (default: cpu)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="families, operators, or implementations as the table names them (default: all)",
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="whose calls (default: some of each family)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the families' tiny models instead, whose times say nothing: nothing is recorded",
    )
    parser.add_argument("-b", "--batch-size", nargs="+", type=positive_int, default=[1, 8], help="(default: 1 8)")
    parser.add_argument("--shapes", type=positive_int, default=3, metavar="N", help="of each layer (default: 3)")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="of operators' calls")
    parser.add_argument("--compiled", action="store_true", help="time the formula under torch.compile too")
    parser.add_argument("--seconds", type=positive, default=0.3, metavar="S", help="to time a case (default: 0.3)")
    parser.add_argument("--timeout", type=positive, default=120, metavar="S", help="for a case (default: 120)")
    parser.add_argument("--minutes", type=positive, default=math.inf, help="start nothing after so many")
    parser.add_argument("--json", metavar="FILE", help="write the record to this file too")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    if args.json:
        check_output_file("--json", args.json, (".json",))
    return args
