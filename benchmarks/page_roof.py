"""The part of benchmarks/README.md about what bounds the networks."""

HEAD = """
## What is left

`python benchmarks/roof.py`, `results/{file}`, {machine}.
Rates measured in the same run: {macs:.0f} billion MACs a second, {bytes:.0f} GB/s, {call:.1f} us a call. At these
rates a network would take the times below for its MACs, for reading all parameters once, for reading and writing every
map from memory, and for its calls; the static twin's are in brackets. Measured: the copies of `timm_dynamic.optimize`,
in turns. Maps stay in the caches in part, so that only the first two are floors; "at least" is the larger of them.

| network | batch | measured, ms | at least, ms | MACs | parameters | maps | calls |
|---|---|---|---|---|---|---|---|
"""
WEIGHTS = """
In onnxruntime a sample's weight has a bound of its own: the runtime lays out constant weights in blocks beforehand.
Convolutions whose weight is an input, in units of the same ones with a constant weight (one image, in the same run):

| channels | map | kernel | groups | time |
|---|---|---|---|---|
"""
BOUNDS = ("arithmetic", "parameters", "maps", "calls")


def roof_text(report: dict, name: str, machine: str) -> str:
    """The section of a report of `roof.py`.

    Args:
        report: What the script wrote.
        name: Of its file in `results`.
        machine: What was measured on, in words.
    """
    rates = report["rates"]
    units = {"macs": rates["macs"] / 1e9, "bytes": rates["bytes"] / 1e9, "call": 1e6 * rates["call_s"]}
    text = HEAD.format(file=name, machine=machine, **units)
    for row in report["rows"]:
        ours, static = row["ours"], row["static"]
        floors = (max(side["arithmetic"], side["parameters"]) for side in (ours, static))
        cells = [(ours["median_ms"], static["median_ms"]), tuple(floors)]
        cells += [(ours[bound], static[bound]) for bound in BOUNDS]
        text += f"| `{row['model']}` | {row['batch_size']} | "
        text += " | ".join(f"{mine:.1f} ({other:.1f})" for mine, other in cells) + " |\n"
    text += WEIGHTS
    for row in report["varying_weights"]:
        size, kernel = (f"{row[key]}x{row[key]}" for key in ("size", "kernel_size"))
        text += f"| {row['channels']} | {size} | {kernel} | {row['groups']} | {row['time_ratio']:.2f} |\n"
    return text
