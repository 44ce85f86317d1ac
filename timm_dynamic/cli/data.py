"""Datasets and loaders of `train`, `validate`, `inspect`, on timm.data: their flags, clear errors for unusable data."""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_loader, resolve_data_config
from timm.data.readers.reader import Reader
from torch import nn
from torch.utils.data import Dataset

from timm_dynamic.cli.arguments.data import find_split

_logger = logging.getLogger(__name__)

IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class UnreadableImage(ValueError):
    """An image file that cannot be opened or decoded."""

    def __init__(self, message: str):
        # A loader's worker process hands its error over as a traceback, the message on its last line.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.UnreadableImage: "))


class Images(Dataset):
    """Images of a timm reader. Unlike timm's own dataset, one that cannot be read is an error, not its successor.

    Args:
        reader: The timm reader that finds files and labels.
        mode: Pillow mode the images are converted to.
        max_bad: Unreadable images to tolerate. In training the next readable one takes the place of such an image; in
            validation a black one with the label -1, to be left out.
        is_training: Which of the two.

    Attributes:
        blue_first: Whether the channels come as blue, green, red.

    Raises:
        UnreadableImage: On access, naming the file, or those that are one too many.
    """

    blue_first = False

    def __init__(self, reader: Reader, mode: str, max_bad: int = 0, is_training: bool = False):
        self.reader, self.mode, self.transform = reader, mode, None
        self.max_bad, self.is_training = max_bad, is_training
        # Which images are unreadable, as far as known; one memory for all worker processes.
        self.bad = torch.zeros(len(reader), dtype=torch.bool).share_memory_() if max_bad else None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int):
        while True:
            try:
                image, target = self._read(index)
                return self.transform(image), target
            except UnreadableImage:
                if not self.max_bad:
                    raise
            self.bad[index] = True
            self.check_bad()
            if not self.is_training:
                return self.transform(Image.new(self.mode, (32, 32))), -1
            index = (index + 1) % len(self)

    def bad_files(self) -> list[str]:
        """Names of the unreadable images, as far as known."""
        return [self.reader.filename(index, absolute=True) for index in self.bad.nonzero().flatten().tolist()]

    def check_bad(self) -> None:
        """Raise an `UnreadableImage` if there are too many."""
        if (number := int(self.bad.sum())) > self.max_bad or number == len(self):
            raise UnreadableImage(f"{_list_bad(self)}: more than --max-bad-images {self.max_bad}, or all there are")

    def _read(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, target = self.reader[index]
            image = Image.open(file).convert(self.mode)
            image = Image.merge(self.mode, image.split()[::-1]) if self.blue_first else image
        except Exception as error:  # Pillow raises all kinds, by format
            name, reason = self.reader.filename(index, absolute=True), " ".join(str(error).split())
            raise UnreadableImage(f"cannot read image {name}: {reason}") from error
        return image, target


def _list_bad(dataset: Images, shown: int = 10) -> str:
    files = dataset.bad_files()
    more = f" and {len(files) - shown} more" if len(files) > shown else ""
    return f"cannot read {len(files)} images: {', '.join(files[:shown])}{more}"


def report_bad_images(dataset: Dataset, where: str, distributed: bool, device: torch.device) -> None:
    """Warn of the unreadable images that were left out, by all processes together.

    Raises:
        UnreadableImage: They are too many together.
    """
    if getattr(dataset, "bad", None) is None:
        return
    if distributed:
        bad = dataset.bad.to(device, torch.uint8)
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        dataset.bad.copy_(bad)
    if dataset.bad.any():
        dataset.check_bad()
        if not distributed or torch.distributed.get_rank() == 0:
            _logger.warning(f"{where}: {_list_bad(dataset)}: left out")


def image_channels(args: argparse.Namespace) -> int | None:
    """Image channels that the flags ask for; None for the model's own."""
    of_model = args.model_kwargs.get("in_chans", args.in_chans)
    if args.in_chans not in (None, of_model):
        raise ValueError(f"--in-chans {args.in_chans} contradicts --model-kwargs in_chans={of_model}")
    args.in_chans = of_model
    if args.input_size and args.in_chans not in (None, args.input_size[0]):
        raise ValueError(f"--in-chans {args.in_chans} contradicts --input-size {args.input_size[0]} ...")
    channels = args.input_size[0] if args.input_size else args.in_chans
    if channels not in (None, *IMAGE_MODES):
        raise ValueError(f"images of {channels} channels cannot be read; possible: {', '.join(map(str, IMAGE_MODES))}")
    return channels


def image_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags for the images mean to `create_model`."""
    size = tuple(args.input_size[1:]) if args.input_size else (args.img_size, args.img_size) if args.img_size else None
    return {"in_chans": image_channels(args), "image_size": size}


def resolve_data(args: argparse.Namespace, model: nn.Module, use_test_size: bool = False) -> dict:
    """timm's data configuration (input size, mean, std, crop, interpolation) of flags and model."""
    try:
        config = resolve_data_config(vars(args), model=model, use_test_size=use_test_size)
    except AssertionError:
        raise ValueError("--mean and --std take one value, or one for each channel") from None
    channels = image_channels(args) or config["input_size"][0]  # timm forgets --in-chans if a size is in the model
    return {**config, "input_size": (channels, *config["input_size"][1:])}


def describe(config: dict) -> str:
    """A data configuration in words."""
    height, width = config["input_size"][1:]
    size = f"{height}" if height == width else f"{height} x {width}"
    mean, std = (" ".join(f"{value:.3g}" for value in config[key]) for key in ("mean", "std"))
    return f"{size} px, crop {config['crop_pct']:g}, {config['interpolation']}, mean {mean}, std {std}"


def class_folders(args: argparse.Namespace, split: str) -> int | None:
    """The number of class folders of a split; None where there are no two."""
    if args.dataset or args.class_map:
        return None
    folder = Path(find_split(args, split)[0])
    number = sum(path.is_dir() for path in folder.iterdir()) if folder.is_dir() else 0
    return number if number > 1 else None


def open_dataset(
    args: argparse.Namespace,
    split: str,
    config: dict,
    num_classes: int | None = None,
    class_map: dict | str = "",
    is_training: bool = False,
    max_bad: int = 0,
) -> Dataset:
    """Open one split, and check that it can be read and that its labels fit the model, unless `num_classes` is None.

    Raises:
        ValueError: No data given, no such folder or split, no images, more classes than the model has, a bad class map,
            `max_bad` unreadable images to be left out (see `Images`) of data that are no image files.
    """
    root, options = find_split(args, split)
    mode = IMAGE_MODES[config["input_size"][0]]
    try:
        dataset = create_dataset(
            args.dataset,
            root=root,
            split=split,
            class_map=class_map or args.class_map,
            is_training=is_training,
            download=args.dataset_download,
            batch_size=args.batch_size,
            input_img_mode=mode,
            **options,
        )
    except (AssertionError, RuntimeError) as error:
        if "Found 0 images" in str(error):
            raise ValueError(f"no images in {root}") from None
        raise ValueError(f"cannot open the dataset in {root}: {error}") from None
    if num_classes is not None and "" in _labels(dataset):
        raise ValueError(f"{root} has images that are in no class folder")
    classes = count_classes(dataset)
    if num_classes is not None and classes > num_classes:
        raise ValueError(f"{root} has {classes} classes, the model {num_classes}: pass --num-classes {classes}")
    if type(dataset) is ImageDataset:
        return Images(dataset.reader, mode, max_bad, is_training)
    if max_bad:
        raise ValueError(f"--max-bad-images is for image files, not for --dataset {args.dataset}")
    return dataset


def count_classes(dataset: Dataset) -> int:
    """The number of classes that a dataset's labels tell apart; 0 where it does not know them."""
    return 1 + max(_labels(dataset).values(), default=-1)


def _labels(dataset: Dataset) -> dict[str, int]:
    return getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}


def make_loader(dataset: Dataset, args: argparse.Namespace, config: dict, device: torch.device, **options):
    """timm's loader: batches `(images, targets)` normalised on `device`. `options` are `create_loader`'s.

    Worker processes start anew each epoch, so that an epoch's random numbers depend on nothing before it.
    """
    # torch warns of more workers than cores in every epoch, which hides what is said below.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    try:
        return create_loader(
            dataset,
            **{
                **config,
                "batch_size": args.batch_size,
                "num_workers": args.workers,
                "pin_memory": args.pin_mem,
                "persistent_workers": False,
                "device": device,
                **options,
            },
        )
    except (AssertionError, KeyError) as error:
        raise ValueError(f"cannot make the data loader: {error}") from error
