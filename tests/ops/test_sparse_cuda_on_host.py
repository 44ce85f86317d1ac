"""The CUDA kernels of sparse execution on the CPU (tests/cuda_on_host), against the references.

The operators and kernels are those that run on a GPU; test_sparse_cuda.py has the same cases for one, and more.
"""

import itertools
import math

import cuda_on_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import TOLERANCE
from ops.test_sparse_cuda import (
    CONVOLUTIONS,
    NO_LIMITS,
    RELU6,
    check,
    misaligned,
    randn,
    table,
)
from pairs import in_turns

from timm_dynamic.ops.sparse import definition as sparse

pytestmark = cuda_on_host.needs_compiler
operators = cuda_on_host.operators("sparse")
SEEDS = itertools.cycle(range(4))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def cast(tensors, dtype):
    """Float tensors in `dtype`, the others as they are."""
    return [t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize(("M", "C", "dtype"), in_turns((0, 1, 33, 70), (1, 3, 8, 12, 24, 130, 520), TOLERANCE), ids=str)
class TestRows:
    def test_gather_rows(self, operators, M, C, dtype):
        source, rows = 4 * torch.randn(40, C).to(dtype), table(M, 3, 40)
        for limits in (RELU6, NO_LIMITS):
            expected = sparse._gather_rows(source, rows, *limits)
            unused = source.index_fill(0, torch.tensor(0), math.nan)
            for from_ in (unused, misaligned(unused)):
                assert torch.equal(operators.gather_rows(from_, rows, *limits, seed=next(SEEDS)), expected)
        source[1] = math.nan
        seen = operators.gather_rows(source, rows, *RELU6).isnan()
        assert torch.equal(seen, (rows == 1).repeat_interleave(C, 1))

    def test_scatter_rows(self, operators, M, C, dtype):
        out, positions = randn(M + 3, C, dtype=dtype), torch.randperm(M + 3)[:M].int()
        rows = randn(M, C, dtype=dtype)
        nowhere = torch.rand(M) < 0.3
        positions[nowhere], rows[nowhere] = -1, math.nan
        out[0, 0] = math.nan
        for limits, place in ((RELU6, misaligned), (NO_LIMITS, torch.clone)):
            expected, actual = out.clone(), place(out.to(dtype))
            sparse._scatter_rows_(expected, positions, rows, *limits)
            operators.scatter_rows_(actual, positions, rows.to(dtype), *limits, seed=next(SEEDS))
            where_nan = expected.isnan()
            assert torch.equal(actual.isnan(), where_nan)
            check(actual.nan_to_num(0), expected.masked_fill(where_nan, 0), dtype)
            untouched = torch.ones(M + 3, dtype=torch.bool)
            untouched[positions[~nowhere].long()] = False
            assert torch.equal(actual.double().nan_to_num(9)[untouched], out.nan_to_num(9)[untouched])

    def test_gather_depthwise(self, operators, M, C, dtype):
        source, rows = randn(40, C, dtype=dtype), table(M, 9, 40)
        weight, bias = randn(9, C, dtype=dtype), randn(C, dtype=dtype)
        for limits, place in ((RELU6, misaligned), (NO_LIMITS, torch.clone)):
            expected = sparse._gather_depthwise(source, rows, weight, bias, *limits)
            args = cast([source, rows, weight, bias], dtype)
            args[0][0] = math.nan
            args[0] = place(args[0])
            check(operators.gather_depthwise(*args, *limits, seed=next(SEEDS)), expected, dtype)


def check_tables(operators, mask, size, window, padding):
    """`window`: kernel size, stride and dilation."""
    expected = sparse._neighbour_table(mask, size, *window, padding)
    signed = torch.where(mask, 1.0, -0.0)
    for own in (mask, signed, signed.half(), signed.bfloat16()):
        actual = operators.neighbour_table(own, size, *window, padding, None, seed=next(SEEDS))
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == torch.int32 and one.is_contiguous() and torch.equal(one, other)
    outputs, inputs = mask.numel(), len(mask) * math.prod(size)
    rooms = [(0, 0), (outputs, inputs), (outputs // 2, inputs // 2), (outputs, inputs // 3), (outputs // 3, inputs)]
    for room, own in zip((*rooms, tuple(expected[3].tolist())), itertools.cycle((mask, signed, signed.half()))):
        fixed = sparse._neighbour_table(mask, size, *window, padding, room)
        actual = operators.neighbour_table(own, size, *window, padding, room, seed=next(SEEDS))
        for one, other in zip(actual, fixed, strict=True):
            assert one.dtype == torch.int32 and one.is_contiguous() and torch.equal(one, other)
    geometry = (size, mask.shape[2:], *window, padding)
    for positions in (expected[0], torch.cat([expected[0], expected[0].new_full((3,), -1)])):
        actual = operators.window_table(positions, *geometry, seed=next(SEEDS))
        assert actual.dtype == torch.int32
        assert torch.equal(actual, sparse._window_table(positions, *geometry))


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("case", [c for c in CONVOLUTIONS if math.prod(c[1]) < 10000], ids=str)
def test_tables(operators, case, density):
    B, size, kernel, stride, dilation = case
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))
    output = tuple((n - 1) // s + 1 for n, s in zip(size, stride, strict=True))
    check_tables(operators, torch.rand(B, 1, *output) < density, size, (kernel, stride, dilation), padding)


# Around the ends of words, of blocks, and of what a block counts at once, 1024 words.
@pytest.mark.parametrize("positions", [31, 32, 33, 63, 64, 65, 255, 256, 257, 32766, 32768, 32770])
def test_sets_of_positions(operators, positions):
    width = positions if positions < 300 else positions // 2
    mask = torch.rand(1, 1, positions // width, width) < 0.5
    mask[..., -1, -1] = True
    check_tables(operators, mask, mask.shape[2:], ((1, 3), (1, 1), (1, 1)), (0, 1))


pairs = st.tuples(*2 * [st.integers(1, 3)])


@given(st.integers(1, 3), st.tuples(*2 * [st.integers(1, 20)]), pairs, pairs, pairs, st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_random_tables(operators, B, size, kernel, stride, dilation, density):
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))
    spans = (n + 2 * p - d * (k - 1) - 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True))
    output = tuple(max(n, 0) // s + 1 for n, s in zip(spans, stride, strict=True))
    check_tables(operators, torch.rand(B, 1, *output) < density, size, (kernel, stride, dilation), padding)


@pytest.mark.parametrize("room", [(13, 5), (-1, 5), (12, 36), (12, 5, 5)], ids=str)
def test_capacities_that_cannot_be(operators, room):
    with pytest.raises(RuntimeError, match="capacity must be two numbers up to 12 and 35"):
        operators.neighbour_table(torch.ones(1, 1, 3, 4), (5, 7), (3, 3), (2, 2), (1, 1), (1, 1), room)
