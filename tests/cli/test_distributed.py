"""Several processes, by themselves or by a launcher a node, train as one process with the same global batch."""

import csv
import itertools
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore
from torch.utils.data import DistributedSampler, RandomSampler

from timm_dynamic import cli
from timm_dynamic.convert import read_checkpoint

ROOT = Path(__file__).parents[2]
# Without what depends on how images are spread over processes: batch norm and random numbers.
FLAGS = (
    "data --num-classes 10 --img-size 32 --device cpu --workers 0 --no-aug --epochs 2 --warmup-epochs 0 --opt momentum "
    "--lr 0.05 --model-ema --model-ema-decay 0.5 --output out"
).split()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, small_digits):
    """Run in an empty folder; its `data` has 19 images to validate, which two processes cannot halve."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/train").symlink_to(small_digits / "train")
    for image in sorted(small_digits.glob("val/*/*.png"))[1:]:
        copy = Path("data", image.relative_to(small_digits))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(image)


def results(experiment: str) -> tuple[list[dict], dict]:
    with open(f"out/{experiment}/summary.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return rows, read_checkpoint(f"out/{experiment}/last.pth.tar")


def assert_same(a: dict, b: dict, **tolerance) -> None:
    for key in ("state_dict", "state_dict_ema"):
        torch.testing.assert_close(a[key], b[key], **tolerance)


def run_one_process(monkeypatch, flags: list[str]) -> tuple[list[dict], dict]:
    """With the order of images that two processes take turns in: one process alone would shuffle in another way."""
    epochs = itertools.count()

    def order(sampler):
        ordered = DistributedSampler(sampler.data_source, num_replicas=1, rank=0)
        ordered.set_epoch(next(epochs))
        return iter(ordered)

    monkeypatch.setattr(RandomSampler, "__iter__", order)
    assert cli.main(["train", *flags, "-b", "8", "--experiment", "one"]) == 0
    return results("one")


def assert_as_one_process(rows: list[dict], last: dict, one_rows: list[dict], one: dict) -> None:
    """A mean of two means is rounded otherwise than one mean: in float32, and over ten updates."""
    assert (last["args"].world_size, one["args"].world_size) == (2, 1)
    assert_same(one, last, rtol=1e-4, atol=1e-5)
    for one_row, row in zip(one_rows, rows, strict=True):
        for of_some_images in (one_row, row):
            of_some_images.pop("eval_routing_spread", None)  # those of the first process
        assert one_row == pytest.approx(row, rel=1e-4)
    assert one_rows[0]["train_loss"] > one_rows[1]["train_loss"]


# What torchrun does with its arguments, but that its workers are forked.
TORCHRUN = """
import os
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from timm_dynamic import cli

for name in list(os.environ):  # of the test's processes
    if name.endswith(("RANK", "WORLD_SIZE")) or name.startswith(("TORCHELASTIC", "MASTER_")):
        del os.environ[name]
os.environ.update({environment})
config, python, (_, *program) = config_from_args(parse_args({argv}))
assert program[:3] == ["-m", "timm_dynamic.cli", "train"], program
config.start_method = "fork"

def train():
    assert cli.main(program[2:]) == 0

elastic_launch(config, train)()
"""


def test_two_nodes_and_two_processes_and_one(monkeypatch, processes):
    """The example for Slurm, whose two nodes are this machine: to the bit as two processes, and as one."""
    scripts = {
        "scontrol": 'test "$*" = "show hostnames node[1-2]"; printf "localhost\nnode2\n"',
        "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
        "torchrun": "printf '%s\\n' \"$@\" > torchrun.txt",
    }
    for name, text in scripts.items():
        Path(name).write_text(f"#!/usr/bin/env bash\nset -e\n{text}\n")
        Path(name).chmod(0o755)
    flags = [*FLAGS, "--model", "test_ped_resnet", "--model-kwargs", "norm_layer=layernorm2d", "noise_std=0"]
    for job in itertools.count():
        try:
            # Where launchers meet, the port of the script: kept here, so that nobody else takes it meanwhile.
            store = TCPStore("localhost", 20000 + job, is_master=True, wait_for_workers=False)
            break
        except torch.distributed.DistNetworkError:
            assert job < 1000
    slurm = {
        "JOB_ID": str(job),
        "JOB_NODELIST": "node[1-2]",
        "JOB_NUM_NODES": "2",
        "GPUS_ON_NODE": "1",
        "CPUS_PER_TASK": "1",
    }
    environment = {
        **os.environ,
        "PATH": f"{Path.cwd()}:{os.environ['PATH']}",
        **{f"SLURM_{key}": value for key, value in slurm.items()},
    }
    command = ["bash", str(ROOT / "examples/slurm.sbatch"), *flags, "-b", "4", "--experiment", "slurm"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    argv = Path("torchrun.txt").read_text().splitlines()
    more = {"PET_RDZV_CONF": "is_host=false,keep_alive_max_attempt=100", "PET_LOCAL_ADDR": "localhost"}  # its flags
    logs = processes.ranks(code=TORCHRUN.format(argv=argv, environment=more))
    assert [status for status, _ in logs] == [0, 0], logs
    del store
    logs = processes.ranks(["train", *flags, "-b", "4", "--experiment", "processes"])
    assert [status for status, _ in logs] == [0, 0], logs
    (rows, last), (same_rows, same) = results("slurm"), results("processes")
    assert rows == same_rows and rows[0]["train_reconstruction"] > 0
    assert_same(last, same, rtol=0, atol=0)
    assert_as_one_process(rows, last, *run_one_process(monkeypatch, flags))
