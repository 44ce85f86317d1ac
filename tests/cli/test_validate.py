import csv
import json
import shutil

import pytest
import timm
import torch
from timm.data import create_dataset, create_transform
from timm.models._hub import save_for_hf

import timm_dynamic
from timm_dynamic import cli
from timm_dynamic.families import FAMILIES, layers

MODEL = "test_ddf_resnet"
FLAGS = ["--model", MODEL, "--img-size", "32", "--workers", "0", "--device", "cpu"]
KEYS = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]


def make_checkpoint(path, num_classes=10, **state):
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=num_classes)
    torch.save({"state_dict": model.state_dict(), **state}, path)
    return model.eval()


def run(capsys, *argv):
    """Exit status, the results, stderr."""
    try:
        status = cli.main(["validate", *map(str, argv)])
    except SystemExit as stop:  # argparse's own errors
        status = stop.code
    out, err = capsys.readouterr()
    return status, json.loads(out.removeprefix("--result\n")) if out else None, err


def accuracy(model, folder, k=1):
    """Top-k accuracy in percent, by a loop of our own over single images."""
    config = model.pretrained_cfg
    transform = create_transform(
        (3, 32, 32), **{key: config[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    )
    dataset = create_dataset("", root=str(folder), transform=transform)
    with torch.no_grad():
        found = [label in model(image[None])[0].topk(k).indices for image, label in dataset]
    return 100 * sum(found) / len(found)


@pytest.mark.parametrize("batch_size", [7, 256])
def test_accuracy_is_that_of_a_plain_loop(tmp_path, capsys, small_digits, batch_size):
    model = make_checkpoint(tmp_path / "a.pth")
    status, results, err = run(capsys, small_digits, *FLAGS, "--checkpoint", tmp_path / "a.pth", "-b", batch_size)
    assert (status, err) == (0, "")
    assert list(results) == KEYS
    assert results["top1"] == pytest.approx(accuracy(model, small_digits / "val"), abs=1e-3)
    assert results["top5"] == pytest.approx(accuracy(model, small_digits / "val", 5), abs=1e-3)
    assert results["top1"] + results["top1_err"] == pytest.approx(100)
    assert results["top5"] + results["top5_err"] == pytest.approx(100)
    assert results["model"] == MODEL and results["img_size"] == 32
    assert results["param_count"] == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


@pytest.mark.parametrize("layer", [name for name in layers() if FAMILIES[name].keeps is not None])
def test_a_pretrained_model_made_dynamic_classifies_as_before(capsys, small_digits, layer):
    flags = [small_digits, "--model", "test_ddf_resnet.digits", "--workers", "0", "--device", "cpu"]
    _, static, _ = run(capsys, *flags)
    status, dynamic, err = run(capsys, *flags, "--dynamize", layer)
    assert (status, err) == (0, "")
    assert static["top1"] > 90 and dynamic["top1"] == static["top1"]
    assert dynamic["param_count"] > static["param_count"]


@pytest.mark.parametrize(
    "flags",
    [
        "--channels-last",
        "--workers 2",
        "--amp --amp-dtype bfloat16",
        "--dataset torch/image_folder",
        "--data-dir DATA",
    ],
)
def test_flags_that_leave_the_results(tmp_path, capsys, small_digits, flags):
    model = make_checkpoint(tmp_path / "a.pth")
    data = [] if "DATA" in flags else [small_digits]
    flags = flags.replace("DATA", str(small_digits)).split()
    status, results, err = run(capsys, *data, *FLAGS, "--checkpoint", tmp_path / "a.pth", *flags)
    assert status == 0, err
    tolerance = 5 if "--amp" in flags else 1e-3  # one image may tip over
    assert results["top1"] == pytest.approx(accuracy(model, small_digits / "val"), abs=tolerance)


def test_other_split(tmp_path, capsys, small_digits):
    model = make_checkpoint(tmp_path / "a.pth")
    flags = [*FLAGS, "--checkpoint", tmp_path / "a.pth"]
    assert run(capsys, small_digits, *flags, "--split", "train")[1]["top1"] == pytest.approx(
        accuracy(model, small_digits / "train"), abs=1e-3
    )
    # A folder without split folders is the data itself.
    assert run(capsys, small_digits / "val", *flags)[1] == run(capsys, small_digits, *flags)[1]


def test_fewer_than_five_classes(tmp_path, capsys, small_digits):
    for label in range(3):
        shutil.copytree(small_digits / "val" / str(label), tmp_path / "val" / str(label))
    make_checkpoint(tmp_path / "a.pth", num_classes=3)
    status, results, _ = run(capsys, tmp_path, *FLAGS, "--checkpoint", tmp_path / "a.pth")  # of three classes
    assert status == 0 and results["top5"] == 100 and results["top1"] < 100


def test_grey_images(tmp_path, capsys, small_digits):
    torch.save(timm.create_model(MODEL, num_classes=10, in_chans=1).state_dict(), tmp_path / "a.pth")
    flags = [*FLAGS, "--checkpoint", tmp_path / "a.pth"]
    assert run(capsys, small_digits, *flags, "--in-chans", "1")[0] == 0
    assert run(capsys, small_digits, *FLAGS[:2], *flags[4:], "--input-size", "1", "32", "32")[0] == 0
    assert run(capsys, small_digits, *flags, "--model-kwargs", "in_chans=1")[0] == 0


def test_use_ema(tmp_path, capsys, small_digits):
    plain = timm.create_model(MODEL, pretrained=True)
    averaged = timm.create_model(MODEL, num_classes=10)
    with torch.no_grad():
        averaged.fc.bias[3] = 1e3
    make_checkpoint(tmp_path / "a.pth", state_dict=plain.state_dict(), state_dict_ema=averaged.state_dict())
    flags = [small_digits, *FLAGS, "--checkpoint", tmp_path / "a.pth"]
    assert run(capsys, *flags, "--use-ema")[1]["top1"] == 10
    assert run(capsys, *flags)[1]["top1"] > 15  # of digits half as large as those that taught it


def masked_checkpoint(path):
    """Weights with masks that are partly on."""
    torch.manual_seed(0)
    model = timm.create_model("dynconv_resnet8")
    for block in model.masked_blocks():
        torch.nn.init.zeros_(block.masker.maskconv.fc.weight)
    torch.save(model.state_dict(), path)
    return model.eval()


@pytest.mark.parametrize("flags", ["", "--channels-last --torchcompile eager"])
def test_optimized(tmp_path, capsys, small_digits, flags):
    make_checkpoint(tmp_path / "a.pth")
    flags = [small_digits, *FLAGS, "--checkpoint", tmp_path / "a.pth", *flags.split()]
    _, expected, _ = run(capsys, *(flag for flag in flags if flag not in ("--torchcompile", "eager")))
    status, results, err = run(capsys, *flags, "--optimize")
    assert status == 0 and "memory format: " in err and results == expected


def test_macs_of_a_model_with_masks(tmp_path, capsys, small_digits):
    """The average over the dataset, whatever the last batch: that of a loop over single images."""
    model = masked_checkpoint(tmp_path / "m.pth")
    config = timm.data.resolve_data_config({}, model=model)
    dataset = create_dataset("", root=str(small_digits / "val"), transform=create_transform(**config))
    counts = [timm_dynamic.count_macs(model, image[None]) for image, _ in dataset]
    assert len({count.executed for count in counts}) > 1
    torch._dynamo.reset()
    for flags in ("-b 7", "-b 256 --channels-last", "-b 7 --torchcompile eager"):
        flags = ["--model", "dynconv_resnet8", *FLAGS[2:], "--checkpoint", tmp_path / "m.pth", *flags.split()]
        status, results, err = run(capsys, small_digits, *flags, "--results-file", tmp_path / "r.json")
        assert (status, err) == (0, "")
        assert list(results) == [*KEYS, "gmacs", "gmacs_static", "executed"]
        # an image whose logits are all but zero may differ by a position, by the order of sums
        assert results["gmacs"] == pytest.approx(sum(count.executed for count in counts) / len(counts) / 1e9, rel=1e-4)
        assert results["gmacs_static"] == pytest.approx(counts[0].static / 1e9, abs=1e-6)
        assert 0 < results["executed"] < results["gmacs"] / results["gmacs_static"]  # of which the stem is a part
        assert json.loads((tmp_path / "r.json").read_text()) == results


def test_fewer_classes_than_the_model_has(tmp_path, capsys, small_digits):
    make_checkpoint(tmp_path / "a.pth", num_classes=12)
    flags = [small_digits, *FLAGS, "--checkpoint", tmp_path / "a.pth", "--num-classes", 12]
    status, results, err = run(capsys, *flags)
    assert status == 0 and list(results) == KEYS
    assert err.startswith("timm-dynamic validate: warning: the data has 10 classes, the model 12: ")
    assert err.count("\n") == 1
    (tmp_path / "map.txt").write_text("".join(f"{label}\n" for label in range(10)))
    assert run(capsys, *flags, "--class-map", tmp_path / "map.txt")[::2] == (0, "")


def test_results_file(tmp_path, capsys, small_digits):
    make_checkpoint(tmp_path / "a.pth")
    flags = [small_digits, *FLAGS, "--checkpoint", tmp_path / "a.pth", "--results-file"]
    (tmp_path / "r.csv").write_text("old")
    _, results, _ = run(capsys, *flags, tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in results.items()}]
    _, results, _ = run(capsys, *flags, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "r.csv", "r.json"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, small_digits):
    """A folder with good data and checkpoint, and with all kinds of bad ones."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "data").symlink_to(small_digits)
    (folder / "empty").mkdir()
    (folder / "empty_val" / "val" / "0").mkdir(parents=True)
    (folder / "only_train" / "train" / "0").mkdir(parents=True)
    shutil.copytree(small_digits / "val" / "0", folder / "flat")
    shutil.copytree(small_digits / "val", folder / "broken/val")
    (folder / "broken/val/0/broken.png").write_bytes((small_digits / "val/0/4.png").read_bytes()[:-40])
    make_checkpoint(folder / "good.pth")
    make_checkpoint(folder / "nine.pth", num_classes=9)
    sizes = {"num_features": 12, "num_stacks": 1}
    save_for_hf(timm.create_model("dynconv_hourglass", **sizes), folder / "pose", model_args=sizes)
    return folder


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("", "no data: name its folder"),
        ("nowhere", "no such data folder: nowhere"),
        ("empty", "no images in empty"),
        ("empty_val", "no images in empty_val/val"),
        ("only_train", "no validation folder in only_train"),
        ("flat", "flat has images that are in no class folder"),
        ("broken", "cannot read image broken/val/0/broken.png: "),
        ("broken --workers 1", "cannot read image broken/val/0/broken.png: "),
        ("data --num-classes 9 --checkpoint nine.pth", "has 10 classes, the model 9: pass --num-classes 10"),
        ("data --class-map nowhere.txt", "Cannot locate specified class map file"),
        ("data --model resnet5O", "unknown model 'resnet5O'; did you mean"),
        ("data --model zzzzzzzz", "unknown model 'zzzzzzzz'; to list the names: python -c"),
        (
            "data --checkpoint= --model dcd_resnet18",
            "no pretrained weights exist for dcd_resnet18: give a file of weights",
        ),
        (
            "data --model dynconv_hourglass --checkpoint=",
            "dynconv_hourglass is a network for keypoint-detection: it has train_pose and validate_pose",
        ),
        ("data --model local-dir:pose --checkpoint=", "local-dir:pose is a network for keypoint-detection: it has"),
        ("data --nonsense", "unrecognized arguments: --nonsense"),
        ("data --device nonsense", "--device nonsense"),
        ("data --batch-size 0", "argument -b/--batch-size: 0 is not 1 or more"),
        ("data --in-chans 1 --input-size 3 32 32", "--in-chans 1 contradicts --input-size 3"),
        ("data --in-chans 5", "images of 5 channels cannot be read"),
        ("data --mean 0.5 0.5", "--mean and --std take one value, or one for each channel"),
        ("data --checkpoint nowhere", "no checkpoint at nowhere"),
        ("data --use-ema", "no averaged weights"),
        ("data --use-ema --checkpoint=", "--use-ema needs --checkpoint"),
        ("data --results-file empty/r.txt", "--results-file empty/r.txt: the name must end in .csv or .json"),
        ("data --results-file nowhere/r.csv", "--results-file nowhere/r.csv: cannot write there"),
        ("data --checkpoint= --model-kwargs features_only=True", "without classes: leave features_only out"),
        ("data --model-kwargs foo", "expected K=V, got 'foo'"),
        ("data --model-kwargs name=x", "name is not for here"),
        ("data --model-kwargs args=1", "unexpected keyword argument 'args'"),
        ("data --torchcompile nonsense", "unknown backend 'nonsense'"),
        ("data --interpolation nonsense", "invalid choice: 'nonsense'"),
    ],
)
def test_errors(inputs, monkeypatch, capsys, argv, expected):
    monkeypatch.chdir(inputs)
    status, results, err = run(capsys, *FLAGS, "--checkpoint", "good.pth", *argv.split())
    assert (status, results) == (2, None), err
    assert err.count("\n") == 1 and err.startswith("timm-dynamic validate: error: ")
    assert expected in err


def test_the_data_are_missed_before_the_weights(capsys, tmp_path):
    status, results, err = run(capsys, tmp_path / "nowhere", "--model", "ddf_mul_resnet50")
    assert (status, results) == (2, None) and "no such data folder" in err
