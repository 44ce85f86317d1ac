"""`timm-dynamic train`: train any timm model as an image classifier, on timm's data, optim, scheduler and task."""

import argparse
import functools
import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from timm.data import FastCollateMixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task.task import TrainingTask
from timm.utils import (
    distribute_bn,
    get_outdir,
    init_distributed_device,
    is_primary,
    random_seed,
    update_summary,
)
from torch import nn

from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cli.arguments.train import run_folder
from timm_dynamic.cli.common import (
    amp_autocast,
    check_classifier,
    check_compile,
    name_of,
    resolve_device,
)
from timm_dynamic.cli.data import (
    count_classes,
    describe,
    make_loader,
    open_dataset,
    report_bad_images,
    resolve_data,
)
from timm_dynamic.cli.train_build import build_model, build_scaler, build_task, check_options, start_log
from timm_dynamic.cli.train_decisions import FirstImages, executed_share, routing_spreads
from timm_dynamic.cli.train_epoch import tell_progress, train_one_epoch
from timm_dynamic.cli.train_finite import FiniteGuard
from timm_dynamic.cli.train_state import (
    SafeSaver,
    find_checkpoint,
    read_rows,
    reload_history,
    repeatable,
    sync,
    write_rows,
)
from timm_dynamic.cli.validate import evaluate
from timm_dynamic.convert import check_finite, extract_state_dict, one_line, read_checkpoint

_logger = logging.getLogger(__name__)

_WARMUP_EPOCHS = 5


class Parts(NamedTuple):
    """What a run depends on beyond its flags: functions with the arguments of this module's own."""

    build_loaders: Callable
    build_loss: Callable
    build_optimizer: Callable
    evaluate: Callable


def main(args: argparse.Namespace) -> None:
    def build_optimizer_of_classifier(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
        check_classifier(args.model, model)
        return build_optimizer(args, model)

    check_classifier(args.model)
    run(args, Parts(build_loaders, build_loss, build_optimizer_of_classifier, evaluate))


def run(args: argparse.Namespace, parts: Parts) -> tuple[Path | None, nn.Module]:
    """Prepare this process and train; see `train`."""
    flags = yaml.safe_dump(vars(args), default_flow_style=False)  # before the run adds its own
    resolve_device(args)
    check_compile(args)
    args.dist_url = "attempt://"  # see train_state.rendezvous_of_attempt
    device = init_distributed_device(args)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    _logger.setLevel(logging.INFO if is_primary(args) else logging.WARNING)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not args.deterministic
        torch.set_float32_matmul_precision("high")
    try:
        with repeatable(args):
            return train(args, flags, device, parts)
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


def train(args: argparse.Namespace, flags: str, device: torch.device, parts: Parts) -> tuple[Path | None, nn.Module]:
    """Train, validating and saving after each epoch.

    Args:
        args: What `make_parser` parsed, and what `init_distributed_device` added.
        flags: The parsed arguments as YAML, for the output folder.
        device: Where to train.
        parts: What is trained for.

    Returns:
        The output folder, None in all processes but the first, and the model that was validated last.
    """
    check_options(args, device)
    if auto := args.resume == "auto":
        args.resume = find_checkpoint(args)
    random_seed(args.seed, args.rank)
    name, model = name_of(args), build_model(args, device)
    config = resolve_data(args, model)
    val_config = resolve_data(args, model, use_test_size=True)  # as `validate` has it
    loader, val_loader = parts.build_loaders(args, config, val_config, device, model.num_classes)
    task = build_task(args, model, parts.build_loss(args).to(device), device)
    optimizer = parts.build_optimizer(args, task.get_trainable_module())
    scaler = build_scaler(args, task, optimizer, device)
    if args.model_ema:
        ema_device = torch.device("cpu") if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
    resumed = resume(args, task, optimizer, scaler) if args.resume else 0
    start = resumed if args.start_epoch is None else args.start_epoch

    if args.warmup_epochs is None:
        args.warmup_epochs = min(_WARMUP_EPOCHS, args.epochs // 10)
    updates = -(-len(loader) // args.grad_accum_steps)
    decreasing = val_loader is None or args.eval_metric == "loss"
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=decreasing), updates_per_epoch=updates
    )
    if scheduler:
        scheduler.step(start)
        scheduler.step_update(start * updates)

    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    eval_models = {"validate": task.get_eval_model()}
    if args.model_ema and not args.model_ema_force_cpu:
        eval_models["validate EMA"] = task.get_eval_model(ema=True)
    if args.distributed:
        options = {"broadcast_buffers": False} if args.no_ddp_bb else {}
        if args.deterministic and args.world_size > 2:
            # Else DDP rearranges the gradients after its first update, and with them the order of sums over processes.
            options["find_unused_parameters"] = True
        task.prepare_distributed(device_ids=None if device.type == "cpu" else [device], **options)

    folder = saver = log = None
    metric = f"eval_{args.eval_metric}" if val_loader else "train_loss"
    if is_primary(args):
        run_name = f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(name)}-{config['input_size'][-1]}"
        folder = Path(get_outdir(run_folder(args, args.experiment or run_name)))
        saver = SafeSaver(
            model,
            optimizer,
            args=args,
            amp_scaler=scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=decreasing,
            max_history=args.checkpoint_hist,
            task=task,
        )
        log = start_log(args, folder)
        reload_history(saver, folder / "summary.csv", start, metric, args.resume if auto else "")
        with replacing(folder / "args.yaml") as temporary:
            temporary.write_text(flags)
    plan = f"epochs {start} to {epochs - 1}" if start < epochs else f"nothing left to do after {start} epochs"
    _logger.info(
        f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {model.num_classes} classes; {plan}, "
        f"{updates} updates each, batch {args.batch_size} x {args.grad_accum_steps} x {args.world_size}, "
        f"lr {args.lr:g}, {args.warmup_epochs} epochs to warm up, {args.workers} workers a process\n"
        f"training images {describe(config)}; validation {describe(val_config)}\n"
        f"in {folder}"
    )

    guard = FiniteGuard(model, args)
    for epoch in range(start, epochs):
        # An epoch's random numbers follow from seed, epoch and rank alone, so that a resumed run draws the same.
        random_seed(args.seed + epoch * args.world_size, args.rank)
        for part in (loader.sampler, loader.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        began = time.perf_counter()
        losses = train_one_epoch(epoch, epochs, task, loader, optimizer, scheduler, scaler, args, device, guard)
        metrics = {f"train_{key}": value for key, value in losses.items()}
        rate = len(loader) * args.batch_size * args.world_size / (time.perf_counter() - began)
        for label, eval_model in eval_models.items() if val_loader else ():
            if args.distributed and args.dist_bn:
                distribute_bn(eval_model, args.world_size, args.dist_bn == "reduce")
            tell_progress(eval_model, epoch, epochs, args)  # the averaged copy has not heard of this epoch yet
            images = FirstImages(val_loader)
            with executed_share(eval_model) as executed:
                result = parts.evaluate(
                    eval_model,
                    images,
                    amp_autocast(args, device),
                    args.channels_last,
                    args.rank,
                    args.world_size,
                    label,
                )
            result |= executed
            if saver and label == "validate":
                with amp_autocast(args, device):
                    result |= routing_spreads(model, images.first, folder / "routing.json", epoch)
            metrics |= {f"eval_{key}": value for key, value in result.items()}  # the averaged weights' come last
        for part in (loader, val_loader) if val_loader else (loader,):
            report_bad_images(part.dataset, f"epoch {epoch}", args.distributed, device)
        if saver:
            lr = sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)
            with saver.saving(epoch):
                write_summary(folder / "summary.csv", epoch, metrics, lr)
                sync(folder / "summary.csv")
                saver.save_checkpoint(epoch, metrics[metric])
            log({"epoch": epoch, **metrics, "lr": lr})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            _logger.info(f"epoch {epoch}: {shown}, lr {lr:.3g}, {rate:.0f} images/s")
        if scheduler:
            scheduler.step(epoch + 1)
    if saver and saver.best_metric is not None:
        print(f"best {metric}: {saver.best_metric:.4f} (epoch {saver.best_epoch}), in {folder}")
    return folder, list(eval_models.values())[-1]


