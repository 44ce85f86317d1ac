"""Writes what code and measurements say into README.md and docs/*.md: families, models, layers, operators, times.

    python docs/tables.py

A part stands between `<!-- NAME -->` and `<!-- end of NAME -->`. Parameters and MACs are counted, on the meta device;
those of our models go to `timm_dynamic/counts.json` first, where `timm-dynamic list` has them from.
"""

import functools
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import timm
import torch
from recipes import recipes
from timm.models import model_entrypoint

import timm_dynamic
from timm_dynamic import counts, layers, ops
from timm_dynamic.counts import Count
from timm_dynamic.families import FAMILIES, Family
from timm_dynamic.layers.base import DynamicLayer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown; `head` has its columns between bars."""
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(_table_row(row) for row in rows)]
    return "\n" + "\n".join(lines) + "\n"


def _table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def families_table(families: Iterable[Family]) -> str:
    """Which family to use: a row for each."""
    head = "family | what depends on the image | formula | cost beside the twin | from static weights | paper"
    return table(head, (_choice(family) for family in families))


def _choice(family: Family) -> Iterator[str]:
    yield family.title
    yield family.about
    yield formula_of(family)
    yield _cost(family)
    yield _kept(family)
    yield family.paper


def formula_of(family: Family) -> str:
    """The equation in the docstring of a family's layer: that of `y` or `W(x)` if there is one, else the first."""
    found = [equation for layer in layers_of(family) for equation in _equations(layer)]
    preferred = [equation for equation in found if re.match(r"y|W\(x\)|out", equation)]
    return f"`{re.split('  +', (preferred or found)[0])[0].strip(',')}`" if found else ""


def _equations(layer: type) -> list[str]:
    """Lines set off in its docstring, or code within a line, before its arguments."""
    text = inspect.cleandoc(layer.__doc__ or "").split("\nArgs:")[0].split("\nAttributes:")[0]
    found = re.findall(r"^ {4,}(\S.*)$|`([^`\n]*)`", text, re.MULTILINE)
    return [a or b for a, b in found if " = " in a or " = " in b]


def layers_of(family: Family) -> list[type]:
    """Classes of `timm_dynamic.layers` that a family's smallest model has, first the one for `dynamize`."""
    model = timm.create_model(family.tiny, device="meta")
    kinds = (kind for module in model.modules() for kind in type(module).__mro__)
    found = [kind for kind in kinds if kind.__module__.startswith("timm_dynamic.layers.") and kind.__doc__]
    return list(dict.fromkeys([family.layer, *found] if family.layer else found))


def _cost(family: Family) -> str:
    """Parameters and MACs as ratios to those of the static twin, of one model; without a twin, the smallest model's."""
    ours = next((model for model in (*family.timed, *family.twins) if model in family.twins), None)
    if ours is None:
        others = [model for model in family.models if model != family.tiny] or family.models
        ours = min(others, key=lambda model: _count(model).parameters)
        return f"`{ours}`: {_count(ours).parameters / 1e6:.1f} M parameters, {_giga(_count(ours).macs)} MACs"
    (parameters, macs, _), (of_twin, macs_of_twin, _) = _count(ours), _count(family.twins[ours])
    return f"`{ours}`: {parameters / of_twin:.2f}x parameters, {macs / macs_of_twin:.2f}x MACs"


def _kept(family: Family) -> str:
    """What `dynamize` leaves of a network's output."""
    if family.layer is None:
        return "only in its own models"
    return "from scratch" if family.keeps is None else "nearly" if family.keeps else "exactly"


def models_table(families: Iterable[Family]) -> str:
    """A row for each model."""
    head = "model | parameters | MACs | top-1, in % | static twin"
    return table(head, (_row(model, family) for family in families for model in family.models))


def papers(families: Iterable[Family]) -> str:
    """A sentence for each family."""
    return " ".join(f"{family.title}: {family.paper}." for family in families)


def layers_pages(families: Iterable[Family]) -> str:
    """A section for each family: its equation, and its public layers, whose docstrings mkdocstrings puts there."""
    text, public = "", {name: value for name, value in vars(layers).items() if name in layers.__all__}
    for family in families:
        text += f"\n## {family.title}\n\n{family.about[0].upper()}{family.about[1:]}. {family.paper}.\n"
        if family.layer is not None:
            text += (
                f'\n`timm_dynamic.dynamize(model, "{family.name}")` puts `{family.layer.__name__}` into a network.\n'
            )
        modules = {layer.__module__ for layer in layers_of(family)}
        names = [name for name, value in public.items() if isinstance(value, type) and value.__module__ in modules]
        text += "".join(f"\n::: timm_dynamic.layers.{name}\n" for name in names)
        public = {name: value for name, value in public.items() if name not in names}
    return text + "\n## Others\n" + "".join(f"\n::: timm_dynamic.layers.{name}\n" for name in public)


