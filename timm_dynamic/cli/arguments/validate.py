"""The flags of `timm-dynamic validate`."""

import argparse

from timm_dynamic.cli.arguments.base import (
    Parser,
    add_device_arguments,
    add_model_arguments,
    add_optimize_argument,
    check_dynamize,
    check_file,
)
from timm_dynamic.cli.arguments.data import add_bad_images_argument, add_data_arguments, find_split
from timm_dynamic.cli.arguments.files import check_output_file


def make_parser() -> Parser:
    parser = Parser("validate", "Measure a model's accuracy on a dataset, with its pretrained weights or a checkpoint.")
    add_data_arguments(parser, batch_size=256)
    add_bad_images_argument(parser)
    parser.add_argument("--split", default="validation", metavar="NAME", help="part of the data (default: validation)")
    add_model_arguments(parser, pretrained="take the model's pretrained weights, as without --checkpoint")
    add_validation_arguments(parser)
    return parser


def add_validation_arguments(parser: Parser) -> None:
    """Which weights, how they run, and where the results go."""
    parser.add_argument(
        "--checkpoint", default="", metavar="FILE", help="weights: ours, timm's, or the authors' (default: pretrained)"
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    add_device_arguments(parser)
    add_optimize_argument(parser, "run the model's inference copy")
    parser.add_argument("--results-file", default="", metavar="FILE", help="write the results to a .csv or .json file")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_validation(parser, args)
    find_split(args, args.split)  # first: weights may have to be downloaded
    check_file(args.checkpoint)
    return args


def check_validation(parser: Parser, args: argparse.Namespace) -> None:
    """What can be wrong with the flags alone."""
    check_dynamize(parser, args)
    if args.use_ema and not args.checkpoint:
        parser.error("--use-ema needs --checkpoint")
    if args.results_file:
        check_output_file("--results-file", args.results_file, (".csv", ".json"))
