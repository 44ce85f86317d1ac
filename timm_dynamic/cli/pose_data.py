"""Persons of MPII Human Pose, in the JSON files that came with HRNet, cut out of their photographs."""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from timm_dynamic.cli.arguments.pose import annotations_of, truth_of
from timm_dynamic.cli.data import UnreadableImage
from timm_dynamic.cli.pose_maps import JOINTS, PAIRS, RADIUS, STRIDE
from timm_dynamic.cli.segmentation_data import DeviceLoader

_HEIGHT = 200  # pixels of a person of scale 1
_HEAD = 0.6  # of the diagonal of a head's box
_SHAPES = {"center": (2,), "scale": (), "joints": (len(JOINTS), 2), "joints_vis": (len(JOINTS),)}


class Person(NamedTuple):
    """A person in a photograph; pixels count from 0.

    Attributes:
        image: File name.
        center: Of the person, `[2]`.
        scale: The side of the square around the person, over 200 pixels.
        joints: `[16, 2]`.
        visible: `[16]`, whether a joint counts.
    """

    image: str
    center: np.ndarray
    scale: float
    joints: np.ndarray
    visible: np.ndarray


class Truth(NamedTuple):
    """What predictions are compared with; pixels count from 1.

    Attributes:
        joints: `[N, 16, 2]`.
        missing: `[N, 16]`, whether a joint does not count.
        head_sizes: `[N]`, in pixels.
    """

    joints: Tensor
    missing: Tensor
    head_sizes: Tensor


class Augmentation(NamedTuple):
    """How persons are varied in training.

    Attributes:
        scale: Standard deviation of the factor on a person's scale, at most once this much from 1.
        rotation: Standard deviation in degrees, at most twice this much.
        rotation_prob, hflip: Probabilities.
    """

    scale: float
    rotation: float
    rotation_prob: float
    hflip: float


class Persons(Dataset):
    """Persons, each in an image of one size; blue comes first, as OpenCV and so the authors' weights have it.

    Args:
        folder: Of the photographs.
        people: Of `read_people`.
        config: timm's data configuration.
        augmentation: None: as annotated.
        truth: Of the same people, for validation.

    Raises:
        UnreadableImage: On access, naming the file.
    """

    def __init__(
        self,
        folder: Path,
        people: list[Person],
        config: dict,
        augmentation: Augmentation | None = None,
        truth: Truth | None = None,
    ):
        self.folder, self.people, self.augmentation, self.truth = folder, people, augmentation, truth
        self.size = tuple(config["input_size"][-2:])
        self.mean, self.std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The image, `[3, H, W]`, and for `pose_maps.target_maps` the joints, `[16, 3]`."""
        person, rotation = self.people[index], 0.0
        image = _opened(self.folder / person.image, "RGB")
        if self.augmentation:
            person, image, rotation = vary(person, image, self.augmentation)
        matrix = crop_matrix(person.center, person.scale, rotation, self.size)
        joints = person.joints @ matrix[:, :2].T + matrix[:, 2]
        pixels = torch.from_numpy(np.ascontiguousarray(np.asarray(cut(image, matrix, self.size))[:, :, ::-1]))
        pixels = (pixels.permute(2, 0, 1).float() / 255 - self.mean) / self.std
        return pixels, torch.from_numpy(to_target(joints, person.visible, self.size))


def _opened(path: Path, mode: str | None = None) -> Image.Image:
    """A photograph; without a mode only its header is read, which has its size."""
    try:
        image = Image.open(path)
        return image.convert(mode) if mode else image
    except Exception as error:  # Pillow raises all kinds, by format
        raise UnreadableImage(f"cannot read image {path}: {' '.join(str(error).split())}") from error


def vary(person: Person, image: Image.Image, how: Augmentation) -> tuple[Person, Image.Image, float]:
    """A person at random; returns an angle in degrees, to be rotated by, too."""
    factor, angle = torch.randn(2).tolist()
    factor = min(max(1 + how.scale * factor, 1 - how.scale), 1 + how.scale)
    angle = min(max(how.rotation * angle, -2 * how.rotation), 2 * how.rotation)
    rotated, mirrored = torch.rand(2).tolist()
    person = person._replace(scale=person.scale * factor)
    if mirrored < how.hflip:
        person, image = mirror(person, image.width), ImageOps.mirror(image)
    return person, image, angle if rotated < how.rotation_prob else 0.0


def mirror(person: Person, width: int) -> Person:
    """The person in the mirrored photograph, of a width in pixels."""
    order = np.arange(len(JOINTS))
    for right, left in PAIRS:
        order[[right, left]] = left, right
    joints, center = person.joints[order], person.center.copy()
    joints[:, 0], center[0] = width - 1 - joints[:, 0], width - 1 - center[0]
    return person._replace(center=center, joints=joints, visible=person.visible[order])


def crop_matrix(center: np.ndarray, scale: float, rotation: float, size: tuple[int, int]) -> np.ndarray:
    """The similarity, `[2, 3]`, from pixels of a photograph to those of the image cut out of it.

    Args:
        center, scale: Of the person, which comes to the middle.
        rotation: In degrees.
        size: Height and width of the image; the person's square becomes as wide as it.
    """
    height, width = size
    angle, factor = math.radians(rotation), width / (_HEIGHT * scale)
    cos, sin = factor * math.cos(angle), factor * math.sin(angle)
    linear = np.array([[cos, sin], [-sin, cos]])
    return np.column_stack([linear, np.array([width / 2, height / 2]) - linear @ center])


def cut(image: Image.Image, matrix: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The image of a size (height, width) that `matrix` takes pixels to: bilinear, black beyond the photograph."""
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    back[:, 2] += 0.5 - back[:, :2] @ [0.5, 0.5]  # Pillow's centres of pixels are at a half
    return image.transform(size[::-1], Image.Transform.AFFINE, back.ravel().tolist(), Image.Resampling.BILINEAR)