def speed_table() -> str:
    """Models and twins each in their fastest execution, as benchmarks/models.py --best measured them."""
    report, rows, heads = _results("best_cpu.json"), {}, ["MACs"]
    for row in sorted(report["rows"], key=lambda row: (row["runtime"] != "torch", row["mode"], row["batch_size"])):
        case = f"batch {row['batch_size']}" + (", training" if row["mode"] == "train" else "")
        case = case if row["runtime"] == "torch" else f"{row['runtime']}, {case}"
        cells = rows.setdefault(f"`{row['model']}` / `{row['baseline']}`", {"MACs": f"{row['macs_ratio']:.2f}"})
        cells[case] = f"{row['time_ratio']:.2f}"
        heads += [case] if case not in heads else []
    head = " | ".join(["model / twin", *heads])
    return table(head, ([name, *(cells.get(one, "") for one in heads)] for name, cells in rows.items())) + _machine(
        report
    )


def sparse_table() -> str:
    """Time at 30 % active positions, as benchmarks/sparse.py measured it."""
    reports, rows = [_results(path.name) for path in sorted(RESULTS.glob("sparse_cpu*.json"))], {}
    for row in (row for report in reports for row in report["rows"] if row["share"] == 0.3):
        cells = rows.setdefault((f"`{row['model']}`", str(row["batch_size"])), {})
        speedups = [f"{row[f'speedup_over_{dense}']:.2f}" for dense in ("folded_dense", "static_twin")]
        cells[row["pattern"]] = [f"{row['times']['sparse']['median_ms']:.1f} ms", *speedups]
    head = "model | batch | blob | over dense | over the twin | scattered | over dense | over the twin"
    quick = [""] * 3  # measured without scattered positions
    lines = ((*key, *cells["blob"], *cells.get("scattered", quick)) for key, cells in rows.items())
    return table(head, lines) + _machine(reports[0])


def budgets_table() -> str:
    """What a trained network gives with several budgets, as benchmarks/digits_budgets.py measured it."""
    report = _results("digits_budgets_cpu.json")
    static = next(row for row in report["rows"] if "share" not in row)
    rows = []
    for row in report["rows"]:
        budget, share = (str(row["budget"]), f"{row['share']:.3f}") if row is not static else ("static", "")
        times = [f"{row[way]['median_ms'] / static['dense']['median_ms']:.2f}" for way in ("auto", "dense")]
        times = times if row is not static else ["", "1"]
        rows.append([budget, f"{row['top1']:.2f}", f"{row['macs'] / 1e6:.2f} M", share, *times])
    head = (
        "budget | top-1 | MACs executed per image | share of the masked ones | time | time with all positions computed"
    )
    return table(head, rows) + _machine(report)


