"""Options of `timm-dynamic train` for the loss, the teacher, the optimizer, mixed precision and logs."""

import importlib.util
import math
import shutil
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from commands import TRAIN_FLAGS, read_summary, run

from timm_dynamic.cli.arguments.train import make_parser
from timm_dynamic.cli.train import build_optimizer
from timm_dynamic.cli.train_build import build_scaler
from timm_dynamic.cli.train_epoch import ramp_mixup
from timm_dynamic.convert import read_checkpoint
from timm_dynamic.layers.auxiliary import _warn_once

ROOT = Path(__file__).parents[2]
FLAGS = ["train", "data", *TRAIN_FLAGS, "--epochs", "1"]
TEACHER = "--kd-model-name test_ddf_resnet.digits"
pytestmark = pytest.mark.usefixtures("workplace")


def train(capsys, flags, experiment="run"):
    """Train; the rows of its summary, and its last checkpoint."""
    if "--resume" not in flags:
        shutil.rmtree(f"out/{experiment}", ignore_errors=True)
    status, _, err = run(capsys, *FLAGS, *flags.split(), "--experiment", experiment)
    assert status == 0, err
    rows = read_summary(f"out/{experiment}")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows, read_checkpoint(f"out/{experiment}/last.pth.tar")


class TestTerms:
    @pytest.mark.parametrize(
        "flags", ["--model test_ped_resnet --model-kwargs", "--model dynconv_resnet8 --model-kwargs budget=0.2"]
    )
    def test_accumulation_needs_no_aux_scale(self, capsys, flags):
        """It has no say: what the batches of an update count is what their losses do."""
        flags = f"--no-aug --opt momentum --val-split= --grad-accum-steps 5 {flags}"
        weights = [train(capsys, f"{flags} aux_scale={scale}")[1]["state_dict"] for scale in (1, 0)]
        torch.testing.assert_close(*weights, rtol=0, atol=0)

    def test_float16_without_a_warning(self, capsys):
        _warn_once.cache_clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="timm_dynamic: in float16")
            rows, _ = train(capsys, "--model test_ped_resnet --amp --val-split=")
        assert rows[0]["train_reconstruction"] > 0

    def test_checkpointed_and_compiled(self, capsys):
        """What Dynamo cannot do with DynConv's blocks it leaves to Python."""
        flags = "--model dynconv_resnet8 --model-kwargs budget=0.3 --grad-checkpointing --torchcompile eager"
        _, last = train(capsys, f"{flags} --grad-accum-steps 2 --model-ema")
        assert not any(key.startswith(("_orig_mod", "module")) for key in last["state_dict"])


class TestDistillation:
    @pytest.mark.parametrize("form", ["logit", "feature"])
    def test_a_teacher(self, capsys, form):
        """Its loss and the task's are logged beside the model's own term; their sum is the loss."""
        flags = f"--model test_ped_resnet {TEACHER} --kd-distill-type {form} --distill-loss-weight 2 --model-ema"
        (row,), last = train(capsys, flags)
        assert list(row)[1:5] == ["train_loss", "train_task_loss", "train_kd_loss", "train_reconstruction"]
        assert row["train_loss"] == pytest.approx(row["train_task_loss"] + 2 * row["train_kd_loss"], rel=1e-4)
        assert not any(key.startswith(("student", "teacher")) for key in last["state_dict"])
        resumed = f"{flags} --epochs 2 --resume out/run/last.pth.tar"
        assert [row["epoch"] for row in train(capsys, resumed)[0]] == [0, 1]

    def test_a_token(self, capsys):
        student = "deit_tiny_distilled_patch16_224 --model-kwargs img_size=32 depth=1 embed_dim=24 num_heads=1"
        form = "--kd-distill-type token --kd-token-distill-type hard --task-loss-weight 0.3"
        (row,), _ = train(capsys, f"--model {student} {TEACHER} {form}")
        parts = 0.3 * row["train_task_loss"] + 0.7 * row["train_distill_loss"]
        assert row["train_loss"] == pytest.approx(parts, rel=1e-4)

    def test_what_is_learnt_reaches_the_projection(self, capsys):
        """Whose weights are trained by the optimizer and kept in the checkpoint."""
        before = train(capsys, f"--model test_resnet {TEACHER} --kd-distill-type feature --lr 0", "a")[1]
        after = train(capsys, f"--model test_resnet {TEACHER} --kd-distill-type feature", "b")[1]
        one, two = (checkpoint["task_state"]["projection"]["weight"] for checkpoint in (before, after))
        assert not torch.equal(one, two)


