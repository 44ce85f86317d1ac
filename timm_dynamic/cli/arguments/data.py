"""The flags of `train`, `validate` and `inspect` that say which images, and what they name on the disk."""

import argparse
import os
from pathlib import Path

from timm_dynamic.cli.arguments.base import count, positive, positive_int

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
# Dataset prefixes whose data does not lie in split folders.
OTHER_SOURCES = ("torch", "hfds", "hfids", "tfds", "wds")
SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
_WORKERS = 4


def add_data_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="folder of the data, the same as --data-dir")
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", help="folder that holds the split folders")
    group.add_argument("--dataset", default="", metavar="NAME", help="timm dataset, TYPE/NAME (default: image folder)")
    group.add_argument(
        "--dataset-download", action="store_true", help="download the dataset first (for torch/..., tfds/...)"
    )
    group.add_argument(
        "--class-map",
        default="",
        metavar="FILE",
        help="text file of the classes' folder names, one a line, in the order of the model's outputs",
    )
    group.add_argument("--img-size", type=positive_int, metavar="N", help="image size (default: the model's)")
    group.add_argument("--input-size", type=positive_int, nargs=3, metavar="N", help="image channels, height and width")
    group.add_argument(
        "--crop-pct", type=positive, metavar="X", help="share of an image that validation sees (default: the model's)"
    )
    group.add_argument(
        "--mean", type=float, nargs="+", metavar="X", help="mean of the pixels, from 0 to 1 (default: the model's)"
    )
    group.add_argument(
        "--std", type=positive, nargs="+", metavar="X", help="their standard deviation (default: the model's)"
    )
    group.add_argument(
        "--interpolation",
        default="",
        choices=("", *INTERPOLATIONS),
        metavar="MODE",
        help=f"resizing in validation: {', '.join(INTERPOLATIONS)} (default: the model's)",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=positive_int,
        default=batch_size,
        metavar="N",
        help=f"images a batch (default: {batch_size})",
    )
    add_workers_argument(group)
    group.add_argument("--pin-mem", action="store_true", help="load into pinned memory, faster to copy to a GPU")


def add_workers_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "-j",
        "--workers",
        type=count,
        default=min(_WORKERS, len(os.sched_getaffinity(0))),
        metavar="N",
        help=f"processes that load images; 0: none (default: {_WORKERS}, or the number of cores if that is less)",
    )


def add_bad_images_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad-images",
        type=count,
        default=0,
        metavar="N",
        help="leave out up to N unreadable images of a split, and name them, then stop (default: 0)",
    )


def find_split(args: argparse.Namespace, split: str) -> tuple[str, dict]:
    """The root of the data, which for folders is that of the split, and what `create_dataset` should know of it.

    Raises:
        ValueError: No data given, no such folder or split.
    """
    root = args.data or args.data_dir
    if args.dataset.partition("/")[0].lower() in OTHER_SOURCES:
        return root, {}
    if not root:
        raise ValueError("no data: name its folder, as in `DATA` or --data-dir")
    return str(_split_folder(Path(root), split)), {"search_split": False}


def _split_folder(root: Path, split: str) -> Path:
    """The folder of a split, by its name or a synonym of it; `root` itself where that has no split folders at all."""
    if not root.exists():
        raise ValueError(f"no such data folder: {root}")
    names = next((synonyms for synonyms in SPLITS if split in synonyms), ())
    for name in (split, *names):
        if (root / name).is_dir():
            return root / name
    if any((root / name).is_dir() for synonyms in SPLITS for name in synonyms):
        raise ValueError(f"no {split} folder in {root}")
    return root
