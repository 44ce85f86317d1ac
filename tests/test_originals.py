"""docs/from-the-originals.md: its commands are ours, with flags, configurations and models that are there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import timm

import timm_dynamic  # noqa: F401

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "from-the-originals.md").read_text()
# A line of a block, or code in a table.
FOUND = re.findall(r"(?:^|`)((?:timm-dynamic [a-z_]+|\./distributed_train\.sh|python \w+\.py) [^`\n]+)", PAGE, re.M)
LINES = [line for line in FOUND if "..." not in line and "configs/NAME.yaml" not in line]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with all that the page names."""
    monkeypatch.chdir(tmp_path)
    for folder in ("IMAGENET", "DATA", "CIFAR", "VOC", "DIGITS"):
        for split in ("train", "val"):
            (tmp_path / folder / split).mkdir(parents=True)
    (tmp_path / "MPII" / "annot").mkdir(parents=True)
    for name in ("FILE", *(f"MPII/annot/{part}" for part in ("train.json", "valid.json", "gt_valid.mat"))):
        (tmp_path / name).touch()
    (tmp_path / "configs").symlink_to(ROOT / "configs")


def test_all_five_are_there():
    assert PAGE.count("\n## ") == 5 and len(LINES) > 30


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_understood(line, workplace):
    program, *words = shlex.split(line)
    if program == "./distributed_train.sh":
        command, words = "train", words[1:]
    elif program == "python":
        command, words = words[0].removesuffix(".py"), words[1:]
        assert (ROOT / f"{command}.py").exists()
    else:
        command, *words = words
    args = importlib.import_module(f"timm_dynamic.cli.arguments.{command}").parse(words)
    models = getattr(args, "models", None) or [getattr(args, "model", None) or "resnet18"]
    assert all(timm.is_model(model) for model in models)
