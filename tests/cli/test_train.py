import csv
import math
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from commands import TRAIN_FLAGS, read_summary, run

from timm_dynamic import cli
from timm_dynamic.cli.train import write_summary
from timm_dynamic.cli.validate import evaluate
from timm_dynamic.convert import load_checkpoint, read_checkpoint
from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.training import set_progress

ROOT = Path(__file__).parents[2]
MODEL = TRAIN_FLAGS[1]
DATA_FLAGS = TRAIN_FLAGS[: TRAIN_FLAGS.index("-b")]  # those that `validate` has too
pytestmark = pytest.mark.usefixtures("workplace")


def train(capsys, flags=""):
    """Train; what it printed, the rows of its summary, and its last checkpoint."""
    if "--resume" not in flags and "--experiment" not in flags:
        shutil.rmtree("out/run", ignore_errors=True)
    status, out, err = run(capsys, "train", "data", *TRAIN_FLAGS, *flags.split())
    assert status == 0, err
    folder = Path(out.split(" in ")[-1].strip())
    return out, read_summary(folder), read_checkpoint(folder / "last.pth.tar")


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=key)


def test_a_run(capsys):
    out, rows, last = train(capsys, "--checkpoint-hist 1")
    assert {path.name for path in Path("out/run").iterdir()} == {
        "args.yaml",
        "summary.csv",
        "last.pth.tar",
        "model_best.pth.tar",
        f"checkpoint-{int(max(rows, key=lambda row: row['eval_top1'])['epoch'])}.pth.tar",
    }
    assert [row["epoch"] for row in rows] == [0, 1]
    assert list(rows[0]) == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [row["lr"] for row in rows] == [0.05, 0.025]  # a cosine over two epochs
    best = max(row["eval_top1"] for row in rows)
    assert out.startswith(f"best eval_top1: {best:.4f} (epoch ")
    assert last["epoch"] == 1 and last["arch"] == MODEL

    # The flags as given, in a form that --config takes.
    flags = yaml.safe_load(Path("out/run/args.yaml").read_text())
    assert flags["model"] == MODEL and flags["lr"] == 0.05 and "world_size" not in flags
    shutil.copy("out/run/args.yaml", "args.yaml")
    assert cli.main(["train", "--config", "args.yaml", "--experiment", "again"]) == 0
    assert_same(last["state_dict"], read_checkpoint("out/again/last.pth.tar")["state_dict"])

    # The checkpoint loads, and its accuracy is that of the summary.
    load_checkpoint(timm.create_model(MODEL, num_classes=10), "out/run/last.pth.tar")
    flags = [*DATA_FLAGS, "--checkpoint", "out/run/last.pth.tar", "--results-file", "r.csv"]
    assert cli.main(["validate", "data", *flags]) == 0
    with open("r.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["top1"]) == pytest.approx(rows[-1]["eval_top1"], abs=1e-3)


def test_classes_are_those_of_the_data_or_of_the_weights(capsys, caplog):
    """Fewer ones than the weights' are said, unless they are meant."""
    note = "test_resnet has 1000 classes, the data 10: to train with these alone pass --num-classes 10"
    flags = "--model test_resnet --epochs 1 --val-split= --lr 0"
    _, _, last = train(capsys, f"{flags} --num-classes 1000")
    assert len(last["state_dict"]["fc.bias"]) == 1000 and note not in caplog.text
    kept = [flag for flag in TRAIN_FLAGS if flag not in ("--num-classes", "10")]
    start = "--initial-checkpoint out/run/last.pth.tar --experiment weights"
    assert cli.main(["train", "data", *kept, *flags.split(), *start.split()]) == 0
    assert caplog.text.count(note) == 1
    caplog.clear()
    assert cli.main(["train", "data", *kept, *flags.split(), "--experiment", "data"]) == 0
    assert len(read_checkpoint("out/data/last.pth.tar")["state_dict"]["fc.bias"]) == 10
    assert note not in caplog.text and "10 classes" in caplog.text and "in out/data" in caplog.text


def test_learns(capsys):
    """40 images are learned by heart. Classes without validation images do not shift the others."""
    shutil.copytree("data/train", "gap/train")
    shutil.copytree("data/train", "gap/val", ignore=lambda folder, names: {"0", "4"} & set(names))
    Path("data").unlink()
    Path("gap").rename("data")
    _, rows, _ = train(capsys, "--epochs 12 --opt adamw --lr 3e-3 --smoothing 0 --no-aug")
    assert rows[-1]["train_loss"] < 0.3 < rows[0]["train_loss"] and rows[-1]["eval_top1"] > 90


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--model-ema --model-ema-decay 0.9 --model-ema-warmup --mixup 0.2 --sched-on-updates --drop 0.1",
        "--opt adamw --lr 1e-3 --workers 2 --aa rand-m7-mstd0.5-inc1 --reprob 0.4 --grad-accum-steps 2",
        "--amp --clip-grad 1 --sched step --decay-epochs 1 --lr-noise 0.3 0.9",
    ],
)
def test_resume_ends_where_an_uninterrupted_run_does(capsys, flags):
    _, rows, last = train(capsys, flags)
    _, resumed_rows, resumed = train(capsys, f"{flags} --experiment b --resume out/run/checkpoint-0.pth.tar")
    assert resumed_rows == rows[1:]
    assert resumed["epoch"] == last["epoch"] == 1
    for key in ("state_dict", "state_dict_ema"):
        assert_same(last.get(key, {}), resumed.get(key, {}))


