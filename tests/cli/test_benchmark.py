"""`timm-dynamic benchmark`: what it reports and refuses, on tiny models; how fast they are does not matter."""

import builtins
import json
import sys

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

import timm_dynamic
from timm_dynamic.cli import benchmark, main
from timm_dynamic.cli.arguments.benchmark import make_parser
from timm_dynamic.ops import kernels

QUICK = ["--img-size", "32", "--num-warm-iter", "1", "--num-bench-iter", "2", "--device", "cpu"]
PAIR = ["--models", "test_ddf_resnet", "--baseline", "test_resnet"]
ROW_KEYS = """model tag backend execution mode batch_size img_size dtype memory_format params macs_static macs_executed
macs_linear num_warm_iter num_bench_iter median_ms p10_ms p90_ms peak_memory peak_memory_source baseline time_ratio
macs_ratio device driver torch timm timm_dynamic commit""".split()


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path):
    """`run(*flags)` is the report that the command writes."""

    def run(*flags):
        path = tmp_path / "out.json"
        assert main(["benchmark", *QUICK, *flags, "--json", str(path)]) == 0
        return json.loads(path.read_text())

    return run


def fails(capsys, *flags) -> str:
    """The one line on stderr of a command that ends with status 2."""
    try:
        status = main(["benchmark", *QUICK, *flags])
    except SystemExit as error:  # argparse
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_optimized(run, capsys):
    rows = run(*PAIR, "--optimize")["rows"]
    assert all(row["optimized_ms"] > 0 for row in rows) and rows[0]["optimized_ratio"] == 1
    assert rows[1]["optimized_ratio"] == pytest.approx(rows[1]["optimized_ms"] / rows[0]["optimized_ms"])
    out = capsys.readouterr().out
    assert "opt ms" in out and "opt x" in out and max(map(len, out.splitlines())) <= 100
    assert "--optimize makes models for inference" in fails(capsys, *PAIR, "--optimize", "--mode", "train")


def test_report(run):
    report = run(*PAIR, "--batch-size", "1", "2", "--threads", "1")
    rows = report["rows"]
    assert [(row["model"], row["batch_size"]) for row in rows] == [
        ("test_resnet", 1),
        ("test_ddf_resnet", 1),
        ("test_resnet", 2),
        ("test_ddf_resnet", 2),
    ]
    assert report["threads"] == 1 and report["cpu"] and report["date"]
    assert report["command"].startswith("timm-dynamic benchmark --img-size 32")
    for row in rows:
        assert list(row) == ROW_KEYS
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert (row["execution"], row["mode"], row["img_size"], row["dtype"]) == ("eager", "eval", 32, "float32")
        assert (row["num_warm_iter"], row["num_bench_iter"], row["baseline"]) == (1, 2, "test_resnet")
        assert row["peak_memory"] > 4 * row["params"]
    static, dynamic = rows[:2]
    assert static["time_ratio"] == static["macs_ratio"] == 1
    assert dynamic["time_ratio"] == dynamic["median_ms"] / static["median_ms"]
    total = [row["macs_executed"] + row["macs_linear"] for row in (dynamic, static)]
    assert dynamic["macs_ratio"] == total[0] / total[1]
    assert rows[3]["time_ratio"] == rows[3]["median_ms"] / rows[2]["median_ms"]  # of the same batch size
    assert static["backend"] == "torch"
    assert dynamic["backend"] == ("C++" if kernels._status["cpu"] == "loaded" else "reference")


def test_medians_come_from_the_samples(run, monkeypatch):
    def measure(candidates, iterations, warmup, device, on_round):
        return {c: [1.0, 2.0, 6.0] if c.model == "test_resnet" else [3.0, 4.0, 5.0] for c in candidates}

    monkeypatch.setattr(benchmark, "measure", measure)
    row = run(*PAIR)["rows"][1]
    assert (row["median_ms"], row["time_ratio"]) == (4, 2)


def test_candidates_are_built_first_and_run_interleaved(run, monkeypatch):
    order = []
    create, step = benchmark.common.create_model, benchmark._step

    def spy_step(candidate, *args):
        run_once = step(candidate, *args)
        return lambda: order.append(candidate.model) or run_once()

    monkeypatch.setattr(
        benchmark.common, "create_model", lambda name, **kw: order.append("built") or create(name, **kw)
    )
    monkeypatch.setattr(benchmark, "_step", spy_step)
    run("--models", "test_ddf_resnet", "test_efficientnet", "--baseline", "test_resnet")
    assert order[:3] == ["built"] * 3
    timed = order[3:12]  # 1 round to warm up, 2 timed; the rest measures memory
    assert all(len(set(timed[i : i + 3])) == 3 for i in (0, 3, 6))


