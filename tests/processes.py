"""Processes of a test that do not import torch each: one does, and forks itself for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]

# Optimizers import torch._dynamo, which takes longer than the training of most tests.
SERVER = """
import gc, json, os, signal, sys, traceback
import torch, torch._dynamo
import timm_dynamic.cli.train, timm_dynamic.cli.train_segmentation
from timm_dynamic import cli

def work(job):
    signal.alarm(300)
    os.chdir(job["folder"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ.update(job["environment"])
    status = 1
    try:
        exec(job["code"], {})
        status = cli.main(job["argv"]) if job["argv"] else 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)

gc.freeze()
for line in iter(sys.stdin.readline, "\\n"):
    started = [os.fork() or work(job) for job in json.loads(line)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]), flush=True)
"""


class Processes:
    """Runs commands at once, each in a process of its own, until all have ended."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)

    def close(self):
        # An empty line: a closed pipe is not seen while a process that was forked here has it open.
        print(file=self._server.stdin, flush=True)
        assert self._server.wait(60) == 0

    def run(self, argv=(), folder=".", code=""):
        """Exit status and output of one, in this folder, behind this code."""
        return self._start([self._job(argv, folder, code, "log")])[0]

    def ranks(self, argv=(), folder=".", code="", count=2):
        """Those of several that know each other, as torchrun starts them."""
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        jobs = []
        for rank in range(count):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
            variables |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
            jobs.append(self._job(argv, folder, code, f"log.{rank}", **variables))
        return self._start(jobs)

    def _job(self, argv, folder, code, log, **variables):
        environment = {name: str(value) for name, value in variables.items()}
        argv = [str(word) for word in argv]
        return {"argv": argv, "folder": os.path.abspath(folder), "code": code, "log": log, "environment": environment}

    def _start(self, jobs):
        self._server.stdin.write(json.dumps(jobs) + "\n")
        self._server.stdin.flush()
        statuses = json.loads(self._server.stdout.readline())
        return [
            (status, Path(job["folder"], job["log"]).read_text()) for job, status in zip(jobs, statuses, strict=True)
        ]
