"""The scripts under benchmarks/: what they count, keep and print. Nothing here is timed, and nothing needs a GPU."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    """`script(name)` is one of the scripts, as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def roof(script, monkeypatch):
    """gpu_roof with small cases on the CPU: every call runs once and takes 2 ms."""
    cases, roof = script("roof_cases"), script("gpu_roof")
    monkeypatch.setattr(cases, "DDF_SHAPES", [(2, 3, 5, 4)])
    monkeypatch.setattr(cases, "SPARSE_SHAPES", [(2, 6, 8, 4)])
    monkeypatch.setattr(cases, "BATCHES", (2, 3))
    monkeypatch.setattr(cases, "THREE_BY_THREE", [(4, 4, 3, 6), (8, 8, 3, 5)] + 2 * [(4, 8, 3, 3)])
    monkeypatch.setattr(cases, "POINTWISE", [(8, 4, 1, 6), (4, 8, 1, 6)] * 2)
    monkeypatch.setattr(roof, "gpu_ms", lambda call, in_graph=True: (call(), 2.0)[1])
    return roof


def test_every_case_of_the_roof_runs(roof):
    torch.manual_seed(0)
    rows = list(roof.rows(list(roof.OPERATORS), 1.0, 1.0, CPU))
    assert {row["operator"] for row in rows} == set(roof.OPERATORS)
    assert not [row["error"] for row in rows if "error" in row]
    for row in json.loads(json.dumps(rows)):
        assert row["bytes"] > 0 and row["share_of_floor"] == row["floor_ms"] / 2
        assert "% of the roof" in roof.show(row)


def test_what_fails_is_reported_and_the_rest_goes_on(roof, monkeypatch):
    attempts = []

    def raises(call, in_graph=True):
        attempts.append(in_graph)
        if len(attempts) < 3:
            raise RuntimeError("no kernel\nfor this")
        return 2.0

    monkeypatch.setattr(roof, "gpu_ms", raises)
    first, second, *_ = roof.rows(["ddf"], 1.0, 1.0, CPU)
    assert first["error"] == "no kernel" and roof.show(first).endswith("no kernel")
    assert second["in_graph"] and attempts[:3] == [True, False, True]


def floors(script, name, device=CPU):
    return {case.what: (case.bytes, case.flops) for case in script("roof_cases").OPERATORS[name](device)}


def test_floors_of_ddf(roof, script):
    [*_, last] = [case for case in script("roof_cases").ddf_cases(CPU) if case.what == "forward"]
    maps, filters = 2 * (2 * 3 * 5 * 4), 2 * 3 * 9 + 2 * 9 * 5 * 4
    assert (last.dtype, last.bytes, last.flops) == (torch.bfloat16, 2 * (maps + filters), 0)


def test_floors_of_sparse_execution(roof, script, monkeypatch):
    """Everywhere active: M = P = 2*8*8 positions of 6 channels outside and 4 inside, in bfloat16."""
    cases = script("roof_cases")
    monkeypatch.setattr(cases.torch, "rand", lambda *size, device: torch.zeros(size))
    monkeypatch.setattr(cases, "SPARSE_SHAPES", [(2, 8, 6, 4)])
    found, P = floors(script, "sparse"), 128
    assert found["gather_rows"] == (2 * P * 6 * 2 + 4 * P, 0)
    assert found["gather_rows, 9 taps"] == (P * 4 * 2 + 4 * 9 * P + 9 * P * 4 * 2, 0)
    assert found["scatter_rows_"] == (3 * P * 6 * 2 + 4 * P, 0)
    assert found["gather_depthwise"] == (P * 4 * 2 + 4 * 9 * P + 9 * 4 * 2 + 4 * 2 + P * 4 * 2, 0)
    assert found["gather_conv"][1] == 2 * P * 36 * 4
    assert found["window_table"] == (4 * P + 4 * 9 * P, 0)
    assert found["neighbour_table"] == (2 * P + 4 * P + 4 * P + 4 * 9 * P, 0)
    assert found["mask_logits"] == (P * 6 * 2 + P * 2, 0)


@pytest.mark.parametrize(
    ("name", "what", "parameters", "more_flops"),
    [
        ("static", "conv2d", 2 * 4 * 8, 0),
        ("mixed_conv2d", "mixed_conv2d", 4 * (3 * 4 + 4 * 4 * 8), 2 * 3 * 4 * 4 * 8),
        ("factored_conv2d", "factored_conv2d", 4 * (4 * 8 + 3 * (4 + 1 + 8)), 0),
    ],
)
def test_floors_of_convolutions(roof, script, name, what, parameters, more_flops):
    """The last case: 3 samples of 6x6 positions, 4 to 8 channels, 1x1."""
    found = floors(script, name)
    x, out, flops = 2 * 3 * 4 * 36, 2 * 3 * 8 * 36, 2 * 3 * 36 * 4 * 8 + more_flops
    assert found[f"{what}, forward"] == (x + out + parameters, flops)
    assert found[f"{what}, forward + backward"] == (2 * (x + out) + x + 3 * parameters, 3 * flops)


