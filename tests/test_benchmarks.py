"""The scripts under benchmarks/: what they count, keep and print. Nothing here is timed, and nothing needs a GPU."""

import importlib
import json
from pathlib import Path

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
