"""The part of benchmarks/README.md about fine-tuning a network that became dynamic."""

from statistics import mean, stdev

HEAD = """
## EfficientNet-Lite0, fine-tuned static and dynamic

`python benchmarks/finetune.py DATA`, `results/{file}`, {machine}. Measured: `tf_efficientnet_lite0` with its ImageNet
weights, as it is and after `timm_dynamic.dynamize(model, LAYER)`, on CIFAR-10's photographs (saved as JPEG, enlarged to
96 px): 2 epochs in batches of 50, the learning rate the best of three on a fifth of the training images. Top-1 on the
10,000 test photographs, which chose nothing: mean and standard deviation of the seeds. The difference is to the static
network, in points; what a difference of two such means is uncertain by (the root of the sum of their squared standard
errors) stands behind it.

"""
TABLE = """{images} images, {optimizer}:

| layers | rate | seeds | top-1 | difference | parameters | MACs | CPU minutes to train |
|---|---|---|---|---|---|---|---|
"""


def finetune_text(rows: list[dict], name: str, machine: str) -> str:
    """The section of the lines that `finetune.py` wrote; `machine` in words."""
    text = HEAD.format(file=name, machine=machine)
    judged = [row for row in rows if row["judged"] == "test"]
    for images, optimizer in sorted({(row["images"], row["optimizer"]) for row in judged}):
        of_it: dict[str, list[dict]] = {}
        for row in judged:
            if (row["images"], row["optimizer"]) == (images, optimizer):
                of_it.setdefault(row["layer"], []).append(row)
        text += TABLE.format(images=images, optimizer={"sgd": "SGD", "adamw": "AdamW"}[optimizer])
        static = [row["top1"] for row in of_it.get("static", ())]
        for layer, runs in of_it.items():
            top1, first = [row["top1"] for row in runs], runs[0]
            text += (
                f"| {layer} | {first['rate']:g} | {len(runs)} | {_mean(top1)} | "
                f"{_difference(top1, static) if layer != 'static' else ''} | {first['params'] / 1e6:.2f} M | "
                f"{first['macs'] / 1e6:.1f} M | {_minutes(runs)} |\n"
            )
        text += "\n"
    return text[:-1]


def _minutes(runs: list[dict]) -> str:
    """Of a training; nothing for those that were begun before it was measured."""
    known = [row["cpu_minutes"] for row in runs if "cpu_minutes" in row]
    return f"{mean(known):.1f}" if known else ""


def _mean(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _difference(values: list[float], static: list[float]) -> str:
    if not static:
        return ""
    text = f"{mean(values) - mean(static):+.2f}"
    if min(len(values), len(static)) > 1:
        text += f" ± {sum(stdev(v) ** 2 / len(v) for v in (values, static)) ** 0.5:.2f}"
    return text
