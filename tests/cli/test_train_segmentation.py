"""Training for segmentation, on pieces of scikit-learn's two photographs in the format of Pascal VOC."""

import argparse
import math
import shutil
from pathlib import Path

import commands
import numpy as np
import pytest
import timm
import torch
from commands import read_summary
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import tv_tensors

import timm_dynamic
from timm_dynamic import cli
from timm_dynamic.cli.segmentation_data import _find, open_scenes, pad_batch, train_transform
from timm_dynamic.convert import load_checkpoint, read_checkpoint

ROOT = Path(__file__).parents[2]
NAME = "dy_deeplabv3plus_mobilenetv2"
KWARGS = {"backbone": "test_resnet", "width_multiplier": 0.1}
FLAGS = (
    "--num-classes 3 --img-size 64 -b 4 --device cpu --workers 0 --scale 0.9 1.2 --lr 0.01 --output out "
    "--experiment run --pictures 0 --model-kwargs backbone=test_resnet width_multiplier=0.1"
).split()
VOC = Path("data/VOCdevkit/VOC2012")
CONFIG = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Eight pieces for training, three for validation, one in no list; 1 is red, 2 bright blue, 255 between classes."""
    folder = tmp_path_factory.mktemp("voc")
    root, stems = folder / VOC.relative_to("data"), []
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        photograph = np.asarray(Image.fromarray(photograph).resize((160, 107)))
        red, green, blue = photograph.astype(int).transpose(2, 0, 1)
        mask = np.where(red > green + 40, 1, np.where(blue > 150, 2, 0)).astype(np.uint8)
        mask[(mask != np.roll(mask, 1, 0)) | (mask != np.roll(mask, 1, 1))] = 255
        for i in range(6):
            piece = np.s_[7 * i : 7 * i + 70, 12 * i : 12 * i + 90 - i]
            stems.append(f"{name}_{i}")
            Image.fromarray(photograph[piece]).save(root / f"JPEGImages/{stems[-1]}.jpg")
            image = Image.fromarray(mask[piece])
            image.putpalette([*range(256)] * 3)
            image.save(root / f"SegmentationClass/{stems[-1]}.png")
    lists = {"train": [s for s in stems if s[-1] in "0134"], "val": ["china_2", "flower_2", "flower_5"]}
    for split, names in lists.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, photographs):
    """Run in an empty folder in which `data` is a copy of the photographs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photographs, "data")


def run(capsys, flags=""):
    """Exit status, stdout, stderr of `train_segmentation data FLAGS ...`."""
    return commands.run(capsys, "train_segmentation", "data", *FLAGS, *flags.split())


def train(capsys, flags=""):
    """Train; what it printed, and the rows of its summary."""
    if "--resume" not in flags:
        shutil.rmtree("out/run", ignore_errors=True)
    status, out, err = run(capsys, flags)
    assert status == 0, err
    return out, read_summary(out.splitlines()[0].split(" in ")[-1])


def arguments(**kwargs):
    defaults = {"data": "data", "dataset": "voc", "dataset_download": False, "train_split": "train", "val_split": "val"}
    return argparse.Namespace(**{**defaults, "scale": (0.9, 1.2), "hflip": 0.5, "blur": 0.5, **kwargs})


def reference_miou(checkpoint, epoch):
    """mIoU of the validation images one by one, padded as in a batch, counted with numpy."""
    model = timm.create_model(NAME, num_classes=3, **KWARGS)
    load_checkpoint(model, checkpoint)
    timm_dynamic.set_progress(model, epoch, 20)
    config = {**CONFIG, **{key: model.default_cfg[key] for key in ("mean", "std")}}
    common, either = np.zeros(3), np.zeros(3)
    for sample in open_scenes(arguments(), config, 3):
        images, masks = pad_batch([sample], (70, 88))
        with torch.no_grad():
            predicted = model.eval()(images).argmax(1).numpy()
        masks = masks.numpy()
        for label in range(3):
            mask, guess = masks == label, (predicted == label) & (masks != 255)
            common[label] += (mask & guess).sum()
            either[label] += (mask | guess).sum()
    return 100 * (common / either).mean()


