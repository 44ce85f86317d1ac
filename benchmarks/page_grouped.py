"""The part of benchmarks/README.md about networks as their authors compute them."""

HEAD = """
## Weights of every sample, as the authors compute them

`python benchmarks/grouped.py --seconds {seconds:.0f}`, `results/{file}`, {machine}.
Times over those of the static twin in the same rounds. "This package": in evaluation the copies that
`timm_dynamic.optimize` makes of network and twin; in training plain. "Grouped convolution": plain PyTorch, the network
as its authors' code runs it, with the weights of all samples in one convolution of as many groups.

| network | mode | batch | static twin, ms | this package | grouped convolution |
|---|---|---|---|---|---|
"""


def grouped_text(report: dict, name: str, machine: str) -> str:
    """The section of a report of `grouped.py`.

    Args:
        report: What the script wrote.
        name: Of its file in `results`.
        machine: What was measured on, in words.
    """
    text = HEAD.format(file=name, machine=machine, seconds=report["seconds"])
    for row in report["rows"]:
        times = {way: time["median_ms"] for way, time in row["ways"].items()}
        twin = times["static twin"]
        text += (
            f"| `{row['model']}` | {row['mode']} | {row['batch_size']} | {twin:.1f} | "
            f"{times['this package'] / twin:.2f} | {times['grouped convolution'] / twin:.2f} |\n"
        )
    return text
