"""The CUDA kernels of dynamic_filter on the CPU (tests/cuda_on_host), against the reference in float64.

The operators and kernels are those that run on a GPU; test_dynamic_filter_cuda.py has the same cases for one, and more.
"""

import itertools

import cuda_on_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_dynamic_filter_cuda import LAYOUTS, NAMES, TOLERANCE, backward, definition, forward, inputs, run

pytestmark = cuda_on_host.needs_compiler
operators = cuda_on_host.operators("dynamic_filter")

FILTERS = (("full", "full"), ("one", "full"), ("full", "one"))


def check(operators, shape, options, dtype, layout, seed, filters=FILTERS[0], processors=4, filter_layout="contiguous"):
    K, _, stride, _ = options
    expected = inputs(shape, K, stride, dtype, seed, filters)
    features, channel, spatial, grad = (t.to(dtype) for t in expected)
    features, spatial = LAYOUTS[layout](features), LAYOUTS[filter_layout](spatial)
    how = {"seed": seed, "processors": processors}
    out = forward(operators.dynamic_filter, features, channel, spatial, *options, **how)
    tensors = (grad, features, channel, spatial)
    grads = backward(operators.dynamic_filter_backward, *tensors, *options, [True] * 3, **how)
    for name, actual, wanted in zip(NAMES, (out, *grads), run(definition, expected, options), strict=True):
        assert actual.dtype == dtype and actual.shape == wanted.shape, name
        scale = wanted.abs().max().clamp(min=1).item() if wanted.numel() else 1.0
        torch.testing.assert_close(
            actual.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


SHAPES = [(1, 1, 1, 1), (2, 1, 5, 3), (1, 5, 1, 17), (2, 16, 33, 1), (3, 37, 8, 9), (2, 64, 7, 7), (1, 68, 6, 12)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_layouts_dtypes(operators, layout):
    for i, (shape, stride) in enumerate(itertools.product(SHAPES, (1, 2))):
        dtype = list(TOLERANCE)[(i + i // 2) % 4]
        check(operators, shape, (3, 1, stride, "mul"), dtype, layout, i % 4)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_kernel(operators, layout, kernel_size):
    for shape, dtype, stride in itertools.product([(1, 8, 5, 12), (2, 5, 7, 9)], TOLERANCE, (1, 2)):
        check(operators, shape, (kernel_size, 1, stride, "mul"), dtype, layout, stride + 1)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize(("layout", "shape"), [("contiguous", (1, 70, 3, 8)), ("channels_last", (2, 8, 16, 40))])
def test_walks_of_several_batches(operators, layout, shape, kernel_size):
    """On a GPU of one processor: blocks are as few as can be."""
    for seed in (1, 2, 3):
        check(operators, shape, (kernel_size, 1, 1, "mul"), torch.float32, layout, seed, processors=1)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_options(operators, layout, kernel_size):
    for dilation, stride in itertools.product((1, 2, 3), (1, 2, 3)):
        options = (kernel_size, dilation, stride, "mul" if (dilation + stride) % 2 else "add")
        check(operators, (2, 20, 6, 12), options, torch.float32, layout, stride)


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)  # small sums of large numbers are inexact
def test_random_cases(operators, data):
    K, dilation, stride, channels, *rest = (
        data.draw(st.sampled_from(x))
        for x in (
            (1, 3, 3, 3, 5, 7),
            (1, 1, 2, 50),
            (1, 1, 2, 3, 50),
            (1, 2, 7, 16, 33, 64, 132),
            (1, 7, 12, 28),
            ("mul", "add"),
            list(TOLERANCE),
            list(LAYOUTS),
            FILTERS,
            (1, 4, 132),
            ("contiguous", "channels_last", "every second column"),
        )
    )
    width, combine, dtype, layout, filters, processors, filter_layout = rest
    shape = (data.draw(st.sampled_from([1, 2, 5])), channels, data.draw(st.integers(1, 9)), width)
    seed = data.draw(st.integers(0, 9))
    check(operators, shape, (K, dilation, stride, combine), dtype, layout, seed, filters, processors, filter_layout)


@pytest.mark.parametrize("filters", FILTERS, ids="-".join)
def test_empty_batch(operators, filters):
    check(operators, (0, 4, 6, 5), (3, 1, 1, "mul"), torch.float32, "contiguous", 0, filters)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_only_where_wanted(operators, layout, needs):
    features, channel, spatial, grad = (t.float() for t in inputs((2, 36, 9, 8)))
    args = (grad, LAYOUTS[layout](features), channel, spatial, 3, 1, 1, "mul")
    every = backward(operators.dynamic_filter_backward, *args, [True, True, True], seed=1)
    some = backward(operators.dynamic_filter_backward, *args, list(needs), seed=2)
    for need, a, b in zip(needs, some, every, strict=True):
        assert torch.equal(a, b) if need else a.shape == (0,)
