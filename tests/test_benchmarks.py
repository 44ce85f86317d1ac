"""The scripts under benchmarks/: what they count, keep and print. Nothing here is timed, and nothing needs a GPU."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


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


def test_sparse_execution_is_inference(roof, monkeypatch, script):
    """With gradients its kernels would not serve."""
    cases, enabled = script("roof_cases"), []
    monkeypatch.setattr(cases.sparse, "gather_conv", lambda *args: enabled.append(torch.is_grad_enabled()))
    for case in cases.sparse_cases(CPU):
        case.call()
    assert enabled == [False, False]


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
    assert found["fixed_neighbour_table"] == found["neighbour_table"]
    assert found["learned_mask"] == (P * 6 * 2 + 4 * (10 * 6 + 1) + P * 2, 0)


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
    monkeypatch.setattr(
        module, "run", lambda model, options, _: run.asked.append((model, options)) or run.answers.pop(0)
    )

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


def test_models_does_not_go_on_with_other_code(script, tmp_path):
    path, started = tmp_path / "models.json", script("models").started
    assert started(path, {"commit": "a"}) == {}
    path.write_text(json.dumps({"commit": "a-dirty", "threads": 2, "date": "then", "samples": {"dcd": []}}))
    assert started(path, {"commit": "a", "threads": 2, "date": "now"}) == {"dcd": []}
    with pytest.raises(ValueError, match="was begun with commit a-dirty, not b: delete it"):
        started(path, {"commit": "b", "threads": 2, "date": "now"})
    with pytest.raises(ValueError, match="was begun with threads 2, not 1"):
        started(path, {"commit": "a", "threads": 1, "date": "now"})
    path.write_text(json.dumps({"commit": "a", "threads": 2, "rows": []}))  # finished
    assert started(path, {"commit": "b", "threads": 2}) == {}


def test_cases_are_options_of_the_benchmark(script):
    from timm_dynamic.cli import benchmark

    for device in ("cpu", "cuda"):
        for paths in (False, True):
            for case in script("models").cases(device, paths):
                benchmark.make_parser().parse_args(["--models", "dcd_resnet18", *case.split(), "--device", device])


@pytest.fixture
def report(script):
    """What models.py writes of `paths`: eager and compiled, each by our kernels and without."""
    common = {"img_size": 224, "dtype": "float32", "memory_format": "contiguous", "mode": "eval", "batch_size": 32}
    common |= {"p10_ms": 1.0, "p90_ms": 3.0, "memory_ratio": 1.5, "baseline": "twin", "peak_memory": 15e6}
    rows = []
    for execution in ("eager", "compile inductor"):
        ways = [("twin", "torch", 1.0), ("dcd", "C++", 1.25), ("dcd", "reference", 7.5)]
        for model, backend, ratio in ways:
            own = {"model": model, "backend": backend, "execution": execution, "median_ms": 2 * ratio}
            macs = 1.0 if model == "twin" else 1.02
            rows.append(common | own | {"time_ratio": ratio, "time_ratios": [ratio, 1.0], "macs_ratio": macs})
    return {"cuda": None, "failed": {"dcd --mode train": "out of memory"}, "rows": rows}


def test_models_in_the_page(script, report, tmp_path):
    pytest.importorskip("matplotlib")
    text = script("page_models").models_text(report, "paths_cpu.json", "a machine", tmp_path)
    assert "`python benchmarks/models.py --paths`, `results/paths_cpu.json`, a machine; 224 px, float32" in text
    assert "`dcd` / `twin`, 1.02x the MACs:" in text
    lines = [line for line in text.splitlines() if line.startswith("| eval")]
    assert [line.split(" | ")[2] for line in lines] == [
        way + compiled for compiled in ("", ", compiled") for way in ("static twin", "ours", "reference path")
    ]
    assert lines[0] == "| eval | 32 | static twin | 2.0 | 1.0-3.0 | 1.00 |  | 15 | 1.50 | 1.00 |"
    assert lines[2] == "| eval | 32 | reference path | 15.0 | 1.0-3.0 | 7.50 | 1.00, 7.50 | 15 | 1.50 | 1.02 |"
    assert text.endswith("- `dcd --mode train`: out of memory\n")
    assert (tmp_path / "paths_cpu.png").read_bytes().startswith(b"\x89PNG")


def kernels():
    row = {"kernel": "gather<float>", "arch": "sm_90", "registers": 40, "shared": 0, "stack": 0, "local": 0}
    return {"rows": [row], "binary_bytes": 10**6, "compiler": "nvcc", "ptx": ["sm_120"]}


def test_what_no_gpu_has_verified_is_said(script):
    page = script("page_gpu")
    assert {*page.OPERATORS, "static"} == script("roof_cases").OPERATORS.keys()
    text = page.gpu_text(None, None, kernels(), str)
    assert "Unverified on GPU: every CUDA kernel, and every operator (ddf, sparse, mixed_conv2d" in text
    assert "| `gather` | unverified | 1 |" in text


def test_what_a_gpu_has_verified_is_said(script):
    page = script("page_gpu")
    tests = {"passed": 9, "failed": 0, "complete": True, "sources": page.sources()}
    tests["sanitizers"] = {"memcheck": "clean (3 tests)"}
    text = page.gpu_text(tests, None, kernels(), lambda report: "an H200")
    assert "an H200: 9 of 9 tests passed; memcheck clean (3 tests)." in text
    assert "| `gather` | tested | 1 |" in text and "to the roof is unverified on GPU" in text
    for other in ({"sources": "of another day"}, {"failed": 1}, {"complete": False}):
        assert "| `gather` | unverified | 1 |" in page.gpu_text(tests | other, None, kernels(), str)
    assert "have changed since" in page.gpu_text(tests | {"sources": "of another day"}, None, kernels(), str)


def test_the_roof_in_the_page(roof, script):
    report = {"copy_gb_per_s": 4000.0, "bf16_matrix_tflop_per_s": 700.0}
    report["rows"] = list(roof.rows(["static", "mixed_conv2d", "dcd", "ddf"], 1e-3, 1e-3, CPU))
    report["rows"][-1] = {key: value for key, value in report["rows"][-1].items() if key != "ms"} | {"error": "no"}
    table = script("page_gpu").roof_table(report, "gpu_roof.json", "an H200")
    assert "a large copy runs at 4000 GB/s" in table
    lines = {line.split(" | ")[0][2:]: line.split(" | ") for line in table.splitlines() if line.startswith("| ")}
    assert lines["mixed_conv2d, forward"][5] == "1.00, 1.00 |"  # every call takes 2 ms here
    assert lines["dcd: DCDConv2d, forward + backward"][5] == "1.00, 1.00 |"
    assert lines["static: conv2d, forward"][5] == " |"
    assert lines["ddf: depthwise, torch"][3] == "1 (1 failed)"
    assert lines["static: conv2d, forward"][4].count(" %") == 3


def test_the_page_is_what_the_results_give(script, monkeypatch, tmp_path):
    """Never written by hand: run `python benchmarks/page.py` where this fails."""
    pytest.importorskip("matplotlib")
    shutil.copytree(BENCHMARKS / "results", tmp_path / "results")
    page = script("page")
    monkeypatch.setattr(page, "HERE", tmp_path)
    page.main()
    assert (tmp_path / "README.md").read_text() == (BENCHMARKS / "README.md").read_text()
    pictures = {path.name for path in (tmp_path / "results").glob("*.png")}
    assert pictures == {path.name for path in (BENCHMARKS / "results").glob("*.png")}


def results(name):
    return json.loads((BENCHMARKS / "results" / name).read_text())["rows"]


def test_the_figures_in_the_readme_are_those_of_the_results():
    readme, rows = (BENCHMARKS.parent / "README.md").read_text(), {}
    for row in results("models_cpu.json"):
        if row["model"] != row["baseline"]:
            rows.setdefault(f"| `{row['model']}` |", []).append(f"{row['time_ratio']:.2f}")
    for row in results("sparse_cpu.json") + results("sparse_cpu_mobilenetv2.json"):
        if row["share"] == 0.3:
            figures = [f"{row['times']['sparse']['median_ms']:.1f} ms"]
            figures += [f"{row[f'speedup_over_{dense}']:.2f}" for dense in ("folded_dense", "static_twin")]
            rows.setdefault(f"| `{row['model']}` | {row['batch_size']} |", []).extend(figures)
    for head, figures in rows.items():
        assert f"{head} {' | '.join(figures)} |" in readme


def test_gpu_table(script, report, tmp_path, monkeypatch, capsys):
    environment = {"device": "an H200", "torch": "2.11", "commit": "abc"}
    (tmp_path / "paths_cuda.json").write_text(json.dumps(environment | report))
    table = script("gpu_table")
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    table.main()
    out = capsys.readouterr().out
    assert "gpu_roof.json: not there yet" in out
    assert "paths_cuda.json: an H200, torch 2.11, commit abc" in out
    assert "dcd                eval     32 reference path" in out and "7.50   1.50   1.02" in out
