"""What `timm-dynamic train` puts together beyond data and optimizer: model, task, loss scaling, logs."""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.task.task import TrainingTask
from timm.utils import ApexScaler, NativeScaler
from torch import nn

from timm_dynamic.cli.common import check_classes, create_model, dynamize_options, name_of
from timm_dynamic.cli.data import class_folders, image_options
from timm_dynamic.training import DynamicTask, add_terms


def check_options(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse options that cannot go together, or whose packages are missing, before anything slow happens.

    Raises:
        ValueError: Which, and what to do.
    """
    packages = [
        ("--log-wandb", args.log_wandb, "wandb"),
        ("--log-tensorboard", args.log_tensorboard, "tensorboard"),
        ("--amp-impl apex", args.amp and args.amp_impl == "apex", "apex"),
    ]
    for flag, wanted, package in packages:
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"{flag}: the package {package} is not installed")
    if args.no_decay_names and args.layer_decay is not None:
        raise ValueError("--no-decay-names and --layer-decay cannot go together: both say which parameters decay")
    if args.mixup_ramp_epochs and not args.mixup:
        raise ValueError("--mixup-ramp-epochs needs --mixup")
    if args.wandb_resume_id and not (args.log_wandb and args.resume):
        raise ValueError("--wandb-resume-id needs --log-wandb and --resume")
    if args.amp and args.amp_impl == "apex":
        if device.type != "cuda" or args.amp_dtype != "float16" or args.torchcompile:
            raise ValueError("--amp-impl apex needs a GPU and --amp-dtype float16, without --torchcompile")


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    options = {
        "pretrained": args.pretrained,
        "num_classes": args.num_classes or _classes_of_data(args),
        **image_options(args),
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
        **args.model_kwargs,
    }
    start = {"checkpoint": args.initial_checkpoint, "new_head": args.num_classes is not None}
    model = create_model(args.model, **start, **dynamize_options(args), **options)
    check_classes(args, model)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError):
            raise ValueError(f"{name_of(args)} does not support --grad-checkpointing") from None
    if args.sync_bn and args.distributed:
        if device.type == "cpu":
            raise ValueError("--sync-bn needs a GPU")
        model, args.dist_bn = convert_sync_batchnorm(model), ""
    return model.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)


def _classes_of_data(args: argparse.Namespace) -> int | None:
    """The number of class folders, for a head that is new; None for the model's: its weights' or its teacher's."""
    if args.pretrained or args.initial_checkpoint or args.kd_model_name or "num_classes" in args.model_kwargs:
        return None
    return class_folders(args, args.train_split)


def build_task(args: argparse.Namespace, model: nn.Module, criterion: nn.Module, device: torch.device) -> TrainingTask:
    """timm's task, the model's auxiliary terms being a part of its loss.

    Raises:
        ValueError: The model cannot learn from that teacher in that way.
    """
    if not args.kd_model_name:
        return DynamicTask(model, criterion, device=device, verbose=False)
    teacher = create_model(args.kd_model_name, pretrained=True, in_chans=model.in_chans)
    if args.kd_distill_type != "feature" and teacher.num_classes != model.num_classes:
        raise ValueError(
            f"--kd-model-name {args.kd_model_name} tells {teacher.num_classes} classes apart, "
            f"{name_of(args)} {model.num_classes}"
        )
    options = {
        "student_model": model,
        "teacher_model": teacher.to(device),
        "criterion": criterion,
        "device": device,
        "verbose": False,
        "distill_loss_weight": args.distill_loss_weight,
        "task_loss_weight": args.task_loss_weight,
    }
    if args.kd_distill_type == "feature":
        dims = {"student_feature_dim": args.kd_student_feature_dim, "teacher_feature_dim": args.kd_teacher_feature_dim}
        task, options = FeatureDistillationTask, options | dims
    elif args.kd_distill_type == "token":
        options |= {"distill_type": args.kd_token_distill_type, "temperature": args.kd_temperature}
        task = TokenDistillationTask
    else:
        options |= {"loss_type": args.kd_loss_type, "temperature": args.kd_temperature}
        task = LogitDistillationTask
    return add_terms(task(**options))


def build_scaler(
    args: argparse.Namespace, task: TrainingTask, optimizer: torch.optim.Optimizer, device: torch.device
) -> NativeScaler | ApexScaler | None:
    """What multiplies the loss by a factor for float16."""
    if not args.amp or args.amp_dtype != "float16":
        return None
    if args.amp_impl == "native":
        return NativeScaler(device.type)
    from apex import amp

    amp.initialize(task.get_trainable_module(), optimizer, opt_level="O1")
    return ApexScaler()


def start_log(args: argparse.Namespace, folder: Path) -> Callable[[dict[str, float]], None]:
    """What takes the metrics of each epoch to TensorBoard and to Weights & Biases, as far as they are asked for."""
    logs = []
    if args.log_tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder)

        def write(row: dict[str, float]) -> None:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])
            writer.flush()

        logs.append(write)
    if args.log_wandb:
        import wandb

        identity = {"id": args.wandb_resume_id, "resume": "must"} if args.wandb_resume_id else {}
        wandb.init(project=args.wandb_project, name=folder.name, config=vars(args), tags=args.wandb_tags, **identity)
        logs.append(wandb.log)
    return lambda row: [log(row) for log in logs]
