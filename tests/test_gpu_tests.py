"""benchmarks/gpu_tests.py: what it counts, stops and keeps. No GPU is needed."""

import json
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_tests(script, monkeypatch, tmp_path):
    """`gpu_tests(text, seconds)`: what the script makes of a file with these tests, and so much time."""
    module = script("gpu_tests")
    monkeypatch.setitem(module.SECONDS, "memcheck", 60)

    def run(text, seconds):
        path = tmp_path / "test_some.py"
        path.write_text(textwrap.dedent(text))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(path)]
        return module.run("memcheck", command, time.monotonic() + seconds)

    return run


def test_gpu_tests_counts_what_pytest_says(gpu_tests):
    result = gpu_tests(
        """
        import pytest

        @pytest.fixture
        def broken():
            raise OSError

        def test_good(): pass
        def test_also_good(): pass
        def test_bad(): assert False
        def test_error(broken): pass
        @pytest.mark.skip
        def test_skipped(): pass
        """,
        60,
    )
    assert {key: result[key] for key in ("status", "passed", "failed", "skipped")} == {
        "status": 1,
        "passed": 2,
        "failed": 2,
        "skipped": 1,
    }
    assert [name.split(".")[-1] for name in result["failures"]] == ["test_bad", "test_error"]


def test_gpu_tests_stops_what_takes_too_long(gpu_tests):
    result = gpu_tests("import time\ndef test_good(): pass\ndef test_slow(): time.sleep(600)", 12)
    assert result["status"].startswith("stopped after 1") and result["passed"] <= 1
    assert gpu_tests("def test_good(): pass", -1)["status"] == "stopped after 0 s"


def test_gpu_tests_keeps_what_it_has(script, monkeypatch, tmp_path):
    module, path = script("gpu_tests"), tmp_path / "gpu_tests.json"
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "backend_info", lambda: {"cuda": "loaded"})
    monkeypatch.setattr(module, "environment", lambda device: {})
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["gpu_tests.py", "--output", str(path)])
    monkeypatch.setattr(module.signal, "signal", lambda *args: None)
    seen, passed = [], {"tests of operators": 5, "other tests": 3, "memcheck": 0, "racecheck": 2}

    def run(name, command, deadline, **env):
        seen.append(json.loads(path.read_text()) if path.exists() else None)
        return {"status": 0, "passed": passed[name], "failed": 0}

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(SystemExit) as ended:
        module.main()
    report = json.loads(path.read_text())
    assert seen[0] is None and [(one["passed"], one["complete"]) for one in seen[1:]] == [
        (5, False),
        (8, True),
        (8, True),
    ]
    assert report["sanitizers"] == {"memcheck": "failed: ran no test", "racecheck": "clean (2 tests)"}
    assert ended.value.code == 1
    monkeypatch.setattr(module, "backend_info", lambda: {"cuda": "not built"})
    with pytest.raises(SystemExit, match="2"):
        module.main()


def test_every_file_of_kernels_has_tests_for_the_sanitizers(script):
    """By its mark or its names."""
    of_operators, _ = script("gpu_tests").files()
    by_name = {"tests/ops/test_ddf_cuda.py", "tests/ops/test_sparse_cuda.py"}
    marked = {path for path in of_operators if "mark.sanitized" in (ROOT / path).read_text()}
    assert marked | by_name == set(of_operators)


def test_gpu_tests_finds_the_files_by_their_mark(script):
    of_operators, others = script("gpu_tests").files()
    assert "tests/ops/test_ddf_cuda.py" in of_operators
    assert {"tests/models/test_on_gpu.py", "tests/test_timing.py"} <= set(others)
    assert not [path for path in others if path.startswith("tests/ops")]
