"""The loading of the compiled kernels. tests/cli/test_start.py switches them off."""

import os
import shutil

import pytest
import torch

from timm_dynamic.ops import backend_info, ddf, kernels

INPUTS = (torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), torch.ones(1, 9, 3, 3))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: nothing was built")
@pytest.mark.skipif(os.environ.get("TIMM_DYNAMIC_KERNELS") == "0", reason="kernels switched off")
def test_cpu_kernels_are_loaded_where_they_can_be_built():
    assert backend_info()["cpu"] == "loaded"


def test_a_missing_binary_is_said_once_and_costs_nothing_else(monkeypatch):
    monkeypatch.setitem(kernels._status, "cpu", "not built: test")
    monkeypatch.setattr(kernels, "_warned", set())
    with pytest.warns(UserWarning, match="cpu kernels not built: test.*same results") as warned:
        first, second = ddf(*INPUTS), ddf(*INPUTS)
    assert len(warned) == 1
    assert first[0, 0, 1, 1] == 9 and torch.equal(first, second)


def test_broken_binary_is_a_reason_not_an_error(monkeypatch, tmp_path):
    package = tmp_path / "package" / "ops"
    package.mkdir(parents=True)
    (tmp_path / "package" / "_cpu.so").write_bytes(b"not a shared library")
    monkeypatch.setattr(kernels, "__file__", str(package / "kernels.py"))
    monkeypatch.setattr(kernels, "_status", {})
    kernels.load_kernels()
    assert backend_info()["cpu"].startswith("not loaded: ")
