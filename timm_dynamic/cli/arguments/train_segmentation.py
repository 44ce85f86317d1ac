"""The flags of `timm-dynamic train_segmentation`: those of `train`, as far as they apply."""

import argparse

from timm_dynamic.cli.arguments.base import (
    Parser,
    add_device_arguments,
    add_model_arguments,
    positive,
    positive_int,
    share,
)
from timm_dynamic.cli.arguments.data import add_workers_argument
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
    return check(parser, parser.parse_args(argv))


def make_parser() -> Parser:
    parser = Parser(
        "train_segmentation",
        "Train a network for semantic segmentation. Flags are those of train, as far as they apply.",
    )
    parser.add_config()
    _add_segmentation_data_arguments(parser)
    add_model_arguments(
        parser,
        "dy_deeplabv3plus_mobilenetv2",
        "a segmentation model of timm-dynamic",
        "start from the whole model's pretrained weights",
        "backbone=resnet50 pretrained_backbone=False",
    )
    add_start_arguments(parser)
    add_device_arguments(parser)
    add_amp_arguments(parser)
    add_distributed_arguments(parser)
    add_optimizer_arguments(parser)
    group = add_schedule_arguments(parser)
    group.add_argument("--lr", type=float, default=0.007, metavar="X", help="of the backbone (default: 0.007)")
    group.add_argument(
        "--head-lr-scale",
        type=float,
        default=10.0,
        metavar="X",
        help="all the rest learns so much faster (default: 10)",
    )
    _add_segmentation_augmentation_arguments(parser)
    add_ema_arguments(parser)
    add_output_arguments(parser, ("miou", "loss"))
    parser.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="validation images to draw with their masks (default: 4)"
    )
    # The recipe of T. Ardelean et al., and what `train` has flags for.
    parser.set_defaults(
        opt="momentum",
        weight_decay=5e-4,
        epochs=100,
        min_lr=1e-6,
        warmup_epochs=0,
        output="output/train_segmentation",
        input_size=None,
        **FOR_CLASSIFIERS,
    )
    return parser


def _add_segmentation_data_arguments(parser: Parser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="folder of the data, as --data-dir")
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", help="folder that holds VOCdevkit/VOC2012, and SBD's in sbd")
    group.add_argument("--dataset", default="voc", choices=("voc", "sbd", "voc+sbd"), help="default: voc")
    group.add_argument("--dataset-download", action="store_true", help="let torchvision download the dataset")
    group.add_argument("--train-split", default="train", metavar="NAME", help="default: train")
    group.add_argument("--val-split", default="val", metavar="NAME", help="default: val; '' for none")
    group.add_argument("--img-size", type=positive_int, metavar="N", help="size of the crops (default: the model's)")
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="mean of the pixels, from 0 to 1")
    group.add_argument("--std", type=positive, nargs="+", metavar="X", help="standard deviation of the pixels")
    group.add_argument("-b", "--batch-size", type=positive_int, default=16, metavar="N", help="default: 16")
    group.add_argument("-vb", "--validation-batch-size", type=positive_int, metavar="N", help="default: as in training")
    add_workers_argument(group)
    group.add_argument("--pin-mem", action="store_true", help="pin the loaders' memory")


def _add_segmentation_augmentation_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation and regularisation")
    group.add_argument(
        "--scale",
        type=positive,
        nargs=2,
        default=[0.5, 2.0],
        metavar="X",
        help="shorter side over --img-size, 0.5 to 2",
    )
    group.add_argument("--hflip", type=share, default=0.5, metavar="P", help="probability, default: 0.5")
    group.add_argument("--blur", type=share, default=0.5, metavar="P", help="probability, default: 0.5")
    group.add_argument("--drop", type=share, metavar="P", help="dropout (default: the model's)")