def to_target(joints: np.ndarray, visible: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Joints `[J, 2]`, in pixels of an image of a size, as `[J, 3]` for `pose_maps.target_maps`."""
    joints = np.where(visible[:, None], joints, 0)
    centres = np.trunc(joints / STRIDE + 0.5)
    limits = np.array(size[::-1]) // STRIDE
    inside = (centres - RADIUS < limits) & (centres + RADIUS + 1 >= 0)
    return np.column_stack([centres, visible & inside.all(1)]).astype(np.float32)


def to_photograph(peaks: Tensor, centers: Tensor, scales: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the peaks of heat maps are in the photographs, in pixels from 1 on.

    Args:
        peaks: `[N, J, 2]`.
        centers, scales: Of the persons, `[N, 2]` and `[N]`.
        size: Height and width of a heat map.
    """
    height, width = size
    middle = torch.tensor([width / 2, height / 2], dtype=peaks.dtype)
    return centers[:, None] + (peaks - middle) * (_HEIGHT * scales / width)[:, None, None] + 1


def build_loaders(
    args: argparse.Namespace, config: dict, val_config: dict, device: torch.device, num_classes: int
) -> tuple[DeviceLoader, DeviceLoader | None]:
    """The training and the validation loader; None for the latter if `--val-split` is empty."""
    augmentation = Augmentation(args.scale_factor, args.rotation_factor, args.rotation_prob, args.hflip)
    val_set = open_persons(args, args.val_split, val_config) if args.val_split else None
    train_set = open_persons(args, args.train_split, config, augmentation)
    if len(train_set) < args.batch_size * args.world_size:
        raise ValueError(
            f"--batch-size {args.batch_size} on {args.world_size} processes is more than the {len(train_set)} persons "
            f"in {args.train_split}"
        )
    sampler = DistributedSampler(train_set) if args.distributed else None
    options = {"sampler": sampler, "shuffle": sampler is None, "drop_last": True}  # as in timm's loaders
    loader = make_loader(train_set, args, device, args.batch_size, **options)
    if val_set is None:
        return loader, None
    sampler = OrderedDistributedSampler(val_set) if args.distributed else None
    return loader, make_loader(val_set, args, device, args.validation_batch_size or args.batch_size, sampler=sampler)


def make_loader(
    persons: Persons, args: argparse.Namespace, device: torch.device, batch_size: int, **options
) -> DeviceLoader:
    """Batches on a device; `options` are those of `DataLoader`."""
    workers = {"num_workers": args.workers, "pin_memory": args.pin_mem}
    return DeviceLoader(persons, batch_size=batch_size, device=device, **workers, **options)


def open_persons(
    args: argparse.Namespace, split: str, config: dict, augmentation: Augmentation | None = None, truth: bool = True
) -> Persons:
    """The persons of a split; without augmentation they come with their truth, unless `truth` is False.

    Raises:
        ValueError: Unusable annotations, a missing or unreadable photograph, or a joint far beyond it.
    """
    if config["input_size"][0] != 3:
        raise ValueError("the images have three channels: leave out --in-chans")
    annotations = annotations_of(args, split)
    people, folder = read_people(annotations), annotations.parents[1] / "images"
    known = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    sizes: dict[str, tuple[int, int]] = {}
    for index, person in enumerate(people):
        where, path = f"{annotations}, person {index}", folder / person.image
        if person.image not in known:
            raise ValueError(f"{where}: no photograph {path}")
        if person.image not in sizes:
            with _opened(path) as image:
                sizes[person.image] = image.size
        _check_joints(person, sizes[person.image], where, path)
    wanted = None if augmentation or not truth else read_truth(truth_of(annotations), len(people))
    return Persons(folder, people, config, augmentation, wanted)


def _check_joints(person: Person, size: tuple[int, int], where: str, path: Path) -> None:
    """Joints can be a little beyond the photograph. What is further out than it is large is a mistake."""
    beyond = np.maximum(-person.joints, person.joints - size) > size
    for joint in np.flatnonzero(beyond.any(1) & person.visible):
        x, y = person.joints[joint] + 1
        raise ValueError(
            f"{where}: the {JOINTS[joint]} (joint {joint}) at ({x:g}, {y:g}) is far out of {path}, "
            f"{size[0]} x {size[1]}: correct it, or set its joints_vis to 0"
        )


def read_people(path: Path) -> list[Person]:
    """The persons in an annotation file: a list with `image`, `center`, `scale`, `joints`, `joints_vis` of each.

    Raises:
        ValueError: Another content; naming the person, counted from 0.
    """
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no persons: it must be a list with one entry for each")
    return [_person(entry, f"{path}, person {index}") for index, entry in enumerate(entries)]


def _person(entry: Any, where: str) -> Person:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise ValueError(f"{where}: it must have the keys image, {', '.join(_SHAPES)}")
    values = {}
    for key, shape in _SHAPES.items():
        if key not in entry:
            raise ValueError(f"{where}: {key} is missing")
        try:
            values[key] = np.array(entry[key], dtype=float)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {key} must be numbers, and is {str(entry[key])[:60]}") from None
        if values[key].shape != shape:
            sizes = ["x".join(map(str, size)) or "one" for size in (shape, values[key].shape)]
            raise ValueError(f"{where}: {key} must be {sizes[0]} numbers, and is {sizes[1]}")
        if not np.isfinite(values[key]).all():
            raise ValueError(f"{where}: {key} must be finite")
    center, scale, joints, visible = values.values()
    if not scale > 0:
        raise ValueError(f"{where}: scale must be above 0, and is {scale:g}")
    if not np.isin(visible, (0, 1)).all():
        raise ValueError(f"{where}: joints_vis must be 0 or 1")
    if center[0] != -1:  # room for the feet, and around the person
        center[1] += 15 * scale
        scale = 1.25 * scale
    return Person(entry["image"], center - 1, float(scale), joints - 1, visible == 1)


def read_truth(path: Path, number: int) -> Truth:
    """The joints and boxes of heads in MPII's MATLAB file, for so many persons.

    Raises:
        ValueError: Another content.
        ModuleNotFoundError: Without scipy.
    """
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise ModuleNotFoundError('PCKh needs scipy: pip install "timm-dynamic[train]"') from None
    try:
        content = loadmat(path)
    except Exception as error:  # a damaged file fails in about every way there is
        raise ValueError(f"{path} is no MATLAB file that scipy reads: {' '.join(str(error).split())}") from None
    shapes = {
        "pos_gt_src": (len(JOINTS), 2, number),
        "jnt_missing": (len(JOINTS), number),
        "headboxes_src": (2, 2, number),
    }
    values = []
    for key, shape in shapes.items():
        value = content.get(key)
        if value is None or value.shape != shape or value.dtype.kind not in "biuf":
            found = "is missing" if value is None else f"is {'x'.join(map(str, value.shape))} of {value.dtype}"
            raise ValueError(f"{path}: {key} must be {'x'.join(map(str, shape))} numbers, and {found}")
        values.append(torch.from_numpy(value.astype(float)))
    joints, missing, heads = values[0].permute(2, 0, 1), values[1].T != 0, values[2].permute(2, 0, 1)
    sizes = _HEAD * torch.linalg.vector_norm(heads[:, 1] - heads[:, 0], dim=1)
    if not (sizes > 0).all():
        raise ValueError(f"{path}: the head's box of person {int((~(sizes > 0)).nonzero()[0])} has no size")
    if missing.all():
        raise ValueError(f"{path}: no joint counts, all are missing")
    return Truth(joints, missing, sizes)
