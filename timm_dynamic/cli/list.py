"""`timm-dynamic list`: the models, what they cost, what they are compared with, and which weights there are."""

import argparse

import timm
import torch

from timm_dynamic.cost import count_macs
from timm_dynamic.families import FAMILIES, Family
from timm_dynamic.hub import PACKAGE_WEIGHTS, local_weights
from timm_dynamic.replace import layer_options
from timm_dynamic.suggest import did_you_mean


def main(args: argparse.Namespace) -> None:
    families = sorted(FAMILIES.values(), key=lambda family: family.name)
    if args.family:
        families = [family for family in families if family.name == args.family.lower()]
        if not families:
            hint = did_you_mean(args.family.lower(), FAMILIES, f"there are {', '.join(sorted(FAMILIES))}")
            raise ValueError(f"--family {args.family}: no such family; {hint}")
    for family in families:
        print(f"{family.title}: {family.about} ({family.paper})")
        if family.layer:
            options = ", ".join(layer_options(family.layer))
            print(f"--dynamize {family.name}: {family.layer.__name__}" + (f", with {options}" if options else ""))
        for name in family.models:
            print(f"  {name}" if args.names else f"  {row(name, family)}", flush=True)
        print()


def row(name: str, family: Family) -> str:
    """A line of the table."""
    model = timm.create_model(name, device="meta").eval()
    size = model.pretrained_cfg["input_size"]
    macs = count_macs(model, torch.zeros(1, *size, device="meta"))
    twin = family.twins.get(name) or " ".join(f"{key}={value}" for key, value in family.static.items())
    parameters, macs = sum(p.numel() for p in model.parameters()), macs.static + macs.linear
    weights = "; ".join(f"{', '.join(tags)} ({place})" for place, tags in weights_of(name).items())
    return (
        f"{name:<34} {parameters / 1e6:7.2f} M  {macs / 1e9:7.3f} GMACs at {size[-1]} px  "
        f"{f'twin {twin}' if twin else '':<28} {f'weights {weights}' if weights else ''}"
    ).rstrip()


def weights_of(name: str) -> dict[str, list[str]]:
    """The tags with weights of a model, by where these are: in the package, in the local folder, with their authors."""
    found: dict[str, list[str]] = {}
    for tagged in timm.list_pretrained(f"{name}.*"):
        cfg = timm.get_pretrained_cfg(tagged)
        if local_weights(tagged).exists():
            place = "here"
        elif cfg.file and PACKAGE_WEIGHTS.as_posix() in cfg.file:
            place = "in the package"
        else:
            place = "to convert from the authors' file"
        found.setdefault(place, []).append(cfg.tag)
    return found
