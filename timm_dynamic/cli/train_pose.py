"""`timm-dynamic train_pose`: train a network to find the joints of a person, in the loop of `train`."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_dynamic.cli import train
from timm_dynamic.cli.pose_data import build_loaders, to_photograph
from timm_dynamic.cli.pose_maps import THRESHOLDS, HeatmapLoss, check_network, count_hits, pckh, peaks, predict
from timm_dynamic.cli.segmentation_data import DeviceLoader


def main(args: argparse.Namespace) -> None:
    check = partial(evaluate, flip_test=args.flip_test)
    train.run(args, train.Parts(build_loaders, lambda _: HeatmapLoss(), build_optimizer, check))


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; raises a `ValueError` for another kind of network, too."""
    check_network(args.model, model)
    return train.build_optimizer(args, model)


def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    autocast: AbstractContextManager | None = None,
    channels_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    label: str = "validate",
    flip_test: bool = False,
) -> dict[str, float]:
    """The loss of the last heat maps, and PCKh at 0.5 and 0.1 in percent; exact, also over several processes.

    Args:
        model: Maps images `[B, 3, H, W]` to heat maps `[B, 16, H/4, W/4]`.
        loader: Of `build_loaders`.
        autocast, channels_last, rank, world_size, label: As for `validate.evaluate`.
        flip_test: As for `pose_maps.predict`.
    """
    loss, counts = measure(model, loader, autocast, channels_last, rank, world_size, label, flip_test)
    shares = pckh(counts)
    return {"loss": loss, "pckh": shares["mean"], "pckh@0.1": shares["mean@0.1"]}


@torch.inference_mode()
def measure(
    model: nn.Module,
    loader: DeviceLoader,
    autocast: AbstractContextManager | None,
    channels_last: bool,
    rank: int,
    world_size: int,
    label: str,
    flip_test: bool,
) -> tuple[float, Tensor]:
    """The loss, and the `count_hits` of all persons. Arguments are those of `evaluate`."""
    model.eval()
    persons, criterion = loader.dataset, HeatmapLoss()
    centers, scales = (
        torch.from_numpy(np.array([getattr(person, key) for person in persons.people])) for key in ("center", "scale")
    )
    counts, loss, seen = torch.zeros(len(THRESHOLDS) + 1, len(persons.truth.missing[0])), 0.0, 0
    # Several processes get equally many persons, the surplus repeated from the start: those are not counted twice.
    share = range(rank, len(persons), world_size)
    with tqdm(total=len(share), desc=label, unit="img", leave=False, disable=True if rank else None) as bar:
        for images, target in loader:
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast or nullcontext():
                maps = predict(model, images, flip_test)
            rows = list(share[seen : seen + len(images)])
            maps, target = maps[: len(rows)].float(), target[: len(rows)]
            if not rows:
                continue
            loss += len(rows) * criterion(maps, target).item()
            places = to_photograph(peaks(maps)[0].cpu(), centers[rows], scales[rows], maps.shape[2:])
            counts = counts + count_hits(places, *(part[rows] for part in persons.truth))
            seen += len(rows)
            bar.update(len(rows))
    sums = torch.cat([torch.tensor([loss], dtype=torch.float64), counts.double().flatten()]).to(loader.device)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    return sums[0].item() / len(persons), sums[1:].cpu().view_as(counts)
