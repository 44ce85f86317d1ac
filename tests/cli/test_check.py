"""`timm-dynamic check`: what it derives, compares, survives and records. Times are not looked at."""

import json
import math
import signal

import pytest
import torch
import toy_rows
from commands import run

from timm_dynamic import cases, check
from timm_dynamic.cli import check as command
from timm_dynamic.ops import kernels, records
from timm_dynamic.ops.registration import OPERATORS, Operator


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TIMM_DYNAMIC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def of_toys(monkeypatch):
    """`of_toys(layer)`: the cases of a network of one toy layer."""

    def plan(layer, batches=(1, 2), count=2):
        monkeypatch.setattr(cases, "build", lambda name: toy_rows.network(layer))
        monkeypatch.setattr(check, "build", lambda name: toy_rows.network(layer))
        torch.manual_seed(0)
        return cases.plan("toy", "cpu", [torch.float32], batches, count)

    return plan


def test_rows_become_cases_where_they_take_a_call(of_toys):
    found = of_toys(toy_rows.Doubled)
    settings = [(case.name, case.shape, case.setting) for case in found]
    assert len(set(settings)) == len(settings)
    assert {name for name, *_ in settings} == {f"doubled: {name}" for name in ("here", "second", "training")}
    of_here = [shape for name, shape, _ in settings if name == "doubled: here"]
    assert of_here == [(2, 4, 6, 6)] * 2  # it does not pay for one; both layouts
    for name, shape, setting in settings:
        assert setting.training == (name == "doubled: training")
        assert setting.dtype == torch.float32 or (setting.training and len(shape) == 4 and shape[0] == 1)
    assert all(check.run(case, 0.01, False)["right"] for case in found if case.setting.layout == "NCHW")


def test_what_is_wrong_is_found(of_toys):
    for layer, error in ((toy_rows.WrongForwards, 1e-3), (toy_rows.WrongBackwards, 1)):
        for case in of_toys(layer, batches=(2,)):
            found = check.run(case, 0.01, False)
            assert not found["right"] and found["error"] > error / 10 and "allowed are" in found["problem"]
            assert "ratio" not in found


def test_operators_called_by_rows(monkeypatch):
    monkeypatch.setattr(kernels, "operators_with_kernel", lambda device: ["dcd_conv"])
    found = cases.plan("test_dcd_resnet", "cpu", [torch.float32], [2], 1)
    case, in_channels_last = [case for case in found if case.name == "dcd_conv"]
    assert in_channels_last.setting.layout == "channels_last"
    assert (case.source, case.number) == ("one call", 0)
    found = check.run(case, 0.01, False)
    assert found["right"] and found["ratio"] > 0
    definition = OPERATORS["dcd_conv"].definition
    wrong = Operator(lambda *args: 1.01 * definition(*args), False)
    monkeypatch.setitem(OPERATORS, "dcd_conv", wrong)
    assert not check.run(case, 0.01, False)["right"]


def test_gradients_of_operators(monkeypatch):
    """As if a layer's formula had called channel_fusion."""
    numbers = torch.Generator().manual_seed(0)
    x, weight, scale, p, v = (
        torch.randn(shape, generator=numbers) for shape in ((2, 4, 3, 3), (5, 4), (2, 5), (5, 2), (2, 2, 9))
    )
    args = (x, weight, None, None, scale, p, v, None, -math.inf, math.inf)
    monkeypatch.setattr(check, "arguments_of", lambda model, case: (args, {}))
    monkeypatch.setattr(check, "build", lambda name: None)
    setting = cases.Setting("cpu", torch.float32, "NCHW", True)
    case = cases.Case("channel_fusion", "", "", x.shape, setting, "formula", 0, "")
    assert check.run(case, 0.01, False)["right"]
    definition = OPERATORS["channel_fusion"].definition

    def without_gradient(x, weight, *others):
        return definition(x, weight.detach(), *others)

    monkeypatch.setitem(OPERATORS, "channel_fusion", Operator(without_gradient, True))
    found = check.run(case, 0.01, False)
    assert not found["right"] and found["error"] > 0.1


@pytest.mark.parametrize(
    ("found", "exact", "expected"),
    [
        ([1.0, 3.0], [1.0, 2.0], 2**0.5),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([math.inf, math.nan], [math.inf, math.nan], 0.0),
        ([1.0, 1.0], [1.0, 1.5], 2**0.5),
        ([0.25], [0.0], 0.25),
        ([], [], 0.0),
    ],
)
def test_errors_are_in_standard_deviations(found, exact, expected):
    assert check._error(torch.tensor(found), torch.tensor(exact)) == pytest.approx(expected)


def test_results_of_other_shapes_or_indices_are_wrong():
    one, index = torch.ones(2), torch.tensor([1, 2])
    assert "torch.float64, not [2] torch.float32" in check._compared([one.double()], [one], [one], one.dtype)["problem"]
    assert check._compared([one[:1]], [one], [one], one.dtype)["error"] == math.inf
    assert not check._compared([index + 1], [index], [index], one.dtype)["right"]
    assert check._compared([index], [index], [index], one.dtype)["right"]


def test_a_formula_that_cannot_run_is_no_error(of_toys, monkeypatch):
    formula, case = toy_rows.Doubled.formula, of_toys(toy_rows.Doubled, batches=(2,))[0]

    def no_kernel(layer, x):
        if len(x) == 1:
            return formula(layer, x)
        raise NotImplementedError("not for this type\nand more")

    monkeypatch.setattr(toy_rows.Doubled, "formula", no_kernel)
    assert check.run(case, 0.01, False) == {"skipped": "the formula: not for this type"}
    assert {case.shape[0] for case in of_toys(toy_rows.Doubled)} == {1}


