"""`timm-dynamic convert`: an author's checkpoint to safetensors."""

import argparse
import os
from pathlib import Path

import timm
from torch import nn

from timm_dynamic.cli.common import KeyValues, Parser, create_model
from timm_dynamic.convert import convert
from timm_dynamic.hub import is_ours, local_weights


def main(argv: list[str]) -> None:
    parser = Parser("convert", "Turn an original author's checkpoint into safetensors that our model loads strictly.")
    parser.add_argument("src", metavar="SRC", help="the author's file; nothing in it is executed")
    parser.add_argument("dst", metavar="DST", nargs="?", help="file to write, *.safetensors")
    parser.add_argument(
        "--install",
        action="store_true",
        help="write to the local weights folder (TIMM_DYNAMIC_WEIGHTS), where pretrained=True looks first",
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="NAME",
        required=True,
        help="the model whose weights these are; with --install NAME.TAG (default: the model's default tag)",
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes (default: the model's)")
    parser.add_argument(
        "--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="arguments of the model"
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    args = parser.parse_args(argv)
    if bool(args.dst) == args.install:
        parser.error("give either DST or --install" if args.install else "the following arguments are required: DST")

    model = create_model(args.model, **{"num_classes": args.num_classes, **args.model_kwargs})
    dst, replaced = args.dst, ""
    if args.install:
        dst = _place_of(model, args)
        shipped = timm.get_pretrained_cfg(args.model).file
        replaced = "the file that was there" if dst.exists() else "the package's own weights" if shipped else ""
    convert(args.src, dst, model, use_ema=args.use_ema)
    if replaced:
        print(f"pretrained=True takes these from now on, not {replaced}; delete the file to undo it")
    print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(model.state_dict())} tensors, "
        f"{os.path.getsize(dst) / 1e6:.1f} MB -> {dst}"
    )


def _place_of(model: nn.Module, args: argparse.Namespace) -> Path:
    """Where `pretrained=True` looks for the weights of the tag."""
    if not is_ours(args.model):
        raise ValueError(f"--install is for the models of timm-dynamic, and {args.model} is none: give DST")
    cfg = timm.get_pretrained_cfg(args.model)
    if model.num_classes != cfg.num_classes:
        raise ValueError(
            f"--install: the weights of {cfg.architecture}.{cfg.tag} have {cfg.num_classes} classes, not "
            f"{model.num_classes}: give DST"
        )
    return local_weights(f"{cfg.architecture}.{cfg.tag}")
