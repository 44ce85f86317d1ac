"""Commands on networks made dynamic."""

import json
from pathlib import Path

import pytest
import timm
import torch
from commands import TRAIN_FLAGS, read_summary, run
from torch import nn

import timm_dynamic

SMALL = "--workers 0 --device cpu".split()
NAMES = [
    ["--model", "test_resnet", "--dynamize", "dcd", "--where", "layer2.*"],
    ["--model", "dynamized", "--model-kwargs", "base=test_resnet", "layer=dcd", "where=layer2.*"],
]
pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize("name", NAMES, ids=["--dynamize", "dynamized"])
def test_from_static_weights_to_the_hub_and_back(capsys, caplog, name):
    """Trained from a static file, validated, pushed; what is pulled is the same to the bit."""
    static = timm.create_model("test_resnet", num_classes=10)
    torch.save(static.state_dict(), "static.pth")
    flags = [*TRAIN_FLAGS, *name, "--initial-checkpoint", "static.pth"]
    status, out, err = run(capsys, "train", "data", *flags)
    assert status == 0, err
    assert "weights of the static test_resnet" in caplog.text and "test_resnet+dcd: " in caplog.text
    rows = read_summary()
    assert 0 < rows[-1]["eval_routing_spread"] < 1
    spread = json.loads(Path("out/run/routing.json").read_text())["spread"]
    assert spread and all(key.startswith("layer2.") for key in spread)

    validate = ["validate", "data", *SMALL, *name, "--num-classes", "10", "--checkpoint", "out/run/last.pth.tar"]
    status, out, err = run(capsys, *validate)  # at the size of the training, which the checkpoint knows
    assert status == 0, err
    result = json.loads(out.removeprefix("--result"))
    assert result["model"] == "test_resnet+dcd" and result["img_size"] == 32
    assert result["top1"] == pytest.approx(rows[-1]["eval_top1"], abs=1e-3)

    push = ["push", name[1], "out/run/last.pth.tar", "me/x", "--out", "files", "--num-classes", "10", *name[2:]]
    assert run(capsys, *push)[0] == 0
    assert json.loads(Path("files/config.json").read_text())["architecture"] == "dynamized"
    model = timm_dynamic.dynamize(timm.create_model("test_resnet", num_classes=10), "dcd", "layer2.*").eval()
    timm_dynamic.convert.load_checkpoint(model, "out/run/last.pth.tar")
    pulled, x = timm.create_model("local-dir:files", pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(pulled(x), model(x))


def test_without_the_flag(capsys):
    """The error says which flag is missing, by the training's flags or by the names."""
    flags = ["train", "data", *TRAIN_FLAGS, "--epochs", "1", *NAMES[0]]
    assert run(capsys, *flags)[0] == 0
    flags = ["data", *SMALL, "--model", "test_resnet", "--num-classes", "10", "--checkpoint", "out/run/last.pth.tar"]
    status, _, err = run(capsys, "validate", *flags)
    assert status == 2 and "it was trained with --dynamize dcd --where layer2.*: add that" in err
    model = timm_dynamic.dynamize(timm.create_model("test_resnet", num_classes=10), "ped")
    torch.save(model.state_dict(), "dynamic.pth")
    flags = ["data", *SMALL, "--model", "test_resnet", "--num-classes", "10", "--checkpoint", "dynamic.pth"]
    status, _, err = run(capsys, "validate", *flags)
    assert status == 2 and err.count("\n") == 1
    assert "it holds weights of this model made dynamic: add --dynamize ped" in err


def test_benchmark(capsys, tmp_path):
    """The static twin is the base. Weights come from a file, images from a folder."""
    model = timm_dynamic.dynamize(timm.create_model("test_resnet", num_classes=10), "dcd", "layer2.*")
    torch.save(model.state_dict(), "dynamic.pth")
    flags = "--baseline static --num-warm-iter 1 --num-bench-iter 2 --img-size 32 --num-classes 10 --json out.json"
    name = ["--models", *NAMES[1][1:], *flags.split(), "--checkpoint", "dynamic.pth", "--images", "data/val"]
    status, _, err = run(capsys, "benchmark", *name)
    assert status == 0, err
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"test_resnet", "test_resnet+dcd"}
    assert {row["baseline"] for row in rows} == {"test_resnet"}


def test_static_twin_of_a_network_that_is_its_own(capsys):
    flags = "--models dynconv_resnet8 --baseline static --num-warm-iter 1 --num-bench-iter 2 --json out.json"
    assert run(capsys, "benchmark", *flags.split())[0] == 0
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert {row["baseline"] for row in rows} == {"dynconv_resnet8 (budget=-1)"}
    parameters = {row["model"]: row["params"] for row in rows}
    assert parameters["dynconv_resnet8"] > parameters["dynconv_resnet8 (budget=-1)"]


def test_a_base_that_is_a_folder_cannot_be_pushed(capsys):
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), "static.pth")
    assert run(capsys, "push", "test_resnet", "static.pth", "me/x", "--num-classes", 10, "--out", "files")[0] == 0
    flags = ["static.pth", "me/x", "--dynamize", "dcd", "--out", "more"]
    status, _, err = run(capsys, "push", "local-dir:files", *flags)
    assert status == 2 and "is a folder of this machine" in err


@pytest.mark.parametrize("where", ["at the end", "in the middle"])
def test_flipped_bytes_are_found(capsys, where):
    model = timm.create_model("test_resnet", num_classes=10)
    torch.save(model.state_dict(), "weights.pth")
    data = bytearray(Path("weights.pth").read_bytes())
    place = data.index(nn.Module.state_dict(model)["fc.weight"].detach().numpy().tobytes())
    data[place + (1000 if where == "in the middle" else 4)] ^= 0x40
    Path("weights.pth").write_bytes(data)
    flags = ["data", *SMALL, "--model", "test_resnet", "--num-classes", "10", "--checkpoint", "weights.pth"]
    status, _, err = run(capsys, "validate", *flags)
    assert status == 2 and "weights.pth is damaged" in err and err.count("\n") == 1


def test_another_run_is_not_written_over(capsys):
    flags = ["train", "data", *TRAIN_FLAGS, "--epochs", "1"]
    assert run(capsys, *flags)[0] == 0
    before = Path("out/run/last.pth.tar").read_bytes()
    status, _, err = run(capsys, *flags)
    assert status == 2 and "out/run holds a run already: go on with it by --resume auto" in err
    assert Path("out/run/last.pth.tar").read_bytes() == before
    assert run(capsys, *flags, "--epochs", "2", "--resume", "auto")[0] == 0


def test_train_validates_as_validate_does(capsys, caplog):
    """With the crop of tests, which can be another than that of training; the loss tells them apart."""
    overlay = ["--model-kwargs", "pretrained_cfg_overlay={'test_crop_pct':0.5}"]
    assert run(capsys, "train", "data", *TRAIN_FLAGS, "--epochs", "1", *overlay)[0] == 0
    assert "validation 32 px, crop 0.5, " in caplog.text
    caplog.clear()
    flags = [*TRAIN_FLAGS[:2], *SMALL, "--num-classes", "10", "--checkpoint", "out/run/last.pth.tar", *overlay]
    status, out, _ = run(capsys, "validate", "data", *flags)
    assert status == 0 and "as in training: --img-size 32" in caplog.text and "crop 0.5, " in caplog.text
    assert json.loads(out.removeprefix("--result"))["top1"] == pytest.approx(read_summary()[-1]["eval_top1"], abs=1e-3)