def test_learns(capsys):
    """From the classes' sizes alone to most pixels right; the mIoU is that of the weights."""
    out, rows = train(capsys, "--epochs 20 --head-lr-scale 5 --pictures 2 --checkpoint-hist 1")
    folder = Path("out/run")
    best = max(rows, key=lambda row: row["eval_miou"])
    assert out.startswith(f"best eval_miou: {best['eval_miou']:.4f} (epoch {best['epoch']:.0f})")
    assert list(rows[0]) == ["epoch", "train_loss", "eval_loss", "eval_miou", "eval_routing_spread", "lr"]
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert rows[0]["eval_miou"] < 45 and rows[-1]["eval_miou"] > 60
    assert {path.name for path in folder.iterdir()} == {
        "args.yaml",
        "summary.csv",
        "last.pth.tar",
        "model_best.pth.tar",
        f"checkpoint-{best['epoch']:.0f}.pth.tar",
        "predictions.png",
        "routing.json",
    }
    with Image.open(folder / "predictions.png") as picture:
        assert picture.width > 1000 and len(np.unique(np.asarray(picture.convert("RGB")))) > 100
    last = read_checkpoint(folder / "last.pth.tar")
    assert [group["initial_lr"] for group in last["optimizer"]["param_groups"]] == [0.01, 0.05]
    assert reference_miou(folder / "last.pth.tar", epoch=19) == pytest.approx(rows[-1]["eval_miou"], abs=1e-3)


def test_resume_ends_where_an_uninterrupted_run_does(capsys):
    flags = "--epochs 3 --model-ema --model-ema-decay 0.5"
    _, rows = train(capsys, flags)
    _, resumed = train(capsys, f"{flags} --experiment b --resume out/run/checkpoint-0.pth.tar")
    assert resumed == rows[1:]
    one, other = (read_checkpoint(f"out/{name}/last.pth.tar") for name in ("run", "b"))
    for key in ("state_dict", "state_dict_ema"):
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


@pytest.mark.parametrize(
    "flags",
    [
        "--amp --amp-dtype bfloat16 --channels-last --grad-checkpointing -vb 2",
        "--workers 1 --grad-accum-steps 2 --eval-metric loss --model-kwargs backbone=test_efficientnet output_stride=8",
        "--val-split= --drop 0.1 --opt adamw --lr 1e-3 --clip-grad 1",
    ],
)
def test_flags(capsys, flags):
    _, rows = train(capsys, f"{flags} --epochs 1")
    assert len(rows) == 1 and all(math.isfinite(value) for value in rows[0].values())


def test_two_processes(processes):
    """Validation is exact, though three images don't halve."""
    logs = processes.ranks(["train_segmentation", "data", *FLAGS, "-b", "2", "--epochs", "1"])
    assert [status for status, _ in logs] == [0, 0], logs
    assert "".join(log for _, log in logs).count("best eval_miou") == 1
    (row,) = read_summary("out/run")
    assert read_checkpoint("out/run/last.pth.tar")["args"].world_size == 2
    assert row["eval_miou"] == pytest.approx(reference_miou("out/run/last.pth.tar", epoch=0), abs=1e-3)


def test_training_images():
    """Image and mask are scaled, cropped and flipped alike; what is beyond the image does not count."""
    transform = train_transform(arguments(blur=1.0, scale=(0.5, 2.0)), CONFIG)
    image = torch.zeros(3, 70, 90, dtype=torch.uint8)
    image[0, :, 60:] = 255
    mask = (image[:1] > 0).to(torch.uint8)
    padded = flipped = 0
    for seed in range(30):
        torch.manual_seed(seed)
        x, y = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        assert x.shape == (3, 64, 64) and y.shape == (1, 64, 64) and y.dtype == torch.int64
        assert type(x) is type(y) is torch.Tensor and set(y.unique().tolist()) <= {0, 1, 255}
        y = y[0]
        beyond = y == 255
        padded += bool(beyond.any())
        assert (x[1][~beyond] < -0.4).all() and (x[:, beyond].abs() < 1.01).all()
        sure = ((x[0] > 0.9) | (x[0] < -0.9)) & ~beyond
        assert (y[sure] == (x[0][sure] > 0)).all()
        columns = (y == 1).any(0).nonzero()
        flipped += bool(len(columns) and columns[0] == 0 and not (y[:, -1] == 1).any())
    assert 5 < padded < 25 and flipped > 2


def test_padding_of_a_batch():
    samples = [
        (torch.ones(3, 5, 9), torch.zeros(5, 9, dtype=torch.int64)),
        (torch.ones(3, 7, 4), torch.ones(7, 4).long()),
    ]
    images, masks = pad_batch(samples, (6, 6))
    assert images.shape == (2, 3, 7, 9) and masks.shape == (2, 7, 9)
    assert images.sum((1, 2, 3)).tolist() == [3 * 45, 3 * 28]
    assert [(masks == label).sum().item() for label in (0, 1, 255)] == [45, 28, 126 - 73]
    images, masks = pad_batch(samples[:1], (8, 12))
    assert images.shape == (1, 3, 8, 12) and (masks[:, :5, :9] == 0).all()