def test_a_process_apart():
    with check.Worker() as worker:
        assert worker.call(toy_rows.answer, 4, seconds=100) == (8, "")
        process = worker._process
        assert worker.call(toy_rows.answer, 5, seconds=100) == (10, "") and worker._process is process
        assert worker.call(toy_rows.fails, seconds=100) == (None, "RuntimeError: an illegal memory access")
        assert worker.call(toy_rows.crashes, seconds=100) == (None, f"crashed: {signal.SIGSEGV.name}")
        assert worker.call(toy_rows.hangs, seconds=1) == (None, "stopped after 1 s")
        assert worker.call(toy_rows.answer, 6, seconds=100) == (12, "")
        last = worker._process
    assert not process.is_alive() and not last.is_alive()


def rows(name, *ratios, **more):
    return [{"name": name, "right": True, "ratio": ratio, **more} for ratio in ratios]


def test_on_is_what_is_right_everywhere_and_faster():
    wrong = {"name": "d", "right": False, "problem": "crashed"}
    found = command.summarise(
        [*rows("a", 0.5, 1.9), *rows("b", 0.5, 2.1), {"name": "c", "skipped": "no kernel"}, *rows("d", 0.1), wrong]
    )
    assert {name for name, verdict in found.items() if verdict["on"]} == {"a"}
    assert found["a"]["ratio"] == pytest.approx(0.95**0.5) and found["a"]["cases"] == 2
    assert found["c"] == {"right": True, "ratio": None, "on": False, "cases": 0}
    assert not found["d"]["right"]


@pytest.fixture
def fake(monkeypatch):
    """The command with these answers of its processes, in the order of the names: no process starts."""

    def install(*answers):
        setting = cases.Setting("cpu", torch.float32, "NCHW", False)
        planned = [
            cases.Case(name, "test_dcd_resnet", "", (i,), setting, "formula", None, "1x4")
            for i, (name, _) in enumerate(answers)
        ]
        left = [answer for _, answer in sorted(answers, key=lambda pair: pair[0])]

        def call(worker, function, *args, seconds):
            return (planned, "") if function is cases.plan else left.pop(0)

        monkeypatch.setattr(command.Worker, "call", call)

    return install


GOOD = {"right": True, "error": 1e-7, "allowed": 1e-5, "problem": "", "ms": 1.0, "formula_ms": 2.0, "ratio": 0.5}


def test_a_table_and_a_record(fake, capsys, tmp_path):
    fake(("dcd: one call", (GOOD, "")), ("ddf", (GOOD | {"ratio": 2.0}, "")))
    path = tmp_path / "record.json"
    status, out, _ = run(capsys, "check", "--models", "test_dcd_resnet", "--json", path)
    assert status == 0
    assert "dcd: one call              1x4                                float32   NCHW" in out
    assert "1.0e-07      1.000      2.000   0.50  right, faster" in out and "right, slower" in out
    [record] = records.read(records.path_of_user())
    assert record == json.loads(path.read_text())["records"][0]
    assert record["names"]["dcd: one call"]["on"] and not record["names"]["ddf"]["on"]
    assert record["torch"] == torch.__version__ and record["device"] and record["build"]
    assert [case["name"] for case in record["cases"]] == ["dcd: one call", "ddf"]


def test_one_that_crashes_is_not_the_end(fake, capsys):
    fake(("a", (None, "crashed: SIGSEGV")), ("b", (GOOD, "")))
    status, out, _ = run(capsys, "check", "--models", "test_dcd_resnet")
    assert status == 1
    assert "WRONG: crashed: SIGSEGV" in out and "right, faster" in out
    [record] = records.read(records.path_of_user())
    assert {name for name, verdict in record["names"].items() if verdict["on"]} == {"b"}


def test_what_is_not_finished_is_not_recorded(fake, capsys, monkeypatch):
    fake(("a", (GOOD, "")), ("b", (GOOD, "")), ("b", (GOOD, "")))
    clock = iter([0, 1, 2, 3, 61, 62])
    monkeypatch.setattr(command, "monotonic", lambda: next(clock))
    status, out, _ = run(capsys, "check", "--models", "test_dcd_resnet", "--minutes", "1")
    assert status == 0 and "not finished, so not recorded: b" in out
    [record] = records.read(records.path_of_user())
    assert list(record["names"]) == ["a"] and [case["name"] for case in record["cases"]] == ["a"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "nothing"], "--only nothing: there are "),
        (["--models", "resnet"], "unknown models resnet"),
        (["--json", "record.txt"], "--json record.txt: the name must end in .json"),
        (["--seconds", "0"], "is not above 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--batch-size", "0"], "0 is not 1 or more"),
    ],
)
def test_bad_arguments(capsys, argv, message):
    status, _, err = run(capsys, "check", *argv)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not records.path_of_user().exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    status, _, err = run(capsys, "check", "--device", "cuda")
    assert (status, err) == (2, "timm-dynamic check: error: --device cuda: there is no CUDA device here\n")


def test_the_whole_of_it(capsys):
    argv = "--quick --only dcd --shapes 1 --batch-size 2 --seconds 0.01".split()
    status, out, _ = run(capsys, "check", *argv)
    assert status == 0, out
    assert "dcd: training in one piece" in out and "Not recorded: --quick" in out
    assert not records.path_of_user().exists()
