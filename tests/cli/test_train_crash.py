import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from timm_dynamic import cli
from timm_dynamic.convert import read_checkpoint

ROOT = Path(__file__).parents[2]
FLAGS = (
    "train data --num-classes 10 --img-size 32 --device cpu --workers 0 -b 20 --warmup-epochs 0 --lr 0.05 "
    "--output out --experiment run --deterministic --resume auto"
).split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# Forks a process for each run, so that torch is imported once. A run may be told to kill itself at its n-th event: an
# update's backward pass, the middle of writing a checkpoint, or a call that changes names in its folder.
SERVER = """
import io, json, os, resource, signal, sys
import torch
import timm_dynamic.cli.train
from timm_dynamic import cli

def kill_at(number):
    seen = 0
    def event():
        nonlocal seen
        if seen == number:
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

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        os.chdir(job["folder"])
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        if job["event"] is not None:
            kill_at(job["event"])
        if job["file_size"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
        status = cli.main(job["argv"])
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    yield process
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.fixture
def run(server, tmp_path, monkeypatch, small_digits):
    """`run(folder, flags)` trains in a process of its own, with the digits as `data`; returns its status and output."""
    monkeypatch.chdir(tmp_path)

    def start(folder, flags="", event=None, file_size=0):
        folder = Path(folder)
        if not folder.exists():
            folder.mkdir()
            (folder / "data").symlink_to(small_digits)
        job = {"argv": [*FLAGS, *flags.split()], "folder": str(folder.resolve()), "event": event, "file_size": file_size}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return status, (folder / "log").read_text()

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
        "--model test_ped_resnet --opt lookahead_adamw --lr 1e-3 --amp --workers 2 --drop-path 0.2 "
        "--aa rand-m7-mstd0.5-inc1 --mixup 0.2 --mixup-off-epoch 3",
    ],
)
def test_killed_again_and_again(run, flags):
    """At events drawn at random from what the run does in about an epoch, until it has come to its end."""
    flags += " --epochs 6"
    expected = finish(run, "whole", flags)
    draw, epoch, killed = random.Random(0), -1, 0
    while True:
        status, log = run("killed", flags, event=draw.randrange(2, 26))
        if status == 0:
            break
        assert status == -signal.SIGKILL, log
        killed += 1
        assert newest_epoch("killed") >= epoch
        epoch = newest_epoch("killed")
    assert killed >= 5
    assert_same(contents("killed"), expected)


def test_killed_at_each_event_of_a_save(run):
    """From the last update of an epoch to the first of the next."""
    flags = "--model test_ped_resnet --epochs 3 --checkpoint-hist 1 --eval-metric loss"
    expected = finish(run, "whole", flags)
    saw_half_a_file = False
    for event in range(14, 25):
        shutil.rmtree("killed", ignore_errors=True)
        status, log = run("killed", flags, event=event)
        assert status == -signal.SIGKILL, log
        saw_half_a_file |= Path("killed/out/run/tmp.pth.tar").exists()
        assert_same(finish(run, "killed", flags), expected)
    assert saw_half_a_file
