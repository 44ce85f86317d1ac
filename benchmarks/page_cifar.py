"""The part of benchmarks/README.md about accuracy on CIFAR-10: text, table and the picture."""

from pathlib import Path

from matplotlib.figure import Figure

_ALIKE = 0.01  # a hundredth of what routing can differ by
HEAD = """
## Every family on CIFAR-10

`python benchmarks/cifar.py train DATA RUNS`, then `report DATA RUNS`; `results/{file}`, {machine}. Measured: one small
residual network (`dynconv_resnet8` without masks, 32 px), static and made dynamic by every family, with one recipe and
the same seeds: `configs/dynconv_resnet8.cifar10.yaml`, {epochs} epochs, which is far from what the authors train.
Dynamic layers are as their authors initialise them; those of `dcd_exact` and `dy_exact` begin as the static network's.
`dynconv_050` has masks with a budget of 0.5 (`quiet`: without noise; `firm`: its loss weighs three times as much),
`static_050` half the channels, and so on. Top-1 on the 10,000 test photographs (CIFAR-10's, saved as JPEG) after the
last epoch: none was chosen by it. MACs are those executed, masks included, on average over 1000 test images. Times are
in ms an image, of all networks in turns, on test images (none where the weights that its masks need are not kept): the
fastest of eager, channels_last, and optimized; in training (forward and backward, batches of 128) the faster layout.
Routing: the mean entropy of what layers decide, and the entropy of their mean decision, as shares of the highest
possible, on average over layers. Where the two are equal, all images are decided alike. DY's temperature falls from 30
to 1 over ten epochs, as its authors have it: in the eighth and last one here it is 7.4, and its attention still nearly
even.

![Accuracy against MACs and against measured time]({picture})

{verdict}
- Masks save operations, not time, on networks as small as these: a block of at most 64 channels on 32 pixels takes no
  longer than gathering its positions. Where they save time: docs/sparse.md.

| network | top-1 | seeds | parameters | MACs | batch 1 | batch 64 | training | routing |
|---|---|---|---|---|---|---|---|---|
"""


def cifar_text(report: dict, name: str, machine: str, results: Path) -> str:
    """The section of a report of `cifar.py`; saves its picture beside the report.

    Args:
        report: What the script wrote.
        name: Of its file in `results`.
        machine: What was measured on, in words.
        results: The folder.
    """
    picture = Path(name).with_suffix(".png")
    save_plots(report["rows"], results / picture)
    text = HEAD.format(
        file=name,
        machine=machine,
        epochs=report["epochs"],
        picture=f"results/{picture}",
        verdict=verdict(report["rows"]),
    )
    for row in report["rows"]:
        seeds = ", ".join(str(run["seed"]) for run in row["runs"])
        spread = "" if row["top1_std"] is None else f" ± {row['top1_std']:.2f}"
        text += (
            f"| {row['network']} | {row['top1_mean']:.2f}{spread} | {seeds} | "
            f"{row['params'] / 1e3:.0f} k | {row['macs'] / 1e6:.2f} M | {_ms(row, 'batch_1', 3)} | "
            f"{_ms(row, 'batch_64', 3)} | {_ms(row, 'training', 2)} | {_entropies(row)} |\n"
        )
    return text


def _ms(row: dict, name: str, digits: int) -> str:
    return f"{row[name]['ms_per_image']:.{digits}f}" if row[name] else ""


def _entropies(row: dict) -> str:
    return "{mean_entropy:.4f}, {entropy_of_mean:.4f}".format(**row["routing"]) if row["routing"] else ""


def is_static(row: dict) -> bool:
    return row["network"].startswith("static")


def bought(row: dict, rows: list[dict], cost) -> float | None:
    """The accuracy that a static network of the same cost has, between the two nearest widths; None beyond them."""
    curve = sorted((cost(other), other["top1_mean"]) for other in rows if is_static(other))
    for (low, worse), (high, better) in zip(curve, curve[1:], strict=False):
        if low <= cost(row) <= high:
            return worse + (better - worse) * (cost(row) - low) / (high - low)
    return None


def verdict(rows: list[dict]) -> str:
    """A sentence a cost: what is above the curve of static networks, what below, and what is beyond its ends."""
    costs = {"MACs": lambda row: row["macs"], "time at batch 64": _batch_64}
    rows = [row for row in rows if not row["network"].startswith("resnet20")]
    lines = []
    for name, cost in costs.items():
        places: dict[str, list[str]] = {"above": [], "below": [], "beyond the ends of": []}
        for row in rows:
            if not is_static(row) and cost(row):
                other = bought(row, rows, cost)
                place = "beyond the ends of" if other is None else "above" if row["top1_mean"] > other else "below"
                difference = "" if other is None else f" ({row['top1_mean'] - other:+.1f})"
                places[place].append(f"{row['network']}{difference}")
        found = "; ".join(f"{place} the curve: {', '.join(names)}" for place, names in places.items() if names)
        lines.append(f"- Beside static networks of the same {name} (in points), {found}.")
    routed = [row for row in rows if row["routing"]]
    alike = [row["network"] for row in routed if _spread(row) < _ALIKE]
    if alike:
        others = ", ".join(row["network"] for row in routed if _spread(row) >= _ALIKE)
        lines.append(
            f"- All images are decided nearly alike (the two entropies are within {_ALIKE:g}) by {', '.join(alike)}"
            f"{f'; not by {others}' if others else ''}."
        )
    return "\n".join(lines)


def _spread(row: dict) -> float:
    return row["routing"]["entropy_of_mean"] - row["routing"]["mean_entropy"]


def _batch_64(row: dict) -> float | None:
    return row["batch_64"] and row["batch_64"]["ms_per_image"]


def save_plots(rows: list[dict], path: Path) -> None:
    figure = Figure((11, 4.5), layout="constrained")
    panels = {
        "MACs of an image, millions": lambda row: row["macs"] / 1e6,
        "ms an image, batch 64": _batch_64,
    }
    for axes, (label, cost) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        static = sorted((cost(row), row["top1_mean"]) for row in rows if is_static(row))
        axes.plot(*zip(*static, strict=True), "o--", color="#777777", label="static, by width")
        for row in rows:
            if is_static(row) or not cost(row):
                continue
            masks = "dynconv" in row["network"]
            color, marker = ("#c8641b", "s") if masks else ("#1f5fa8", "o")
            axes.errorbar(cost(row), row["top1_mean"], row["top1_std"] or 0, fmt=marker, color=color)
            axes.annotate(row["network"], (cost(row), row["top1_mean"]), xytext=(4, 4), textcoords="offset points")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("top-1 on CIFAR-10's test images, %")
    figure.savefig(path, dpi=110, metadata={"Software": None})
