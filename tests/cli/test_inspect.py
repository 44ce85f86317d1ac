import json
import math
import shutil
from collections import defaultdict

import commands
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform

import timm_dynamic
from timm_dynamic.cli import inspect

MODEL = "test_dy_resnet"
FLAGS = ["--model", MODEL, "--img-size", "32", "--workers", "0", "--device", "cpu"]
RESOLUTIONS = ["16x16", "8x8", "4x4", "2x2", "1x1"]


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=10)
    for layer in model.modules():
        if isinstance(layer, timm_dynamic.layers.KernelAttention):
            torch.nn.init.normal_(layer.to_scores[2].weight, std=9)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    return tmp_path / "a.pth"


def run(capsys, *argv):
    """Exit status, stdout, stderr."""
    return commands.run(capsys, "inspect", *argv)


def entropies(checkpoint, folder):
    """Of every layer, by a loop of our own over single images."""
    model = timm.create_model(MODEL, checkpoint_path=str(checkpoint)).eval()
    cfg = model.pretrained_cfg
    transform = create_transform((3, 32, 32), **{key: cfg[key] for key in ("mean", "std", "crop_pct", "interpolation")})
    dataset = create_dataset("", root=str(folder), transform=transform)
    found = defaultdict(list)
    for name, layer in model.named_modules():
        if isinstance(layer, timm_dynamic.layers.KernelAttention):
            name = name.removesuffix(".attention")
            layer.register_forward_hook(lambda _, __, p, name=name: found[name].append(-(p * p.log()).sum().item()))
    with torch.no_grad():
        for image, _ in dataset:
            model(image[None])
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_entropies_are_those_of_a_plain_loop(tmp_path, capsys, small_digits, checkpoint):
    out = tmp_path / "new" / "out"
    status, text, err = run(capsys, small_digits, *FLAGS, "--checkpoint", checkpoint, "--out", out, "-b", 7)
    assert (status, err) == (0, "")
    report = json.loads((out / "entropy.json").read_text())
    assert (report["model"], report["images"], report["img_size"]) == (MODEL, 20, [32, 32])
    layers = {row["layer"]: row for row in report["layers"]}
    expected = entropies(checkpoint, small_digits / "val")
    assert {name: row["entropy"] for name, row in layers.items()} == pytest.approx(expected, rel=1e-4)
    assert min(expected.values()) < 0.9 * math.log(4)
    for row in layers.values():
        assert (row["kind"], row["values"], row["inputs"]) == ("attention", 4, 20)
        assert row["normalised"] == pytest.approx(row["entropy"] / math.log(4))
    assert [row["resolution"] for row in report["resolutions"]] == RESOLUTIONS
    for group in report["resolutions"]:
        own = [row for row in layers.values() if row["resolution"] == group["resolution"]]
        assert group["layers"] == len(own)
        for key in ("entropy", "normalised"):
            assert group[key] == pytest.approx(sum(row[key] for row in own) / len(own))
            assert f"{group[key]:.4f}" in text
    assert all(name in text for name in layers)
    assert sorted(path.name for path in out.iterdir()) == ["entropy.json", "entropy.png"]
    assert Image.open(out / "entropy.png").width > 300


