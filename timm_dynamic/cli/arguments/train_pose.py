"""The flags of `timm-dynamic train_pose`: those of `train`, as far as they apply."""

import argparse

from timm_dynamic.cli.arguments.base import (
    Parser,
    add_device_arguments,
    add_model_arguments,
    non_negative,
    positive_int,
    share,
    share_below_one,
)
from timm_dynamic.cli.arguments.pose import add_flip_test_argument, add_pose_data_arguments, annotations_of, truth_of
from timm_dynamic.cli.arguments.train import (
    FOR_CLASSIFIERS,
    add_amp_arguments,
    add_distributed_arguments,
    add_ema_arguments,
    add_optimizer_arguments,
    add_output_arguments,
    add_schedule_arguments,
    add_start_arguments,
    check,
)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = check(parser, parser.parse_args(argv))
    annotations_of(args, args.train_split)
    if args.val_split:
        truth_of(annotations_of(args, args.val_split))
    return args


def make_parser() -> Parser:
    parser = Parser(
        "train_pose", "Train a network to find the joints of a person. Flags are those of train, as far as they apply."
    )
    parser.add_config()
    group = add_pose_data_arguments(parser, batch_size=6)
    group.add_argument("--train-split", default="train", metavar="NAME", help="default: train")
    group.add_argument("--val-split", default="valid", metavar="NAME", help="default: valid; '' for none")
    group.add_argument(
        "-vb", "--validation-batch-size", type=positive_int, default=32, metavar="N", help="default: %(default)s"
    )
    add_model_arguments(parser, "dynconv_hourglass", "a pose network of timm-dynamic", example="budget=0.25")
    add_start_arguments(parser)
    add_device_arguments(parser)
    add_amp_arguments(parser)
    add_distributed_arguments(parser)
    add_optimizer_arguments(parser)
    group = add_schedule_arguments(parser)
    group.add_argument("--lr", type=float, default=2.5e-4, metavar="X", help="learning rate (default: %(default)s)")
    _add_pose_augmentation_arguments(parser)
    add_ema_arguments(parser)
    add_output_arguments(parser, ("pckh", "loss"))
    add_flip_test_argument(parser)
    # The recipe of Verelst and Tuytelaars, and what `train` has flags for.
    parser.set_defaults(
        opt="adam",
        weight_decay=0.0,
        epochs=100,
        sched="multistep",
        decay_milestones=[60, 90],
        warmup_epochs=0,
        output="output/train_pose",
        drop=None,
        **FOR_CLASSIFIERS,
    )
    return parser


def _add_pose_augmentation_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--scale-factor",
        type=share_below_one,
        default=0.25,
        metavar="X",
        help="deviation of the persons' sizes, and the largest (default: 0.25)",
    )
    group.add_argument(
        "--rotation-factor",
        type=non_negative,
        default=30.0,
        metavar="X",
        help="deviation of the angle in degrees, and half of the largest (default: 30)",
    )
    group.add_argument(
        "--rotation-prob", type=share, default=0.6, metavar="P", help="probability of a rotation (default: 0.6)"
    )
    group.add_argument("--hflip", type=share, default=0.5, metavar="P", help="probability, default: 0.5")
