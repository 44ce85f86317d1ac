"""Fair timing: candidates run in turn, quantiles instead of means, peak memory, and what machine it was."""

import json
import os
import platform
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import timm
import torch

from timm_dynamic.version import __version__


def measure(
    candidates: Mapping[str, Callable[[], object]],
    iterations: int,
    warmup: int,
    device: torch.device,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time candidates in turn, so that a slow spell of the machine hits all of them alike.

    Every round has an order of its own: what ran before decides what is in the cache.

    Args:
        candidates: Name to a callable that does one iteration.
        iterations: Timed rounds.
        warmup: Rounds before those.
        device: CPU (wall clock) or CUDA (events, synchronised around each call, so launch overhead counts).
        on_round: Called after every round, warm-up included; for progress bars.

    Returns:
        Milliseconds of each timed call, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    orders = random.Random(0)
    once = _cuda_once if device.type == "cuda" else _cpu_once
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for i in range(warmup + iterations):
            for name in orders.sample(list(candidates), len(candidates)):
                elapsed = once(candidates[name])
                if i >= warmup:
                    samples[name].append(elapsed)
            on_round()
    return samples


def summarise(samples: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of times in milliseconds."""
    p10, median, p90 = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9]).double())
    return {"median_ms": median.item(), "p10_ms": p10.item(), "p90_ms": p90.item()}


def _cpu_once(candidate: Callable[[], object]) -> float:
    start = time.perf_counter()
    candidate()
    return 1e3 * (time.perf_counter() - start)


def _cuda_once(candidate: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    candidate()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_memory(step: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """Bytes that one call allocates at its peak, above what was there before, and how they were measured.

    On CUDA the caching allocator's own record; on CPU the profiler's record of every allocation that torch makes
    (tensors and oneDNN's reordered copies; not what other libraries take for themselves).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler chats on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in events]
    before = totals[0] - events[0]["args"]["Bytes"] if events else 0
    return max(totals, default=before) - before, "torch.profiler allocations"


def environment(device: torch.device) -> dict[str, object]:
    """What a measurement depends on: device, driver, versions, commit, threads, date."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "timm_dynamic": __version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else None


def _commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # installed: a repository further up is someone else's
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