def test_optimized(tmp_path, capsys, small_digits, checkpoint):
    flags = [small_digits, *FLAGS, "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    (status, expected, _), (fast_status, out, _) = run(capsys, *flags), run(capsys, *flags, "--optimize")
    assert status == fast_status == 0 and out == expected


def test_images_without_classes_and_a_single_one(tmp_path, capsys, small_digits, checkpoint):
    flags = [*FLAGS, "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    shutil.copytree(small_digits / "val" / "3", tmp_path / "data" / "3")
    expected = entropies(checkpoint, tmp_path / "data")
    image = next((tmp_path / "data" / "3").iterdir())
    for data, images in ((tmp_path / "data" / "3", 2), (image, 1)):
        if images == 1:
            for other in set(image.parent.iterdir()) - {image}:
                other.unlink()
            expected = entropies(checkpoint, tmp_path / "data")
        assert run(capsys, data, *flags)[0] == 0
        report = json.loads((tmp_path / "out" / "entropy.json").read_text())
        assert report["images"] == images
        found = {row["layer"]: row["entropy"] for row in report["layers"]}
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_folder_for_every_checkpoint(tmp_path, capsys, monkeypatch, small_digits, checkpoint):
    """Those of two runs have one name."""
    monkeypatch.chdir(tmp_path)
    image = small_digits / "val" / "3" / "4.png"
    for run_name in ("one", "two"):
        (tmp_path / run_name).mkdir()
        shutil.copy(checkpoint, f"{run_name}/last.pth.tar")
        status, out, err = run(capsys, image, *FLAGS, "--checkpoint", f"{run_name}/last.pth.tar")
        assert status == 0, err
        file = tmp_path / "output/inspect" / MODEL / run_name / "last.pth.tar" / "4" / "entropy.json"
        assert json.loads(file.read_text())["checkpoint"] == f"{run_name}/last.pth.tar"


def test_a_single_image_starts_no_processes(tmp_path, capsys, small_digits, checkpoint, monkeypatch):
    seen, make_loader = [], inspect.make_loader
    monkeypatch.setattr(inspect, "make_loader", lambda *args: seen.append(make_loader(*args)) or seen[-1])
    image = small_digits / "val" / "3" / "4.png"
    flags = ["--model", MODEL, "--img-size", "32", "--device", "cpu", "--checkpoint", checkpoint, "--out", tmp_path]
    assert run(capsys, image, *flags, "--workers", "2")[0] == 0
    assert [loader.loader.num_workers if hasattr(loader, "loader") else loader.num_workers for loader in seen] == [0]


@pytest.mark.parametrize("name", ["test_dcd_resnet", "test_ped_resnet"])
def test_gates(tmp_path, capsys, small_digits, name):
    torch.save(timm.create_model(name, num_classes=10).state_dict(), tmp_path / "b.pth")
    flags = ["--model", name, *FLAGS[2:], "--checkpoint", tmp_path / "b.pth", "--out", tmp_path]
    status, text, err = run(capsys, small_digits, *flags)
    assert status == 0, err
    assert "entropy of its gates" in text
    for row in json.loads((tmp_path / "entropy.json").read_text())["layers"]:
        assert row["kind"] == "gates" and 0.5 < row["normalised"] <= 1


def test_default_folder_and_dynamize(tmp_path, capsys, small_digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(timm_dynamic.dynamize(timm.create_model("test_resnet"), "dy").state_dict(), "c.pth")
    flags = ["--model", "test_resnet", *FLAGS[2:], "--dynamize", "dy", "--checkpoint", "c.pth"]
    assert run(capsys, small_digits, *flags)[0] == 0
    file = tmp_path / "output/inspect/test_resnet_dy" / tmp_path.name / "c.pth/entropy.json"
    assert json.loads(file.read_text())["images"] == 20


def masked_model(**kwargs):
    """With masks that are partly on."""
    torch.manual_seed(0)
    model = timm.create_model("dynconv_resnet8", **kwargs).eval()
    for block in model.masked_blocks():
        torch.nn.init.zeros_(block.masker.maskconv.fc.weight)
    return model


MASKED = ["--model", "dynconv_resnet8", *FLAGS[4:]]


def test_masks_of_a_folder(tmp_path, capsys, small_digits):
    """Shares and MACs are those of a plain loop over the first images."""
    model = masked_model()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    out = tmp_path / "out"
    flags = [*MASKED, "--checkpoint", tmp_path / "m.pth", "--out", out, "--images", 3]
    status, text, err = run(capsys, small_digits, *flags)
    assert (status, err) == (0, "")
    names = ["000.4", "001.5", "002.4"]
    pictures = [f"{name}.{kind}.png" for name in names for kind in ("masks", "ponder")]
    assert sorted(path.name for path in out.iterdir()) == [*pictures, "masks.json"]
    assert all(Image.open(out / picture).width > 300 for picture in pictures)

    report = json.loads((out / "masks.json").read_text())
    assert (report["model"], report["images"], report["img_size"]) == ("dynconv_resnet8", 3, [32, 32])
    config = timm.data.resolve_data_config({}, model=model)
    dataset = create_dataset("", root=str(small_digits / "val"), transform=create_transform(**config))
    seen = defaultdict(list)
    for name, block in model.named_modules():
        if isinstance(block, timm_dynamic.layers.SparseBranch):
            hook = lambda unit, args, mask, name=name: seen[name].append(mask)  # noqa: E731
            block.masker.register_forward_hook(hook)
    with torch.no_grad():
        macs = [timm_dynamic.count_macs(model, dataset[i][0][None]) for i in range(3)]
    assert [row["image"] for row in report["per_image"]] == names
    assert [row["executed_macs"] for row in report["per_image"]] == [count.executed for count in macs]
    assert {row["static_macs"] for row in report["per_image"]} == {macs[0].static}
    assert [row["block"] for row in report["blocks"]] == ["layer1.0", "layer2.0", "layer3.0"]
    for row in report["blocks"]:
        assert row["active"] == pytest.approx(torch.cat(seen[row["block"]]).mean().item())
        assert 0 < row["active"] <= row["dilated"] <= 1
        assert f"{row['block']}" in text and f"{row['active']:.4f}" in text and f"{row['dilated']:.4f}" in text
    assert all(f"{count.executed / count.static:.4f}" in text for count in macs)


def test_masks_of_a_photograph(tmp_path, capsys, monkeypatch):
    """Not square; its results go to a folder of their own."""
    datasets = pytest.importorskip("sklearn.datasets")
    monkeypatch.chdir(tmp_path)
    torch.save(masked_model().state_dict(), "m.pth")
    Image.fromarray(datasets.load_sample_image("china.jpg")).save("china.jpg")
    flags = [*MASKED, "--checkpoint", "m.pth", "--input-size", 3, 43, 64, "--crop-pct", 1]
    status, text, err = run(capsys, "china.jpg", *flags)
    assert (status, err) == (0, "")
    out = tmp_path / "output/inspect/dynconv_resnet8" / tmp_path.name / "m.pth/china"
    assert sorted(path.name for path in out.iterdir()) == ["china.masks.png", "china.ponder.png", "masks.json"]
    assert json.loads((out / "masks.json").read_text())["img_size"] == [43, 64]
    assert Image.open(out / "china.ponder.png").width > 2 * Image.open(out / "china.ponder.png").height


def test_grey_images(tmp_path, capsys, small_digits):
    torch.save(masked_model(in_chans=1).state_dict(), tmp_path / "m.pth")
    flags = [*MASKED, "--checkpoint", tmp_path / "m.pth", "--out", tmp_path / "out", "--in-chans", 1, "--images", 1]
    assert run(capsys, small_digits, *flags)[0] == 0
    assert (tmp_path / "out" / "000.4.masks.png").exists()


def test_both_kinds(tmp_path, capsys, small_digits):
    """A model with masks and attention gets both reports."""
    torch.save(timm_dynamic.dynamize(masked_model(), "dy").state_dict(), tmp_path / "m.pth")
    flags = [*MASKED, "--dynamize", "dy", "--checkpoint", tmp_path / "m.pth", "--out", tmp_path, "-b", 7]
    status, text, err = run(capsys, small_digits, *flags, "--images", 2)
    assert (status, err) == (0, "")
    entropy, masks = (json.loads((tmp_path / name).read_text()) for name in ("entropy.json", "masks.json"))
    assert "entropy of its attention" in text and "share of positions" in text
    assert [row["inputs"] for row in entropy["layers"]] == [20] * 6
    assert {row["layer"] for row in entropy["layers"]} == {f"layer{i}.0.conv{k}" for i in (1, 2, 3) for k in (1, 2)}
    assert [row["block"] for row in masks["blocks"]] == ["layer1.0", "layer2.0", "layer3.0"]
    assert (entropy["images"], masks["images"]) == (20, 2)


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--model test_resnet", "no layer with attention, gates or masks in this ResNet"),
        ("--model test_ddf_resnet", "no layer with attention, gates or masks in this ResNet"),
        ("--model=", "name a model with --model"),
        ("--use-ema", "--use-ema needs --checkpoint"),
        ("--model dynconv_resnet8 --model-kwargs budget=-1", "gates or masks in this DynConvResNetSmall"),
        ("--images 0", "argument --images: 0 is not 1 or more"),
        ("--checkpoint huge.pth", "the attention of conv1.3 is not finite"),
        ("--checkpoint a.pth --out a.pth", "File exists: 'a.pth'"),
        ("--checkpoint a.pth --data-dir nowhere", "no such image or data folder: nowhere"),
        ("--checkpoint a.pth --data-dir cat.png", "no such image or data folder: cat.png"),
        ("--checkpoint a.pth --data-dir a.pth", "cannot read image a.pth"),
        (
            "--model dcd_resnet18",
            "no pretrained weights exist for dcd_resnet18: give a file of weights with --checkpoint",
        ),
    ],
)
def test_errors(tmp_path, capsys, monkeypatch, small_digits, checkpoint, argv, expected):
    monkeypatch.chdir(tmp_path)
    state = torch.load("a.pth")
    state["conv1.0.weight"].fill_(3e38)
    torch.save(state, "huge.pth")
    data = [] if "--data-dir" in argv else [small_digits]
    status, text, err = run(capsys, *data, *FLAGS, *argv.split())
    assert (status, text) == (2, "")
    assert err.count("\n") == 1 and err.startswith("timm-dynamic inspect: error: ")
    assert expected in err
    assert not list(tmp_path.rglob("entropy.*"))
