"""The flags of `timm-dynamic push`."""

import argparse
import os
from pathlib import Path

from timm_dynamic.cli.arguments.base import Parser, check_dynamize, check_file
from timm_dynamic.cli.arguments.card import add_card_arguments, add_weights_arguments


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "push",
        "Upload a checkpoint and its model card to the Hugging Face Hub, from where "
        'timm.create_model("hf-hub:ORG/NAME", pretrained=True) takes it. Nothing is uploaded unless the checkpoint '
        "loads strictly.",
    )
    add_weights_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the weights: ours, timm's, or the authors'")
    parser.add_argument("repo", metavar="ORG/NAME", help="the repository; made if missing")
    parser.add_argument(
        "--labels", metavar="FILE", help="names of the classes, a line each: NAME or NAME<tab>DESCRIPTION"
    )
    group = parser.add_argument_group("upload")
    group.add_argument("--out", metavar="DIR", help="write the files to this new folder, and upload nothing")
    group.add_argument("--private", action="store_true", help="make a new repository private")
    group.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if missing (default: main)")
    group.add_argument("--token", help="access token (default: that of `hf auth login`, or HF_TOKEN)")
    add_card_arguments(parser).add_argument("--card", metavar="FILE", help="instead of all this: the model card itself")
    args = parser.parse_args(argv)
    check_dynamize(parser, args)
    if args.out and (os.path.lexists(args.out) or not Path(args.out).absolute().parent.is_dir()):
        raise ValueError(
            f"--out {args.out} is there already, or its parent is not: name a new folder in an existing one"
        )
    check_file(args.checkpoint)
    return args
