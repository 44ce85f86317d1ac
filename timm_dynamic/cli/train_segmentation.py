"""`timm-dynamic train_segmentation`: train a network for semantic segmentation, in the loop of `train`."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

try:
    from torchmetrics.classification import MulticlassJaccardIndex
except ModuleNotFoundError:
    raise ModuleNotFoundError('segmentation needs torchmetrics: pip install "timm-dynamic[train]"') from None

from timm_dynamic.cli import train
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cli.common import amp_autocast
from timm_dynamic.cli.data import resolve_data
from timm_dynamic.cli.segmentation_data import IGNORED, DeviceLoader, build_loaders, open_scenes


def main(args: argparse.Namespace) -> None:
    if args.pictures and args.val_split:
        from timm_dynamic.cli import plot  # noqa: F401 (says what is missing, before the training and not after)
    folder, model = train.run(args, train.Parts(build_loaders, build_loss, build_optimizer, evaluate))
    if folder and args.pictures > 0 and args.val_split:
        draw(args, model, folder / "predictions.png")


def build_loss(args: argparse.Namespace) -> nn.Module:
    """Cross-entropy, without the pixels that do not count."""
    return nn.CrossEntropyLoss(ignore_index=IGNORED)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer, with weight decay on everything, and `--head-lr-scale` for all but the backbone.

    Raises:
        ValueError: If the model has no backbone, as classifiers have none, or for what `train.build_optimizer` raises.
    """
    if not hasattr(model, "backbone"):
        raise ValueError(f"{args.model} is no segmentation model: timm.list_models('*deeplab*') names ours")
    return train.build_optimizer(args, model, param_group_fn=partial(_groups, args))


def _groups(args: argparse.Namespace, model: nn.Module) -> list[dict]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    backbone = [p for name, p in parameters.items() if name.startswith("backbone.")]
    head = [p for name, p in parameters.items() if not name.startswith("backbone.")]
    return [{"params": backbone, "lr": args.lr}, {"params": head, "lr": args.lr * args.head_lr_scale}]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    autocast: AbstractContextManager | None = None,
    channels_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    label: str = "validate",
) -> dict[str, float]:
    """Mean cross-entropy over the pixels that count, and mIoU in percent; exact, also over several processes.

    The mIoU is the mean, over the classes that are in a mask or predicted somewhere, of intersection over union, whose
    pixels are those of all images.

    Args:
        model: Maps images `[B, 3, H, W]` to logits `[B, classes, H, W]`.
        loader: Of `build_loaders`.
        autocast, channels_last, rank, world_size, label: As for `validate.evaluate`.
    """
    model.eval()
    # Several processes get equally many images, the surplus repeated from the start: those are not counted twice.
    share, seen = len(range(rank, len(loader.dataset), world_size)), 0
    miou = MulticlassJaccardIndex(loader.dataset.num_classes, ignore_index=IGNORED, validate_args=False)
    miou, sums = miou.to(loader.device), torch.zeros(2, dtype=torch.float64, device=loader.device)  # of loss and pixels
    with tqdm(total=share, desc=label, unit="img", leave=False, disable=True if rank else None) as bar:
        for images, masks in loader:
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast or nullcontext():
                output = model(images)
            output, masks = output[: share - seen].float(), masks[: share - seen]
            miou.update(output.argmax(1), masks)
            loss = F.cross_entropy(output, masks, ignore_index=IGNORED, reduction="sum")
            sums += torch.stack([loss, (masks != IGNORED).sum()])
            seen += len(masks)
            bar.update(len(masks))
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    loss, pixels = sums.tolist()
    return {"loss": loss / max(1, pixels), "miou": 100 * miou.compute().item()}


@torch.inference_mode()
def draw(args: argparse.Namespace, model: nn.Module, path: Path) -> None:
    """Draw the first images of the validation data, their masks and what the model predicts.

    Args:
        args: The flags.
        model: As it was validated last.
        path: PNG to write.
    """
    from timm_dynamic.cli.plot import save_predictions

    device = next(model.parameters()).device
    config = resolve_data(args, getattr(model, "_orig_mod", model), use_test_size=True)
    scenes = open_scenes(args, config, model.num_classes)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    rows = []
    for image, mask in (scenes[i] for i in range(min(args.pictures, len(scenes)))):
        with amp_autocast(args, device):
            predicted = model.eval()(image[None].to(device)).argmax(1)[0].cpu()
        rows.append(((image * std + mean).clamp(0, 1).permute(1, 2, 0), mask, predicted))
    with replacing(path) as temporary:
        save_predictions(rows, scenes.num_classes, f"{args.model}: prediction after the last epoch", temporary)
    print(f"pictures: {path}")
