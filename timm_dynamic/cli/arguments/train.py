"""The flags of `timm-dynamic train`: names, meanings and defaults of timm's train.py, whose YAML configs load here."""

import argparse
from pathlib import Path

from timm_dynamic.cli.arguments.base import (
    KeyValues,
    Parser,
    add_device_arguments,
    add_model_arguments,
    check_dynamize,
    check_file,
    count,
    non_negative,
    positive,
    positive_int,
    share,
    share_below_one,
)
from timm_dynamic.cli.arguments.data import (
    INTERPOLATIONS,
    OTHER_SOURCES,
    add_bad_images_argument,
    add_data_arguments,
    find_split,
)

# timm's `plateau` is left out: what it has seen is in no checkpoint, so a resumed run would take another course.
SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "none")


def make_parser() -> Parser:
    parser = Parser("train", "Train an image classifier. Flags are named as in timm's train.py, and have its defaults.")
    parser.add_config()
    add_data_arguments(parser, batch_size=128)
    add_bad_images_argument(parser)
    parser.add_argument("--train-split", default="train", metavar="NAME", help="default: train")
    parser.add_argument("--val-split", default="validation", metavar="NAME", help="default: validation; '' for none")
    parser.add_argument(
        "-vb", "--validation-batch-size", type=positive_int, metavar="N", help="default: as in training"
    )
    add_model_arguments(parser)
    add_start_arguments(parser)
    add_device_arguments(parser)
    add_amp_arguments(parser)
    add_distributed_arguments(parser)
    add_optimizer_arguments(parser)
    _add_rate_arguments(add_schedule_arguments(parser))
    _add_augmentation_arguments(parser)
    _add_loss_arguments(parser)
    _add_distillation_arguments(parser)
    add_ema_arguments(parser)
    add_output_arguments(parser, ("top1", "top5", "loss"))
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    return check(parser, parser.parse_args(argv))


def check(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """The flags, after what can be found wrong with them before anything slow happens.

    Raises:
        ValueError, FileNotFoundError: No such data, split or checkpoint, or the run's folder is another run's.
    """
    check_dynamize(parser, args)
    root = Path(args.data or args.data_dir or "")
    if not args.dataset:
        for split in filter(None, (args.train_split, args.val_split)):
            find_split(args, split)
    elif args.data or args.data_dir:
        if not (root.exists() or args.dataset_download or args.dataset.partition("/")[0].lower() in OTHER_SOURCES):
            raise ValueError(f"no such data folder: {root}")
    check_file(args.initial_checkpoint)
    check_file("" if args.resume == "auto" else args.resume)
    if args.experiment:
        _check_folder(args)
    return args


def run_folder(args: argparse.Namespace, name: str) -> Path:
    return Path(args.output or "output/train", name)


def _check_folder(args: argparse.Namespace) -> None:
    """Refuse to write over another run."""
    folder = run_folder(args, args.experiment)
    if not args.resume and ((folder / "summary.csv").exists() or any(folder.glob("*.pth.tar"))):
        raise ValueError(f"{folder} holds a run already: go on with it by --resume auto, or give another --experiment")


def add_start_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("start")
    group.add_argument(
        "--initial-checkpoint",
        default="",
        metavar="FILE",
        help="weights to start from; with --num-classes, the classifier is new where theirs has another number",
    )
    group.add_argument(
        "--resume",
        default="",
        metavar="FILE",
        help="checkpoint of a run to go on with; `auto`: the last whole one in the folder of --experiment, if any",
    )
    group.add_argument("--no-resume-opt", action="store_true", help="do not resume the optimizer's state")
    group.add_argument("--start-epoch", type=count, metavar="N", help="first epoch (default: 0, or the resumed one)")
    group.add_argument("--seed", type=count, default=42, metavar="N", help="random seed (default: 42)")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same weights each time, to the bit, also when resumed; can be slower",
    )


def add_amp_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("mixed precision and compilation in training")
    group.add_argument(
        "--amp-impl", default="native", choices=("native", "apex"), help="PyTorch's, or NVIDIA's Apex (default: native)"
    )
    group.add_argument("--torchcompile-mode", metavar="MODE", help="torch.compile's mode, as reduce-overhead")


def add_distributed_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("memory and several processes")
    group.add_argument("--grad-accum-steps", type=positive_int, default=1, metavar="N", help="batches an update")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    group.add_argument("--no-ddp-bb", action="store_true", help="do not broadcast buffers in each forward pass")
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm over the batches of all processes (GPU)")
    group.add_argument(
        "--dist-bn",
        default="reduce",
        choices=("reduce", "broadcast", ""),
        help="after an epoch, average or broadcast BatchNorm's statistics over processes (default: reduce)",
    )