class TestSBD:
    """Its masks are MATLAB files."""

    @pytest.fixture(autouse=True)
    def sbd(self):
        io = pytest.importorskip("scipy.io")
        for name in ("img", "cls"):
            Path("data/sbd", name).mkdir(parents=True)
        lists = {"train": ["china_0", "china_2", "new_0"], "val": ["flower_2", "china_5"]}
        for split, names in lists.items():
            Path(f"data/sbd/{split}.txt").write_text("\n".join(names))
            for name in names:
                source = name.replace("new", "flower")
                shutil.copy(VOC / f"JPEGImages/{source}.jpg", f"data/sbd/img/{name}.jpg")
                mask = np.asarray(Image.open(VOC / f"SegmentationClass/{source}.png"))
                io.savemat(f"data/sbd/cls/{name}.mat", {"GTcls": {"Segmentation": mask}})

    def test_added_to_voc(self):
        """Every image once, and none that is validated on."""
        args = arguments(dataset="voc+sbd")
        names = [Path(dataset.images[i]).stem for dataset, i in _find(args, training=True)]
        assert names == [f"{name}_{i}" for name in ("china", "flower") for i in (0, 1, 3, 4)] + ["new_0", "china_5"]
        assert [Path(dataset.images[i]).stem for dataset, i in _find(args, training=False)] == [
            "china_2",
            "flower_2",
            "flower_5",
        ]
        by_name = dict(
            zip(names, open_scenes(arguments(dataset="voc+sbd", val_split="train"), CONFIG, 3), strict=False)
        )
        assert by_name["china_0"][0].shape == (3, 70, 90)

    def test_alone(self):
        scenes = open_scenes(arguments(data="data/sbd", dataset="sbd"), CONFIG, 3)
        voc = open_scenes(arguments(), CONFIG, 3)
        assert len(scenes) == 2
        for one, other in zip(scenes[0], voc[1], strict=True):
            assert torch.equal(one, other)


def spoil(kind):
    image, mask = VOC / "JPEGImages/china_0.jpg", VOC / "SegmentationClass/china_0.png"
    if kind == "broken image":
        image.write_bytes(image.read_bytes()[:500])
    elif kind == "no mask":
        mask.unlink()
    elif kind == "colours":
        Image.open(mask).convert("RGB").save(mask)
    elif kind == "size":
        Image.open(mask).crop((0, 0, 50, 50)).save(mask)
    elif kind == "empty split":
        (VOC / "ImageSets/Segmentation/val.txt").write_text("")


@pytest.mark.parametrize(
    ("flags", "kind", "expected"),
    [
        (
            "--data-dir nowhere",
            "",
            "no such data folder: nowhere",
        ),
        ("--dataset voc+sbd", "", "no SBD data: data/sbd/img does not exist (--dataset-download fetches it)"),
        ("--val-split trainval", "", "VOC in data has no list of the split trainval: data/VOCdevkit/"),
        ("--val-split nonsense", "", "cannot open the VOC data in data: Unknown value 'nonsense'"),
        ("", "empty split", "val has no images"),
        ("-b 9", "", "--batch-size 9 on 1 processes is more than the 8 images in train"),
        ("-b 1", "", "ASPP normalises the mean of the map over the batch: training needs more than one image"),
        ("--num-classes 2", "", " has class 2: the model has 0 to 1, and 255 is ignored"),
        ("-b 8", "broken image", "cannot read data/VOCdevkit/VOC2012/JPEGImages/china_0.jpg with its mask data/"),
        ("-b 8 --workers 1", "no mask", "china_0.png: [Errno 2] No such file or directory"),
        ("-b 8", "colours", "data/VOCdevkit/VOC2012/SegmentationClass/china_0.png has 3 channels: a mask has one"),
        ("-b 8", "size", "SegmentationClass/china_0.png differ in size: 70x90 and 50x50"),
        ("--model-kwargs output_stride=12", "", "output_stride must be 16 or 8, got 12"),
        ("--model resnet18 --model-kwargs", "", "resnet18 is no segmentation model"),
        ("--in-chans 1", "", "the images have three channels: leave out --in-chans"),
        ("--scale 2 1", "", "--scale 2.0 1.0: the first must not be larger"),
        ("--layer-decay 0.5", "", "unrecognized arguments: --layer-decay 0.5"),
        ("--eval-metric top1", "", "argument --eval-metric: invalid choice: 'top1'"),
    ],
)
def test_errors_are_one_line(capsys, flags, kind, expected):
    spoil(kind)
    data = [] if "--data-dir" in flags else ["data"]
    try:
        status = cli.main(["train_segmentation", *data, *FLAGS, *flags.split()])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("timm-dynamic train_segmentation: error: ") and expected in last
    assert not Path("out/run/last.pth.tar").exists()
