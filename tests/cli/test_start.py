"""The program `timm-dynamic` answers at once: torch, which takes seconds, is imported when work begins."""

import subprocess
import sys
from pathlib import Path

import pytest

from timm_dynamic import cli

ROOT = Path(__file__).parents[2]
START = [sys.executable, ROOT / "timm_dynamic_start.py"]
MISTAKES = {
    "train --bathc-size 3": "unrecognized arguments: --bathc-size; did you mean --batch-size",
    "train nowhere": "no such data folder: nowhere",
    "validate nowhere": "no such data folder: nowhere",
    "inspect nowhere --model x": "no such image or data folder: nowhere",
    "push resnet18 nowhere me/x": "no checkpoint at nowhere",
    "valdate": "unknown command 'valdate'; did you mean validate?",
}


def start(words: str) -> subprocess.CompletedProcess:
    """The program; torch cannot be imported in it."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['torch'] = None; "
    code += "import timm_dynamic_start; timm_dynamic_start.run()"
    return subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)


@pytest.mark.parametrize("words", ["--help", "--version", *(f"{name} --help" for name in cli.COMMANDS)])
def test_help(words):
    done = start(words)
    assert done.returncode == 0 and "timm-dynamic" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = start(words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and MISTAKES[words] in done.stderr


def test_work():
    """The package is whole when a command runs."""
    done = subprocess.run([*START, "list", "--family", "ped", "--names"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ped_resnet18" in done.stdout and "--dynamize ped: PEDConv2d" in done.stdout
