"""`timm-dynamic push`: weights to the Hugging Face Hub, in timm's format."""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from timm_dynamic.cli.card import (
    make_card,
    make_model,
    model_args,
    named_tag,
)
from timm_dynamic.cli.common import explaining, name_of
from timm_dynamic.hub import check_repo_id, save_for_hub, upload


def main(args: argparse.Namespace) -> None:
    check_repo_id(args.repo)
    names, descriptions = _read_labels(args.labels) if args.labels else (None, None)
    model = make_model(args)
    if hasattr(model, "recipe") and model.recipe.base.lower().startswith("local-dir:"):
        raise ValueError(f"{model.recipe.base} is a folder of this machine: name the model of the base")
    with TemporaryDirectory(prefix=".push-", dir=Path(args.out).parent if args.out else None) as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        with explaining(model, args.checkpoint, args.use_ema):
            save_for_hub(model, args.checkpoint, folder, model_args(args), names, descriptions, args.use_ema)
        if args.card:
            card = Path(args.card).read_text(encoding="utf-8")
        else:
            card = make_card(args, model, named_tag(args), args.repo)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if args.out:
            folder.rename(args.out)
            print(f"{name_of(args)}: {', '.join(sorted(os.listdir(args.out)))} -> {args.out}; nothing was uploaded")
        else:
            commit = upload(folder, args.repo, args.private, args.revision, args.token)
            print(f'{name_of(args)} -> {commit}\ntimm.create_model("hf-hub:{args.repo}", pretrained=True)')


def _read_labels(path: str) -> tuple[list[str], dict[str, str]]:
    """The names, and the descriptions of those that have one."""
    lines = [line.partition("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()]
    names = [name for name, _, _ in lines]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"--labels {path} has an empty name or one twice")
    return names, {name: description for name, _, description in lines if description}
