"""The program `timm-dynamic` answers at once: torch is imported when work begins."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from timm_dynamic import cli, counts

ROOT = Path(__file__).parents[2]
START = [sys.executable, ROOT / "timm_dynamic_start.py"]
MISTAKES = {
    "train --bathc-size 3": "unrecognized arguments: --bathc-size; did you mean --batch-size",
    "train nowhere": "no such data folder: nowhere",
    "validate nowhere": "no such data folder: nowhere",
    "inspect nowhere --model x": "no such image or data folder: nowhere",
    "push resnet18 nowhere me/x": "no checkpoint at nowhere",
    "list --family dcdd": "--family dcdd: no such family; did you mean dcd",
    "valdate": "unknown command 'valdate'; did you mean validate, validate_pose?",
}


def start(words: str) -> tuple[int, str, str, bool]:
    """Of the program: its exit status, what it says and complains, and whether it imported torch."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *START[1:], *words.split()], capture_output=True, text=True
    )
    imports, errors = [], []
    for line in done.stderr.splitlines(keepends=True):
        (imports if line.startswith("import time:") else errors).append(line)
    assert any(line.split()[-1] == "timm_dynamic.cli" for line in imports)
    return done.returncode, done.stdout, "".join(errors), any(line.split()[-1] == "torch" for line in imports)


@pytest.mark.parametrize("words", ["--help", "--version", *(f"{name} --help" for name in cli.COMMANDS)])
def test_help(words):
    status, out, err, torch_imported = start(words)
    assert (status, err, torch_imported) == (0, "", False)
    assert "timm-dynamic" in out


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err, torch_imported = start(words)
    assert (status, torch_imported) == (2, False)
    assert err.count("\n") == 1 and MISTAKES[words] in err


def test_a_reader_that_has_seen_enough():
    """As `head` may leave it."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*START, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_work():
    """The package is whole when a command runs; kernels can be switched off."""
    environment = {**os.environ, "TIMM_DYNAMIC_KERNELS": "0"}
    done = subprocess.run([*START, "env"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^cpu kernels +not loaded: TIMM_DYNAMIC_KERNELS=0$", done.stdout, re.M)


def test_list_builds_no_model(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("it builds a model")

    monkeypatch.setattr(timm, "create_model", refuse)
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert out.count(" GMACs at ") == sum(map(len, counts.read().values())) and "--dynamize ped: PEDConv2d" in out
    assert re.search(r"ped_resnet18 +12.14 M +1.81\d GMACs at 224 px +twin resnet18 +weights in1k \(to conv", out)
