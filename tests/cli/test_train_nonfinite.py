import shutil

import pytest
import torch
from commands import TRAIN_FLAGS, read_summary, run

from timm_dynamic import cli
from timm_dynamic.cli.common import create_model
from timm_dynamic.convert import read_checkpoint
from timm_dynamic.layers import PEDConv2d

FLAGS = ["train", "data", *TRAIN_FLAGS, "--model", "test_ped_resnet"]
pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(batches)` puts a nan into these training batches of the next runs, counted from 0 in each run.

    With `term` an auxiliary term becomes infinite instead.
    """

    def hook_up(model, batches, term):
        count = iter(range(1000))

        def spoil_input(module, args):
            if module.training and next(count) in batches:
                images = args[0].clone()
                images[0, 0, 0, 0] = torch.nan
                return (images,)

        def spoil_term(module, args, output):
            if module.training and next(count) in batches:
                module.reconstruction.fill_(torch.inf)

        if term:
            layer = next(module for module in model.modules() if isinstance(module, PEDConv2d))
            layer.register_forward_hook(spoil_term)
        else:
            model.register_forward_pre_hook(spoil_input)
        return model

    def start(batches, term=False):
        monkeypatch.setattr(
            "timm_dynamic.cli.train_build.create_model",
            lambda *args, **kwargs: hook_up(create_model(*args, **kwargs), batches, term),
        )

    return start


def train(capsys, flags=""):
    """Exit status, stderr, the summary's rows and the last checkpoint."""
    shutil.rmtree("out/run", ignore_errors=True)
    status, _, err = run(capsys, *FLAGS, *flags.split())
    return status, err, read_summary(), read_checkpoint("out/run/last.pth.tar")


def finite(checkpoint):
    states = (checkpoint["state_dict"], checkpoint.get("state_dict_ema", {}))
    return all(value.isfinite().all() for state in states for value in state.values())


@pytest.mark.parametrize("flags", ["", "--amp", "--grad-accum-steps 5"])
def test_stops(capsys, spoil, flags):
    """In the second epoch, also at its last update."""
    spoil({9})
    status, err, (row,), last = train(capsys, flags)
    assert status == 2 and err.count("error: ") == 1
    assert "error: epoch 1, step 5 of 5, learning rate 0.025: the task's loss is nan, " in err
    assert "--skip-nonfinite N skips N such updates" in err
    assert last["epoch"] == 0 and finite(last)


def test_names_the_term(capsys, spoil):
    spoil({6}, term=True)
    status, err, _, last = train(capsys)
    assert status == 2 and "epoch 1, step 2 of 5, learning rate 0.025: layer1.0.conv1.reconstruction is inf" in err
    assert "the task's loss" not in err and last["epoch"] == 0


@pytest.mark.parametrize("flags", ["--model-ema --model-ema-decay 0.5", "--amp", "--clip-grad 1 --sched-on-updates"])
def test_skips(capsys, caplog, spoil, flags):
    """Weights, averages and BatchNorm's statistics stay finite; the losses of the summary are of the others."""
    spoil({1, 4, 9})
    status, _, both, last = train(capsys, f"{flags} --skip-nonfinite 3")
    assert status == 0 and caplog.text.count("update skipped") == 3
    assert "update skipped, 3 of 3" in caplog.text
    assert finite(last)
    assert all(0 < row["train_loss"] < 10 for row in both)
    status, err, _, last = train(capsys, f"{flags} --skip-nonfinite 2")
    assert status == 2 and "after 2 skipped updates (--skip-nonfinite)" in err
    assert last["epoch"] == 0


def test_what_a_skipped_update_changes(capsys, caplog, spoil):
    """Nothing, be it any batch of its group that is bad; the loss reported is of the others."""
    flags = "--epochs 1 --sched none --opt adamw --model-ema --skip-nonfinite 9 --grad-accum-steps 2"
    results = []
    for batches, skipped in (({1, 2}, 2), ({0, 3}, 2), ((), 0)):  # groups are 0 and 1, 2 and 3, 4
        spoil(batches)
        caplog.clear()
        _, _, (row,), last = train(capsys, flags)
        assert caplog.text.count("update skipped") == skipped
        assert {int(state["step"]) for state in last["optimizer"]["state"].values()} == {3 - skipped}
        results.append((row["train_loss"], last["state_dict"]))
    (loss, state), (other_loss, other), (whole_loss, _) = results
    assert loss == other_loss != whole_loss
    assert all(torch.equal(state[key], other[key]) for key in state)
    spoil(range(5))
    status = cli.main([*FLAGS, *flags.split(), "--experiment", "none"])
    assert status == 2 and "epoch 0: all of its updates were skipped" in capsys.readouterr().err


def test_weights_that_are_lost(capsys, monkeypatch):
    """An infinite gradient of a finite loss: later updates are not skipped in vain."""
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a: (self.param_groups[0]["params"][0].grad.fill_(torch.inf), step(self))
    )
    status = cli.main([*FLAGS, "--skip-nonfinite", "5"])
    err = capsys.readouterr().err
    assert status == 2 and err.count("error: ") == 1 and "step 2 of 5" in err
    assert "is not finite either, so that skipping does not help" in err


def test_infinite_gradients_under_a_scaler_are_not_counted(capsys, caplog, monkeypatch):
    """The first scales of float16 can be too large for the gradients."""
    from timm.utils import NativeScaler

    monkeypatch.setattr(
        "timm_dynamic.cli.train_build.NativeScaler",
        lambda device: _with_scale(NativeScaler(device), 2.0**120),
    )
    status = cli.main([*FLAGS, "--amp", "--skip-nonfinite", "1"])
    assert status == 0 and "skipped" not in caplog.text
    assert read_checkpoint("out/run/last.pth.tar")["amp_scaler"]["scale"] < 2.0**120


def _with_scale(scaler, scale):
    scaler._scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return scaler


SPOIL_THE_SECOND = """
import os, torch
from timm_dynamic.cli import train_build

create, count = train_build.create_model, iter(range(1000))

def spoil(module, args):
    if module.training and next(count) in (1, 3) and os.environ["RANK"] == "1":
        return (args[0] * torch.nan,)

def spoilt(*args, **kwargs):
    model = create(*args, **kwargs)
    model.register_forward_pre_hook(spoil)
    return model

train_build.create_model = spoilt
"""


def test_processes_skip_together(processes):
    """What only the second of them sees; then they stop together."""
    for status, log in processes.ranks([*FLAGS, "-b", "5", "--skip-nonfinite", "1"], code=SPOIL_THE_SECOND):
        assert status == 2
        assert "epoch 0, step 2 of 4, learning rate 0.05: the task's loss is nan" in log
        assert log.count("update skipped, 1 of 1") == 1
        assert "error: epoch 0, step 4 of 4, learning rate 0.05: the task's loss is nan" in log