def test_dynamize(capsys):
    """Checkpoints of a model made dynamic load into one that is: resumed, as a start, and validated."""
    flags = "--model test_resnet --dynamize ped"
    _, rows, last = train(capsys, flags)
    assert "layer1.0.conv1.attn.fc_share.weight" in last["state_dict"]
    _, resumed_rows, resumed = train(capsys, f"{flags} --experiment b --resume out/run/checkpoint-0.pth.tar")
    assert resumed_rows == rows[1:]
    assert_same(last["state_dict"], resumed["state_dict"])
    start = "--lr 0 --epochs 1 --experiment c --initial-checkpoint out/run/last.pth.tar"
    _, _, started = train(capsys, f"{flags} {start}")
    assert rows[0]["train_reconstruction"] > 0
    key = "layer1.0.conv1.kernel"
    assert torch.equal(started["state_dict"][key], last["state_dict"][key])
    validate = ["validate", "data", *DATA_FLAGS, "--checkpoint", "out/run/last.pth.tar"]
    assert cli.main([*validate, *flags.split(), "--results-file", "r.csv"]) == 0
    with open("r.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["top1"]) == pytest.approx(rows[-1]["eval_top1"], abs=1e-3)


def test_auxiliary_terms_are_logged(capsys):
    """Their means over the images, and not in the loss; the network's term is 10 * (share - budget)^2."""
    flags = "--model dynconv_resnet8 --lr 0 --epochs 1 -b 16 --model-kwargs budget="
    rows = [train(capsys, f"{flags}{budget}")[1][0] for budget in (0.3, 0.5, 0.7)]
    assert list(rows[0])[1:5] == ["train_loss", "train_network_budget", "train_block_budget", "eval_loss"]
    assert rows[0]["train_loss"] == rows[1]["train_loss"] == rows[2]["train_loss"]
    first, second, third = (row["train_network_budget"] for row in rows)
    assert first - 2 * second + third == pytest.approx(10 * 2 * 0.2**2, rel=1e-4)
    assert all(row["train_block_budget"] > 0 and 0 < row["eval_executed"] <= 1 for row in rows)
    assert {"train_network_budget", "eval_executed"}.isdisjoint(train(capsys, f"{flags}-1")[1][0])


def test_schedules_follow_the_epochs(capsys, monkeypatch):
    """With every batch, and in evaluation; a resumed run goes on where it was."""
    told, by_epoch = [], [[epoch, *(epoch + step / 5 for step in range(1, 5)), epoch] for epoch in range(3)]

    def listen(model, epoch, epochs):
        set_progress(model, epoch, epochs)
        told.append(model.masked_blocks()[0].masker.progress().item() * epochs)

    monkeypatch.setattr("timm_dynamic.cli.train_epoch.set_progress", listen)
    flags = "--model dynconv_resnet8 --epochs 2 --cooldown-epochs 1"
    _, rows, last = train(capsys, flags)
    assert told == pytest.approx(sum(by_epoch, []))
    del told[:]
    _, resumed_rows, resumed = train(capsys, f"{flags} --experiment b --resume out/run/checkpoint-0.pth.tar")
    assert told == pytest.approx(sum(by_epoch[1:], []))
    assert resumed_rows == rows[1:]
    assert_same(last["state_dict"], resumed["state_dict"])


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--model test_resnet --dynamize dy --model-ema", [30, 30, 30 - 29 / 9, 30 - 29 / 9]),
        ("--model test_dy_resnet --model-kwargs anneal_steps=4", [1, 1]),  # which then counts
    ],
)
def test_temperatures_of_evaluation(capsys, monkeypatch, flags, expected):
    """Those of the epoch before, for the averaged weights too."""
    seen = []

    def listen(model, *args):
        layer = next(module for module in model.modules() if isinstance(module, DynamicConv2d))
        seen.append(pytest.approx(layer.temperature().item()))
        return evaluate(model, *args)

    monkeypatch.setattr("timm_dynamic.cli.train.evaluate", listen)
    train(capsys, flags)
    assert seen == expected


