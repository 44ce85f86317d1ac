"""The CUDA kernels of scaled_sum on the CPU (tests/cuda_on_host), against the reference.

The operators and kernels are those that run on a GPU, but for the instruction of its tensor cores;
test_scaled_sum_cuda.py has the same cases for one, and more.
"""

import itertools
import math

import cuda_on_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import LAYOUTS, MIXED_DTYPES, TOLERANCE, every_layout
from ops.test_scaled_sum_cuda import (
    CASES,
    REFUSED_PROJECTIONS,
    arguments,
    check,
    check_projection,
    expected_of,
    forward_and_backward,
    other_layouts,
    projection,
)

pytestmark = cuda_on_host.needs_compiler
operators = cuda_on_host.operators("scaled_sum")
SEEDS = itertools.cycle(range(4))


@every_layout
@MIXED_DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results(operators, case, dtype, wide, layout):
    args = arguments(case, layout, dtype, wide)
    check(forward_and_backward(operators, *args, seed=next(SEEDS)), expected_of(*args), args[1:])


sizes = st.tuples(st.integers(1, 2), st.integers(1, 150), st.integers(1, 60), st.integers(1, 9), st.integers(1, 20))


@given(sizes, st.sampled_from(list(LAYOUTS)), st.sampled_from(list(TOLERANCE)), st.booleans(), st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_random_cases(operators, case, layout, dtype, wide, processors):
    args = arguments(case, layout, dtype, wide)
    actual = forward_and_backward(operators, *args, seed=next(SEEDS), processors=processors)
    check(actual, expected_of(*args), args[1:])


@every_layout
@pytest.mark.parametrize("processors", [1, 200])
def test_parts_of_the_channels(operators, processors, layout):
    """How the walk is cut depends on the GPU; the sum of the parts does not."""
    args = arguments((1, 1100, 9, 3, 3), layout, torch.float32, False)
    check(forward_and_backward(operators, *args, processors=processors), expected_of(*args), args[1:])


@every_layout
@MIXED_DTYPES
def test_other_layouts(operators, dtype, wide, layout):
    args = arguments((2, 24, 9, 4, 6), layout, dtype, wide)
    expected = expected_of(*args)
    for own in other_layouts(*args):
        for one, other in zip(forward_and_backward(operators, *own), expected, strict=True):
            atol = TOLERANCE[dtype] * other.abs().max().item()
            torch.testing.assert_close(one.double().view(other.shape), other, rtol=0, atol=atol)


@every_layout
@MIXED_DTYPES
def test_nan_stays_in_its_sample(operators, dtype, wide, layout):
    grad, y, scale, p, v = arguments((3, 24, 9, 4, 6), layout, dtype, wide)
    grad[1, 3, 2, 2] = y[1, 5, 1, 1] = v[1, 2, 0, 0] = math.nan
    out, dy, dscale, dv = forward_and_backward(operators, grad, y, scale, p, v, seed=next(SEEDS))
    assert all(t[[0, 2]].isfinite().all() for t in (out, dy, dscale, dv))
    assert out[1, :, 0, 0].isnan().all() and out[1].isnan().sum() == 25
    assert dy[1].isnan().sum() == 1 and dscale[1].isnan().sum() == 2 and dv[1].isnan().sum() == 9


def test_float16_keeps_large_numbers_finite(operators):
    y, scale, p, v = arguments((1, 8, 3, 2, 2), "NCHW", torch.float16, True)[1:]
    assert operators.scaled_sum(y, scale, p * 0, v + 1e6).isfinite().all()


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, torch.Tensor.double, "y must be"),
        (2, lambda t: t[:, 1:], "scale must have shape .2, 24"),
        (3, lambda t: t[:, :0], "p must be .O, L"),
        (4, lambda t: t[:, :, 1:], "v must have shape"),
        (4, torch.Tensor.double, "v must be beside"),
        (0, lambda t: t[:1], "grad must have shape"),
    ],
)
def test_bad_arguments_are_refused(operators, index, change, message):
    args = arguments((2, 24, 9, 4, 6), "NCHW", torch.float32, False)
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        operators.scaled_sum_backward(*args)


@every_layout
@MIXED_DTYPES
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_projection(operators, case, dtype, wide, layout):
    check_projection(operators, *projection(case, layout, dtype, wide), seed=next(SEEDS))


@pytest.mark.parametrize(("index", "change", "message"), REFUSED_PROJECTIONS)
def test_bad_arguments_of_projections_are_refused(operators, index, change, message):
    args = [*projection((2, 24, 9, 4, 6), "NCHW", torch.float32, False)]
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        operators.sum_and_project_backward(*args)
