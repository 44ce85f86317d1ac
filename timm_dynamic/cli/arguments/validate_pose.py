"""The flags of `timm-dynamic validate_pose`."""

import argparse

from timm_dynamic.cli.arguments.base import (
    Parser,
    add_device_arguments,
    add_model_arguments,
    add_optimize_argument,
    check_dynamize,
    check_file,
)
from timm_dynamic.cli.arguments.files import check_output_file
from timm_dynamic.cli.arguments.pose import add_flip_test_argument, add_pose_data_arguments, annotations_of, truth_of


def make_parser() -> Parser:
    parser = Parser("validate_pose", "Measure the PCKh of a pose network, with its pretrained weights or a checkpoint.")
    group = add_pose_data_arguments(parser, batch_size=32)
    group.add_argument("--split", default="valid", metavar="NAME", help="part of the data (default: valid)")
    add_model_arguments(
        parser,
        "dynconv_hourglass",
        "a pose network of timm-dynamic",
        "take the model's pretrained weights, as without --checkpoint",
        "budget=0.25",
    )
    parser.add_argument(
        "--checkpoint", default="", metavar="FILE", help="weights: ours, or the authors' (default: pretrained)"
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    add_flip_test_argument(parser)
    add_device_arguments(parser)
    add_optimize_argument(parser, "run the model's inference copy")
    parser.add_argument("--results-file", default="", metavar="FILE", help="write the results to a .csv or .json file")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_dynamize(parser, args)
    if args.use_ema and not args.checkpoint:
        parser.error("--use-ema needs --checkpoint")
    if args.results_file:
        check_output_file("--results-file", args.results_file, (".csv", ".json"))
    truth_of(annotations_of(args, args.split))  # first: weights may have to be downloaded
    check_file(args.checkpoint)
    return args
