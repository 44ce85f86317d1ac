"""Runs the GPU tests and saves what came of them: `python benchmarks/gpu_tests.py [--output FILE]`.

Every test marked `cuda` runs, the operators first, several at a time where pytest-xdist is there. Then, where
compute-sanitizer is on the PATH, a few of these run under memcheck and racecheck: those in `SANITIZED`, and those
marked `sanitized`. In all it takes less than 9 minutes: what needs longer is stopped, and the file, which is written
after every part, says so. Ends with status 1 unless all is well.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import torch
from page_gpu import sources

from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "cuda", "-rfE"]
# A sanitizer makes a test up to a hundred times slower.
SANITIZED = "test_random_cases and full-full or (test_learned_mask or TestRows) and float32 and not 1030 or test_tables"
SANITIZERS = ("memcheck", "racecheck")
SECONDS = {"tests of operators": 200, "other tests": 130, "memcheck": 80, "racecheck": 80}
IN_ALL = 485


def files() -> tuple[list[str], list[str]]:
    """Those with tests for a GPU: of operators, others. The rest need not be importable here."""
    found = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"mark\.cuda|needs_gpu\(", path.read_text())
    ]
    of_operators = [path.parent.name == "ops" for path in found]
    return tuple([str(p.relative_to(ROOT)) for p, is_it in zip(found, of_operators, strict=True) if is_it is wanted]
                 for wanted in (True, False))  # fmt: skip


def run(name: str, command: list[str], deadline: float, **env: str) -> dict:
    """Run pytest, shown as it runs: how it ended, and how many tests did what."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    seconds = max(0.0, min(SECONDS[name], deadline - started))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        command = [*command, f"--junitxml={path}"]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGINT)  # at which pytest sums up
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            if process.poll() is None:  # else it would have the GPU while others are timed
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        suite = ElementTree.parse(path).find("testsuite") if path.exists() else ElementTree.Element("testsuite")
    ended, skipped, *failed = (int(suite.get(key, 0)) for key in ("tests", "skipped", "failures", "errors"))
    bad = [case for case in suite if case.find("failure") is not None or case.find("error") is not None]
    return {
        "status": status,
        "seconds": round(time.monotonic() - started),
        "passed": ended - skipped - sum(failed),
        "failed": sum(failed),
        "skipped": skipped,
        "failures": [f"{case.get('classname')}.{case.get('name')}" for case in bad],
    }


def sanitized(tool: str, of_operators: list[str], deadline: float) -> str:
    """What a sanitizer says of the kernels, in words."""
    if shutil.which("compute-sanitizer") is None:
        return "not run: no compute-sanitizer on the PATH"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", *PYTEST, "-x", "-k"]
    # Without torch's cache of memory every tensor has an allocation of its own, whose end memcheck knows.
    command += [f"{SANITIZED} or sanitized", *of_operators]
    result = run(tool, command, deadline, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if result["status"] == 0 and result["passed"]:
        return f"clean ({result['passed']} tests)"
    if result["status"] == 7:
        return "found errors"
    if result["status"] == 0:
        return "failed: ran no test"
    return result["status"] if isinstance(result["status"], str) else f"failed with status {result['status']}"


def save(path: Path, report: dict) -> None:
    parts = report["parts"].values()
    report["passed"], report["failed"] = (sum(part[key] for part in parts) for key in ("passed", "failed"))
    report["complete"] = len(parts) == 2 and all(part["status"] in (0, 1) for part in parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_tests.json")
    args = parser.parse_args()
    if not torch.cuda.is_available() or backend_info()["cuda"] != "loaded":
        parser.error(f"needs a CUDA device and the CUDA kernels ({backend_info()['cuda']})")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and stop what runs
    deadline = time.monotonic() + IN_ALL
    report = {**environment(torch.device("cuda")), "kernels": "loaded", "sources": sources()}
    report |= {"parts": {}, "sanitizers": {}}
    several = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    of_operators, others = files()
    for name, paths in (("tests of operators", of_operators), ("other tests", others)):
        report["parts"][name] = run(name, [*PYTEST, *several, *paths], deadline, OMP_NUM_THREADS="4")
        save(args.output, report)
    for tool in SANITIZERS:
        report["sanitizers"][tool] = sanitized(tool, of_operators, deadline)
        save(args.output, report)
    print(f"{report['passed']} passed, {report['failed']} failed; sanitizers: {report['sanitizers']}")
    well = all(part["status"] == 0 for part in report["parts"].values())
    sys.exit(0 if well and all(how.startswith(("clean", "not run")) for how in report["sanitizers"].values()) else 1)


if __name__ == "__main__":
    main()
