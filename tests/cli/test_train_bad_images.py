import csv
import shutil
from pathlib import Path

import pytest
import torch

from timm_dynamic import cli
from timm_dynamic.cli.data import Images
from timm_dynamic.convert import read_checkpoint

MODEL = "--model test_resnet --num-classes 10 --img-size 32 --device cpu -b 8".split()
FLAGS = [*MODEL, *"--epochs 2 --warmup-epochs 0 --lr 0.05 --output out --experiment run".split()]
BAD = ("train/0/0.png", "train/3/2.png", "val/5/4.png")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, small_digits):
    """Run in an empty folder in which three images of `bad` are none; `good` lacks the one of validation."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_digits, "bad")
    Path("bad", BAD[0]).write_bytes(b"")
    Path("bad", BAD[1]).write_text("text")
    whole = Path("bad", BAD[2]).read_bytes()
    Path("bad", BAD[2]).write_bytes(whole[: len(whole) // 2])
    shutil.copytree(small_digits, "good")
    Path("good", BAD[2]).unlink()


def train(capsys, flags):
    shutil.rmtree("out/run", ignore_errors=True)
    status = cli.main(["train", *FLAGS, *flags.split()])
    return status, capsys.readouterr().err


def last_rows():
    with open("out/run/summary.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("workers", [0, 2])
def test_left_out(capsys, caplog, workers):
    """In training another one takes the place, in validation none; each epoch they are named, once each."""
    assert train(capsys, f"bad --workers {workers} --max-bad-images 2")[0] == 0
    for epoch in (0, 1):
        assert f"epoch {epoch}: cannot read 2 images: bad/train/0/0.png, bad/train/3/2.png: left out" in caplog.text
        assert f"epoch {epoch}: cannot read 1 images: bad/val/5/4.png: left out" in caplog.text
    assert caplog.text.count("left out") == 4


def test_validation_is_of_the_others(capsys, caplog):
    """As exact as of a folder that lacks the image."""
    losses = []
    train(capsys, "good --workers 0")
    validate = ["validate", *MODEL, "--workers", "0", "--checkpoint", "out/run/last.pth.tar"]
    for data in ("good", "bad"):
        status = cli.main([*validate, data, "--max-bad-images", "1", "--results-file", f"{data}.csv"])
        assert status == 0
        assert ("validation: cannot read 1 images: bad/val/5/4.png: left out" in caplog.text) == (data == "bad")
        with open(f"{data}.csv", newline="") as file:
            losses.append({**next(csv.DictReader(file))})
    assert losses[0] == losses[1]
    assert cli.main([*validate, "bad"]) == 2
    assert "cannot read image bad/val/5/4.png: " in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many(capsys, workers):
    status, err = train(capsys, f"bad --workers {workers} --max-bad-images 1")
    assert status == 2 and err.count("error: ") == 1
    assert "error: cannot read 2 images: bad/train/0/0.png, bad/train/3/2.png: more than --max-bad-images 1" in err


def test_replaced_by_the_next(capsys):
    """So that batches are as many as before, and repeat."""
    assert train(capsys, "bad --workers 0 --max-bad-images 2 --no-aug")[0] == 0
    first = read_checkpoint("out/run/last.pth.tar")["state_dict"]
    for path, other in ((BAD[0], "train/0/1.png"), (BAD[1], "train/3/3.png")):
        shutil.copy(Path("bad", other), Path("bad", path))
    assert train(capsys, "bad --workers 0 --max-bad-images 1 --no-aug")[0] == 0
    second = read_checkpoint("out/run/last.pth.tar")["state_dict"]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_no_image_at_all():
    class Reader(list):
        def filename(self, index, absolute):
            return str(index)

    images = Images(Reader([("nowhere", 0), ("nowhere", 1)]), "RGB", max_bad=5, is_training=True)
    with pytest.raises(ValueError, match="cannot read 2 images: 0, 1: more than --max-bad-images 5, or all there are"):
        images[1]


def test_not_for_other_data(capsys, monkeypatch):
    monkeypatch.setattr("timm_dynamic.cli.data.create_dataset", lambda *args, **kwargs: torch.utils.data.Dataset())
    status, err = train(capsys, "--dataset torch/cifar10 --max-bad-images 1")
    assert status == 2 and "--max-bad-images is for image files, not for --dataset torch/cifar10" in err


def test_negative(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", *FLAGS, "--max-bad-images", "-1"])
    assert "argument --max-bad-images: -1 is less than 0" in capsys.readouterr().err