class TestDecayByName:
    def groups(self, *flags):
        from timm_dynamic.cli.common import create_model

        args = make_parser().parse_args(["data", "--config", f"{ROOT}/configs/ped_resnet18.yaml", *flags])
        args.world_size = 8
        model = create_model(args.model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(args, model)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
        return {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}

    def test_the_recipe_of_ped(self):
        """Off for names with "bn": the norms of the shortcuts, which are named `downsample.1`, decay, as biases do."""
        decay = self.groups()
        assert {name for name, value in decay.items() if value == 0} == {name for name in decay if "bn" in name}
        assert set(decay.values()) == {0.0, 3.0517578125e-5}
        for name in ("layer2.0.downsample.1.weight", "layer2.0.downsample.1.bias", "fc.bias", "conv1.weight"):
            assert decay[name] > 0, name
        assert decay["bn1.weight"] == decay["layer4.1.bn2.bias"] == 0

    def test_other_patterns(self):
        decay = self.groups("--no-decay-names", "fc.*", "*.bias")
        assert {name for name, value in decay.items() if value == 0} == {
            name for name in decay if name.startswith("fc.") or name.endswith(".bias")
        }


class TestMixupRamp:
    def test_the_recipe_of_dcd(self):
        """Alpha grows linearly over the first 100 of 120 epochs, to 0.2; without any there is no mixing."""
        args = make_parser().parse_args(["data", "--config", f"{ROOT}/configs/dcd_resnet50.yaml"])
        collate = types.SimpleNamespace(cutmix_alpha=0.0)
        seen = {}
        for epoch in (0, 1, 50, 99, 100, 119):
            ramp_mixup(epoch, collate, args)
            seen[epoch] = (pytest.approx(collate.mixup_alpha), collate.mixup_enabled)
        assert seen == {
            0: (0.0, False),
            1: (0.002, True),
            50: (0.1, True),
            99: (0.198, True),
            100: (0.2, True),
            119: (0.2, True),
        }

    @pytest.mark.parametrize("workers", [0, 1])
    def test_in_training(self, capsys, workers):
        """The first epoch is that of a run without mixing but for its targets; a resumed run is where it was."""
        flags = (
            f"--model test_resnet --no-aug --mixup 5 --mixup-ramp-epochs 2 --val-split= --lr 0 -j {workers} --epochs 3"
        )
        rows, _ = train(capsys, flags)
        resumed, _ = train(capsys, f"{flags} --resume out/run/checkpoint-0.pth.tar", "b")
        assert resumed == rows[1:]
        constant, _ = train(capsys, flags.replace("--mixup-ramp-epochs 2", ""), "c")
        assert rows[2] == constant[2] and rows[0] != constant[0] and rows[1] != constant[1]


class TestLogs:
    def test_tensorboard(self, capsys):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        rows, _ = train(capsys, "--model test_ped_resnet --epochs 2 --log-tensorboard")
        events = EventAccumulator("out/run").Reload()
        assert set(events.Tags()["scalars"]) == rows[0].keys() - {"epoch"}
        for name in ("train_loss", "train_reconstruction", "eval_top1", "lr"):
            seen = [(event.step, event.value) for event in events.Scalars(name)]
            assert seen == [(row["epoch"], pytest.approx(row[name])) for row in rows]

    def test_wandb(self, capsys, monkeypatch):
        """With a stand-in for the package: a run is opened and gets the rows of the summary."""
        started, logged = [], []
        fake = types.ModuleType("wandb")
        fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
        fake.init, fake.log = lambda **options: started.append(options), lambda row: logged.append(row)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        rows, _ = train(capsys, "--model test_resnet --log-wandb --wandb-project p --wandb-tags a b")
        (options,) = started
        assert (options["project"], options["name"], options["tags"]) == ("p", "run", ["a", "b"])
        assert options["config"]["model"] == "test_resnet" and "resume" not in options
        assert logged == [pytest.approx(row) for row in rows]
        flags = "--model test_resnet --log-wandb --wandb-resume-id x --resume out/run/last.pth.tar --epochs 2"
        train(capsys, flags)
        assert (started[-1]["id"], started[-1]["resume"]) == ("x", "must")


def test_apex(monkeypatch):
    """With a stand-in for the package: it gets the model and the optimizer, and scales the loss."""
    called = []
    apex = types.ModuleType("apex")
    apex.amp = types.SimpleNamespace(initialize=lambda *args, **options: called.append((args, options)))
    monkeypatch.setitem(sys.modules, "apex", apex)
    args = make_parser().parse_args(["data", "--amp", "--amp-impl", "apex"])
    task = types.SimpleNamespace(get_trainable_module=lambda: "model")
    assert type(build_scaler(args, task, "optimizer", torch.device("cuda"))).__name__ == "ApexScaler"
    assert called == [(("model", "optimizer"), {"opt_level": "O1"})]


def test_flags_of_a_run_are_a_config(capsys):
    train(capsys, "--model test_resnet --no-decay-names *bn* --mixup 0.2 --mixup-ramp-epochs 2")
    flags = yaml.safe_load(Path("out/run/args.yaml").read_text())
    assert flags["no_decay_names"] == ["*bn*"] and flags["mixup_ramp_epochs"] == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--log-wandb", "--log-wandb: the package wandb is not installed"),
        ("--log-tensorboard", "--log-tensorboard: the package tensorboard is not installed"),
        ("--amp --amp-impl apex", "--amp-impl apex: the package apex is not installed"),
        ("--amp-impl other", "argument --amp-impl: invalid choice: 'other'"),
        ("--no-decay-names *bn* --layer-decay 0.7", "--no-decay-names and --layer-decay cannot go together"),
        ("--mixup-ramp-epochs 3", "--mixup-ramp-epochs needs --mixup"),
        ("--wandb-resume-id x", "--wandb-resume-id needs --log-wandb and --resume"),
        ("--kd-model-name test_ddf_resnex", "unknown model 'test_ddf_resnex'; did you mean test_ddf_resnet"),
        (
            f"{TEACHER} --num-classes 12",
            "--kd-model-name test_ddf_resnet.digits tells 10 classes apart, test_resnet 12",
        ),
        (f"{TEACHER} --kd-distill-type other", "argument --kd-distill-type: invalid choice: 'other'"),
        (f"{TEACHER} --kd-distill-type token", "does not have 'set_distilled_training' method"),
    ],
)
def test_errors(capsys, monkeypatch, flags, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, out, err = run(capsys, *FLAGS, "--model", "test_resnet", *flags.split())
    assert (status, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("timm-dynamic train: error: ") and expected in err


def test_apex_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    status, _, err = run(capsys, *FLAGS, "--amp", "--amp-impl", "apex")
    assert status == 2 and "--amp-impl apex needs a GPU and --amp-dtype float16, without --torchcompile" in err
