"""The flags of `timm-dynamic convert`."""

import argparse

from timm_dynamic.cli.arguments.base import KeyValues, Parser, check_file


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("convert", "Turn an original author's checkpoint into safetensors that our model loads strictly.")
    parser.add_argument("src", metavar="SRC", help="the author's file; nothing in it is executed")
    parser.add_argument("dst", metavar="DST", nargs="?", help="file to write, *.safetensors")
    parser.add_argument(
        "--install",
        action="store_true",
        help="write to the local weights folder (TIMM_DYNAMIC_WEIGHTS), where pretrained=True looks first",
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="NAME",
        required=True,
        help="the model whose weights these are; with --install NAME.TAG (default: the model's default tag)",
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes (default: the model's)")
    parser.add_argument(
        "--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="arguments of the model"
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    args = parser.parse_args(argv)
    if bool(args.dst) == args.install:
        parser.error("give either DST or --install" if args.install else "the following arguments are required: DST")
    check_file(args.src)
    return args
