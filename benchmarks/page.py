"""Writes benchmarks/README.md from benchmarks/results/*.json: `python benchmarks/page.py`."""

import json
from pathlib import Path

from page_best import best_text
from page_cifar import cifar_text
from page_finetune import finetune_text
from page_grouped import grouped_text
from page_images import images_text
from page_models import models_text
from page_rejected import rejected_text
from page_roof import roof_text
from page_sparse import sparse_text

from timm_dynamic.ops.records import SHIPPED, read

HERE = Path(__file__).parent
HEAD = """# Measurements

Written by `benchmarks/page.py` from the files under `results/`, which name machine, versions and commit. Times are
medians of interleaved rounds in one process. The CPU is a shared, noisy virtual machine: a ratio differs by up to
15 %, at batch 16 by up to 25 %, from process to process, above all with what page faults its large maps cost.
"""
OPERATOR = """
## Filters of every position on {where}

`{command}`, `results/{file}`, {machine}. Calls of `dynamic_filter` with K x K filters; ratios are to torch's own
depthwise `conv2d` of that size in the same layout (for CARAFE: of the enlarged map, with enlarging it). "Compiled" is
the definition, a sum of shifted maps, under `torch.compile`; "unfold" are products with im2col's patches: ratios of
both modes.

| operator | shape | K | stride | dtype | layout | forward | ratio | fwd + bwd | ratio | compiled | unfold |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
MEMORY = """
A forward at `{shape}` allocates its output and {extra:.1f} % more.
"""
DIGITS = """
## A trained network with several budgets

`benchmarks/digits_budgets.py` (its head has the commands), `results/{file}`, {machine}. `dynconv_resnet8` trained on
scikit-learn's digits, one run per budget, with `configs/dynconv_resnet8.digits.yaml`; top-1, MACs and shares on the 360
test images; time per image at batch {batch}, as the network runs by default, and with every position computed.

| budget | top-1 | MACs | share of the masked MACs | ms | all positions, ms | positions by block |
|---|---|---|---|---|---|---|
"""
LOOP = """
## Digits, trained by our train and by a plain loop

`benchmarks/digits_loop.py` (its head has the commands), `results/{file}`, {machine}. Top-1 on the 360 test images after
the last epoch (one image is 0.28), one run for each seed: by `timm-dynamic train` with `configs/MODEL.digits.yaml`, and
by `examples/train_loop.py`, which knows nothing of auxiliary losses. The last column has these at the end, weighted.

| model | seeds | train | plain loop | auxiliary: train, loop |
|---|---|---|---|---|
"""
UNVERIFIED = """
## GPU

Nothing has been measured on a GPU yet: no kernel and no faster implementation runs on one by default, the formulas with
PyTorch's libraries do. `benchmarks/gpu.sh` checks, tests and measures; `timm-dynamic check --device cuda` checks alone.
"""
VERIFIED = """
## On {device}

`timm-dynamic check --device cuda`, `timm_dynamic/measured/{file}`, torch {torch}, {date}. Each implementation against
its formula in float64, and its time beside that of the formula (geometric mean of all cases). What is right and faster
is on by default on such a device, with this build of the kernels.

