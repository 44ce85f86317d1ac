"""The flags of `timm-dynamic inspect`."""

import argparse
from pathlib import Path

from timm_dynamic.cli.arguments.base import (
    Parser,
    add_device_argument,
    add_model_arguments,
    add_optimize_argument,
    check_dynamize,
    check_file,
    positive_int,
)
from timm_dynamic.cli.arguments.data import add_data_arguments


def make_parser() -> Parser:
    parser = Parser(
        "inspect", "Measure the entropy of a model's attention or gates, or draw its masks, on a folder or one image."
    )
    add_data_arguments(parser, batch_size=64)
    parser.add_argument("--split", default="validation", metavar="NAME", help="part of the data (default: validation)")
    add_model_arguments(parser, default=None, pretrained="take the model's pretrained weights, as without --checkpoint")
    parser.add_argument(
        "--checkpoint", default="", metavar="FILE", help="weights: ours, timm's, or the authors' (default: pretrained)"
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    add_device_argument(parser)
    add_optimize_argument(parser, "look into the model's inference copy")
    parser.add_argument(
        "--images", type=positive_int, default=8, metavar="N", help="draw masks for the first N images (default: 8)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the results (default: output/inspect/NAME[/FOLDER/FILE][/IMAGE], FOLDER/FILE the checkpoint)",
    )
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_dynamize(parser, args)
    if not args.model:
        parser.error("name a model with --model")
    if args.use_ema and not args.checkpoint:
        parser.error("--use-ema needs --checkpoint")
    path = Path(args.data or args.data_dir or "")
    if not args.dataset and not path.exists():
        raise ValueError(f"no such image or data folder: {path}")
    check_file(args.checkpoint)
    return args
