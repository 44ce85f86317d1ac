"""`timm-dynamic push`: weights to the Hugging Face Hub, in timm's format."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from timm_dynamic.cli.card import (
    add_card_arguments,
    add_model_arguments,
    explain_dynamized,
    make_card,
    make_model,
    model_args,
    named_tag,
)
from timm_dynamic.cli.common import Parser
from timm_dynamic.hub import check_repo_id, save_for_hub, upload


def main(argv: list[str]) -> None:
    parser = Parser(
        "push",
        "Upload a checkpoint and its model card to the Hugging Face Hub, from where "
        'timm.create_model("hf-hub:ORG/NAME", pretrained=True) takes it. Nothing is uploaded unless the checkpoint '
        "loads strictly.",
    )
    add_model_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the weights: ours, timm's, or the authors'")
    parser.add_argument("repo", metavar="ORG/NAME", help="the repository; made if missing")
    parser.add_argument(
        "--labels", metavar="FILE", help="names of the classes, a line each: NAME or NAME<tab>DESCRIPTION"
    )
    group = parser.add_argument_group("upload")
    group.add_argument("--out", metavar="DIR", help="write the files to this new folder, and upload nothing")
    group.add_argument("--private", action="store_true", help="make a new repository private")
    group.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if missing (default: main)")
    group.add_argument("--token", help="access token (default: that of `hf auth login`, or HF_TOKEN)")
    add_card_arguments(parser).add_argument("--card", metavar="FILE", help="instead of all this: the model card itself")
    args = parser.parse_args(argv)

    check_repo_id(args.repo)
    if args.out and (os.path.lexists(args.out) or not Path(args.out).absolute().parent.is_dir()):
        raise ValueError(
            f"--out {args.out} is there already, or its parent is not: name a new folder in an existing one"
        )
    names, descriptions = _read_labels(args.labels) if args.labels else (None, None)
    model = make_model(args)
    with TemporaryDirectory(prefix=".push-", dir=Path(args.out).parent if args.out else None) as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        with explain_dynamized(model):
            save_for_hub(model, args.checkpoint, folder, model_args(args), names, descriptions, args.use_ema)
        if args.card:
            card = Path(args.card).read_text(encoding="utf-8")
        else:
            card = make_card(args, model, named_tag(args), args.repo)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if args.out:
            folder.rename(args.out)
            print(f"{args.model}: {', '.join(sorted(os.listdir(args.out)))} -> {args.out}; nothing was uploaded")
        else:
            commit = upload(folder, args.repo, args.private, args.revision, args.token)
            print(f'{args.model} -> {commit}\ntimm.create_model("hf-hub:{args.repo}", pretrained=True)')


def _read_labels(path: str) -> tuple[list[str], dict[str, str]]:
    """The names, and the descriptions of those that have one."""
    lines = [line.partition("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()]
    names = [name for name, _, _ in lines]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"--labels {path} has an empty name or one twice")
    return names, {name: description for name, _, description in lines if description}
