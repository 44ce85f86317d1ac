"""`timm-dynamic convert`: an author's checkpoint to safetensors."""

import argparse
import os
from pathlib import Path

import timm
from torch import nn

from timm_dynamic.cli.common import create_model
from timm_dynamic.convert import convert
from timm_dynamic.hub import is_ours, local_weights


def main(args: argparse.Namespace) -> None:
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
