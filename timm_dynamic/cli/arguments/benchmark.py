"""The flags of `timm-dynamic benchmark`."""

import argparse
import shlex
from pathlib import Path

from timm_dynamic.cli.arguments.base import (
    KeyValues,
    Parser,
    add_device_arguments,
    add_dynamize_arguments,
    add_optimize_argument,
    check_dynamize,
    check_file,
    positive_int,
)
from timm_dynamic.cli.arguments.files import check_output_file


def make_parser() -> Parser:
    parser = Parser("benchmark", "Time models, in turns in one process, and print ratios to a baseline.")
    group = parser.add_argument_group("what")
    group.add_argument("--models", nargs="+", required=True, metavar="NAME", help="any timm or timm-dynamic models")
    group.add_argument(
        "--baseline",
        default="none",
        metavar="static|NAME|none",
        help="what ratios refer to: each model's static twin (with --dynamize: the model without it), a model, or "
        "nothing (default: none)",
    )
    group.add_argument(
        "--backends",
        nargs="+",
        default=["kernel"],
        choices=("kernel", "reference", "compiled-reference"),
        help="how our operators run: compiled kernels, plain PyTorch, or that under torch.compile (default: kernel)",
    )
    group.add_argument(
        "--mode",
        choices=("eval", "train"),
        default="eval",
        help="what to time; train: forward, backward and SGD step (default: eval)",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        nargs="+",
        type=positive_int,
        default=[1],
        metavar="N",
        help="images a batch; several are timed one after the other (default: 1)",
    )
    group.add_argument("--img-size", type=positive_int, metavar="N", help="image size (default: the model's)")
    group.add_argument(
        "--pretrained", action="store_true", help="take the models' pretrained weights (masks depend on them)"
    )
    group.add_argument("--checkpoint", default="", metavar="FILE", help="weights of the one model of --models")
    group.add_argument(
        "--images", metavar="DIR", help="folder of images to run on, instead of noise (masks depend on them)"
    )
    group.add_argument("--num-classes", type=positive_int, metavar="N", help="number of classes (default: the model's)")
    add_dynamize_arguments(group, "each of --models")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help="more arguments for --models, not for a baseline that is another model",
    )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--num-warm-iter", type=positive_int, default=10, metavar="N", help="untimed rounds (default: 10)"
    )
    group.add_argument(
        "--num-bench-iter", type=positive_int, default=40, metavar="N", help="timed rounds (default: 40)"
    )
    group.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's)")
    add_device_arguments(parser)
    add_optimize_argument(group, "also time the inference copy of every model, baselines included")
    group = parser.add_argument_group("results")
    group.add_argument("--json", metavar="OUT.json", help="write every row here")
    group.add_argument("--plot", metavar="OUT.png", help="draw the ratios here")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_dynamize(parser, args)
    if args.checkpoint and len(args.models) > 1:
        parser.error("--checkpoint is for one model: name one in --models")
    check_file(args.checkpoint)
    if args.images and not Path(args.images).is_dir():
        raise ValueError(f"no such folder of images: {args.images}")
    if args.optimize and args.mode != "eval":
        raise ValueError("--optimize makes models for inference: it needs --mode eval")
    if args.json:
        check_output_file("--json", args.json, (".json",))
    if args.plot:
        check_output_file("--plot", args.plot, (".png", ".pdf", ".svg"))
        if args.baseline == "none":
            raise ValueError("--plot draws ratios: give a --baseline")
    args.command = shlex.join(["timm-dynamic", "benchmark", *argv])
    return args
