"""The flags that `train_pose` and `validate_pose` share, and the files that they name."""

import argparse
from pathlib import Path

from timm_dynamic.cli.arguments.base import Parser, positive, positive_int
from timm_dynamic.cli.arguments.data import add_workers_argument


def add_pose_data_arguments(parser: Parser, batch_size: int) -> argparse._ArgumentGroup:
    parser.add_argument("data", nargs="?", metavar="DATA", help="folder of the data, as --data-dir")
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", help="folder that holds images, and in annot the annotations")
    group.add_argument("--img-size", type=positive_int, metavar="N", help="size of the images (default: the model's)")
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="mean of blue, green, red, from 0 to 1")
    group.add_argument("--std", type=positive, nargs="+", metavar="X", help="their standard deviation")
    group.add_argument(
        "-b", "--batch-size", type=positive_int, default=batch_size, metavar="N", help="default: %(default)s"
    )
    add_workers_argument(group)
    group.add_argument("--pin-mem", action="store_true", help="pin the loaders' memory")
    parser.set_defaults(dataset="mpii", dataset_download=False, input_size=None, crop_pct=None, interpolation="")
    return group


def add_flip_test_argument(parser: Parser) -> None:
    parser.add_argument(
        "--flip-test", action="store_true", help="average with the mirrored image; the authors' figures are without it"
    )


def annotations_of(args: argparse.Namespace, split: str) -> Path:
    """The annotation file of a split.

    Raises:
        ValueError: It is not there, or no folder is named.
    """
    if not (args.data or args.data_dir):
        raise ValueError("no data: name its folder, as in `DATA` or --data-dir")
    root = Path(args.data or args.data_dir)
    if not root.is_dir():
        raise ValueError(f"no such data folder: {root}")
    return _existing(root / "annot" / f"{split}.json")


def truth_of(annotations: Path) -> Path:
    """The file of true joints and heads that belongs to an annotation file; raises a `ValueError` without it."""
    return _existing(annotations.with_name(f"gt_{annotations.stem}.mat"))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f"no {path}: it comes with HRNet's data for MPII (github.com/HRNet/HRNet-Human-Pose-Estimation), "
            "not with MPII's own download"
        )
    return path
