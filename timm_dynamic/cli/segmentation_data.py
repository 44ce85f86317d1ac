"""Datasets and loaders of `train_segmentation`: torchvision's Pascal VOC and SBD, with torchvision's transforms."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate
from torchvision import tv_tensors
from torchvision.datasets import SBDataset, VOCSegmentation
from torchvision.transforms import v2

from timm_dynamic.cli.data import UnreadableImage

IGNORED = 255  # the class of pixels that do not count: VOC's outlines, and padding


class Scenes(Dataset):
    """Images with a class for each pixel, from torchvision's datasets.

    Args:
        items: Datasets with `images` and `masks`, and indices into them.
        num_classes: Classes that a mask may have, beside `IGNORED`.
        transform: Of an image and its mask, as `tv_tensors`.

    Raises:
        UnreadableImage: On access, naming the file: it cannot be read, or the mask is none for its image.
    """

    def __init__(self, items: list[tuple[Dataset, int]], num_classes: int, transform: Callable):
        self.items, self.num_classes, self.transform = items, num_classes, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The image, `[3, H, W]`, and the class of every pixel, `[H, W]` of int64."""
        dataset, i = self.items[index]
        name, mask_name = dataset.images[i], dataset.masks[i]
        try:
            image, mask = (v2.functional.pil_to_tensor(part) for part in dataset[i])
        except Exception as error:  # Pillow raises all kinds, by format
            reason = " ".join(str(error).split())
            raise UnreadableImage(f"cannot read {name} with its mask {mask_name}: {reason}") from error
        if len(mask) != 1:
            raise UnreadableImage(f"{mask_name} has {len(mask)} channels: a mask has one, the number of the class")
        if mask.shape[1:] != image.shape[1:]:
            sizes = " and ".join(f"{height}x{width}" for _, height, width in (image.shape, mask.shape))
            raise UnreadableImage(f"{name} and its mask {mask_name} differ in size: {sizes}")
        highest = int(mask.masked_fill(mask == IGNORED, 0).max())
        if highest >= self.num_classes:
            raise UnreadableImage(
                f"{mask_name} has class {highest}: the model has 0 to {self.num_classes - 1}, and {IGNORED} is ignored"
            )
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image, mask[0]


class DeviceLoader(DataLoader):
    """A loader whose batches come on a device."""

    def __init__(self, *args, device: torch.device, **kwargs):
        super().__init__(*args, **kwargs)
        self.device = device

    def __iter__(self):
        for images, masks in super().__iter__():
            yield images.to(self.device, non_blocking=True), masks.to(self.device, non_blocking=True)


def build_loaders(
    args: argparse.Namespace, config: dict, val_config: dict, device: torch.device, num_classes: int
) -> tuple[DeviceLoader, DeviceLoader | None]:
    """The training and the validation loader; None for the latter if `--val-split` is empty."""
    if config["input_size"][0] != 3:
        raise ValueError("the images have three channels: leave out --in-chans")
    val_set = open_scenes(args, val_config, num_classes) if args.val_split else None
    train_set = Scenes(_find(args, training=True), num_classes, train_transform(args, config))
    if len(train_set) < args.batch_size * args.world_size:
        raise ValueError(
            f"--batch-size {args.batch_size} on {args.world_size} processes is more than the {len(train_set)} images "
            f"in {args.train_split}"
        )
    sampler = DistributedSampler(train_set) if args.distributed else None
    loader = _make_loader(
        train_set, args, device, sampler, batch_size=args.batch_size, shuffle=sampler is None, drop_last=True
    )
    if not val_set:
        return loader, None
    sampler = OrderedDistributedSampler(val_set) if args.distributed else None
    batch_size = args.validation_batch_size or args.batch_size
    collate = partial(pad_batch, size=val_config["input_size"][-2:])
    return loader, _make_loader(val_set, args, device, sampler, batch_size=batch_size, collate_fn=collate)