def build_loaders(
    args: argparse.Namespace, config: dict, val_config: dict, device: torch.device, num_classes: int
) -> tuple:
    """The training and the validation loader; None for the latter if `--val-split` is empty."""
    train_set = open_dataset(args, args.train_split, config, num_classes, is_training=True, max_bad=args.max_bad_images)
    if args.num_classes is None and 0 < (classes := count_classes(train_set)) < num_classes:
        _logger.info(
            f"{args.model} has {num_classes} classes, the data {classes}: to train with these alone pass "
            f"--num-classes {classes}"
        )
    collate = None
    if _mixing(args):
        if args.batch_size % 2:
            raise ValueError(f"mixup and CutMix pair images: --batch-size {args.batch_size} must be even")
        collate = FastCollateMixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    for flag, bounds in (("scale", args.scale), ("ratio", args.ratio)):
        if bounds and bounds[0] > bounds[-1]:
            raise ValueError(f"--{flag} {bounds[0]} {bounds[-1]}: the first must not be larger")
    train_options = {
        "is_training": True,
        "no_aug": args.no_aug,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
        "scale": args.scale,
        "ratio": args.ratio,
        "hflip": args.hflip,
        "vflip": args.vflip,
        "color_jitter": _color_jitter(args),
        "auto_augment": args.aa,
        "interpolation": (not args.no_aug and args.train_interpolation) or config["interpolation"],
        "collate_fn": collate,
    }
    loader = make_loader(train_set, args, config, device, distributed=args.distributed, **train_options)
    if not len(loader):
        raise ValueError(
            f"--batch-size {args.batch_size} on {args.world_size} processes is more than the {len(train_set)} images "
            f"in {args.train_split}"
        )
    if not args.val_split:
        return loader, None
    val_set = open_dataset(args, args.val_split, val_config, num_classes, max_bad=args.max_bad_images)
    reader, val_reader = getattr(train_set, "reader", None), getattr(val_set, "reader", None)
    classes, val_classes = getattr(reader, "class_to_idx", {}), getattr(val_reader, "class_to_idx", {})
    if args.train_split != args.val_split and reader and getattr(reader, "root", 0) == getattr(val_reader, "root", 1):
        raise ValueError(f"no {args.train_split} and {args.val_split} folders in {reader.root}")
    if classes != val_classes:  # timm numbers the classes it finds, so a class without images would shift the others
        if unknown := sorted(set(val_classes) - set(classes)):
            raise ValueError(f"classes in {args.val_split} that {args.train_split} lacks: {', '.join(unknown[:5])}")
        val_set = open_dataset(
            args, args.val_split, val_config, num_classes, class_map=classes, max_bad=args.max_bad_images
        )
    batch_size = args.validation_batch_size or args.batch_size
    return loader, make_loader(val_set, args, val_config, device, distributed=args.distributed, batch_size=batch_size)