| implementation | cases | right | time | |
|---|---|---|---|---|
"""
MODES = ("forward", "forward+backward")
MODELS = ("models_cpu.json", "paths_cpu.json", "models_cuda.json", "paths_cuda.json")


def load(name: str) -> dict:
    return json.loads((HERE / "results" / name).read_text())


def load_if_there(name: str) -> dict | None:
    return load(name) if (HERE / "results" / name).exists() else None


def machine(report: dict) -> str:
    return f"{report['device']}, {report['threads']} threads, torch {report['torch']}, {report['date'][:10]}"


def operator_table(report: dict, name: str) -> str:
    where = "a GPU" if report["cuda"] else "a CPU"
    table = OPERATOR.format(where=where, command=report["command"], file=name, machine=machine(report))
    found: dict[tuple, dict] = {}
    for row in report["rows"]:
        operator = row.get("operator", "DDF") + (f", {row['filters']} filters" if row.get("filters") else "")
        case = (operator, tuple(row["shape"]), *(row[key] for key in ("kernel_size", "stride", "dtype", "layout")))
        found.setdefault(case, {})[row["candidate"], row["mode"]] = row
    for (operator, shape, *about), rows in found.items():
        forward, both = rows["kernel", "forward"], rows["kernel", "forward+backward"]
        others = (
            ", ".join(f"{row['ratio_to_depthwise']:.2f}" for mode in MODES if (row := rows.get((name, mode))))
            for name in ("compiled reference", "unfold")
        )
        table += (
            f"| {operator} | {list(shape)} | {' | '.join(map(str, about))} | {forward['median_ms']:.2f} ms | "
            f"{forward['ratio_to_depthwise']:.2f} | {both['median_ms']:.2f} ms | {both['ratio_to_depthwise']:.2f} | "
            f"{' | '.join(others)} |\n"
        )
    kernel = next(row for row in report["rows"] if row["candidate"] == "kernel" and row["peak_bytes"])
    extra = 100 * (kernel["peak_bytes"] / kernel["output_bytes"] - 1)
    return table + MEMORY.format(shape=kernel["shape"], extra=extra)


def digits_table(name: str) -> str:
    report = load(name)
    table = DIGITS.format(file=name, machine=machine(report), batch=report["batch_size"])
    for row in report["rows"]:
        share, positions = f"{row['share']:.3f}" if "share" in row else "", row.get("positions", [])
        table += (
            f"| {row['budget'] if share else 'static'} | {row['top1']:.2f} | {row['macs'] / 1e6:.2f} M | {share} | "
            f"{row['auto']['median_ms']:.3f} | {row['dense']['median_ms']:.3f} | {', '.join(map(str, positions))} |\n"
        )
    return table


def loop_table(name: str) -> str:
    report = load(name)
    table = LOOP.format(file=name, machine=machine(report))
    rows = {(row["model"], row["seed"], row["way"]): row for row in report["rows"]}
    for model in dict.fromkeys(model for model, _, way in rows if way == "loop"):
        seeds = [seed for m, seed, way in rows if (m, way) == (model, "loop")]  # the second of both ways
        top1, auxiliary = (
            [", ".join(f"{rows[model, seed, way][key]:{form}}" for seed in seeds) for way in ("train", "loop")]
            for key, form in (("top1", ".2f"), ("auxiliary", ".2g"))
        )
        table += f"| `{model}` | {', '.join(map(str, seeds))} | {top1[0]} | {top1[1]} | {'; '.join(auxiliary)} |\n"
    return table


def gpu_text() -> str:
    """What `timm-dynamic check` found on GPUs."""
    text = ""
    for path in sorted(SHIPPED.glob("*.json")):
        for record in read(path):
            facts = {key: record[key] for key in ("device", "torch")}
            text += VERIFIED.format(**facts, file=path.name, date=record["date"][:10])
            for name, verdict in record["names"].items():
                time = f"{verdict['ratio']:.2f}x" if verdict["ratio"] else ""
                right, on = ("yes" if verdict["right"] else "no"), ("on" if verdict["on"] else "off")
                text += f"| {name} | {verdict['cases']} | {right} | {time} | {on} |\n"
    return text or UNVERIFIED


def main() -> None:
    page = HEAD
    if report := load_if_there("best_cpu.json"):
        page += best_text(report, "best_cpu.json", machine(report))
    for name in ("op_ddf_cpu.json", "op_ddf_cuda.json"):
        if report := load_if_there(name):
            page += operator_table(report, name)
    for name in MODELS:
        if report := load_if_there(name):
            page += models_text(report, name, machine(report), HERE / "results")
    if report := load_if_there("grouped_cpu.json"):
        page += grouped_text(report, "grouped_cpu.json", machine(report))
    if report := load_if_there("roof_cpu.json"):
        page += roof_text(report, "roof_cpu.json", machine(report))
    if report := load_if_there("images_cpu.json"):
        page += images_text(report, "images_cpu.json", machine(report))
    for path in sorted(HERE.glob("results/sparse_*.json")):
        report = load(path.name)
        page += sparse_text(report, path.name, machine(report), path.parent)
    if report := load_if_there("cifar_cpu.json"):
        page += cifar_text(report, "cifar_cpu.json", machine(report), HERE / "results")
    if (path := HERE / "results" / "finetune_cpu.jsonl").exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        page += finetune_text(rows, path.name, "; ".join(dict.fromkeys(map(machine, rows))))
    page += digits_table("digits_budgets_cpu.json") + loop_table("digits_train_loop.json")
    page += rejected_text(load("op_ddf_cpu.json"))
    page += gpu_text()
    (HERE / "README.md").write_text(page)


if __name__ == "__main__":
    main()
