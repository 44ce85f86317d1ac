"""One epoch of `timm-dynamic train`."""

import argparse
import logging
import time
from collections import defaultdict
from contextlib import nullcontext
from datetime import timedelta

import torch
from timm.data import FastCollateMixup
from timm.scheduler.scheduler import Scheduler
from timm.task.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad, is_primary, reduce_tensor, unwrap_model
from torch import nn
from tqdm import tqdm

from timm_dynamic.cli.common import amp_autocast
from timm_dynamic.cli.train_finite import FiniteGuard
from timm_dynamic.training import auxiliary_loss, set_progress

_logger = logging.getLogger("timm_dynamic.cli.train")  # whose level the command sets

_SECONDS_OF_LOG, _SECONDS_OF_BAR = 30, 1  # between two reports, beside those of --log-interval


def tell_progress(model: nn.Module, epoch: float, epochs: int, args: argparse.Namespace) -> None:
    """Let the schedules in a model follow the epochs, unless it was built to count steps for them."""
    if args.model_kwargs.keys().isdisjoint({"anneal_steps", "total_steps"}):
        set_progress(model, epoch, epochs)


def ramp_mixup(epoch: int, collate: FastCollateMixup, args: argparse.Namespace) -> None:
    """Set mixup's alpha: in epoch e of the first N, counted from 0, it is e/N of the whole."""
    collate.mixup_alpha = args.mixup * min(epoch / args.mixup_ramp_epochs, 1.0)
    collate.mixup_enabled = collate.mixup_alpha > 0 or collate.cutmix_alpha > 0


def train_one_epoch(
    epoch: int,
    epochs: int,
    task: TrainingTask,
    loader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None,
    scaler: NativeScaler | None,
    args: argparse.Namespace,
    device: torch.device,
    guard: FiniteGuard,
) -> dict[str, float]:
    """One pass over the training data.

    Returns:
        Means over the epoch and all processes: the task's `loss`, without the model's auxiliary terms; these, weighted,
        those of one name added up over the layers; a distillation's two parts. Skipped updates (see `FiniteGuard`) are
        left out.

    Raises:
        ValueError: A loss was not finite.
    """
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        loader.mixup_enabled = False
    elif args.mixup_ramp_epochs:
        ramp_mixup(epoch, loader.loader.collate_fn, args)
    model = unwrap_model(task.get_trainable_module().train())
    autocast = amp_autocast(args, device)
    second_order = getattr(optimizer, "is_second_order", False)
    steps, accumulate = len(loader), args.grad_accum_steps
    done = epoch * -(-steps // accumulate)  # updates so far
    sums, images_seen = defaultdict(lambda: torch.zeros((), device=device)), 0
    optimizer.zero_grad()
    began = reported = time.perf_counter()
    bar = tqdm(
        total=steps * args.batch_size * args.world_size,
        desc=f"epoch {epoch}",
        unit="img",
        leave=False,
        disable=None if is_primary(args) else True,
    )
    with bar:
        for step, (images, target) in enumerate(loader):
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            group = min(accumulate, steps - step + step % accumulate)  # batches of this update
            update = step % accumulate == group - 1
            if step % accumulate == 0:
                guard.start()
                before = sums.copy(), images_seen
            lr = optimizer.param_groups[0]["lr"]
            where = f"epoch {epoch}, step {step + 1} of {steps}, learning rate {lr:.3g}"
            tell_progress(model, epoch + step / steps, epochs, args)
            with nullcontext() if update else task.no_sync():
                with autocast:
                    result = task(images, target)
                loss, base = result["loss"], result.get("base_loss", result["loss"])
                guard.watch(base, auxiliary_loss(model))
                skipped = update and guard.skips(where)
                clipped = None
                if args.clip_grad is not None:
                    clipped = task.get_clip_parameters(exclude_head=args.clip_mode == "agc")
                if skipped:
                    pass
                elif scaler:
                    scaler(
                        loss / group,
                        optimizer,
                        clip_grad=args.clip_grad,
                        clip_mode=args.clip_mode,
                        parameters=clipped,
                        create_graph=second_order,
                        need_update=update,
                    )
                else:
                    (loss / group).backward(create_graph=second_order)
                    if update:
                        if clipped is not None:
                            dispatch_clip_grad(clipped, value=args.clip_grad, mode=args.clip_mode)
                        optimizer.step()
            for name, value in {**result, "loss": base}.items():
                if name not in ("base_loss", "output"):
                    sums[name] = sums[name] + value.detach() * len(images)
            images_seen += len(images)
            bar.update(len(images) * args.world_size)
            if not update:
                continue
            done += 1
            optimizer.zero_grad()
            if skipped:
                sums, images_seen = before
            else:
                guard.note(where)
                task.update_ema(step=done)
            now = time.perf_counter()
            due = now - reported >= (_SECONDS_OF_LOG if bar.disable else _SECONDS_OF_BAR)
            if is_primary(args) and images_seen and (due or done % args.log_interval == 0):
                reported = now
                mean = sums["loss"].item() / images_seen
                state = {"loss": f"{mean:.4g}", "lr": f"{lr:.3g}"}
                bar.set_postfix(state)
                if bar.disable:
                    rate = images_seen * args.world_size / (now - began)
                    left = timedelta(seconds=round((now - began) * (steps / (step + 1) - 1)))
                    _logger.info(
                        f"epoch {epoch} [{step + 1}/{steps}]: loss {state['loss']}, lr {state['lr']}, "
                        f"{rate:.0f} images/s, {left} left"
                    )
            if scheduler:
                scheduler.step_update(done)
    guard.look()
    if not images_seen:
        raise ValueError(f"epoch {epoch}: all of its updates were skipped (--skip-nonfinite)")
    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()
    means = torch.stack(list(sums.values())) / images_seen
    means = reduce_tensor(means, args.world_size) if args.distributed else means
    return dict(zip(sums, means.tolist(), strict=True))
