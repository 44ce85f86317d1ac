"""What a checkpoint says of its training, and models that are made for one size of images."""

import argparse
import json

import pytest
import timm
import torch
from commands import TRAIN_FLAGS, run

from timm_dynamic.convert import read_checkpoint

FLAGS = "--workers 0 --device cpu".split()
pytestmark = pytest.mark.usefixtures("workplace")


def save(model: str, made: dict, **args) -> None:
    """A checkpoint of a training with these flags."""
    torch.manual_seed(0)
    state = timm.create_model(model, num_classes=10, **made).state_dict()
    flags = argparse.Namespace(**{"model": model, "dynamize": None, "model_kwargs": made, **args})
    torch.save({"state_dict": state, "args": flags}, "a.pth")


def validate(capsys, *flags) -> dict:
    status, out, err = run(capsys, "validate", "data", *FLAGS, "--checkpoint", "a.pth", *flags)
    assert status == 0, err
    return json.loads(out.removeprefix("--result"))


def test_arguments_of_the_model(capsys, caplog):
    save("dynconv_resnet8", {"budget": -1, "total_steps": 10**9})
    result = validate(capsys, "--model", "dynconv_resnet8")
    assert "gmacs" not in result and "as in training: --model-kwargs budget=-1\n" in caplog.text
    save("dynconv_resnet8", {"budget": 0.3})
    assert "gmacs" in validate(capsys, "--model", "dynconv_resnet8.digits")
    with pytest.warns(UserWarning, match="trained with masks"):  # what a flag says counts
        assert "gmacs" not in validate(capsys, "--model", "dynconv_resnet8", "--model-kwargs", "budget=-1")


@pytest.mark.parametrize(
    "strange",
    [
        {"pretrained_cfg_overlay": {"file": "nowhere"}},
        {"pretrained": True},
        {"num_features": "hf-hub:a/b", "__class__": 3, 5: 5},
        {"num_stacks": 10**7},
        ["budget"],
    ],
)
def test_arguments_that_are_not_taken(capsys, strange):
    save("dynconv_resnet8", {}, model_kwargs=strange)
    assert "gmacs" in validate(capsys, "--model", "dynconv_resnet8")


def test_inspect(capsys):
    """Its images are prepared as those of the training were."""
    save("test_dy_resnet", {"num_kernels": 2}, img_size=48, crop_pct=0.5, mean=None, std=None, interpolation="")
    flags = [*FLAGS, "--model", "test_dy_resnet", "--checkpoint", "a.pth", "--out", "out"]
    status, _, err = run(capsys, "inspect", "data", *flags)
    assert status == 0, err
    with open("out/entropy.json") as file:
        report = json.load(file)
    assert report["img_size"] == [48, 48] and {row["values"] for row in report["layers"]} == {2}
    assert run(capsys, "inspect", "data", *flags, "--img-size", "32")[0] == 0
    with open("out/entropy.json") as file:
        assert json.load(file)["img_size"] == [32, 32]


def test_a_model_made_for_one_size(capsys):
    """LSNet's attention has biases for the map that `--img-size` leaves."""
    flags = [*TRAIN_FLAGS, "--model", "test_lsnet", "--img-size", "160", "--epochs", "1"]
    assert run(capsys, "train", "data", *flags)[0] == 0
    state = read_checkpoint("out/run/last.pth.tar")["state_dict"]
    assert [tuple(v.shape[1:]) for key, v in state.items() if key.endswith("attention_biases")] == [(3, 3)]
    flags = ["data", *FLAGS, "--model", "test_lsnet", "--checkpoint", "out/run/last.pth.tar"]
    status, out, err = run(capsys, "validate", *flags)
    assert status == 0 and json.loads(out.removeprefix("--result"))["img_size"] == 160, err
    flags = ["data", *FLAGS, "--model", "test_lsnet.digits", "--input-size", "3", "128", "256"]
    assert run(capsys, "validate", *flags)[0] == 0
    flags = ["--models", "test_lsnet", "--img-size", "192", "--num-warm-iter", "1", "--num-bench-iter", "1"]
    assert run(capsys, "benchmark", *flags)[0] == 0
