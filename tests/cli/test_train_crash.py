import argparse
import errno
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
import yaml
from commands import read_summary

from timm_dynamic import cli
from timm_dynamic.cli.train_state import repeatable
from timm_dynamic.convert import read_checkpoint

FLAGS = (
    "train data --num-classes 10 --img-size 32 --device cpu --workers 0 -b 20 --warmup-epochs 0 --lr 0.05 "
    "--output out --experiment run --deterministic --resume auto"
).split()

# A run may be told to kill itself at its n-th event: an update's backward pass, the middle of writing a checkpoint, or
# a call that changes names in its folder.
KILL = """
import io, os, signal, torch

seen = 0

def event():
    global seen
    if seen == {event}:
        os.kill(os.getpid(), signal.SIGKILL)
    seen += 1

def watch(owner, name):
    call = getattr(owner, name)
    def watched(*args, **kwargs):
        event()
        return call(*args, **kwargs)
    setattr(owner, name, watched)

for name in ("replace", "link", "fsync", "remove"):
    watch(os, name)
watch(torch.Tensor, "backward")
save = torch.save

def watched_save(value, file):
    whole = io.BytesIO()
    save(value, whole)
    half = len(whole.getvalue()) // 2
    file.write(whole.getvalue()[:half])
    file.flush()
    event()
    file.write(whole.getvalue()[half:])

torch.save = watched_save
"""
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


@pytest.fixture
def run(processes, tmp_path, monkeypatch, small_digits):
    """`run(folder, flags)` trains in a process of its own, with the digits as `data`; returns its status and output."""
    monkeypatch.chdir(tmp_path)

    def start(folder, flags="", code=""):
        folder = Path(folder)
        if not folder.exists():
            folder.mkdir()
            (folder / "data").symlink_to(small_digits)
        return processes.run([*FLAGS, *flags.split()], folder, code)

    return start


def finish(run, folder, flags):
    status, log = run(folder, flags)
    assert status == 0, log
    return contents(folder)


def contents(folder):
    """What a finished run leaves: names, checkpoints without what names the file resumed from, and the summary."""
    files = {path.name: path for path in Path(folder, "out/run").iterdir()}
    checkpoints = {name: read_checkpoint(path) for name, path in files.items() if name.endswith(".tar")}
    for checkpoint in checkpoints.values():
        checkpoint["args"].resume = None
    return sorted(files), checkpoints, files["summary.csv"].read_bytes()


def assert_same(a, b):
    names, checkpoints, summary = a
    assert names == b[0] and summary == b[2]
    for name, checkpoint in checkpoints.items():
        assert_equal(checkpoint, b[1][name], name)


def assert_equal(a, b, where):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def newest_epoch(folder):
    """That of `last.pth.tar`, which is whole at any time; -1 before there is one."""
    last = Path(folder, "out/run/last.pth.tar")
    return read_checkpoint(last)["epoch"] if last.exists() else -1


@pytest.mark.parametrize(
    "flags",
    [
        "--model dynconv_resnet8 --model-ema --model-ema-decay 0.9 --model-ema-warmup --mixup 0.2 --cutmix 1 "
        "--sched-on-updates --lr-noise 0.2 0.9 --reprob 0.3 --checkpoint-hist 2",
        "--model test_ped_resnet --opt lookahead_adamw --lr 1e-3 --amp --workers 1 --drop-path 0.2 "
        "--aa rand-m7-mstd0.5-inc1 --mixup 0.2 --mixup-off-epoch 1",
    ],
)
def test_killed_again_and_again(run, flags):
    """At events drawn at random from what the run does in about an epoch, until it has come to its end."""
    flags += " --epochs 2"
    expected = finish(run, "whole", flags)
    draw, epoch, killed = random.Random(0), -1, 0
    while True:
        status, log = run("killed", flags, KILL.format(event=draw.randrange(5, 26)))
        if status == 0:
            break
        assert status == -signal.SIGKILL, log
        killed += 1
        assert newest_epoch("killed") >= epoch
        epoch = newest_epoch("killed")
    assert killed >= 2
    assert_same(contents("killed"), expected)


