"""`timm-dynamic card`: the model card of weights, to look at or to edit."""

import argparse
import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from torch import nn

from timm_dynamic.card import model_card
from timm_dynamic.cli.common import KeyValues, Parser, check_output_file, create_model, replacing
from timm_dynamic.convert import load_checkpoint
from timm_dynamic.hub import check_repo_id, file_sha256, is_ours


def main(argv: list[str]) -> None:
    parser = Parser(
        "card", "Write the model card of weights, in Markdown, for their repository on the Hugging Face Hub."
    )
    add_model_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="the weights (default: those of the tag)")
    parser.add_argument("--repo", metavar="ORG/NAME", help="their repository (default: the tag's)")
    parser.add_argument("--out", metavar="FILE", help="file to write, *.md (default: standard output)")
    add_card_arguments(parser)
    args = parser.parse_args(argv)
    if args.out:
        check_output_file("--out", args.out, (".md",))

    model, tag = make_model(args), named_tag(args)
    if not args.checkpoint:
        cfg = timm.get_pretrained_cfg(args.model) if ":" not in args.model else None
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
        with explain_dynamized(model):
            load_checkpoint(model, args.checkpoint, args.use_ema)
    text = make_card(args, model, tag, repo)
    if not args.out:
        print(text, end="")
        return
    with replacing(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="their model; with a tag if they are that tag's weights")
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes (default: the model's)")
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help="what the model is created with, as in training; kept for those who pull it",
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")


def add_card_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("card")
    group.add_argument("--license", metavar="ID", help="licence of the weights, as the Hub names it (default: unknown)")
    group.add_argument("--source", metavar="TEXT", help="where the weights come from (default: as known of the tag)")
    group.add_argument("--dataset", metavar="NAME", help="dataset they were trained on, as the Hub names it")
    group.add_argument("--results-file", metavar="FILE", help="what `validate --results-file` measured, .json or .csv")
    return group


def make_model(args: argparse.Namespace) -> nn.Module:
    """The model that `args` describe, its cfg that of the weights: a file's have a tag and licence if one is named."""
    model = create_model(args.model, **{"num_classes": args.num_classes, **args.model_kwargs})
    cfg = dict(model.pretrained_cfg)
    if "in_chans" in args.model_kwargs:
        cfg["input_size"] = (args.model_kwargs["in_chans"], *cfg["input_size"][1:])
    if args.checkpoint and not named_tag(args):
        cfg = {key: value for key, value in cfg.items() if key not in ("tag", "license")}
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def named_tag(args: argparse.Namespace) -> str | None:
    """The tag in `args.model`."""
    return None if ":" in args.model else args.model.partition(".")[2] or None


@contextmanager
def explain_dynamized(model: nn.Module) -> Iterator[None]:
    """Add to the error of a checkpoint that does not load what the reason may be."""
    try:
        yield
    except ValueError as error:
        if is_ours(model.pretrained_cfg["architecture"]):
            raise
        raise ValueError(
            f"{error} (a model changed by --dynamize cannot go to the Hub: timm.create_model could not build it again)"
        ) from error


def model_args(args: argparse.Namespace) -> dict[str, Any]:
    """What the model has to be created with again."""
    return {key: value for key, value in args.model_kwargs.items() if not key.startswith("pretrained_cfg")}


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
    if timm.is_model(measured.partition(".")[0]) and measured.partition(".")[0] != architecture:
        raise ValueError(f"--results-file {path} is of {measured}, not of {architecture}")
    return results
