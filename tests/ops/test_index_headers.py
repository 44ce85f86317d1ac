"""Index arithmetic of the CPU and the CUDA kernels, compiled for the host alone."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

HEADERS = Path(__file__).parents[2] / "cuda_ops"
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

DRIVER = """
#include <algorithm>
#include "dynamic_filter/shape.h"
#include "sparse/window.h"
using namespace timm_dynamic;

// inputs, tapped: [Ho * Wo, taps]; outputs: [H * W, taps]
template <typename Int>
void tables(const Window<Int>& w, int64_t* inputs, int64_t* tapped, int64_t* outputs) {
  const Int T = w.taps();
  std::fill(tapped, tapped + w.Ho * w.Wo * T, -1);
  for (Int y = 0; y < w.Ho; ++y)
    for (Int x = 0; x < w.Wo; ++x) {
      const Int row = (y * w.Wo + x) * T;
      for (Int t = 0; t < T; ++t) inputs[row + t] = w.input(y, x, t);
      w.each_tap(y, x, [&](Int t, Int at) { tapped[row + t] = at; });
    }
  for (Int y = 0; y < w.H; ++y)
    for (Int x = 0; x < w.W; ++x)
      for (Int t = 0; t < T; ++t) outputs[(y * w.W + x) * T + t] = w.output(y, x, t);
}

template <typename Int>
Window<Int> window(const int64_t* v) {
  Int n[12];
  std::copy(v, v + 12, n);
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11]};
}

extern "C" {
void tables32(const int64_t* v, int64_t* i, int64_t* t, int64_t* o) { tables(window<int>(v), i, t, o); }
void tables64(const int64_t* v, int64_t* i, int64_t* t, int64_t* o) { tables(window<int64_t>(v), i, t, o); }
int64_t floor_of(int64_t a, int64_t b) { return floor_div(a, b); }
int64_t ceil_of(int64_t a, int64_t b) { return ceil_div(a, b); }
int64_t outputs_of(int64_t size, int64_t stride) { return output_size(size, stride); }
void range_of(int64_t shift, int64_t stride, int64_t size, int64_t outputs, int64_t* to) {
  const Range r = valid_outputs(shift, stride, size, outputs);
  to[0] = r.begin, to[1] = r.end, to[2] = r.empty();
}
void shifts(int64_t K, int64_t dilation, int64_t* dy, int64_t* dx) {
  DdfShape s{};
  s.K = K, s.dilation = dilation;
  for (int64_t k = 0; k < s.taps(); ++k) dy[k] = s.dy(k), dx[k] = s.dx(k);
}
}
"""


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """The functions of the headers, as the host's compiler sees them; it must find nothing to warn of."""
    folder = tmp_path_factory.mktemp("headers")
    source, library = folder / "driver.cpp", folder / "driver.so"
    source.write_text(DRIVER)
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    command = [COMPILER, *flags, f"-I{HEADERS}", str(source), "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    functions = ctypes.CDLL(str(library))
    for name in ("floor_of", "ceil_of", "outputs_of"):
        getattr(functions, name).restype = ctypes.c_int64
    return functions


def call(function, *args):
    """Its result for numbers and int64 arrays."""
    return function(*(a.ctypes if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in args))


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def windows(draw):
    """Size of the map, kernel size, stride, dilation and padding of a convolution that has outputs."""
    size, kernel, stride, dilation, padding = (draw(pairs(*x)) for x in ((1, 12), (1, 5), (1, 4), (1, 3), (0, 6)))
    spans = (d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True))
    return tuple(max(pair) for pair in zip(size, spans, strict=True)), kernel, stride, dilation, padding


def inputs_by_unfold(size, kernel, stride, dilation, padding):
    """[outputs, taps]: what each tap of each output reads, -1 outside, by torch's own unfold."""
    positions = torch.arange(1, size[0] * size[1] + 1, dtype=torch.float64).reshape(1, 1, *size)
    table = F.unfold(positions, kernel, dilation, padding, stride)[0].T
    return table.long().contiguous().numpy() - 1


@given(windows())
@settings(max_examples=200, deadline=None)
def test_window(headers, window):
    size, kernel, stride, dilation, padding = window
    expected = inputs_by_unfold(*window)
    image, weight = torch.empty(1, 1, *size, device="meta"), torch.empty(1, 1, *kernel, device="meta")
    output = F.conv2d(image, weight, None, stride, padding, dilation).shape[2:]
    reads = np.full((size[0] * size[1], expected.shape[1]), -1)  # the table's inverse: which output reads an input
    rows, taps = (expected >= 0).nonzero()
    reads[expected[rows, taps], taps] = rows
    fields = np.array([*size, *output, *kernel, *stride, *dilation, *padding], np.int64)
    for tables in (headers.tables32, headers.tables64):
        inputs, tapped, outputs = np.empty_like(expected), np.empty_like(expected), np.empty_like(reads)
        call(tables, fields, inputs, tapped, outputs)
        np.testing.assert_array_equal(inputs, expected)
        np.testing.assert_array_equal(tapped, expected)
        np.testing.assert_array_equal(outputs, reads)


@given(pairs(1, 14), st.sampled_from([1, 3, 5, 7]), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_ddf_taps(headers, size, K, stride, dilation):
    """Both axes of DDF's window: its shifts, its number of outputs, and which of these a tap serves."""
    H, W = size
    expected = inputs_by_unfold(size, (K, K), (stride, stride), (dilation, dilation), (K // 2 * dilation,) * 2)
    Ho, Wo = call(headers.outputs_of, H, stride), call(headers.outputs_of, W, stride)
    dy, dx, bounds = np.empty(K * K, np.int64), np.empty(K * K, np.int64), np.empty(3, np.int64)
    call(headers.shifts, K, dilation, dy, dx)
    actual = np.full((Ho, Wo, K * K), -1)
    for k in range(K * K):
        ranges = []
        for shift, n, outputs in ((dy[k], H, Ho), (dx[k], W, Wo)):
            call(headers.range_of, int(shift), stride, n, outputs, bounds)
            assert bool(bounds[2]) == (bounds[0] >= bounds[1])
            ranges.append(np.arange(bounds[0], max(bounds[:2])))
        y, x = np.meshgrid(*ranges, indexing="ij")
        actual[y, x, k] = (y * stride + dy[k]) * W + x * stride + dx[k]
    np.testing.assert_array_equal(actual.reshape(Ho * Wo, -1), expected)


@given(st.integers(-(2**40), 2**40), st.integers(1, 2**20))
def test_divisions(headers, a, b):
    assert call(headers.floor_of, a, b) == a // b
    assert call(headers.ceil_of, a, b) == -(-a // b)
