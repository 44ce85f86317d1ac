"""`timm-dynamic list`: the models, what they cost, what they are compared with, and which weights there are."""

import argparse

import timm

from timm_dynamic import counts
from timm_dynamic.families import FAMILIES, Family
from timm_dynamic.hub import PACKAGE_WEIGHTS, local_weights
from timm_dynamic.replace import layer_options


def main(args: argparse.Namespace) -> None:
    for name, rows in counts.read().items():
        if args.family and args.family.lower() != name:
            continue
        family = FAMILIES[name]
        print(f"{family.title}: {family.about} ({family.paper})")
        if family.layer:
            options = ", ".join(layer_options(family.layer))
            print(f"--dynamize {family.name}: {family.layer.__name__}" + (f", with {options}" if options else ""))
        for model, count in rows.items():
            print(f"  {model}" if args.names else f"  {row(model, count, family)}", flush=True)
        print()


def row(model: str, count: counts.Count, family: Family) -> str:
    """A line of the table."""
    twin = family.twins.get(model) or " ".join(f"{key}={value}" for key, value in family.static.items())
    weights = "; ".join(f"{', '.join(tags)} ({place})" for place, tags in weights_of(model).items())
    return (
        f"{model:<34} {count.parameters / 1e6:7.2f} M  {count.macs / 1e9:7.3f} GMACs at {count.size} px  "
        f"{f'twin {twin}' if twin else '':<28} {f'weights {weights}' if weights else ''}"
    ).rstrip()


def weights_of(model: str) -> dict[str, list[str]]:
    """The tags with weights of a model, by where these are: in the package, in the local folder, with their authors."""
    found: dict[str, list[str]] = {}
    for tagged in timm.list_pretrained(f"{model}.*"):
        cfg = timm.get_pretrained_cfg(tagged)
        if local_weights(tagged).exists():
            place = "here"
        elif cfg.file and PACKAGE_WEIGHTS.as_posix() in cfg.file:
            place = "in the package"
        else:
            place = "to convert from the authors' file"
        found.setdefault(place, []).append(cfg.tag)
    return found
