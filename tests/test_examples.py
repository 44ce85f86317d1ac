import copy
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from module_cases import randomise
from torch import nn

from timm_dynamic.families import FAMILIES

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


def example(name):
    """A program under examples/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("upsampler, layer", [("carafe", "ped"), ("ddf", "dcd")])
def test_detection(upsampler, layer, capsys):
    """A detector with a dynamic backbone and pyramid learns from two photographs, and detects in maps of odd sizes."""
    model = example("detection").main(upsampler, layer)
    step, *photographs = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 0: loss \d\.\d+", step) and len(photographs) == 2
    assert all(re.match(r"[1-9]\d* boxes", line) for line in photographs)
    assert any(isinstance(module, FAMILIES[layer].layer) for module in model.backbone.body.modules())
    with torch.no_grad():
        (result,) = model([torch.rand(3, 100, 135)])
    assert result["boxes"].shape[1] == 4


def test_segmentation(capsys):
    pytest.importorskip("segmentation_models_pytorch")
    example("segmentation").main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["by_name", "with_a_dynamic_encoder"]
    assert all(0 < float(re.search(r"loss ([\d.]+)", line)[1]) < 1 for line in lines)


@pytest.mark.parametrize("model", ["test_dy_resnet", "test_ped_resnet"])
def test_lightning(model, small_digits, tmp_path):
    """The schedule is at its last epoch, of the averaged network too; the auxiliary loss is part of what is logged."""
    pytest.importorskip("lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    module = example("lightning_module")
    trainer = module.main(str(small_digits), model, 2, default_root_dir=tmp_path, **quiet)
    metrics = trainer.callback_metrics
    assert metrics["loss"].isfinite() and 0 <= metrics["top1"] <= 100
    if model == "test_ped_resnet":
        torch.testing.assert_close(metrics["loss"], metrics["base_loss"] + metrics["reconstruction"])
        assert metrics["reconstruction"] > 0
    else:
        loaded = module.Classifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
        for network in (trainer.lightning_module, loaded):  # the schedule is in the second of ten epochs
            layers = [layer for layer in network.modules() if isinstance(layer, FAMILIES["dy"].layer)]
            assert {round(layer.temperature().item(), 3) for layer in layers} == {26.778}


@pytest.mark.parametrize("layer, batch", [("dcd", 1), ("dy", 2), ("ped", 2)])
def test_yolo(layer, batch, tmp_path, monkeypatch):
    """`fuse`, validation and ONNX give the numbers of the network that was trained."""
    for name, value in {"YOLO_CONFIG_DIR": tmp_path, "YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}.items():
        monkeypatch.setenv(name, str(value))
    pytest.importorskip("ultralytics", reason="ultralytics, which is AGPL, is not installed")
    fused = example("yolo").main(layer, batch, tmp_path).model.eval()
    trained = torch.load(tmp_path / "train/weights/last.pt", weights_only=False)
    trained = (trained["ema"] or trained["model"]).float().eval()
    dynamic = [name for name, module in trained.named_modules() if isinstance(module, FAMILIES[layer].layer)]
    assert len(dynamic) > 5 and all(
        hasattr(trained.get_submodule(name.removesuffix(".conv")), "bn") for name in dynamic
    )
    assert not any(hasattr(fused.get_submodule(name.removesuffix(".conv")), "bn") for name in dynamic)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = trained(images)[0]
        torch.testing.assert_close(fused(images)[0], expected, rtol=1e-3, atol=1e-3)
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "train/weights/best.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-3)
    # A network as new as this gives nearly the same for all images: until its norms know their statistics, and the
    # layers decide by the image.
    for module in trained.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = 1.0
        elif isinstance(module, FAMILIES[layer].layer):
            randomise(module)
    images = torch.rand(8, 3, 64, 64)
    with torch.no_grad():
        trained.train()(images)
        expected = trained.eval().model[:9](images)
        assert expected.std(0).mean() > 0.1 * expected.std()
        fused = copy.deepcopy(trained).fuse(verbose=False).model[:9](images)
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
