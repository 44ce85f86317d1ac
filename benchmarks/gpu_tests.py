"""Runs the GPU tests and saves what came of them: `python benchmarks/gpu_tests.py [--output FILE]`.

Every test marked `cuda` runs, the operators first. Then, where compute-sanitizer is on the PATH, a few of these
run under memcheck and racecheck: those in `SANITIZED`, and those marked `sanitized`. In all it takes less than 9
minutes: what needs longer is stopped, and the file says so. Ends with status 1 unless all is well.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from page_gpu import sources

from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "cuda", "-rf"]
# A sanitizer makes a test up to a hundred times slower.
SANITIZED = "test_random_cases and full-full or (test_learned_mask or TestRows) and float32 and not 1030 or test_tables"
SANITIZERS = ("memcheck", "racecheck")
SECONDS = {"tests of operators": 190, "other tests": 120, "memcheck": 100, "racecheck": 100}


def files() -> tuple[list[str], list[str]]:
    """Those with tests for a GPU: of operators, others. The rest need not be importable here."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    of_operators = [path.parent.name == "ops" for path in found]
    return tuple([str(p.relative_to(ROOT)) for p, is_it in zip(found, of_operators, strict=True) if is_it is wanted]
                 for wanted in (True, False))  # fmt: skip


def run(name: str, command: list[str], **env: str) -> dict:
    """Run pytest, shown as it runs: how it ended, and how many tests did what."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as shown:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=shown, stderr=subprocess.STDOUT, env=os.environ | env, start_new_session=True
        )
        in_time = True
        for number, seconds in ((signal.SIGINT, SECONDS[name]), (signal.SIGKILL, 20)):  # pytest sums up at the first
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                in_time = False
                os.killpg(process.pid, number)
        process.wait()
        shown.seek(0)
        text = shown.read()
    print(text, flush=True)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return {
        "status": process.returncode if in_time else f"stopped after {SECONDS[name]} s",
        "seconds": round(time.monotonic() - started),
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0),
        "failures": failures,
    }


def sanitized(tool: str, of_operators: list[str]) -> str:
    """What a sanitizer says of the kernels, in words."""
    if shutil.which("compute-sanitizer") is None:
        return "not run: no compute-sanitizer on the PATH"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", *PYTEST, "-x", "-k"]
    # Without torch's cache of memory every tensor has an allocation of its own, whose end memcheck knows.
    result = run(tool, [*command, f"{SANITIZED} or sanitized", *of_operators], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if result["status"] == 0:
        return f"clean ({result['passed']} tests)"
    if result["status"] == 7:
        return "found errors"
    return result["status"] if isinstance(result["status"], str) else f"failed with status {result['status']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_tests.json")
    args = parser.parse_args()
    of_operators, others = files()
    parts = {
        "tests of operators": run("tests of operators", [*PYTEST, *of_operators]),
        "other tests": run("other tests", [*PYTEST, *others]),
    }
    report = {
        **environment(torch.device("cuda")),
        "kernels": backend_info()["cuda"],
        "sources": sources(),
        "passed": sum(part["passed"] for part in parts.values()),
        "failed": sum(part["failed"] for part in parts.values()),
        "complete": all(part["status"] in (0, 1) for part in parts.values()),
        "parts": parts,
        "sanitizers": {tool: sanitized(tool, of_operators) for tool in SANITIZERS},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, args.output)
    print(f"{report['passed']} passed, {report['failed']} failed; sanitizers: {report['sanitizers']}")
    well = all(part["status"] == 0 for part in parts.values())
    sys.exit(0 if well and all(how.startswith(("clean", "not run")) for how in report["sanitizers"].values()) else 1)


if __name__ == "__main__":
    main()