def test_schedules_do_not_compile_again(capsys, monkeypatch):
    compiled = []

    def listen(*args):
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return write_summary(*args)

    monkeypatch.setattr("timm_dynamic.cli.train.write_summary", listen)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(capsys, "--model dynconv_resnet8 --torchcompile eager --val-split= --epochs 3")
    assert compiled[0] == compiled[1] == compiled[2] > 0


def test_cifar10_through_torchvision(capsys, monkeypatch):
    """With files of its format, a few random images each."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder = Path("cifar/cifar-10-batches-py")
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(label) for label in range(10)]}))
    random = np.random.RandomState(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": random.randint(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 3, 6, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    Path("data").unlink()
    Path("data").symlink_to("cifar")
    config = f"--config {ROOT}/configs/dynconv_resnet32.yaml"
    _, (row,), last = train(capsys, f"{config} --epochs 1 --model dynconv_resnet8")
    assert last["args"].dataset == "torch/cifar10"
    assert row["eval_top1"] in (0, 25, 50, 75, 100)


def test_resume_in_the_same_folder(capsys):
    """Rows of epochs to be repeated go, the best of the others stays the best."""
    out, rows, last = train(capsys, "--epochs 3 --checkpoint-hist 2")
    shutil.copy("out/run/last.pth.tar", "last.pth.tar")
    files = sorted(Path("out/run").iterdir())
    out_again, again, resumed = train(capsys, "--epochs 3 --checkpoint-hist 2 --resume last.pth.tar")
    assert (out_again, again, sorted(Path("out/run").iterdir())) == (out, rows, files)
    _, again, resumed = train(capsys, "--epochs 4 --resume last.pth.tar")
    assert [row["epoch"] for row in again] == [0, 1, 2, 3] and again[:3] == rows
    assert resumed["epoch"] == 3


def test_another_run_in_the_same_folder(capsys):
    """Its summary is its own, with other columns."""
    train(capsys, "--epochs 1")
    _, (row,), _ = train(capsys, "--epochs 1 --val-split=")
    assert list(row) == ["epoch", "train_loss", "lr"]


def test_a_run_that_goes_on_with_other_metrics(capsys):
    """No epoch's numbers get lost, or under another's name."""
    flags = "--resume auto --val-split=".split()
    train(capsys, "--epochs 1")
    assert run(capsys, "train", "data", *TRAIN_FLAGS, *flags, "--epochs", 2)[0] == 0
    assert run(capsys, "train", "data", *TRAIN_FLAGS, *flags[:2], "--epochs", 3)[0] == 0
    with open("out/run/summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [bool(row["eval_top1"]) for row in rows] == [True, False, True]
    assert all(row["train_loss"] and row["lr"] for row in rows)


def test_best_is_remembered(capsys):
    """A resumed run that gets worse does not replace the best checkpoint."""
    train(capsys, "--epochs 1")
    path = Path("out/run/summary.csv")
    header, row = path.read_text().splitlines()
    fields = dict(zip(header.split(","), row.split(","), strict=True), eval_top1="100.0")
    path.write_text(f"{header}\n{','.join(fields.values())}\n")
    before = Path("out/run/model_best.pth.tar").read_bytes()
    out, *_ = train(capsys, "--resume out/run/last.pth.tar")
    assert out.startswith("best eval_top1: 100.0000 (epoch 0)")
    assert Path("out/run/model_best.pth.tar").read_bytes() == before


def test_start_and_optimizer_of_a_resumed_run(capsys):
    train(capsys, "--epochs 2")
    flags = "--resume out/run/last.pth.tar --experiment b"
    _, rows, last = train(capsys, f"{flags} --epochs 4 --start-epoch 3")
    assert [row["epoch"] for row in rows] == [3]
    assert rows[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 3 / 4)) / 2)
    # The optimizer's state brings its learning rate along, a new optimizer takes the flag's.
    _, rows, _ = train(capsys, f"{flags} --epochs 4 --start-epoch 2 --lr 0.01 --no-resume-opt --opt adamw")
    assert rows[-2]["lr"] == pytest.approx(0.01 / 2)
    status, _, err = run(capsys, "train", "data", *TRAIN_FLAGS, "--resume", "auto", "--opt", "adamw")
    assert status == 2 and "does not fit this run: it is of --opt sgd, not adamw, which could begin anew" in err


def test_initial_checkpoint(capsys):
    _, _, last = train(capsys)
    _, rows, again = train(capsys, "--initial-checkpoint out/run/last.pth.tar --lr 0 --experiment b --epochs 1")
    assert rows[0]["epoch"] == 0
    weights = [key for key, _ in timm.create_model(MODEL, num_classes=10).named_parameters()]
    assert_same(*({key: c["state_dict"][key] for key in weights} for c in (last, again)))
    # With other classes, all but the classifier.
    flags = "--initial-checkpoint out/run/last.pth.tar --lr 0 --experiment c --epochs 1 --num-classes 12"
    _, _, other = train(capsys, flags)
    assert len(other["state_dict"].pop("fc.bias")) == 12
    weights = [key for key in weights if not key.startswith("fc.")]
    assert_same(*({key: c["state_dict"][key] for key in weights} for c in (last, other)))


def test_averaged_weights(capsys):
    """The average is validated and saved: with decay 0 it is the weights, with decay 1 the first update's."""
    _, rows, last = train(capsys, "--model-ema --model-ema-decay 0")
    assert_same(last["state_dict"], last["state_dict_ema"])
    _, kept, frozen = train(capsys, "--model-ema --model-ema-decay 1 --experiment b")
    assert_same(last["state_dict"], frozen["state_dict"])
    assert not torch.equal(frozen["state_dict"]["fc.weight"], frozen["state_dict_ema"]["fc.weight"])
    assert rows[-1]["eval_loss"] != kept[-1]["eval_loss"]
    _, plain, _ = train(capsys, "--experiment c")
    assert plain == rows
    _, on_cpu, last = train(capsys, "--model-ema --model-ema-force-cpu --model-ema-decay 1 --experiment d")
    assert on_cpu == plain
    assert_same(frozen["state_dict_ema"], last["state_dict_ema"])


