"""The part of benchmarks/README.md about spatially sparse execution: text, tables and the picture."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

HEAD = """
## Spatially sparse execution on {where}, {dtype}

`python benchmarks/sparse.py{options}`, `results/{file}`, {machine}; {size} px, medians of 30 rounds
at batch 1, else of 10. The mask units run and are in the times, but their masks are replaced by ones with a given share
of active positions, the same in every block: a blob (the positions nearest to the centre) or scattered (drawn at
random). Where positions are scattered, the first convolution of a block must run at more of their neighbours.

"Folded dense" is the same network, mask units included, with every position computed, batch norms folded, in
channels_last; the static twin is timm's model without masks, or our own with `budget=-1`, folded likewise. All three
ran in turn. Speed-ups above 1 mean that sparse execution is the faster one; MACs are those executed, as a share of the
same network's with full masks, mask units and unmasked layers included. Memory is the peak over the shares, beyond
weights and input.

![Time against the share of active positions]({picture})

{losses}
"""
PATTERNS = {"blob": "#1f5fa8", "scattered": "#c8641b"}
DENSE = {"folded dense": ("#333333", "--"), "static twin": ("#777777", ":")}
_MiB = 2**20


def sparse_text(report: dict, name: str, machine: str, results: Path) -> str:
    """The section of a report of `sparse.py`; saves its picture beside the report.

    Args:
        report: What the script wrote.
        name: Of its file in `results`.
        machine: What was measured on, in words.
        results: The folder.
    """
    picture = Path(name).with_suffix(".png")
    dtype = report.get("dtype", "float32")
    save_times(report, f"{machine}, {dtype}", results / picture)
    models = dict.fromkeys(row["model"] for row in report["rows"])
    options = {
        " --device cuda": report["cuda"],
        f" --models {' '.join(models)}": len(models) < 3,
        f" --dtype {dtype}": dtype != "float32",
        " --quick": "scattered" not in by_pattern(report["rows"]),
        f" --output benchmarks/results/{name}": name not in ("sparse_cpu.json", "sparse_cuda.json"),
    }
    text = HEAD.format(
        where="a GPU" if report["cuda"] else "a CPU",
        dtype=dtype,
        options="".join(option for option, given in options.items() if given),
        file=name,
        machine=machine,
        size=report["rows"][0].get("img_size", 224),
        picture=f"results/{picture}",
        losses="\n".join(losses(report["rows"], dense) for dense in DENSE).rstrip(),
    )
    return text + "".join(_table(key, rows) for key, rows in by_panel(report["rows"]).items())


def by_panel(rows: Iterable[dict]) -> dict[tuple[str, int], list[dict]]:
    """The rows of every model and batch size, in the order measured."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        found.setdefault((row["model"], row["batch_size"]), []).append(row)
    return found


def by_pattern(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """The rows of every pattern, by share."""
    rows = sorted(rows, key=lambda row: row["share"])
    found = {pattern: [row for row in rows if row["pattern"] == pattern] for pattern in PATTERNS}
    return {pattern: of_it for pattern, of_it in found.items() if of_it}


def _speedup(row: dict, dense: str) -> float:
    return row[f"speedup_over_{dense.replace(' ', '_')}"]


def losses(rows: Iterable[dict], dense: str) -> str:
    """A paragraph on where sparse execution is slower than a dense network."""
    places = []
    for (model, batch_size), of_panel in by_panel(rows).items():
        for pattern, of_it in by_pattern(of_panel).items():
            slower = [row for row in of_it if _speedup(row, dense) < 1]
            if slower:
                shares = ", ".join(f"{row['share']:.1f}" for row in slower)
                worst = min(_speedup(row, dense) for row in slower)
                places.append(f"- `{model}`, batch {batch_size}, {pattern}: at {shares} (down to {worst:.2f}x)")
    if not places:
        return f"Against {dense}, sparse execution loses nowhere.\n"
    return "\n".join([f"Against {dense}, sparse execution loses:\n", *places, ""])


def _table(key: tuple[str, int], rows: list[dict]) -> str:
    shares = sorted({row["share"] for row in rows})
    times = ", ".join(f"{dense} {_median(rows, dense):.1f} ms" for dense in DENSE)
    memory = ", ".join(
        f"{name} {max(row['peak_memory'][name] for row in rows) / _MiB:.1f} MiB" for name in ("sparse", "folded dense")
    )
    text = f"\n`{key[0]}`, batch {key[1]}: {times}. Peak memory: {memory}.\n\n"
    text += _line("share of active positions", [f"{share:.1f}" for share in shares])
    text += _line("---", ["---"] * len(shares))
    for pattern, of_it in by_pattern(rows).items():
        by_share = {row["share"]: row for row in of_it}
        columns = [by_share.get(share) for share in shares]
        for title, cell in (
            ("ms", lambda row: f"{row['times']['sparse']['median_ms']:.1f}"),
            ("speed-up over folded dense", lambda row: f"{_speedup(row, 'folded dense'):.2f}"),
            ("speed-up over static twin", lambda row: f"{_speedup(row, 'static twin'):.2f}"),
            ("MACs", lambda row: f"{row['macs']['executed'] / row['macs']['static']:.2f}"),
        ):
            text += _line(f"{pattern}, {title}", [cell(row) if row else "" for row in columns])
    return text


def _line(head: str, cells: list[str]) -> str:
    return f"| {' | '.join([head, *cells])} |\n"


def _median(rows: list[dict], dense: str) -> float:
    """Of a dense network, which was timed beside every share: in milliseconds."""
    return median(row["times"][dense]["median_ms"] for row in rows)


def save_times(report: dict, machine: str, path: Path) -> None:
    """Draw the time against the share of active positions, a panel for every model and batch size.

    Args:
        report: What `sparse.py` wrote.
        machine: What was measured on, as a line under the title.
        path: File to write, in the format of its suffix.
    """
    panels = by_panel(report["rows"])
    models, batches = (list(dict.fromkeys(column)) for column in zip(*panels, strict=True))
    figure = Figure(figsize=(1.2 + 3.9 * len(batches), 1.3 + 2.6 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(batches), squeeze=False, sharex=True)
    for axes in grid.flat:
        axes.set_axis_off()
    for (model, batch_size), rows in panels.items():
        axes = grid[models.index(model)][batches.index(batch_size)]
        axes.set_axis_on()
        for pattern, of_it in by_pattern(rows).items():
            shares, times = [row["share"] for row in of_it], [row["times"]["sparse"] for row in of_it]
            low, middle, high = ([time[key] for time in times] for key in ("p10_ms", "median_ms", "p90_ms"))
            axes.fill_between(shares, low, high, color=PATTERNS[pattern], alpha=0.2, linewidth=0)
            axes.plot(shares, middle, color=PATTERNS[pattern], marker="o", markersize=3, label=f"sparse, {pattern}")
        for dense, (color, style) in DENSE.items():
            axes.axhline(_median(rows, dense), color=color, linestyle=style, linewidth=1.2, label=dense)
        axes.set_title(f"{model}, batch {batch_size}", loc="left", fontsize=10)
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms")
    for axes in grid[-1]:
        axes.set_xlabel("share of active positions")
    title = f"Time of spatially sparse execution (median, band p10 to p90)\n{machine}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(batches) * 2, frameon=False
    )
    figure.savefig(path, dpi=120)