def _color_jitter(args: argparse.Namespace) -> float | list[float]:
    values = args.color_jitter if isinstance(args.color_jitter, list) else [args.color_jitter]
    if len(values) not in (1, 3, 4):
        raise ValueError(f"--color-jitter takes one number, or three or four, got {len(values)}")
    return values if len(values) > 1 else values[0]


def build_loss(args: argparse.Namespace) -> nn.Module:
    smoothing = 0.0 if _mixing(args) else args.smoothing  # the mixed targets come smoothed
    if args.bce_loss:
        return BinaryCrossEntropy(smoothing, target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum)
    if _mixing(args):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def build_optimizer(args: argparse.Namespace, model: nn.Module, **options) -> torch.optim.Optimizer:
    """timm's optimizer; sets `args.lr` from `--lr-base` if it was not given.

    Args:
        args: The flags.
        model: To train.
        **options: More arguments of `create_optimizer_v2`.
    """
    if args.lr is None:
        ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
        adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
        scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
        args.lr = args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)
    flags = {**optimizer_kwargs(args), **args.opt_kwargs}
    if args.no_decay_names:
        options["param_group_fn"] = functools.partial(
            param_groups_weight_decay,
            weight_decay=args.weight_decay,
            weight_decay_exclude_1d=False,
            no_weight_decay_list=args.no_decay_names,
        )
    try:
        return create_optimizer_v2(model, **flags, **options)
    except (AssertionError, TypeError) as error:
        raise ValueError(f"cannot create the optimizer {args.opt}: {error}") from error


def resume(args: argparse.Namespace, task: TrainingTask, optimizer: torch.optim.Optimizer, scaler) -> int:
    """Load the state of a run; returns the epoch to go on with.

    Raises:
        ValueError: The checkpoint holds no training state, or that of another model or optimizer.
    """
    checkpoint = read_checkpoint(args.resume)
    needed = {"epoch", "state_dict"} | (set() if args.no_resume_opt else {"optimizer"})
    if missing := needed - set(checkpoint):
        raise ValueError(
            f"--resume {args.resume} holds no {', '.join(sorted(missing))}: for weights alone use --initial-checkpoint"
        )
    try:
        before = str(getattr(checkpoint.get("args"), "opt", args.opt))[:100]
        if before != args.opt and not args.no_resume_opt:
            raise ValueError(f"it is of --opt {before}, not {args.opt}, which could begin anew by --no-resume-opt")
        state = extract_state_dict(checkpoint)
        check_finite(state)
        task.load_checkpoint_state(state, checkpoint.get("task_state"))
        if task.has_ema():
            averaged = "state_dict_ema" in checkpoint  # else the average starts from the weights
            state = extract_state_dict(checkpoint, use_ema=averaged)
            task.load_checkpoint_state(state, checkpoint.get("task_state_ema" if averaged else "task_state"), ema=True)
        if not args.no_resume_opt:
            optimizer.load_state_dict(checkpoint["optimizer"])
            if scaler and scaler.state_dict_key in checkpoint:
                scaler.load_state_dict(checkpoint[scaler.state_dict_key])
        return int(checkpoint["epoch"]) + (checkpoint.get("version", 1) > 1)  # older files hold the next epoch
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        arch = str(checkpoint.get("arch", args.model))
        if arch.partition(".")[0] != args.model.partition(".")[0]:
            reason = f"it is of {arch[:100]}, and this run trains {args.model}; another --experiment is another run"
        else:
            reason = one_line(error)
        raise ValueError(f"--resume {args.resume} does not fit this run: {reason}") from error


def write_summary(path: Path, epoch: int, metrics: dict[str, float], lr: float) -> None:
    """Add the row of an epoch. A run may go on with flags for other metrics: the file has the columns of all."""
    columns, rows = read_rows(path) if path.exists() else ([], [])
    metrics = {**dict.fromkeys(columns, ""), **metrics}
    train, evaluated = (
        {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        for prefix in ("train_", "eval_")
    )
    names = ["epoch", *(f"train_{key}" for key in train), *(f"eval_{key}" for key in evaluated), "lr"]
    if columns and columns != names:
        write_rows(path, names, rows)
    update_summary(epoch, train, evaluated, path, lr=lr, write_header=not path.exists())


def _mixing(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