def add_optimizer_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--opt", default="sgd", metavar="NAME", help="timm optimizer; sgd is with Nesterov (default: %(default)s)"
    )
    group.add_argument("--opt-eps", type=float, metavar="X", help="the optimizer's epsilon (default: its own)")
    group.add_argument("--opt-betas", type=float, nargs="+", metavar="X", help="its betas (default: its own)")
    group.add_argument("--momentum", type=non_negative, default=0.9, metavar="X", help="default: 0.9")
    group.add_argument("--weight-decay", type=non_negative, default=2e-5, metavar="X", help="default: %(default)s")
    group.add_argument("--clip-grad", type=positive, metavar="X", help="clip gradients (default: no)")
    group.add_argument(
        "--clip-mode", default="norm", choices=("norm", "value", "agc"), help="how to clip (default: norm)"
    )
    group.add_argument(
        "--skip-nonfinite",
        type=count,
        default=0,
        metavar="N",
        help="skip up to N updates whose loss is infinite or nan, then stop (default: 0)",
    )
    group.add_argument(
        "--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="more of its arguments"
    )


def _add_rate_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lr", type=float, metavar="X", help="learning rate (default: from --lr-base)")
    group.add_argument("--lr-base", type=float, default=0.1, metavar="X", help="for a global batch of --lr-base-size")
    group.add_argument("--lr-base-size", type=positive_int, default=256, metavar="N", help="default: 256")
    group.add_argument(
        "--lr-base-scale",
        default="",
        choices=("", "linear", "sqrt"),
        help="growth with the batch (default: linear, sqrt for Adam's kin)",
    )
    group.add_argument(
        "--no-decay-names",
        nargs="+",
        metavar="PATTERN",
        help="no weight decay for parameters with such names, as in '*bn*', and for these alone "
        "(default: none for biases and norms)",
    )
    group.add_argument("--layer-decay", type=float, metavar="X", help="factor on the learning rate from layer to layer")
    group.add_argument(
        "--layer-decay-min-scale", type=float, default=0.0, metavar="X", help="lower bound of the product"
    )
    group.add_argument("--layer-decay-no-opt-scale", type=float, metavar="X", help="below it, layers are not trained")