def open_scenes(args: argparse.Namespace, config: dict, num_classes: int) -> Scenes:
    """The validation images, as they are but for the scale of their values."""
    scenes = Scenes(_find(args, training=False), num_classes, v2.Compose([*_to_floats(config), v2.ToPureTensor()]))
    if not len(scenes):
        raise ValueError(f"{args.val_split} has no images")
    return scenes


def train_transform(args: argparse.Namespace, config: dict) -> v2.Transform:
    """Random scale, crop, flip and blur; what a crop has beyond the image is 0 and `IGNORED`."""
    size = config["input_size"][-2:]
    low, high = (max(1, round(factor * min(size))) for factor in args.scale)
    if low > high:
        raise ValueError(f"--scale {args.scale[0]} {args.scale[1]}: the first must not be larger")
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(args.hflip),
            v2.RandomShortestSize(range(low, high + 1)),
            *_to_floats(config),
            v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}),
            v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 1.0))], args.blur),
            v2.ToPureTensor(),
        ]
    )


def pad_batch(samples: list[tuple[Tensor, Tensor]], size: tuple[int, int]) -> list[Tensor]:
    """Stack images of different sizes, padded to the largest, and to `size` at least, with 0 and `IGNORED`."""
    height, width = (
        max(least, *sides) for least, *sides in zip(size, *(mask.shape for _, mask in samples), strict=True)
    )
    return default_collate(
        [
            (
                F.pad(image, (0, width - mask.shape[1], 0, height - mask.shape[0])),
                F.pad(mask, (0, width - mask.shape[1], 0, height - mask.shape[0]), value=IGNORED),
            )
            for image, mask in samples
        ]
    )


def _to_floats(config: dict) -> list[v2.Transform]:
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(config["mean"], config["std"])]


def _make_loader(
    dataset: Dataset, args: argparse.Namespace, device: torch.device, sampler: Sampler | None, **options
) -> DeviceLoader:
    return DeviceLoader(
        dataset, sampler=sampler, num_workers=args.workers, pin_memory=args.pin_mem, device=device, **options
    )


def _find(args: argparse.Namespace, training: bool) -> list[tuple[Dataset, int]]:
    """The images of a split. With both datasets, SBD's are added for training, without those for validation."""
    if not (args.data or args.data_dir):
        raise ValueError("no data: name its folder, as in `DATA` or --data-dir")
    root = Path(args.data or args.data_dir)
    split = args.train_split if training else args.val_split
    if args.dataset == "sbd":
        return _items(_open(SBDataset, root, split, args))
    voc = _open(VOCSegmentation, root, split, args)
    if args.dataset == "voc" or not training:
        return _items(voc)
    known = {Path(name).stem for name in voc.images}
    if args.val_split:
        known |= {Path(name).stem for name in _open(VOCSegmentation, root, args.val_split, args).images}
    both = [item for part in ("train", "val") for item in _items(_open(SBDataset, root, part, args))]
    return _items(voc) + [(sbd, i) for sbd, i in both if Path(sbd.images[i]).stem not in known]


def _items(dataset: Dataset) -> list[tuple[Dataset, int]]:
    return [(dataset, i) for i in range(len(dataset))]


def _open(cls: type[Dataset], root: Path, split: str, args: argparse.Namespace) -> Dataset:
    if cls is SBDataset:
        root = root if args.dataset == "sbd" else root / "sbd"
        kind, folder, options = "SBD", root / "img", {"mode": "segmentation"}
    else:
        kind, folder, options = "VOC", root / "VOCdevkit" / "VOC2012", {}
    download = args.dataset_download and not folder.is_dir()
    if not (download or folder.is_dir()):
        raise ValueError(f"no {kind} data: {folder} does not exist (--dataset-download fetches it)")
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        return cls(str(root), image_set=split, download=download, **options)
    except FileNotFoundError as error:
        raise ValueError(f"{kind} in {root} has no list of the split {split}: {error.filename} is missing") from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"cannot open the {kind} data in {root}: {error}") from None
