"""The flags of `timm-dynamic digits`."""

import argparse

from timm_dynamic.cli.arguments.base import Parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("digits", "Write scikit-learn's digits as an image folder: 1437 images to train on, 360 to test.")
    parser.add_argument("folder", metavar="DIR", help="folder to write, new or empty; gets train/ and val/")
    return parser.parse_args(argv)