def add_schedule_arguments(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("learning rate")
    group.add_argument("--epochs", type=positive_int, default=300, metavar="N", help="default: %(default)s")
    group.add_argument("--sched", default="cosine", choices=SCHEDULERS, help="default: cosine")
    group.add_argument("--sched-on-updates", action="store_true", help="step in each update, not each epoch")
    group.add_argument("--lr-noise", type=float, nargs="+", metavar="X", help="noise between these shares of the run")
    group.add_argument(
        "--lr-noise-pct", type=float, default=0.67, metavar="X", help="largest noise, as a share of the rate"
    )
    group.add_argument("--lr-noise-std", type=float, default=1.0, metavar="X", help="standard deviation of the noise")
    group.add_argument("--lr-cycle-mul", type=float, default=1.0, metavar="X", help="growth of a cycle's length")
    group.add_argument(
        "--lr-cycle-decay", type=float, default=0.5, metavar="X", help="factor on the rate from cycle to cycle"
    )
    group.add_argument("--lr-cycle-limit", type=positive_int, default=1, metavar="N", help="number of cycles")
    group.add_argument("--lr-k-decay", type=float, default=1.0, metavar="X", help="exponent in cosine and poly")
    group.add_argument("--warmup-lr", type=float, default=1e-5, metavar="X", help="default: 1e-5")
    group.add_argument(
        "--warmup-epochs", type=count, metavar="N", help="default: 5, or a tenth of --epochs if that is less"
    )
    group.add_argument("--warmup-prefix", action="store_true", help="the schedule begins after the warm-up")
    group.add_argument("--min-lr", type=float, default=0.0, metavar="X", help="default: %(default)s")
    group.add_argument(
        "--cooldown-epochs", type=count, default=0, metavar="N", help="epochs at --min-lr after the cycles"
    )
    group.add_argument(
        "--decay-milestones",
        type=int,
        nargs="+",
        default=[90, 180, 270],
        metavar="N",
        help="epochs of --sched multistep",
    )
    group.add_argument(
        "--decay-epochs", type=positive, default=90, metavar="N", help="epochs between steps of --sched step"
    )
    group.add_argument(
        "--decay-rate", "--dr", type=float, default=0.1, metavar="X", help="step, multistep, poly's power"
    )
    return group


def _add_augmentation_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation and regularisation")
    group.add_argument("--no-aug", action="store_true", help="no augmentation at all")
    group.add_argument(
        "--scale", type=positive, nargs=2, default=[0.08, 1.0], metavar="X", help="areas of random crops"
    )
    group.add_argument(
        "--ratio", type=positive, nargs=2, default=[3 / 4, 4 / 3], metavar="X", help="width to height of random crops"
    )
    group.add_argument("--hflip", type=share, default=0.5, metavar="P", help="probability, default: 0.5")
    group.add_argument("--vflip", type=share, default=0.0, metavar="P", help="probability, default: 0")
    group.add_argument(
        "--color-jitter",
        type=non_negative,
        nargs="+",
        default=0.4,
        metavar="X",
        help="of brightness, contrast and saturation, or of each and the hue (default: 0.4)",
    )
    group.add_argument("--aa", metavar="POLICY", help="AutoAugment, RandAugment, ..., as rand-m7-mstd0.5-inc1")
    group.add_argument("--reprob", type=share, default=0.0, metavar="P", help="probability of random erasing")
    group.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"), help="default: pixel")
    group.add_argument("--recount", type=positive_int, default=1, metavar="N", help="erased areas, default: 1")
    group.add_argument("--mixup", type=non_negative, default=0.0, metavar="X", help="alpha of mixup, 0: none")
    group.add_argument("--cutmix", type=non_negative, default=0.0, metavar="X", help="alpha of CutMix, 0: none")
    group.add_argument("--cutmix-minmax", type=float, nargs=2, metavar="X", help="CutMix with sides between these")
    group.add_argument("--mixup-prob", type=share, default=1.0, metavar="P", help="of either, default: 1")
    group.add_argument("--mixup-switch-prob", type=share, default=0.5, metavar="P", help="of CutMix if both are on")
    group.add_argument("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="default: batch")
    group.add_argument(
        "--mixup-ramp-epochs", type=int, default=0, metavar="N", help="let mixup's alpha grow from 0 over N epochs"
    )
    group.add_argument("--mixup-off-epoch", type=int, default=0, metavar="N", help="no mixing from this epoch on")
    group.add_argument(
        "--train-interpolation",
        default="random",
        choices=("random", "", *INTERPOLATIONS),
        help="resizing in training (default: random; '': as in validation)",
    )
    group.add_argument("--drop", type=share, default=0.0, metavar="P", help="dropout before the classifier")
    group.add_argument("--drop-path", type=share, metavar="P", help="stochastic depth")


def _add_loss_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--smoothing", type=share_below_one, default=0.1, metavar="X", help="label smoothing (default: 0.1)"
    )
    group.add_argument("--bce-loss", action="store_true", help="binary instead of softmax cross-entropy")
    group.add_argument("--bce-sum", action="store_true", help="sum it over the classes")
    group.add_argument("--bce-target-thresh", type=float, metavar="X", help="targets above count as 1, others as 0")


def _add_distillation_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("distillation")
    group.add_argument("--kd-model-name", metavar="NAME", help="teacher: a model with pretrained weights")
    group.add_argument(
        "--kd-distill-type",
        default="logit",
        choices=("logit", "feature", "token"),
        help="what is learnt from it: its logits (default), its pooled features, or its logits by a second head",
    )
    group.add_argument(
        "--kd-loss-type", default="kl", choices=("kl",), help="for logits; default, and all there is: kl"
    )
    group.add_argument(
        "--kd-token-distill-type", default="soft", choices=("soft", "hard"), help="the teacher's logits or its choice"
    )
    group.add_argument("--kd-temperature", type=float, default=4.0, metavar="X", help="default: 4")
    group.add_argument("--kd-student-feature-dim", type=positive_int, metavar="N", help="default: as the model says")
    group.add_argument("--kd-teacher-feature-dim", type=positive_int, metavar="N", help="default: as the teacher says")
    group.add_argument("--distill-loss-weight", type=float, metavar="X", help="default: 1, or 1 - --task-loss-weight")
    group.add_argument("--task-loss-weight", type=float, metavar="X", help="default: 1")


def add_ema_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("averaged weights")
    group.add_argument("--model-ema", action="store_true", help="keep, validate and save a moving average")
    group.add_argument("--model-ema-force-cpu", action="store_true", help="keep it on the CPU, and do not validate it")
    group.add_argument("--model-ema-decay", type=share, default=0.9998, metavar="X", help="default: 0.9998")
    group.add_argument("--model-ema-warmup", action="store_true", help="let the decay grow towards that")


# What commands for other tasks than classification do not ask for.
FOR_CLASSIFIERS = {
    "drop_path": None,
    "layer_decay": None,
    "no_decay_names": None,
    "mixup": 0.0,
    "mixup_off_epoch": 0,
    "mixup_ramp_epochs": 0,
    "kd_model_name": None,
}


def add_output_arguments(parser: Parser, metrics: tuple[str, ...]) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output", default="output/train", metavar="DIR", help="default: %(default)s")
    group.add_argument("--experiment", default="", metavar="NAME", help="folder in it (default: time, model and size)")
    group.add_argument("--checkpoint-hist", type=positive_int, default=10, metavar="N", help="best checkpoints to keep")
    group.add_argument("--eval-metric", default=metrics[0], choices=metrics, help="default: %(default)s")
    group.add_argument("--log-interval", type=positive_int, default=50, metavar="N", help="updates between two reports")
    group.add_argument("--log-tensorboard", action="store_true", help="write the summary for TensorBoard, too")
    group.add_argument("--log-wandb", action="store_true", help="log the summary to Weights & Biases, too")
    group.add_argument("--wandb-project", metavar="NAME")
    group.add_argument("--wandb-tags", default=[], nargs="+", metavar="TAG")
    group.add_argument("--wandb-resume-id", default="", metavar="ID", help="with --resume: run to go on with")