def test_floors_of_dcd_and_of_weights_by_sample(roof, script):
    assert floors(script, "dcd")["DCDConv2d, forward"][1] == 2 * 3 * 36 * (4 * 8 + 2 * (4 + 2 + 8))  # L = 2
    depthwise = floors(script, "per_sample_conv2d")["per_sample_conv2d, forward"]
    assert depthwise == (2 * (2 * 2 * 8 * 25 + 2 * 8 * 9), 2 * 2 * 25 * 8 * 9)


def test_the_floor_is_bytes_or_operations(script):
    cases = script("roof_cases")
    case = cases.Case("a", "b", "c", torch.float32, "rows", lambda: None, bytes=3 * 10**9, flops=4 * 10**12)
    assert cases.floor_ms(case, copy_gb_per_s=1000, tflop_per_s=2000) == 3
    assert cases.floor_ms(case, copy_gb_per_s=1000, tflop_per_s=1000) == 4


def rows_of(model, ratio, batch=1):
    """What `timm-dynamic benchmark` would give: the twin, ours."""
    common = {"mode": "eval", "batch_size": batch, "backend": "C++", "execution": "eager", "baseline": "twin"}
    common |= {"p10_ms": 1.0, "p90_ms": 3.0, "macs_ratio": 1.0, "dtype": "float32", "memory_format": "contiguous"}
    twin = {"model": "twin", "median_ms": 2.0, "time_ratio": 1.0, "peak_memory": 10 * 2**20}
    ours = {"model": model, "median_ms": 2.0 * ratio, "time_ratio": ratio, "peak_memory": 15 * 2**20}
    return [common | twin, common | ours]


@pytest.fixture
def models(script, monkeypatch, tmp_path):
    """`models(*flags)` runs models.py on two cases, whose processes give `models.answers`; its report."""
    module = script("models")
    monkeypatch.setattr(module, "cases", lambda device, paths: ["--mode eval", "--mode train"])
    monkeypatch.setattr(module, "run", lambda model, options: run.asked.append((model, options)) or run.answers.pop(0))

    def run(*flags):
        path = tmp_path / "models.json"
        monkeypatch.setattr("sys.argv", ["models.py", "--models", "dcd", "--output", str(path), *flags])
        run.asked = []
        module.main()
        return json.loads(path.read_text())

    return run


def test_models_medians_over_processes(models):
    models.answers = [rows_of("dcd", ratio) for ratio in (1.5, 4.0, 1.25, 4.0, 2.0, 4.0)]
    report = models("--processes", "3", "--threads", str(torch.get_num_threads()))
    assert [model for model, _ in models.asked] == ["dcd"] * 6
    assert ["train" in options for _, options in models.asked] == [False, True] * 3
    assert "samples" not in report and not report["failed"]
    twin, ours, *_ = report["rows"]
    assert (ours["time_ratio"], ours["time_ratios"], ours["median_ms"]) == (1.5, [1.5, 1.25, 2.0], 3.0)
    assert (twin["memory_ratio"], ours["memory_ratio"]) == (1, 1.5)


def test_models_goes_on_where_it_stopped(models, script, capsys, monkeypatch):
    flags = ("--processes", "2", "--minutes", "1", "--threads", str(torch.get_num_threads()))
    models.answers = [rows_of("dcd", 1.5)]
    with pytest.raises(IndexError):  # killed
        models(*flags)
    models.answers = [rows_of("dcd", 4.0), "out of memory at --batch-size 1"]
    clock = iter([0, 0, 0, 61])
    monkeypatch.setattr(script("models"), "time", SimpleNamespace(monotonic=lambda: next(clock)))
    report = models(*flags)
    assert "1 of 4 are left" in capsys.readouterr().out
    assert list(report["failed"].values()) == ["out of memory at --batch-size 1"]
    assert [row["time_ratios"] for row in report["rows"]] == [[1], [1.5], [1], [4]]


def test_models_starts_again_for_other_code(script, tmp_path):
    path, started = tmp_path / "models.json", script("models").started
    assert started(path, {"commit": "a"}) == {}
    path.write_text(json.dumps({"commit": "a-dirty", "threads": 2, "date": "then", "samples": {"dcd": []}}))
    assert started(path, {"commit": "a", "threads": 2, "date": "now"}) == {"dcd": []}
    assert started(path, {"commit": "b", "threads": 2, "date": "now"}) == {}
    assert started(path, {"commit": "a", "threads": 1, "date": "now"}) == {}
    path.write_text(json.dumps({"commit": "a", "threads": 2, "rows": []}))  # finished
    assert started(path, {"commit": "a", "threads": 2}) == {}


def test_cases_are_options_of_the_benchmark(script):
    from timm_dynamic.cli import benchmark

    for device in ("cpu", "cuda"):
        for paths in (False, True):
            for case in script("models").cases(device, paths):
                benchmark.make_parser().parse_args(["--models", "dcd_resnet18", *case.split(), "--device", device])
