import argparse
import os

import commands
import pytest
import timm
import torch

from timm_dynamic import cli
from timm_dynamic.convert import load_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """An author's file for a network of 5 classes, and the network."""
    model = timm.create_model("test_ddf_resnet", num_classes=5).eval()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    averaged = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    path = tmp_path / "authors.pth.tar"
    torch.save({"state_dict": state, "state_dict_ema": averaged, "args": argparse.Namespace(lr=0.1)}, path)
    return path, model


def run(capsys, *argv):
    """Exit status, stdout, stderr."""
    return commands.run(capsys, "convert", *argv)


def test_convert(tmp_path, capsys, checkpoint):
    path, source = checkpoint
    dst = tmp_path / "b.safetensors"
    status, out, err = run(capsys, path, dst, "--model", "test_ddf_resnet", "--num-classes", 5)
    assert (status, err) == (0, "")
    parameters = sum(p.numel() for p in source.parameters())
    assert out == (
        f"test_ddf_resnet: {parameters:,} parameters, {len(source.state_dict())} tensors, "
        f"{os.path.getsize(dst) / 1e6:.1f} MB -> {dst}\n"
    )
    model = timm.create_model("test_ddf_resnet", num_classes=5).eval()
    load_checkpoint(model, dst)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def test_model_kwargs_and_use_ema(tmp_path, capsys, checkpoint):
    path, source = checkpoint
    dst = tmp_path / "b.safetensors"
    status, *_ = run(capsys, path, dst, "--use-ema", "-m", "test_ddf_resnet", "--model-kwargs", "num_classes=5")
    assert status == 0
    model = timm.create_model("test_ddf_resnet", num_classes=5)
    load_checkpoint(model, dst)
    assert torch.equal(model.fc.weight, source.fc.weight.half().float())


@pytest.mark.parametrize(
    "name, file, flags",
    [
        ("test_ddf_resnet", "test_ddf_resnet.digits", ""),
        ("dynconv_resnet8.budget30_digits", "dynconv_resnet8.budget30_digits", ""),
        ("dynconv_resnet32.base_cifar10", "dynconv_resnet32.base_cifar10", "--model-kwargs budget=-1"),
    ],
)
def test_install(tmp_path, capsys, monkeypatch, name, file, flags):
    monkeypatch.setenv("TIMM_DYNAMIC_WEIGHTS", str(tmp_path / "weights"))
    options = {"budget": -1} if flags else {}
    source = timm.create_model(name, **options)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "authors.pth")
    status, out, err = run(capsys, tmp_path / "authors.pth", "--install", "-m", name, *flags.split())
    installed = tmp_path / "weights" / f"{file}.safetensors"
    assert (status, err) == (0, "") and out.endswith(f" -> {installed}\n")
    model = timm.create_model(name, pretrained=True, **options)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("SRC DST", "required: -m/--model"),
        ("SRC -m test_ddf_resnet", "required: DST"),
        ("SRC DST --install -m test_ddf_resnet", "give either DST or --install"),
        ("SRC --install -m test_ddf_resnet", "num_classes=5 (--num-classes 5)"),
        ("SRC --install -m test_ddf_resnet --num-classes 5", "test_ddf_resnet.digits have 10 classes, not 5: give DST"),
        ("SRC --install -m test_ddf_resnet.none", "Invalid pretrained tag (none)"),
        ("SRC --install -m test_resnet", "for the models of timm-dynamic, and test_resnet is none"),
        ("SRC DST -m ddf_mull_resnet50", "unknown model 'ddf_mull_resnet50'; did you mean ddf_mul_resnet50"),
        ("SRC DST -m zzzzzzzz", "unknown model 'zzzzzzzz'; to list the names: python -c"),
        ("SRC DST -m test_ddf_resnet", "num_classes=5 (--num-classes 5)"),
        ("SRC DST -m test_ddf_resnet --num-classes 5 --model-kwargs nonsense=1", "cannot create test_ddf_resnet"),
        ("SRC DST -m test_ddf_resnet --num-classes 0", "num_classes=5 (--num-classes 5)"),
        ("SRC DST -m test_ddf_resnet --num-classes five", "invalid int value: 'five'"),
        ("SRC DST -m test_ddf_resnet --num-classes 5 --colour", "unrecognized arguments: --colour"),
        ("SRC DST -m test_resnet --num-classes 5", "does not load into test_resnet"),
        ("MISSING DST -m test_ddf_resnet", "no checkpoint at"),
        ("SRC DST.pth -m test_ddf_resnet --num-classes 5", "must end in .safetensors"),
        ("SRC SRC/b.safetensors -m test_ddf_resnet --num-classes 5", "authors.pth.tar"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, checkpoint, argv, expected, monkeypatch):
    monkeypatch.setenv("TIMM_DYNAMIC_WEIGHTS", str(tmp_path / "weights"))
    path = checkpoint[0]
    names = {"MISSING": tmp_path / "missing.pth", "SRC": path, "DST": tmp_path / "new" / "b.safetensors"}
    for name, value in names.items():
        argv = argv.replace(name, str(value))
    status, out, err = run(capsys, *argv.split())
    assert (status, out) == (2, "")
    assert expected in err
    assert err.startswith("timm-dynamic convert: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


def test_install_says_what_it_takes_the_place_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TIMM_DYNAMIC_WEIGHTS", str(tmp_path / "weights"))
    torch.save(timm.create_model("test_ped_resnet", num_classes=10).state_dict(), tmp_path / "a.pth")
    for replaced in ("the package's own weights", "the file that was there"):
        assert cli.main(["convert", str(tmp_path / "a.pth"), "--install", "--model", "test_ped_resnet"]) == 0
        assert f"not {replaced}; delete the file to undo it" in capsys.readouterr().out