def test_static_baseline_is_the_twin_at_the_same_size(run, monkeypatch):
    monkeypatch.setattr(benchmark.families, "static_twin", lambda name: {"test_ddf_resnet": "test_resnet"}[name])
    flags = ["--models", "test_ddf_resnet", "--baseline", "static"]
    rows = run(*flags)["rows"]
    assert [(row["model"], row["baseline"]) for row in rows] == [
        ("test_resnet", "test_resnet"),
        ("test_ddf_resnet", "test_resnet"),
    ]
    args = make_parser().parse_args([*flags, "--num-bench-iter", "1", "--device", "cpu"])
    rows = benchmark.run(args, torch.device("cpu"))  # test_resnet's own size is 160
    assert [row["img_size"] for row in rows] == [64, 64]


def test_without_a_baseline_there_are_no_ratios(run, capsys):
    rows = run("--models", "test_resnet", "test_resnet")["rows"]
    assert len(rows) == 1  # the same twice is timed once
    assert rows[0]["baseline"] is rows[0]["time_ratio"] is rows[0]["macs_ratio"] is None
    assert "time x" not in capsys.readouterr().out


def test_train_mode_trains(monkeypatch):
    args = make_parser().parse_args([*PAIR, *QUICK, "--mode", "train", "-b", "2", "--img-size", "64"])
    seen = {}
    step = benchmark._step

    def spy(candidate, model, *rest):
        seen[candidate.model] = model, model.conv1[0].weight.clone(), model.training
        return step(candidate, model, *rest)

    monkeypatch.setattr(benchmark, "_step", spy)
    rows = benchmark.run(args, torch.device("cpu"))
    for row in rows:
        model, before, training = seen[row["model"]]
        assert row["mode"] == "train" and training
        assert not torch.equal(model.conv1[0].weight, before)
        assert row["peak_memory"] > 3 * 4 * row["params"]  # weights, momentum, gradients


@pytest.mark.parametrize("flags, dtype, expected", [((), None, "float32"), (("--amp",), "bfloat16", "amp bfloat16")])
def test_amp_and_channels_last_reach_the_model(run, monkeypatch, flags, dtype, expected):
    seen = []
    step = benchmark._step

    def spy(candidate, model, x, *rest):
        run_once = step(candidate, model, x, *rest)
        assert x.is_contiguous(memory_format=torch.channels_last)
        return lambda: seen.append(run_once().dtype)

    monkeypatch.setattr(benchmark, "_step", spy)
    rows = run("--models", "test_resnet", "--channels-last", *flags, "--amp-dtype", dtype or "float16")["rows"]
    assert set(seen) == {getattr(torch, dtype or "float32")}
    assert (rows[0]["dtype"], rows[0]["memory_format"]) == (expected, "channels_last")


def test_backends(run, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compiled.append(kwargs) or model)
    monkeypatch.setitem(kernels._status, "cpu", "loaded")  # the operator serves, binary or not
    forced = []
    monkeypatch.setattr(benchmark, "use", lambda way: forced.append(way) or timm_dynamic.use(way))
    rows = run(*PAIR, "--backends", "kernel", "reference", "compiled-reference")["rows"]
    assert [(row["model"], row["backend"], row["execution"]) for row in rows] == [
        ("test_resnet", "torch", "eager"),
        ("test_ddf_resnet", "C++", "eager"),
        ("test_ddf_resnet", "reference", "eager"),
        ("test_ddf_resnet", "reference", "compile inductor"),
    ]
    assert compiled == [{"backend": "inductor", "dynamic": False}]
    assert forced == ["formula"] * 2 * (1 + 2 + 1)  # two candidates: warm-up, timed, memory
    assert "*: torch.compile, inductor" in capsys.readouterr().out


def test_without_kernels_the_row_says_reference(run, monkeypatch, capsys):
    monkeypatch.setitem(kernels._status, "cpu", "not built: test")
    rows = run(*PAIR, "--backends", "kernel", "reference")["rows"]
    assert [row["backend"] for row in rows] == ["torch", "reference"]  # once: it would be the same code
    assert "reference: kernels not built: test" in capsys.readouterr().out


def test_torchcompile(run):
    rows = run("--models", "test_resnet", "--torchcompile", "eager", "--batch-size", "1", "2")["rows"]
    assert [row["execution"] for row in rows] == ["compile eager"] * 2


def test_model_kwargs_and_num_classes(run):
    plain, wide = (
        run(*PAIR, "--num-classes", "7", *flags)["rows"] for flags in ((), ("--model-kwargs", "se_ratio=0.5"))
    )
    assert plain[0] | {"params": 0} != wide[0]
    assert plain[0]["params"] == wide[0]["params"] and plain[1]["params"] < wide[1]["params"]
    assert plain[0]["macs_linear"] % 7 == 0