def test_killed_at_each_event_of_a_save(run):
    """From the file of the routing to the link to the best one, after the last of two epochs."""
    flags = "--model test_ped_resnet --epochs 2 --checkpoint-hist 1 --eval-metric loss"
    expected = finish(run, "whole", flags)
    saw_half_a_file = False
    for event in range(15, 26):
        shutil.rmtree("killed", ignore_errors=True)
        status, log = run("killed", flags, KILL.format(event=event))
        assert status == -signal.SIGKILL, log
        saw_half_a_file |= Path("killed/out/run/tmp.pth.tar").exists()
        assert_same(finish(run, "killed", flags), expected)
    assert saw_half_a_file


@pytest.fixture
def here(workplace, capsys, caplog):
    """`here(flags)` trains in this process; returns its status, and stderr with what was logged before."""

    def start(flags=""):
        status = cli.main([*FLAGS, "--model", "test_resnet", *flags.split()])
        return status, caplog.text + capsys.readouterr().err

    return start


FOLDER = Path("out/run")


def epochs():
    return [row["epoch"] for row in read_summary(FOLDER)]


def test_a_finished_run_stays(here):
    """Its last checkpoint is there, and so is the result; half-written files of a killed one go."""
    assert here("--epochs 2")[0] == 0
    before = contents(".")
    leftovers = [FOLDER / name for name in (".summary.12.csv", ".args.12.yaml", ".checkpoint-1.pth.12.tar")]
    for path in leftovers:
        path.write_bytes(b"half")
    os.link(FOLDER / "last.pth.tar", FOLDER / "tmp.pth.tar")  # which nothing may write to
    assert here("--epochs 2")[0] == 0
    assert_same(contents("."), before)
    assert yaml.safe_load((FOLDER / "args.yaml").read_text())["resume"] == "auto"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, fill_with_zeros, empty, Path.unlink])
def test_the_newest_whole_checkpoint(here, damage):
    """`last` and what are links to it are damaged, as by a power cut: the epoch before is gone on from."""
    here("--epochs 3 --eval-metric loss")
    before = contents(".")
    if damage is Path.unlink:
        (FOLDER / "checkpoint-2.pth.tar").unlink()
    damage(FOLDER / "last.pth.tar")
    status, err = here("--epochs 3 --eval-metric loss")
    assert status == 0 and "last.pth.tar is passed over" in err or damage is Path.unlink
    assert_same(contents("."), before)


def test_no_whole_checkpoint(here):
    here("--epochs 1")
    before = contents(".")
    truncate(FOLDER / "last.pth.tar")
    status, err = here("--epochs 1")
    assert status == 0 and "passed over" in err
    assert_same(contents("."), before)


@pytest.mark.parametrize("torn", ["", "1", "2,0.", "\n2,0.1,0.2"])
def test_a_summary_cut_short(here, torn):
    here("--epochs 3")
    before = contents(".")
    shutil.copy(FOLDER / "checkpoint-1.pth.tar", FOLDER / "last.pth.tar")
    lines = before[2].decode().splitlines(keepends=True)
    (FOLDER / "summary.csv").write_bytes("".join([*lines[:3], torn]).encode())
    assert here("--epochs 3")[0] == 0
    assert_same(contents("."), before)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--experiment=", "--resume auto needs --experiment NAME"),
        ("--start-epoch 1", "--resume auto goes on exactly where the run was: leave out --start-epoch"),
        ("--no-resume-opt", "--resume auto goes on exactly where the run was: leave out --no-resume-opt"),
    ],
)
def test_what_auto_needs(here, flags, expected):
    status, err = here(flags)
    assert status == 2 and f"error: {expected}" in err


def test_statistics_of_each_process():
    """Of which a checkpoint could hold one."""
    flags = {"sync_bn": False, "dist_bn": "", "val_split": "validation"}
    args = argparse.Namespace(deterministic=True, distributed=True, no_ddp_bb=True, **flags)
    with pytest.raises(ValueError, match="--deterministic: with --no-ddp-bb each process has BatchNorm"):
        with repeatable(args):
            pass