def _results(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def _machine(report: dict) -> str:
    return f"\n{report['device']}, {report['threads']} threads, torch {report['torch']}, {report['date'][:10]}.\n"


def fused_layers(families: Iterable[Family]) -> str:
    """The layers that have something faster than their formula, but for ONNX."""
    found = [layer for layer in _dynamic_layers(families) if any(not row.exported for row in layer.implementations)]
    return f"{', '.join(f'`{layer.__name__}`' for layer in found)}."


def routing_table(families: Iterable[Family]) -> str:
    """What `record` gives of each family."""
    return table("family | what is recorded", ((family.title, family.routing or "nothing") for family in families))


def reported_list(families: Iterable[Family], text: str) -> str:
    """The authors' accuracies on ImageNet of families that the table of a page, its text, does not have."""
    lines = []
    for family in families:
        found = {key.removesuffix(".in1k"): value for key, value in family.reported.items() if "cifar" not in key}
        if found and not re.search(rf"^\| {family.title}\b", text, re.MULTILINE):
            lines.append(f"- {family.title}: {', '.join(f'`{model}` {value:g}' for model, value in found.items())}")
    return "\n" + "\n".join(lines) + "\n"


def layers_table(families: Iterable[Family]) -> str:
    """How the layers of all families run, and what decides."""
    rows = []
    for layer in _dynamic_layers(families):
        for row in layer.implementations:
            kind = "ONNX graphs" if row.exported else "training" if row.gradients else "inference"
            where = f"{kind}, {' and '.join(row.devices)}, {', '.join(str(d)[6:] for d in row.dtypes)}"
            rows.append((f"`{layer.__name__}`", row.name, where, _sentence(row.cannot), _sentence(row.pays)))
        rows.append((f"`{layer.__name__}`", "formula", "everything else", "", ""))
    return table("layer | implementation | for | not where | faster, but not where", rows)


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


def operators_pages() -> str:
    """The public operators, whose docstrings mkdocstrings puts there."""
    functions = (getattr(ops, name) for name in ops.__all__ if name != "backend_info")
    return "".join(f"\n::: {function.__module__}.{function.__name__}\n" for function in functions)


def operators_table() -> str:
    """All registered operators, and on which devices there are kernels."""
    rows = []
    sources = {device: _sources(device) for device in ("cpu", "cuda")}
    for name in sorted(one.partition("::")[2] for one in torch._C._dispatch_get_all_op_names() if _is_ours(one)):
        differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(f"timm_dynamic::{name}", "Autograd")
        kernels = [device for device, text in sources.items() if f'm.impl("{name}"' in text]
        rows.append((f"`{name}`", "yes" if differentiable else "private", ", ".join(kernels)))
    return table("operator | gradients | kernels", rows)


def _is_ours(name: str) -> bool:
    return name.startswith("timm_dynamic::")


def _sources(device: str) -> str:
    """The C++ that registers the kernels of a device."""
    files = [path for path in (ROOT / "cuda_ops").rglob("*.cpp") if path.name.startswith("cuda_") == (device == "cuda")]
    return "".join(path.read_text() for path in files)


def _row(model: str, family: Family) -> list[str]:
    parameters, macs, size = _count(model)
    twin = family.twins.get(model)
    baseline = f"`{twin}`, {_giga(_count(twin)[1])}" if twin else ""
    at = f" at {size} px" if size != 224 else ""
    return [f"`{model}`", f"{parameters / 1e6:.2f} M", _giga(macs) + at, _accuracies(model, family), baseline]


@functools.cache
def _count(model: str) -> Count:
    """As counted before for our models, or now."""
    known = (models[model] for models in counts.read().values() if model in models)
    return next(known, None) or count(model)


def count(model: str) -> Count:
    """Of a model of timm for 224 px, of ours for the size in its cfg."""
    network = timm.create_model(model, device="meta")
    of_timm = model_entrypoint(model).__module__.startswith("timm.models.")
    size = (3, 224, 224) if of_timm else network.default_cfg["input_size"]
    macs = timm_dynamic.count_macs(network, torch.empty(1, *size, device="meta"))
    return Count(sum(p.numel() for p in network.parameters()), macs.static + macs.linear, size[-1])


def counted(families: Iterable[Family]) -> str:
    """The text of counts.json, of all models of the families."""
    found = {family.name: {model: count(model) for model in family.models} for family in families}
    return re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", json.dumps(found, indent=1)) + "\n"


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.{2 if macs >= 5e8 else 3}f} G"


def _accuracies(model: str, family: Family) -> str:
    """The authors' for published weights and in the paper, and ours of weights in the package."""
    found = []
    for key, value in family.reported.items():
        name, _, tag = key.partition(".")
        if name == model:
            found.append(f"{value:g} (`{tag}`)" if tag else f"{value:g} in the paper")
    cards = (Path(timm_dynamic.__file__).parent / "weights" / "README.md").read_text()
    for tag, text in re.findall(rf"## {model}\.(\w+)\n(.*?)(?=\n## |\Z)", cards, re.DOTALL):
        (value,) = re.findall(r"([\d.]+) % top-1 on the (?:360|10 000), measured", text)
        found.append(f"{value} (`{tag}`, measured)")
    return ", ".join(found)


def parts(text: str) -> dict[str, str]:
    """What stands between the markers of a text, by name."""
    return {name: part for name, part in re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end of \1 -->", text, re.DOTALL)}


def written() -> dict[Path, dict[str, str]]:
    """What the parts of each file are to be."""
    families = sorted(FAMILIES.values(), key=lambda family: family.title.lower())
    texts = {
        "README.md": {"families": families_table(families), "speed": speed_table()},
        "docs/models.md": {"models": models_table(families), "papers": papers(families)},
        "docs/layers.md": {"classes": layers_pages(families)},
        "docs/api.md": {"public_operators": operators_pages()},
        "docs/sparse.md": {"sparse": sparse_table(), "budgets": budgets_table()},
        "docs/training.md": {"recipes": table("family | configurations | data | recipe", recipes())},
        "docs/choosing.md": {"reported": reported_list(families, (ROOT / "docs" / "choosing.md").read_text())},
        "docs/inspect.md": {"routing": routing_table(families)},
        "docs/deployment.md": {"faster": fused_layers(families)},
        "docs/architecture.md": {"layers": layers_table(families), "operators": operators_table()},
    }
    return {ROOT / name: of_it for name, of_it in texts.items()}


def main() -> None:
    counts.FILE.write_text(counted(sorted(FAMILIES.values(), key=lambda family: family.name)))
    for path, texts in written().items():
        text = path.read_text()
        for name, before in parts(text).items():
            marked = "<!-- {0} -->\n{1}\n<!-- end of {0} -->"
            text = text.replace(marked.format(name, before), marked.format(name, texts[name]))
        path.write_text(text)


if __name__ == "__main__":
    main()
