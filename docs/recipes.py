"""The table of recipes in docs/training.md, from the files in configs/."""

import re
from pathlib import Path
from typing import Any

import yaml

from timm_dynamic.families import family_of

CONFIGS = Path(__file__).parents[1] / "configs"
_OPTIMIZERS = {
    "sgd": "Nesterov SGD",
    "momentum": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsproptf": "RMSProp",
}
_DATA = {"voc": "Pascal VOC", "voc+sbd": "Pascal VOC and SBD"}


def recipes() -> list[tuple[str, str, str, str]]:
    """Rows of family, configurations, data and recipe; configurations of one recipe share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for path in sorted(CONFIGS.glob("*.yaml"), key=_in_order):
        text = path.read_text()
        values, data = yaml.safe_load(text), _data(text)
        family = "each" if data == "digits" else family_of(values["model"]).title
        key = family, _DATA.get(values.get("dataset"), data), _recipe(text, values)
        rows.setdefault(key, []).append(f"`{path.stem}`")
    ordered = sorted(rows.items(), key=lambda row: (row[0][0] == "each", row[0][0].lower()))
    return [(family, ", ".join(names), data, recipe) for (family, data, recipe), names in ordered]


def _in_order(path: Path) -> list[str | int]:
    """So that resnet50 comes before resnet101."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def _data(text: str) -> str:
    named = re.search(r"on (ImageNet|CIFAR-10|TinyImageNet|Imagenette|MPII|scikit-learn's digits)\b", text)
    return named[1].removeprefix("scikit-learn's ")


def _recipe(text: str, values: dict[str, Any]) -> str:
    processes = re.search(r"^# (\d+) GPUs x (\d+) images", text, re.MULTILINE)
    batch = f"{processes[1]} x {values['batch_size']}" if processes else f"batch {values['batch_size']}"
    momentum = values.get("momentum", 0.9)
    parts = [
        batch + (f" x {values['grad_accum_steps']}" if "grad_accum_steps" in values else ""),
        _OPTIMIZERS[values["opt"]] + (f" with momentum {momentum}" if momentum != 0.9 else ""),
        f"lr {values['lr']:g}",
        f"decay {values['weight_decay']:.3g}",
        _schedule(values),
        _epochs(values),
    ]
    policy = values.get("aa")
    parts += [{"original": "AutoAugment"}.get(policy, "RandAugment")] if policy else []
    flags = {"reprob": "erasing", "mixup": "mixup", "cutmix": "CutMix", "drop": "dropout", "smoothing": "smoothing"}
    flags |= {"drop_path": "stochastic depth", "blur": "blur"}
    parts += [f"{word} {values[flag]:g}" for flag, word in flags.items() if values.get(flag)]
    parts += ["averaged weights"] if values.get("model_ema") else []
    parts += [f"teacher `{values['kd_model_name']}`"] if "kd_model_name" in values else []
    return ", ".join(parts)


def _schedule(values: dict[str, Any]) -> str:
    if values["sched"] == "cosine":
        return "cosine"
    rate = "a tenth" if values["decay_rate"] == 0.1 else f"times {values['decay_rate']:g}"
    if values["sched"] == "step":
        return f"{rate} every {values['decay_epochs']:g} epochs"
    return f"{rate} at {', '.join(str(milestone - 1) for milestone in values['decay_milestones'])}"  # counted from 0


def _epochs(values: dict[str, Any]) -> str:
    warmup, text = values["warmup_epochs"], f"{values['epochs']} epochs"
    if warmup:
        text += f" after {warmup} of warm-up" if values.get("warmup_prefix") else f" with {warmup} of warm-up"
    return text + (f" and {values['cooldown_epochs']} at the lowest rate" if "cooldown_epochs" in values else "")
