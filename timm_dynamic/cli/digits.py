"""`timm-dynamic digits`: a small real dataset that needs no download."""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

_VAL_IMAGES = 360
_SEED = 0


def load_digits() -> dict[str, np.ndarray]:
    """scikit-learn's digits: 8x8 grey images (uint8) by path, `{train,val}/<digit>/<index>.png`.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    try:
        from sklearn import datasets, model_selection
    except ModuleNotFoundError:
        raise ModuleNotFoundError('digits come with scikit-learn: pip install "timm-dynamic[demo]"') from None
    digits = datasets.load_digits()
    _, val = model_selection.train_test_split(
        range(len(digits.target)), test_size=_VAL_IMAGES, random_state=_SEED, stratify=digits.target
    )
    val = set(val)
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # grey levels are 0..16
    return {
        f"{'val' if index in val else 'train'}/{label}/{index:04d}.png": image
        for index, (image, label) in enumerate(zip(images, digits.target, strict=True))
    }


def write_digits(folder: str | os.PathLike) -> bool:
    """Write `load_digits()` as PNG files under `folder`, all or none; False if they are there already.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
        ValueError: `folder` holds something else.
    """
    images = load_digits()
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a new or empty one")
    if folder.is_dir() and any(folder.iterdir()):
        if all((folder / name).is_file() for name in images) and not any(
            path.is_file() and path.relative_to(folder).as_posix() not in images for path in folder.rglob("*")
        ):
            return False
        raise ValueError(f"{folder} is not empty and does not hold the digits alone: give a new or empty folder")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for name, image in tqdm(images.items(), desc="digits", unit="image", disable=None):
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def main(args: argparse.Namespace) -> None:
    written = write_digits(args.folder)
    print(f"{args.folder}: 1437 images in train/, 360 in val/, 10 classes{'' if written else ' (already there)'}")
