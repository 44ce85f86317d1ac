"""The CUDA kernels for inference on the CPU (tests/cuda_on_host), against the references.

The operators and kernels are those that run on a GPU; test_inference_cuda.py has the same cases for one, and more.
"""

import functools
import itertools
import math

import cuda_on_host
import pytest
import torch
from on_gpu import MIXED_DTYPES, every_layout
from ops.test_inference_cuda import (
    LIMITS,
    NAMES,
    REFERENCES,
    REFUSED,
    SHAPES,
    SHAPES_OF_MAPS,
    arguments,
    check_affine,
    check_operator,
    flat,
)

pytestmark = cuda_on_host.needs_compiler
operators = cuda_on_host.operators("inference")
SEEDS = itertools.cycle(range(4))


@every_layout
@MIXED_DTYPES
@LIMITS
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 3, 3)], ids=str)
def test_affine(operators, shape, limits, dtype, wide, layout):
    y, scale, shift, *_ = arguments("affine_", shape, layout, dtype, wide)
    check_affine(functools.partial(operators.affine_, seed=next(SEEDS)), y, scale, shift, limits)


@every_layout
@MIXED_DTYPES
@SHAPES_OF_MAPS
@pytest.mark.parametrize("name", REFERENCES)
def test_results(operators, name, shape, dtype, wide, layout):
    run = functools.partial(getattr(operators, name), seed=next(SEEDS))
    check_operator(run, name, arguments(name, shape, layout, dtype, wide), wide)


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_parts_of_the_map(operators, processors):
    """How the mean is cut depends on the GPU; the result does not."""
    run = functools.partial(operators.dcd_factors, processors=processors)
    check_operator(run, "dcd_factors", arguments("dcd_factors", (1, 12, 37, 31), "channels_last"), False)


def test_nan_and_limits(operators):
    y = torch.tensor([math.nan, math.inf, -math.inf, 1.0]).view(1, 1, 2, 2)
    operators.affine_(y, torch.ones(1), torch.ones(1), 0.0, 6.0)
    assert y.isnan().flatten().tolist() == [True, False, False, False]
    assert y.flatten()[1:].tolist() == [6, 0, 2]


@every_layout
@pytest.mark.parametrize("name", REFERENCES)
def test_nan_stays_in_its_sample(operators, name, layout):
    args = arguments(name, (3, 24, 9, 7), layout)
    args[0][1, 3, 2, 2] = math.nan
    for out in flat(getattr(operators, name)(*args)):
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("name", "index", "change", "message"), REFUSED)
def test_bad_arguments_are_refused(operators, name, index, change, message):
    assert name in NAMES
    args = arguments(name, (2, 24, 7, 9))
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        getattr(operators, name)(*args)
