import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_train_loop(small_digits, monkeypatch, capsys):
    """A line for every epoch; the loss falls, of a model with auxiliary losses."""
    script = ROOT / "examples/train_loop.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(small_digits), "test_ped_resnet", "--epochs", "8"])
    runpy.run_path(str(script))
    pattern = r"epoch (\d): loss ([\d.]+), auxiliary ([\d.e-]+), top-1 [\d.]+"
    epochs, losses, auxiliary = zip(
        *(re.fullmatch(pattern, line).groups() for line in capsys.readouterr().out.splitlines()), strict=True
    )
    assert "".join(epochs) == "01234567"
    assert float(losses[-1]) < float(losses[0])
    assert all(0 < float(value) < 0.1 for value in auxiliary)


@pytest.mark.parametrize("upsampler", ["carafe", "ddf"])
def test_detection(upsampler, capsys):
    """A detector trains with a pyramid of ours, on maps of odd sizes, and detects."""
    spec = importlib.util.spec_from_file_location("detection", ROOT / "examples/detection.py")
    detection = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(detection)
    detection.main(upsampler, steps=1)
    assert re.fullmatch(r"step 0: loss \d\.\d+\n", capsys.readouterr().out)
    model = detection.detector(upsampler, 2, "resnet18").eval()
    with torch.no_grad():
        (result,) = model([torch.rand(3, 100, 135)])
    assert result["boxes"].shape[1] == 4
