"""The flags of `timm-dynamic validate_pose`."""

import argparse

from timm_dynamic.cli.arguments.base import Parser, add_model_arguments, check_file
from timm_dynamic.cli.arguments.pose import add_flip_test_argument, add_pose_data_arguments, annotations_of, truth_of
from timm_dynamic.cli.arguments.validate import add_validation_arguments, check_validation


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
    add_flip_test_argument(parser)
    add_validation_arguments(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_validation(parser, args)
    truth_of(annotations_of(args, args.split))  # first: weights may have to be downloaded
    check_file(args.checkpoint)
    return args
