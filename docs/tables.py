"""Writes what the code says into the README and docs/architecture.md: families, models, layers, operators.

    python docs/tables.py

A part stands between `<!-- NAME -->` and `<!-- end of NAME -->`. Parameters and MACs are counted, on the meta device.
"""

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch
from timm.models import model_entrypoint

import timm_dynamic
from timm_dynamic.families import FAMILIES, Family
from timm_dynamic.layers.base import DynamicLayer

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


def layers_table(families: Iterable[Family]) -> str:
    """How the layers of all families run, and what decides."""
    rows = ["", "| layer | implementation | for | not where | faster, but not where |", "|---|---|---|---|---|"]
    for layer in _dynamic_layers(families):
        for row in layer.implementations:
            kind = "training" if row.gradients else "inference"
            where = f"{kind}, {' and '.join(row.devices)}, {', '.join(str(d)[6:] for d in row.dtypes)}"
            cells = (f"`{layer.__name__}`", row.name, where, _sentence(row.cannot), _sentence(row.pays))
            rows.append(f"| {' | '.join(cells)} |")
        rows.append(f"| `{layer.__name__}` | formula | everything else | | |")
    return "\n".join(rows) + "\n"


def _dynamic_layers(families: Iterable[Family]) -> list[type]:
    """Those with a table, in the order of the families."""
    found = [vars(module).values() for module in map(importlib.import_module, _modules_of_layers())]
    classes = {one for values in found for one in values if isinstance(one, type) and issubclass(one, DynamicLayer)}
    order = [family.name for family in families]
    with_rows = [one for one in classes if "implementations" in vars(one) and one.family in order]
    return sorted(with_rows, key=lambda one: (order.index(one.family), one.__name__))


def _modules_of_layers() -> list[str]:
    return [f"timm_dynamic.layers.{module.name}" for module in pkgutil.iter_modules(timm_dynamic.layers.__path__)]


def _sentence(function: Callable) -> str:
    return " ".join((function.__doc__ or "").split())


def operators_table() -> str:
    """All registered operators, and on which devices there are kernels."""
    rows = ["", "| operator | gradients | kernels |", "|---|---|---|"]
    sources = {device: _sources(device) for device in ("cpu", "cuda")}
    for name in sorted(one.partition("::")[2] for one in torch._C._dispatch_get_all_op_names() if _is_ours(one)):
        differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(f"timm_dynamic::{name}", "Autograd")
        kernels = [device for device, text in sources.items() if f'm.impl("{name}"' in text]
        rows.append(f"| `{name}` | {'yes' if differentiable else 'private'} | {', '.join(kernels)} |")
    return "\n".join(rows) + "\n"


def _is_ours(name: str) -> bool:
    return name.startswith("timm_dynamic::")


def _sources(device: str) -> str:
    """The C++ that registers the kernels of a device."""
    files = [path for path in (ROOT / "cuda_ops").rglob("*.cpp") if path.name.startswith("cuda_") == (device == "cuda")]
    return "".join(path.read_text() for path in files)


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


def written() -> dict[Path, dict[str, str]]:
    """What the parts of each file are to be."""
    families = FAMILIES.values()
    readme = {"families": introduction(families), "models": models_table(families), "papers": papers(families)}
    architecture = {"layers": layers_table(families), "operators": operators_table()}
    return {ROOT / "README.md": readme, ROOT / "docs" / "architecture.md": architecture}


def main() -> None:
    for path, texts in written().items():
        text = path.read_text()
        for name, before in parts(text).items():
            marked = "<!-- {0} -->\n{1}\n<!-- end of {0} -->"
            text = text.replace(marked.format(name, before), marked.format(name, texts[name]))
        path.write_text(text)


if __name__ == "__main__":
    main()
