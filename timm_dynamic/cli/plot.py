"""The pictures of a benchmark (time beside MACs, both relative to the baseline) and of `inspect`."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    raise ModuleNotFoundError('the plot needs matplotlib: pip install "timm-dynamic[demo]"') from None

from timm_dynamic.cli.pose_maps import JOINTS, PARENTS

_TIME, _MACS, _TEXT = "#1f5fa8", "#b9c2cf", "#333333"
_BAR = 0.36
_SIDES = {"right": "#e4572e", "left": "#2e86de"}  # of a person; other joints are yellow
_MIDDLE = "#f5c518"
_SKIPPED = torch.tensor([0.267, 0.005, 0.329])  # viridis's colour of 0 blocks
_VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
_VISIBLE = 0.25  # how much of an image is seen where a block is not executed


def save_ratios(rows: list[dict], conditions: str, path: Path) -> None:
    """Draw horizontal bars, for each model and batch size, of the ratio of time beside the ratio of MACs.

    Args:
        rows: Of the benchmark's report; those that are their own baseline become the 1.0 line.
        conditions: What was measured on, as a line under the title.
        path: File to write, in the format of its suffix.
    """
    baselines = {_key(row): row for row in rows if _is_baseline(row)}
    rows = [row for row in rows if not _is_baseline(row)] or rows
    figure = Figure(figsize=(9, 1.9 + 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        base = baselines[row["batch_size"], row["img_size"], row["baseline"]]["median_ms"]
        time, macs = row["time_ratio"], row["macs_ratio"]
        spread = [[time - row["p10_ms"] / base], [row["p90_ms"] / base - time]]
        whiskers = {"ecolor": _TEXT, "capsize": 3}
        axes.barh(y - _BAR / 2, time, _BAR, color=_TIME, xerr=spread, error_kw=whiskers)
        axes.barh(y + _BAR / 2, macs, _BAR, color=_MACS)
        notes = (f"{time:.2f}  ({row['median_ms']:.4g} / {base:.4g} ms)", f"{macs:.2f}")
        for text, height in zip(notes, (y - _BAR / 2, y + _BAR / 2), strict=True):
            axes.text(1.02, height, text, transform=axes.get_yaxis_transform(), va="center", color=_TEXT, fontsize=9)
    names = [f"{row['model']} ({_code(row)})\nbatch {row['batch_size']}, {row['img_size']} px" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axes.axvline(1, color=_TEXT, linewidth=1, linestyle="--")
    axes.set_xlim(0, 1.25 * max(max(1, row["time_ratio"], row["macs_ratio"]) for row in rows))
    names = ", ".join(dict.fromkeys(row["baseline"] for row in rows))
    axes.set_xlabel(f"ratio to {names} (shorter is better)")
    axes.set_title(f"Time and MACs as ratios to {names}", loc="left", fontweight="bold", pad=24)
    axes.annotate(conditions, (0, 1), (0, 8), "axes fraction", "offset points", color=_TEXT, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    bars = [Patch(color=_TIME, label="time (median, whiskers p10 to p90)"), Patch(color=_MACS, label="MACs")]
    figure.legend(handles=bars, loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def save_entropy(report: dict, path: Path) -> None:
    """Draw the entropy of every layer as a dot, and their mean as a line, over the feature resolutions.

    Args:
        report: Of `inspect`.
        path: File to write, in the format of its suffix.
    """
    resolutions = [row["resolution"] for row in report["resolutions"]]
    figure = Figure(figsize=(max(5, 1.5 + 0.9 * len(resolutions)), 4), layout="constrained")
    axes = figure.subplots()
    means = [row["normalised"] for row in report["resolutions"]]
    axes.plot(range(len(means)), means, color=_TIME, marker="o", label="mean of the layers")
    for x, value in enumerate(means):
        axes.annotate(f"{value:.3f}", (x, value), (0, -16), textcoords="offset points", ha="center", color=_TIME)
    positions = [resolutions.index(row["resolution"]) for row in report["layers"]]
    values = [row["normalised"] for row in report["layers"]]
    axes.scatter(positions, values, s=14, color=_MACS, zorder=3, label="layer")
    axes.set_xticks(range(len(resolutions)), resolutions)
    axes.set_xlim(-0.5, len(resolutions) - 0.5)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("input resolution of the layer")
    axes.set_ylabel("entropy / highest possible")
    kinds = " and ".join(dict.fromkeys(row["kind"] for row in report["layers"]))
    axes.set_title(f"{report['model']}: entropy of its {kinds}", loc="left", fontweight="bold", pad=24)
    axes.annotate(f"images: {report['images']}", (0, 1), (0, 8), "axes fraction", "offset points", color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def save_ponder_cost(
    image: Tensor, cost: Tensor, blocks: int, title: str, path: Path, joints: Tensor | None = None
) -> None:
    """Draw an image beside the number of blocks that are executed at its positions.

    Args:
        image: `[H, W, 1 or 3]`, from 0 to 1.
        cost: `[h, w]`, from 0 to `blocks`.
        blocks: The number of blocks that have a mask.
        title: A line above.
        path: File to write, in the format of its suffix.
        joints: Of a person, `[16, 3]`: column, row and the height of the heat map there, to be drawn on the image; the
            map then lies on the image, too.
    """
    height, width = image.shape[:2]
    figure = Figure(figsize=(9.6, 1 + 4.2 * height / width), layout="compressed")
    left, right = figure.subplots(1, 2)
    left.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    if joints is not None:
        _draw_skeleton(left, joints)
        right.imshow(image.mean(2).numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    # From 0 to all blocks, whatever this image has: pictures of several images can be compared.
    drawn = right.imshow(
        cost.numpy(),
        cmap="viridis",
        vmin=0,
        vmax=blocks,
        extent=(0, width, height, 0),
        interpolation="none",
        alpha=None if joints is None else 0.6,
    )
    label = f"blocks executed, of {blocks} (mean {cost.mean():.1f})"
    bar = figure.colorbar(drawn, ax=right, label=label, ticks=MaxNLocator(integer=True), pad=0.02)
    bar.outline.set_visible(False)
    for axes in (left, right):
        axes.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _draw_skeleton(axes: Axes, joints: Tensor) -> None:
    """Bones and joints, the fainter the less certain; none where a heat map is nowhere positive."""
    for joint, (x, y, score) in enumerate(joints.tolist()):
        *end, other = joints[PARENTS[joint]].tolist()
        colour = _SIDES.get(JOINTS[joint].partition(" ")[0], _MIDDLE)
        if min(score, other) > 0:
            axes.plot([x, end[0]], [y, end[1]], color=colour, linewidth=2, alpha=_opacity(min(score, other)))
        if score > 0:
            axes.plot(x, y, "o", color=colour, markersize=4, markeredgecolor="white", alpha=_opacity(score))


def _opacity(score: float) -> float:
    return min(max(score, 0.2), 1.0)


def save_masks(image: Tensor, masks: dict[str, Tensor], title: str, path: Path) -> None:
    """Draw, for every block, the image where the block is executed, and violet where it is not.

    Args:
        image: `[H, W, 1 or 3]`, from 0 to 1.
        masks: `[h, w]`, of zeros and ones, by the name of the block.
        title: A line above.
        path: File to write, in the format of its suffix.
    """
    height, width = image.shape[:2]
    image = image.expand(-1, -1, 3)
    skipped = _VISIBLE * image.mean(2, keepdim=True) + (1 - _VISIBLE) * _SKIPPED
    columns = min(len(masks), max(3, round(math.sqrt(len(masks) * 1.6 * height / width))))
    rows = math.ceil(len(masks) / columns)
    figure = Figure(figsize=(1.9 * columns, 0.5 + rows * (0.3 + 1.8 * height / width)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (name, mask) in zip(panels, masks.items(), strict=False):
        active = F.interpolate(mask[None, None], (height, width))[0, 0, :, :, None]
        axes.imshow(torch.where(active > 0, image, skipped).numpy())
        axes.set_title(f"{name}  {mask.mean():.0%}", fontsize=9)
    figure.suptitle(
        f"{title}\nwhere each block is executed, and its share of positions", x=0.01, ha="left", fontsize=10
    )
    figure.savefig(path, dpi=150)


def save_predictions(rows: list[tuple[Tensor, Tensor, Tensor]], num_classes: int, title: str, path: Path) -> None:
    """Draw images beside the classes of their pixels: those in the mask, and those that a model predicts.

    Args:
        rows: Of each image: `[H, W, 3]`, from 0 to 1; its mask, `[H, W]`; the prediction, `[H, W]`.
        num_classes: Classes; what is not one of them in a mask stays white.
        title: A line above.
        path: File to write, in the format of its suffix.
    """
    colours = ["black", *(colormaps["tab20"](i % 20) for i in range(num_classes - 1))]
    shapes = [image.shape[0] / image.shape[1] for image, _, _ in rows]
    figure = Figure(figsize=(9.6, 0.9 + 3.1 * sum(shapes)), layout="compressed")
    panels = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"height_ratios": shapes})
    for axes, name in zip(panels[0], ("image", "mask", "prediction"), strict=True):
        axes.set_title(name, fontsize=10)
    found = set()
    for (image, *masks), (first, *others) in zip(rows, panels, strict=True):
        first.imshow(image.numpy())
        for mask, axes in zip(masks, others, strict=True):
            found |= {int(label) for label in mask.unique() if label < num_classes}
            options = {"vmin": -0.5, "vmax": num_classes - 0.5, "interpolation": "none"}
            axes.imshow(mask.numpy(), ListedColormap(colours).with_extremes(over="white"), **options)
    for axes in panels.flat:
        axes.set_axis_off()
    names = _VOC_CLASSES if num_classes == len(_VOC_CLASSES) else [f"class {i}" for i in range(num_classes)]
    patches = [Patch(color=colours[label], label=names[label]) for label in sorted(found)]
    figure.legend(handles=patches, loc="outside lower left", ncols=7, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _key(row: dict) -> tuple[int, int, str]:
    return row["batch_size"], row["img_size"], row["model"]


def _is_baseline(row: dict) -> bool:
    return row["baseline"] == row["model"] and row["time_ratio"] == 1


def _code(row: dict) -> str:
    return row["backend"] if row["execution"] == "eager" else f"{row['backend']}, {row['execution']}"
