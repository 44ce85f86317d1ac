"""The part of benchmarks/README.md about images per second."""

HEAD = """
## Images per second on a CPU

`python benchmarks/images.py --seconds {seconds:.0f}`, `results/{file}`, {machine}.
Networks in evaluation mode on images of their own size, in each way that they run; the fastest way counts. "Optimized"
is the copy that `timm_dynamic.optimize` makes.

| network | batch | images/s | by | {ways} |
|---|---|---|---|{lines}|
"""


def images_text(report: dict, name: str, machine: str) -> str:
    """The section of a report of `images.py`.

    Args:
        report: What the script wrote.
        name: Of its file in `results`.
        machine: What was measured on, in words.
    """
    ways = list(dict.fromkeys(way for row in report["rows"] for way in row["ways"]))
    columns = {"ways": " | ".join(ways), "lines": "|".join(["---"] * len(ways))}
    text = HEAD.format(file=name, machine=machine, seconds=report["seconds"], **columns)
    for row in report["rows"]:
        speeds = (
            f"{1e3 * row['batch_size'] / row['ways'][way]['median_ms']:.0f}" if way in row["ways"] else ""
            for way in ways
        )
        text += (
            f"| `{row['model']}` | {row['batch_size']} | {row['images_per_s']:.0f} | {row['best']} | "
            f"{' | '.join(speeds)} |\n"
        )
    return text
