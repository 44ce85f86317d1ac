"""Writes the parts of the README that the records of the families give (`timm_dynamic.families`).

    python docs/tables.py

A part stands between `<!-- NAME -->` and `<!-- end of NAME -->`. Parameters and MACs are counted, on the meta device.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from timm.models import model_entrypoint

import timm_dynamic
from timm_dynamic.families import FAMILIES, Family

ROOT = Path(__file__).parents[1]
HEAD = """
| model | parameters | MACs | top-1, in % | static twin |
|---|---|---|---|---|
"""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def introduction(families: Iterable[Family]) -> str:
    """A sentence that names all families."""
    names = [f"{family.title} ({family.about})" for family in families]
    number = NUMBERS[len(names)] if len(names) < len(NUMBERS) else str(len(names))
    return f"{number.capitalize()} families are here: {', '.join(names[:-1])} and {names[-1]}."


def models_table(families: Iterable[Family]) -> str:
    """A row for each model."""
    return HEAD + "".join(_row(model, family) for family in families for model in family.models)


def papers(families: Iterable[Family]) -> str:
    """A sentence for each family."""
    return " ".join(f"{family.title}: {family.paper}." for family in families)


def _row(model: str, family: Family) -> str:
    parameters, macs, size = _count(model)
    twin = family.twins.get(model)
    baseline = f"`{twin}`, {_giga(_count(twin)[1])}" if twin else ""
    at = f" at {size} px" if size != 224 else ""
    return f"| `{model}` | {parameters / 1e6:.2f} M | {_giga(macs)}{at} | {_accuracies(model, family)} | {baseline} |\n"


@functools.cache
def _count(model: str) -> tuple[int, int, int]:
    """Parameters, multiply-accumulates per image, and its side: 224 for timm's models, as in our cfgs."""
    network = timm.create_model(model, device="meta")
    of_timm = model_entrypoint(model).__module__.startswith("timm.models.")
    size = (3, 224, 224) if of_timm else network.default_cfg["input_size"]
    macs = timm_dynamic.count_macs(network, torch.empty(1, *size, device="meta"))
    return sum(p.numel() for p in network.parameters()), macs.static + macs.linear, size[-1]


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.{2 if macs >= 5e8 else 3}f} G"


def _accuracies(model: str, family: Family) -> str:
    """The authors' for published weights and in the paper, and ours on scikit-learn's digits."""
    found = []
    for key, value in family.reported.items():
        name, _, tag = key.partition(".")
        if name == model:
            found.append(f"{value:g} (`{tag}`)" if tag else f"{value:g} in the paper")
    cards = (Path(timm_dynamic.__file__).parent / "weights" / "README.md").read_text()
    for tag, text in re.findall(rf"## {model}\.(\w+)\n(.*?)(?=\n## |\Z)", cards, re.DOTALL):
        (value,) = re.findall(r"([\d.]+) % top-1 on the 360", text)
        found.append(f"{value} (`{tag}`, measured)")
    return ", ".join(found)


def parts(text: str) -> dict[str, str]:
    """What stands between the markers of a text, by name."""
    return {name: part for name, part in re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end of \1 -->", text, re.DOTALL)}


def main() -> None:
    families, path = FAMILIES.values(), ROOT / "README.md"
    text = path.read_text()
    written = {"families": introduction(families), "models": models_table(families), "papers": papers(families)}
    for name, before in parts(text).items():
        marked = "<!-- {0} -->\n{1}\n<!-- end of {0} -->"
        text = text.replace(marked.format(name, before), marked.format(name, written[name]))
    path.write_text(text)


if __name__ == "__main__":
    main()