def test_a_run_of_another_model(here):
    here("--epochs 1")
    before = contents(".")
    status, err = here("--epochs 1 --model test_ped_resnet")
    assert status == 2 and "does not fit this run" in err
    assert_same(contents("."), before)


def test_no_deterministic_form(here, monkeypatch):
    def forward(model, x, original=timm.models.resnet.ResNet.forward):
        x = original(model, x)
        return x.clone().put_(torch.tensor([0]), x.detach()[0, :1])  # which of several puts to a place wins is open

    monkeypatch.setattr("timm.models.resnet.ResNet.forward", forward)
    status, err = here()
    assert status == 2 and err.count("error: ") == 1
    assert "--deterministic: put_" in err and "train without the flag" in err
    assert not torch.are_deterministic_algorithms_enabled()


def test_file_too_large(run):
    """A real write error of the system; the file system is full for files of that size, as it were."""
    flags = "--model test_ped_resnet --epochs 2"
    expected = finish(run, "whole", flags)
    assert run("full", flags, KILL.format(event=14))[0] == -signal.SIGKILL
    for size in (3000, 100_000, 600_000):
        status, log = run("full", flags, LIMIT.format(size=size))
        assert status == 2 and log.count("error: ") == 1
        assert "error: cannot save epoch 1 in out/run (File too large); out/run/last.pth.tar holds epoch 0: " in log
        assert "make room and go on with --resume auto" in log
        assert not Path("full/out/run/tmp.pth.tar").exists()
    assert_same(finish(run, "full", flags), expected)


@pytest.mark.parametrize("call", ["os.fsync", "os.link", "os.replace", "timm_dynamic.cli.train.update_summary"])
def test_disk_full(here, monkeypatch, call):
    """Wherever it shows."""
    here("--epochs 2")
    expected = contents(".")
    shutil.rmtree("out")
    here("--epochs 1 --sched none")
    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        patch.setattr("shutil.copy2", full)
        status, err = here("--epochs 2")
    assert status == 2 and err.count("error: ") == 1
    assert "No space left on device" in err
    if call != "os.replace":  # the first to be replaced is args.yaml
        assert "out/run/last.pth.tar holds epoch 0: make room and go on with --resume auto" in err
    assert here("--epochs 2")[0] == 0
    assert len(epochs()) == 2
    assert contents(".")[0] == expected[0]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# As torchrun does it, but that workers are forked.
LAUNCHER = """
import os, signal, torch
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from timm_dynamic import cli

backward, count = torch.Tensor.backward, iter(range(1000))

def dying(*args, **kwargs):
    if next(count) == 3 and os.environ["RANK"] == "1" and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(*args, **kwargs)

def train():
    torch.Tensor.backward = dying
    assert cli.main({argv}) == 0

meeting = {{"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}}
elastic_launch(LaunchConfig(1, 1, 2, max_restarts=1, start_method="fork", **meeting), train)()
"""


def test_a_worker_killed_under_a_launcher(workplace, processes):
    """It starts all of them again, and they go on together, with EMA and two processes' BatchNorm."""
    flags = [*FLAGS, *"--model test_ped_resnet -b 10 --epochs 2 --model-ema --model-ema-decay 0.9 --output".split()]
    assert [status for status, _ in processes.ranks([*flags, "whole"])] == [0, 0]
    status, log = processes.run(code=LAUNCHER.format(argv=[*flags, "killed"]))
    assert status == 0 and Path("died").exists(), log
    assert "--resume auto: from killed/run/last.pth.tar" in log
    whole, killed = (read_checkpoint(f"{folder}/run/last.pth.tar") for folder in ("whole", "killed"))
    for key in ("state_dict", "state_dict_ema", "optimizer", "epoch"):
        assert_equal(killed[key], whole[key], key)
    assert Path("killed/run/summary.csv").read_bytes() == Path("whole/run/summary.csv").read_bytes()
