"""The flags of `timm-dynamic card`, and those that `push` shares with it."""

import argparse

from timm_dynamic.cli.arguments.base import KeyValues, Parser, add_dynamize_arguments, check_dynamize, check_file
from timm_dynamic.cli.arguments.files import check_output_file


def make_parser() -> Parser:
    parser = Parser(
        "card", "Write the model card of weights, in Markdown, for their repository on the Hugging Face Hub."
    )
    add_weights_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="the weights (default: those of the tag)")
    parser.add_argument("--repo", metavar="ORG/NAME", help="their repository (default: the tag's)")
    parser.add_argument("--out", metavar="FILE", help="file to write, *.md (default: standard output)")
    add_card_arguments(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_dynamize(parser, args)
    if args.out:
        check_output_file("--out", args.out, (".md",))
    check_file(args.checkpoint)
    return args


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="their model; with a tag if they are that tag's weights")
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes (default: the model's)")
    add_dynamize_arguments(parser)
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help="what the model is created with, as in training; kept for those who pull it",
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")


def add_card_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("card")
    group.add_argument("--license", metavar="ID", help="licence of the weights, as the Hub names it (default: unknown)")
    group.add_argument("--source", metavar="TEXT", help="where the weights come from (default: as known of the tag)")
    group.add_argument("--dataset", metavar="NAME", help="dataset they were trained on, as the Hub names it")
    group.add_argument("--results-file", metavar="FILE", help="what `validate --results-file` measured, .json or .csv")
    return group
