"""`timm-dynamic card`: the model card of weights, to look at or to edit."""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import timm
from torch import nn

from timm_dynamic.card import model_card
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cli.common import create_model, dynamize_options, explaining
from timm_dynamic.convert import load_checkpoint
from timm_dynamic.hub import check_repo_id, file_sha256


def main(args: argparse.Namespace) -> None:
    model, tag = make_model(args), named_tag(args)
    if not args.checkpoint:
        plain = ":" not in args.model and not args.dynamize and args.model != "dynamized"
        cfg = timm.get_pretrained_cfg(args.model) if plain else None
        if not (cfg and cfg.has_weights):
            raise ValueError(f"no weights of {args.model} are known: give a CHECKPOINT")
        tag = cfg.tag
    name = f"{model.pretrained_cfg['architecture']}.{tag}" if tag else model.pretrained_cfg["architecture"]
    repo = (
        args.repo
        or (model.pretrained_cfg.get("hf_hub_id") if tag else None)
        or (f"timm-dynamic/{name}" if tag else "ORG/NAME")
    )
    check_repo_id(repo)
    if args.checkpoint:
        with explaining(model, args.checkpoint, args.use_ema):
            load_checkpoint(model, args.checkpoint, args.use_ema)
    text = make_card(args, model, tag, repo)
    if not args.out:
        print(text, end="")
        return
    with replacing(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_model(args: argparse.Namespace) -> nn.Module:
    """The model that `args` describe, its cfg that of the weights: a file's have a tag and licence if one is named."""
    model = create_model(args.model, **dynamize_options(args), **{"num_classes": args.num_classes, **args.model_kwargs})
    cfg = dict(model.pretrained_cfg)
    if "in_chans" in args.model_kwargs:
        cfg["input_size"] = (args.model_kwargs["in_chans"], *cfg["input_size"][1:])
    if args.checkpoint and not named_tag(args):
        cfg = {key: value for key, value in cfg.items() if key not in ("tag", "license")}
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def named_tag(args: argparse.Namespace) -> str | None:
    """The tag in `args.model`; None for a base's."""
    return None if ":" in args.model or args.dynamize else args.model.partition(".")[2] or None


def model_args(args: argparse.Namespace) -> dict[str, Any]:
    """What the model has to be created with again."""
    made = {"base": args.model, "layer": args.dynamize, "where": args.where} if args.dynamize else {}
    given = {key: value for key, value in args.model_kwargs.items() if not key.startswith("pretrained_cfg")}
    return {key: value for key, value in made.items() if value} | given


def make_card(args: argparse.Namespace, model: nn.Module, tag: str | None, repo: str) -> str:
    converted = (Path(args.checkpoint).name, file_sha256(args.checkpoint)) if args.checkpoint else None
    return model_card(
        model,
        repo,
        tag=tag,
        model_args=model_args(args),
        license=args.license,
        dataset=args.dataset,
        source=args.source,
        converted=converted,
        results=_read_results(args.results_file, model.pretrained_cfg["architecture"]) if args.results_file else None,
    )


def _read_results(path: str, architecture: str) -> dict[str, Any]:
    """What `write_results` wrote."""
    with open(path, newline="") as file:
        try:
            results = next(csv.DictReader(file)) if path.endswith(".csv") else json.load(file)
            measured = results["model"]
            missing = {"top1", "top5", "img_size", "crop_pct", "interpolation"} - set(results)
        except (ValueError, KeyError, TypeError, StopIteration):
            raise ValueError(f"--results-file {path} is not what `validate --results-file` writes") from None
    if missing:
        raise ValueError(f"--results-file {path} lacks {', '.join(sorted(missing))}")
    if "+" not in measured and timm.is_model(measured.partition(".")[0]) and measured.partition(".")[0] != architecture:
        raise ValueError(f"--results-file {path} is of {measured}, not of {architecture}")
    return results