def test_dynamize(run):
    """The baseline is the model without the layer, of the same arguments."""
    flags = ["--models", "test_resnet", "--dynamize", "dcd", "--baseline", "static", "--model-kwargs", "num_classes=7"]
    rows = run(*flags)["rows"]
    assert [(row["model"], row["baseline"]) for row in rows] == [
        ("test_resnet", "test_resnet"),
        ("test_resnet+dcd", "test_resnet"),
    ]
    assert rows[0]["params"] < rows[1]["params"] and rows[0]["macs_linear"] % 7 == 0
    assert [row["model"] for row in run(*flags[:4], "--baseline", "test_vit")["rows"]] == [
        "test_vit",
        "test_resnet+dcd",
    ]


def test_images_are_as_the_model_is_made(run):
    assert run("--models", "test_vit")["rows"][0]["img_size"] == 32
    assert run("--models", "test_resnet", "--model-kwargs", "in_chans=1")["rows"][0]["macs_executed"] > 0


def test_table_fits_in_100_columns():
    row = dict.fromkeys(ROW_KEYS, 12345.6) | {
        "model": "a_model_with_a_name_far_too_long_for_any_table.tag",
        "backend": "reference",
        "execution": "compile inductor",
        "baseline": "resnet50",
        "params": 123456789,
        "memory_format": "contiguous",
        "mode": "eval",
        "dtype": "float32",
        "peak_memory_source": "model",
    }
    report = {"rows": [row], "device": "CPU", "threads": 2, "torch": "2", "kernels": "loaded"}
    lines = benchmark.format_report(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("a_model_with_a_name_") and "… " in line for line in lines)
    warning = "is something else running?"
    assert warning not in lines[-2]
    row["p90_ms"] *= 2.1
    assert warning in benchmark.format_report(report).splitlines()[-2]


def test_plot_is_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    run(*PAIR, "--batch-size", "1", "2", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    run("--models", "test_resnet", "--baseline", "test_resnet", "--plot", str(path))  # nothing but the baseline
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_missing_matplotlib_is_said_before_the_timing(monkeypatch, capsys, tmp_path):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "timm_dynamic.cli.plot", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    monkeypatch.setattr(benchmark, "run", lambda *args: pytest.fail("timed"))
    assert 'pip install "timm-dynamic[demo]"' in fails(capsys, *PAIR, "--plot", str(tmp_path / "out.png"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--json", "{}/none/out.json"], "cannot write there"),
        (["--json", "{}/out.csv"], "must end in .json"),
        (["--plot", "{}/out.txt"], "must end in .png"),
        (["--plot", "{}/out.png", "--baseline", "none"], "--plot draws ratios: give a --baseline"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "only cpu and cuda can be timed"),
        (["--batch-size", "4", "0"], "0 is not 1 or more"),
        (["--threads", "0"], "0 is not 1 or more"),
        (["--num-bench-iter", "0"], "0 is not 1 or more"),
        (["--mode", "sideways"], "invalid choice: 'sideways'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_bad_flags_are_refused_before_anything_runs(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "run", lambda *args: pytest.fail("timed"))
    assert message in fails(capsys, *PAIR, *(flag.format(tmp_path) for flag in flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--models", "test_resnet", "test_resne"], "unknown model 'test_resne'; did you mean"),
        (["--models", "test_resnet", "--baseline", "nothing_like_it"], "unknown model 'nothing_like_it'; to list"),
        (["--models", "test_ddf_resnet", "--baseline", "static"], "test_ddf_resnet has no static twin"),
        (["--models", "test_resnet", "--model-kwargs", "wings=2"], "unexpected keyword argument 'wings'"),
        (["--models", "test_vit", "--img-size", "31"], "test_vit does not run on images [1, 3, 31, 31]"),
        (["--models", "test_resnet", "--images", "{}"], "no images in "),
    ],
)
def test_bad_models_are_one_line(flags, message, capsys, tmp_path):
    path = tmp_path / "out.json"
    assert message in fails(capsys, *(flag.format(tmp_path) for flag in flags), "--json", str(path))
    assert not path.exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def raises(*args):
        raise error

    monkeypatch.setattr(benchmark, "measure", raises)
    assert "out of memory at --batch-size 3: try a smaller one" in fails(capsys, *PAIR, "--batch-size", "3")


def test_a_failing_compiler_is_one_line(monkeypatch, capsys):
    def raises(*args):
        raise InvalidCxxCompiler

    monkeypatch.setattr(benchmark, "measure", raises)
    assert "torch.compile failed: No working C++ compiler" in fails(capsys, *PAIR, "--torchcompile")


def test_other_errors_are_not_hidden(monkeypatch):
    def raises(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(benchmark, "measure", raises)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["benchmark", *QUICK, *PAIR])
