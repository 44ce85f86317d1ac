"""The mechanics of timing; no test here depends on how fast the machine is."""

import json
import subprocess

import pytest
import torch

from timm_dynamic import timing

CPU = torch.device("cpu")


def test_candidates_run_interleaved_and_warm_up_is_not_counted():
    calls, rounds = [], []
    candidates = {name: lambda name=name: calls.append(name) for name in "ABC"}
    samples = timing.measure(
        candidates, iterations=18, warmup=2, device=CPU, on_round=lambda: rounds.append(len(calls))
    )
    orders = {"".join(calls[i : i + 3]) for i in range(0, 60, 3)}
    assert len(orders) > 1 and all(sorted(order) == ["A", "B", "C"] for order in orders)
    assert rounds == list(range(3, 63, 3))
    assert {name: len(values) for name, values in samples.items()} == {"A": 18, "B": 18, "C": 18}
    assert all(value >= 0 for values in samples.values() for value in values)


def test_summary():
    summary = timing.summarise([float(i) for i in range(11)])
    assert summary == pytest.approx({"median_ms": 5, "p10_ms": 1, "p90_ms": 9})


@pytest.mark.parametrize("temporaries", [1, 2, 3])
def test_peak_memory_on_cpu_is_what_is_alive_at_once(temporaries):
    x = torch.ones(1000, 100)

    def step():
        kept = [x + i for i in range(temporaries)]
        kept.clear()
        return x + 1  # after the peak

    size, source = timing.peak_memory(step, CPU)
    assert temporaries * x.nbytes <= size <= temporaries * x.nbytes + 1000  # scalars
    assert source == "torch.profiler allocations"


def test_peak_memory_of_nothing():
    assert timing.peak_memory(lambda: None, CPU)[0] == 0


def test_environment_is_complete_and_json():
    environment = timing.environment(CPU)
    assert json.loads(json.dumps(environment)) == environment
    expected = "device driver cuda cpu threads python torch timm timm_dynamic commit date".split()
    assert list(environment) == expected
    assert environment["device"] == environment["cpu"] and environment["driver"] is None
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()
    assert environment["date"].endswith("+00:00")


def test_the_commit_is_our_own_repository_s_or_none(monkeypatch, tmp_path):
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timm_dynamic" / "timing.py"))
    assert len(timing.environment(CPU)["commit"]) == 40
    installed = tmp_path / ".venv" / "lib" / "timm_dynamic" / "timing.py"
    monkeypatch.setattr(timing, "__file__", str(installed))
    assert timing.environment(CPU)["commit"] is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    device = torch.device("cuda")
    x = torch.ones(1000, 1000, device=device)
    samples = timing.measure({"A": lambda: x @ x}, iterations=3, warmup=1, device=device)
    assert len(samples["A"]) == 3 and min(samples["A"]) > 0
    size, source = timing.peak_memory(lambda: x + 1, device)
    assert x.nbytes <= size <= 2 * x.nbytes and "cuda" in source
    assert timing.environment(device)["cuda"] == torch.version.cuda
