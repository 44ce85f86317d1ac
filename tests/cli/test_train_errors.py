"""What `timm-dynamic train` refuses, in one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from commands import TRAIN_FLAGS, run

from timm_dynamic import cli
from timm_dynamic.cli.data import UnreadableImage

ROOT = Path(__file__).parents[2]
MODEL = TRAIN_FLAGS[1]
pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def bad_inputs():
    Path("empty").mkdir()
    for name, splits in {"no_val": ["train"], "empty_val": ["train"], "other": ["train"], "bare": []}.items():
        for split in splits:
            shutil.copytree("data/train", f"{name}/{split}")
    shutil.copytree("data/val", "bare", dirs_exist_ok=True)
    Path("empty_val/val/3").mkdir(parents=True)
    shutil.copytree("data/val/3", "other/val/eleven")
    shutil.copytree("data", "broken")
    Path("broken/train/0/broken.png").write_bytes(b"")
    Path("file").write_text("x")
    Path("key.yaml").write_text("nonsense: 1\nmodel: test_resnet\n")
    Path("choice.yaml").write_text("sched: nonsense\n")
    Path("type.yaml").write_text("epochs: 1.5\n")
    Path("range.yaml").write_text("hflip: 5\ndrop_path: null\nscale: [0.5, 1.0]\n")
    Path("list.yaml").write_text("[1, 2]\n")
    Path("text.yaml").write_text("experiment: 2024\n")
    Path("map.yaml").write_text("model_kwargs: budget=0.5\n")
    Path("pair.yaml").write_text("scale: 0.5\n")
    Path("switch.yaml").write_text("amp: 'no'\n")
    Path("nothing.yaml").write_text("mean: 0.5\nopt:\n")
    model = timm.create_model("test_resnet", num_classes=10)
    torch.save(model.state_dict(), "weights.pth")
    optimizer = torch.optim.SGD(model.parameters(), 0.1).state_dict()
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer, "epoch": 1}, "foreign.pth")
    torch.save(
        {"state_dict": model.state_dict(), "optimizer": optimizer, "epoch": 1, "arch": "test_resnet"}, "arch.pth"
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--data-dir nowhere", "no such data folder: nowhere"),
        ("--data-dir empty", "no images in empty"),
        ("--data-dir no_val", "no validation folder in no_val"),
        ("--data-dir empty_val", "no images in empty_val/val"),
        ("--data-dir bare", "no train and validation folders in bare"),
        ("--data-dir other", "classes in validation that train lacks: eleven"),
        ("--data-dir broken -b 41", "cannot read image broken/train/0/broken.png: "),
        ("-b 41", "--batch-size 41 on 1 processes is more than the 40 images in train"),
        (
            "--model dy_deeplabv3plus_mobilenetv2_050",
            "dy_deeplabv3plus_mobilenetv2_050 is a network for image-segmentation: it has train_segmentation",
        ),
        (
            "--model dynconv_hourglass.budget25_mpii",
            "dynconv_hourglass.budget25_mpii is a network for keypoint-detection: it has train_pose and validate_pose",
        ),
        ("-b 0", "argument -b/--batch-size: 0 is not 1 or more"),
        ("--smoothing 1.0", "argument --smoothing: 1.0 is not below 1"),
        ("--mixup 0.2 --smoothing -1", "argument --smoothing: -1 is not between 0 and 1"),
        ("--drop-path 2", "argument --drop-path: 2 is not between 0 and 1"),
        ("--model-ema --model-ema-decay 5", "argument --model-ema-decay: 5 is not between 0 and 1"),
        ("--reprob nan", "argument --reprob: nan is not between 0 and 1"),
        ("--weight-decay -3", "argument --weight-decay: -3 is not 0 or more"),
        ("--sched step --decay-epochs 0", "argument --decay-epochs: 0 is not above 0"),
        ("--clip-grad -1", "argument --clip-grad: -1 is not above 0"),
        ("--std 0", "argument --std: 0 is not above 0"),
        ("--scale 2 1", "--scale 2.0 1.0: the first must not be larger"),
        ("--epochs nine", "argument --epochs: 'nine' is not a whole number"),
        (
            "--torchcompile --torchcompile-mode foo",
            "argument --torchcompile-mode: unknown mode 'foo'; there are default,",
        ),
        ("--config range.yaml", "--config range.yaml: hflip: 5 is not between 0 and 1"),
        ("-b 7 --mixup 0.2", "--batch-size 7 must be even"),
        ("--num-classes 9", "has 10 classes, the model 9: pass --num-classes 10"),
        ("--model resnet5O", "unknown model 'resnet5O'"),
        ("--dynamize nonsense", "layer must be one of 'cond', "),
        ("--model test_vit --dynamize dy", "none of the 1 convolutions of test_vit is replaced"),
        ("--model-kwargs nonsense=1", f"cannot create {MODEL}"),
        ("--model dla60x_c --grad-checkpointing", "dla60x_c does not support --grad-checkpointing"),
        ("--model-kwargs features_only=True", "is a FeatureListNet, without classes: leave features_only out"),
        ("--in-chans 3 --model-kwargs in_chans=1", "--in-chans 3 contradicts --model-kwargs in_chans=1"),
        ("--opt nonsense", "Optimizer nonsense not found"),
        ("--opt-kwargs nonsense=1", "cannot create the optimizer sgd"),
        ("--sched nonsense", "argument --sched: invalid choice: 'nonsense'"),
        ("--aa nonsense", "cannot make the data loader"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--bathc-size 3", "unrecognized arguments: --bathc-size 3; did you mean --batch-size"),
        ("--where conv1", "--where needs --dynamize"),
        ("--dynamize dcd --model-kwargs latent_dmi=3", "; did you mean latent_dim?"),
        ("--device nonsense", "--device nonsense"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--config key.yaml", "--config key.yaml: unknown keys nonsense"),
        ("--config choice.yaml", "--config choice.yaml: sched is 'nonsense', not one of 'cosine'"),
        ("--config type.yaml", "--config type.yaml: epochs is 1.5, not a whole number"),
        ("--config text.yaml", "--config text.yaml: experiment is 2024, not a text: put it in quotes"),
        ("--config map.yaml", "--config map.yaml: model_kwargs is 'budget=0.5', not a map, as in {budget: 0.5}"),
        ("--config pair.yaml", "--config pair.yaml: scale is 0.5, not 2 values"),
        ("--config switch.yaml", "--config switch.yaml: amp is 'no', not true or false"),
        ("--config nothing.yaml", "--config nothing.yaml: opt has no value"),
        ("--config list.yaml", "--config list.yaml must hold `key: value` lines"),
        ("--initial-checkpoint nowhere", "no checkpoint at nowhere"),
        ("--initial-checkpoint weights.pth", f"weights.pth does not load into {MODEL}"),
        ("--resume nowhere", "no checkpoint at nowhere"),
        ("--resume weights.pth", "--resume weights.pth holds no epoch, optimizer, state_dict"),
        ("--resume foreign.pth", "--resume foreign.pth does not fit this run"),
        (
            "--resume arch.pth",
            f"--resume arch.pth does not fit this run: it is of test_resnet, and this run trains {MODEL}",
        ),
        ("--output file", "file/run"),
    ],
)
def test_errors(bad_inputs, capsys, flags, expected):
    argv = ["train", *([] if "--data-dir" in flags else ["data"]), *TRAIN_FLAGS, *flags.split()]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("timm-dynamic train: error: ")
    assert expected in err
    assert not list(Path(".").glob("out/run/*.tar"))


def test_no_data(capsys):
    assert cli.main(["train", *TRAIN_FLAGS]) == 2
    assert "no data: name its folder" in capsys.readouterr().err


def test_unreadable_image_in_a_worker_process():
    """PyTorch makes the error anew from a traceback."""
    error = UnreadableImage("cannot read image a: b")
    traceback = (
        f"Caught UnreadableImage in DataLoader worker process 0.\nOriginal Traceback ...\n{type(error).__module__}"
    )
    assert str(error) == str(UnreadableImage(f"{traceback}.UnreadableImage: {error}\n")) == "cannot read image a: b"


def test_as_a_script(small_digits):
    """The script at the root is the command."""
    done = subprocess.run([sys.executable, ROOT / "train.py", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "timm-dynamic train: error: no such data folder: nowhere\n"
