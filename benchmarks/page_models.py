"""The part of benchmarks/README.md about whole models beside their static twins: text, tables and the picture."""

from collections.abc import Iterable
from pathlib import Path

HEAD = """
## {title} on {where}

`{command}`, `results/{file}`, {machine}; {settings}. The static twin is timm's model as it is. Time and memory are
ratios to it, in the same process; memory is the peak of a step with the weights. "Optimized" is the inference copy that
`timm_dynamic.optimize` makes, of the model and of the twin alike. {processes}{paths}

![Ratios of time and of MACs]({picture})
"""
ONE = "Every case ran in one process."
SEVERAL = "The time is the median over several processes, whose own follow it."
PATHS = """ The reference path is what serves without our kernels; it is the same code as ours where no kernel of
ours has a part in it, as in most training steps on a CPU. What is compiled (`torch.compile`, inductor) is compared with
the compiled twin."""
TABLE = """
`{model}` / `{twin}`, {macs:.2f}x the MACs:

| mode | batch | | ms | p10-p90 | time | of each process | optimized, ms | time | MB | memory | MACs |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
FAILED = "\nNot measured:\n\n"
# What to draw: in strong colours what runs eagerly.
COLORS = {
    "ours": "#1f5fa8",
    "ours, compiled": "#7fa8d8",
    "reference path": "#c8641b",
    "reference path, compiled": "#e5b48c",
}
MACS = "#b9c2cf"
_TEXT = "#333333"
_BAR = 0.17
_LONGEST = 3.0  # bars are cut here: the reference path can be many times slower


def models_text(report: dict, name: str, machine: str, results: Path) -> str:
    """The section of a report of `models.py`; saves its picture beside the report.

    Args:
        report: What the script wrote.
        name: Of its file in `results`: `models_*.json`, or `paths_*.json` with the reference path.
        machine: What was measured on, in words.
        results: The folder.
    """
    cases = by_case(report["rows"])
    paths, cuda, first = name.startswith("paths"), bool(report["cuda"]), report["rows"][0]
    settings = f"{first['img_size']} px, {first['dtype']}, {first['memory_format']}"
    picture = Path(name).with_suffix(".png")
    save_ratios(cases, f"{machine}, {settings}", results / picture)
    text = HEAD.format(
        title="All ways to run the models" if paths else "Models",
        where="a GPU" if cuda else "a CPU",
        command="python benchmarks/models.py" + " --paths" * paths + " --device cuda" * cuda,
        file=name,
        machine=machine,
        settings=settings,
        processes=ONE if len(first["time_ratios"]) == 1 else SEVERAL,
        paths=PATHS if paths else "",
        picture=f"results/{picture}",
    )
    for model in dict.fromkeys(model for model, *_ in cases):
        text += _table(model, [rows for key, rows in sorted(cases.items()) if key[0] == model])
    failed = [f"- `{case}`: {why}\n" for case, why in report.get("failed", {}).items()]
    return text + (FAILED + "".join(failed) if failed else "")


def by_case(rows: Iterable[dict]) -> dict[tuple[str, bool, str, int], list[dict]]:
    """The twin's row and those compared with it, by model, whether compiled, mode and batch size.

    In a report they follow each other, the twin first.
    """
    runs: list[list[dict]] = []
    for row in rows:
        if row["model"] == row["baseline"]:
            runs.append([])
        runs[-1].append(row)
    return {(run[-1]["model"], _compiled(run[-1]), run[-1]["mode"], run[-1]["batch_size"]): run for run in runs}


def what(row: dict) -> str:
    """What a row is of."""
    if row["model"] == row["baseline"]:
        name = "static twin"
    else:
        name = "reference path" if row["backend"] == "reference" else "ours"
    return name + (", compiled" if _compiled(row) else "")


def _compiled(row: dict) -> bool:
    return row["execution"] != "eager"


def _table(model: str, cases: list[list[dict]]) -> str:
    ours = cases[0][-1]
    text = TABLE.format(model=model, twin=ours["baseline"], macs=ours["macs_ratio"])
    for row in (row for rows in cases for row in rows):
        each = ", ".join(f"{ratio:.2f}" for ratio in sorted(row["time_ratios"]))
        optimized = f"{row['optimized_ms']:.1f} | {row['optimized_ratio']:.2f}" if "optimized_ms" in row else " | "
        text += (
            f"| {row['mode']} | {row['batch_size']} | {what(row)} | {row['median_ms']:.1f} | "
            f"{row['p10_ms']:.1f}-{row['p90_ms']:.1f} | {row['time_ratio']:.2f} | "
            f"{each if row['model'] != row['baseline'] else ''} | {optimized} | {row['peak_memory'] / 1e6:.0f} | "
            f"{row['memory_ratio']:.2f} | {row['macs_ratio']:.2f} |\n"
        )
    return text


def save_ratios(cases: dict[tuple, list[dict]], conditions: str, path: Path) -> None:
    """Draw bars of the ratios of time beside that of MACs: a panel for every mode and batch size.

    Args:
        cases: As `by_case` gives them.
        conditions: What was measured on, as a line under the title.
        path: File to write, in the format of its suffix.
    """
    from matplotlib.figure import Figure  # here: a machine that only measures need not have it
    from matplotlib.patches import Patch

    panels = sorted({key[2:] for key in cases})
    models = list(dict.fromkeys(key[0] for key in cases))
    found = {what(row) for rows in cases.values() for row in rows}
    colors = {name: color for name, color in COLORS.items() if name in found} | {"MACs": MACS}
    height = 1.5 + len(models) * (0.2 + _BAR * len(colors))
    figure = Figure(figsize=(1.8 + 2.7 * len(panels), height), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, panel in zip(grid, panels, strict=True):
        for y, model in enumerate(models):
            rows = [row for key, rows in cases.items() if (key[0], *key[2:]) == (model, *panel) for row in rows[1:]]
            ratios = {what(row): row["time_ratio"] for row in rows}
            if rows:
                ratios["MACs"] = rows[0]["macs_ratio"]
            for i, (name, color) in enumerate(colors.items()):
                if name in ratios:
                    at = y + 0.8 * ((i + 0.5) / len(colors) - 0.5)
                    axes.barh(at, min(ratios[name], _LONGEST), 0.8 / len(colors), color=color)
                    axes.text(_LONGEST + 0.1, at, f"{ratios[name]:.2f}", va="center", color=_TEXT, fontsize=7)
        axes.axvline(1, color=_TEXT, linewidth=1, linestyle="--")
        axes.set_title(f"{panel[0]}, batch {panel[1]}", loc="left", fontsize=10)
        axes.set_xlim(0, _LONGEST + 0.6)
        axes.set_xticks(range(int(_LONGEST) + 1))
        axes.set_ylim(len(models) - 0.5, -0.5)  # the first model on top
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_yticks(range(len(models)), models)
    figure.suptitle(f"Time and MACs as ratios to the static twin\n{conditions}", x=0.01, ha="left", fontsize=11)
    handles = [Patch(color=color, label=name if name == "MACs" else f"time: {name}") for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
