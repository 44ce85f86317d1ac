"""The part of `timm-dynamic inspect` on masks: where each block of a model computes, as pictures and as shares."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_dynamic.cli import pose_maps
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cli.data import Images
from timm_dynamic.cli.plot import save_masks, save_ponder_cost
from timm_dynamic.cli.pose_data import Persons
from timm_dynamic.cost import ActivePositions, count_active, count_macs
from timm_dynamic.inspect import ponder_cost, record


def report_masks(
    model: nn.Module, loader, count: int, config: dict, about: dict, out: Path, is_pose: bool = False
) -> None:
    """Draw, for the first images, where the model computes; print and write what that saves.

    Writes `masks.json` and, for each image, `<name>.ponder.png` and `<name>.masks.png`.

    Args:
        model: In eval mode, with masks.
        loader: timm's loader, of single images on the model's device.
        count: The number of images.
        config: timm's data configuration, for the images' normalisation.
        about: What the report begins with.
        out: Folder to write to.
        is_pose: Whether the model sees images whose blue comes first, and finds joints, which are to be drawn.
    """
    static, images, blocks = None, [], {}
    names = _names(loader.dataset)
    total = min(count, len(loader.dataset))
    batches = tqdm(itertools.islice(loader, total), total=total, desc="masks", unit="img", leave=False, disable=None)
    for (x, _), name in zip(batches, names, strict=False):
        static = static or count_macs(model, x).static
        with torch.inference_mode(), record(model) as seen, count_active(model) as active:
            output = model(x)
        executed = round(static - active.skipped_macs)
        images.append({"image": name, "executed_macs": executed, "static_macs": static})
        for block, positions in active.blocks.items():
            blocks.setdefault(block, []).append(positions)
        masks = {block: seen[f"{block}.masker"].float() for block in active.blocks}
        picture, joints = _denormalised(x[0].cpu(), config), None
        if is_pose:
            places, scores = pose_maps.peaks(output.cpu())
            picture, joints = picture.flip(2), torch.cat([pose_maps.STRIDE * places, scores[..., None]], 2)[0]
        title = f"{name}: {_giga(executed)} of {_giga(static)} GMACs ({executed / static:.0%})"
        with replacing(out / f"{name}.ponder.png") as temporary:
            save_ponder_cost(picture, ponder_cost(masks.values())[0], len(masks), title, temporary, joints)
        with replacing(out / f"{name}.masks.png") as temporary:
            save_masks(picture, {block: mask[0, 0] for block, mask in masks.items()}, title, temporary)
    report = {
        **about,
        "images": len(images),
        "per_image": images,
        "blocks": [_shares(block, rows) for block, rows in blocks.items()],
    }
    with replacing(out / "masks.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    print(format_masks(report))
    print(f"\nsaved {out / 'masks.json'} and two pictures an image, {out / images[0]['image']}.*.png")


def format_masks(report: dict) -> str:
    """A table of blocks, and one of images."""
    width = 2 + max(len(row["block"]) for row in report["blocks"])
    lines = [
        f"{report['model']}: share of positions that are active (images: {report['images']})",
        "dilated: those at which the block's first convolution runs",
        "",
        f"{'block':<{width}}{'active':>8}{'dilated':>9}",
    ]
    lines += [f"{row['block']:<{width}}{row['active']:>8.4f}{row['dilated']:>9.4f}" for row in report["blocks"]]
    width = 2 + max(len(row["image"]) for row in report["per_image"])
    width = max(width, len("image") + 2)
    lines += ["", f"{'image':<{width}}{'GMACs':>9}{'static':>9}{'share':>9}"]
    for row in report["per_image"]:
        executed, static = row["executed_macs"], row["static_macs"]
        lines.append(f"{row['image']:<{width}}{_giga(executed):>9}{_giga(static):>9}{executed / static:>9.4f}")
    return "\n".join(lines)


def _names(dataset) -> Iterator[str]:
    """A name for the pictures of every image; files of one name may lie in several folders."""
    if isinstance(dataset, Persons):
        stems = (Path(person.image).stem for person in dataset.people)
    elif isinstance(dataset, Images):
        stems = (Path(dataset.reader.filename(i)).stem for i in range(len(dataset)))
    else:
        return (f"{i:03d}" for i in itertools.count())
    return stems if len(dataset) == 1 else (f"{i:03d}.{stem}" for i, stem in enumerate(stems))


def _shares(block: str, rows: list[ActivePositions]) -> dict:
    active, positions, dilated_active, dilated_positions = map(sum, zip(*rows, strict=True))
    return {"block": block, "active": active / positions, "dilated": dilated_active / dilated_positions}


def _denormalised(image: Tensor, config: dict) -> Tensor:
    """`[C, H, W]` to `[H, W, 1 or 3]`, from 0 to 1."""
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0)[:, :, :3]


def _giga(macs: float) -> str:
    return f"{macs / 1e9:.4f}"
