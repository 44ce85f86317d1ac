"""The first part of benchmarks/README.md: every model in its fastest execution beside its twin in its fastest."""

HEAD = """
## Best beside best

`python benchmarks/models.py --best`, `results/{file}`, {machine}; {size} px, float32. Every model and its static twin
in the fastest of all ways to run them (`benchmarks/best.py` lists them), in turns in one process: the ratio of their
times ({processes}), and both ways. How to run a model so: [deployment](../docs/deployment.md).
"""
TITLES = {"torch": "Within PyTorch", "onnxruntime": "In onnxruntime"}
TABLE = """
### {title}

| model / twin | MACs | | time | each process | model | ms | twin | ms |
|---|---|---|---|---|---|---|---|---|
"""
FAILED = "\nNot measured:\n\n"


def best_text(report: dict, name: str, machine: str) -> str:
    """The section of a report of `models.py --best`.

    Args:
        report: What the script wrote.
        name: Of its file.
        machine: What was measured on, in words.
    """
    rows = report["rows"]
    count = max(len(row["time_ratios"]) for row in rows)
    processes = "one process a case" if count == 1 else f"the median of {count} processes"
    text = HEAD.format(file=name, machine=machine, size=rows[0]["img_size"], processes=processes)
    for runtime, title in TITLES.items():
        found = [row for row in rows if row["runtime"] == runtime]
        text += TABLE.format(title=title) if found else ""
        for row in sorted(found, key=lambda row: (row["model"], row["mode"], row["batch_size"])):
            each = ", ".join(f"{ratio:.2f}" for ratio in sorted(row["time_ratios"])) if count > 1 else ""
            ways = (
                f"{row['execution']} | {row['median_ms']:.1f} | {row['baseline_execution']} | {row['baseline_ms']:.1f}"
            )
            text += (
                f"| `{row['model']}` / `{row['baseline']}` | {row['macs_ratio']:.2f} | {row['mode']}, batch "
                f"{row['batch_size']} | {row['time_ratio']:.2f} | {each} | {ways} |\n"
            )
    failed = [f"- `{case}`: {why}\n" for case, why in report.get("failed", {}).items()]
    return text + (FAILED + "".join(failed) if failed else "")