def test_learning_rate_from_the_batch(capsys):
    flags = "--epochs 1 --lr-base 0.1 --lr-base-size 80 --grad-accum-steps 2".split()
    keep = [flag for flag in TRAIN_FLAGS if flag not in ("--lr", "0.05")]
    rates = []
    for extra in ([], ["--lr-base-scale", "sqrt"], ["--opt", "adamw"]):
        shutil.rmtree("out", ignore_errors=True)
        assert cli.main(["train", "data", *keep, *flags, *extra]) == 0
        rates.append(read_summary()[0]["lr"])
    assert rates == pytest.approx([0.02, 0.1 * 0.2**0.5, 0.1 * 0.2**0.5])


@pytest.mark.parametrize(
    "batch, accumulated", [("-b 20", "-b 5 --grad-accum-steps 4"), ("-b 40", "-b 5 --grad-accum-steps 9")]
)
def test_gradient_accumulation_is_a_larger_batch(capsys, batch, accumulated):
    """Without BatchNorm, which sees the small batches; also for a last group that is smaller than asked."""
    flags = "--model vit_tiny_patch16_224 --model-kwargs img_size=32 depth=1 embed_dim=24 num_heads=1 --no-aug"
    flags += " --epochs 1 --opt momentum"
    _, rows, large = train(capsys, f"{flags} {batch}")
    _, again, small = train(capsys, f"{flags} {accumulated} --experiment b")
    assert rows[0]["train_loss"] == pytest.approx(again[0]["train_loss"], rel=1e-5)
    assert_same(large["state_dict"], small["state_dict"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        "--amp --amp-dtype bfloat16",
        "--channels-last",
        "--grad-checkpointing",
        "--grad-accum-steps 3",
        "--clip-grad 0.1 --clip-mode agc",
        "--clip-grad 0.1 --clip-mode value --opt adamw",
        "--mixup 0.2 --cutmix 1 --mixup-mode elem --mixup-off-epoch 1",
        "--cutmix-minmax 0.2 0.8 --bce-loss --bce-target-thresh 0.2",
        "--bce-loss --bce-sum",
        "--smoothing 0 --eval-metric loss",
        "--val-split=",
        "--sched none --layer-decay 0.7",
        "--sched multistep --decay-milestones 1 --decay-rate 0.5",
        "--in-chans 1 --mean 0.3 --std 0.3 --color-jitter 0",
        "--model test_resnet --drop-path 0.1 -vb 3",
    ],
)
def test_flags(capsys, flags):
    out, rows, last = train(capsys, flags)
    metric = {"--val-split=": "train_loss", "--smoothing 0 --eval-metric loss": "eval_loss"}.get(flags, "eval_top1")
    assert out.startswith(f"best {metric}: ")
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    assert not any(key.startswith(("_orig_mod", "module")) for key in last["state_dict"])


def test_distributed_script():
    """What it starts, in a folder without our .venv; tests/cli/test_distributed.py trains with several processes."""
    shutil.copy(ROOT / "distributed_train.sh", ".")
    Path("python3").write_text('#!/bin/sh\necho "$@"\n')
    Path("python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{Path.cwd()}:{os.environ['PATH']}"}
    command = ["./distributed_train.sh", "2", "data", "--model", "x y"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == (
        f"-m torch.distributed.run --standalone --nproc_per_node 2 {Path.cwd()}/train.py data --model x y\n"
    )


@pytest.mark.parametrize("argv", [[], ["0"], ["-1"], ["two", "data"]])
def test_distributed_usage(argv):
    done = subprocess.run([ROOT / "distributed_train.sh", *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("usage: distributed_train.sh N DATA")
