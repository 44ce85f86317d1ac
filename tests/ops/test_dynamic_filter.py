"""The operator dynamic_filter, and ddf, against their formula, with and without the compiled kernels."""

import itertools

import pytest
import torch
from filter_cases import (
    BACKENDS,
    CASES,
    KERNEL,
    LAYOUTS,
    TOLERANCE,
    arranged,
    assert_close,
    call,
    definition,
    formula,
    inputs,
    of_case,
    operands,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_dynamic import use
from timm_dynamic.ops import ddf, dynamic_filter


@BACKENDS
@pytest.mark.parametrize("case", CASES)
def test_formula(backend, case):
    tensors, options = of_case(case)
    expected = call(formula, **options)(*tensors)
    with backend():
        for layout in ("contiguous", "channels_last"):
            assert_close(call(dynamic_filter, **options)(*arranged(*tensors, layout)), expected, torch.float64)


@KERNEL.marks[0]
@pytest.mark.parametrize("case", CASES)
def test_kernels_in_both_layouts_and_all_dtypes(case):
    for dtype, spatial in zip(TOLERANCE, ("one", "full", "full", "one"), strict=True):
        tensors, options = of_case(case, dtype, spatial=spatial)
        wide = [None if t is None else t.double() for t in tensors]
        expected = with_gradients(call(definition, **options), wide)
        for layout in ("contiguous", "channels_last"):
            actual = with_gradients(call(dynamic_filter, **options), arranged(*tensors, layout))
            for a, e in zip(actual, expected, strict=True):
                assert a.shape == e.shape
                assert_close(a, e, dtype)


@KERNEL.marks[0]
@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)  # small sums of large numbers are inexact
def test_kernels_in_random_cases(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    parts, members, inner = draw(1, 1, 2, 3), draw(1, 2, 3, 5, 8, 16, 17), draw(1, 1, 2, 3, 8, 12, 16)
    C, G, K = parts * members * inner, parts * inner, draw(1, 3, 3, 5, 7)
    stride, upsample = draw((1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (1, 3))
    grouping = draw("blocks", "interleaved", "interleaved")
    shape = (draw(0, 1, 2), C, data.draw(st.integers(1, 12)), data.draw(st.integers(1, 20)))
    options = {"kernel_size": K, "dilation": draw(1, 1, 2, 3), "stride": stride, "upsample": upsample}
    options |= {"grouping": grouping, "parts": parts, "kernel_combine": draw("mul", "add")}
    factors, dtype, layout = (
        (draw("none", "full", "one"), draw("full", "full", "one")),
        draw(*TOLERANCE),
        draw(*LAYOUTS),
    )
    tensors = operands(shape, G, K, stride, upsample, *factors, dtype, data.draw(st.integers(0, 9)))
    wide = [None if t is None else t.double() for t in tensors]
    expected = with_gradients(call(definition, **options), wide)
    actual = with_gradients(call(dynamic_filter, **options), arranged(*tensors, layout))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert_close(a, e, dtype)


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_ddf(backend, layout):
    shapes = ((1, 1, 1, 1), (2, 1, 5, 3), (3, 37, 8, 9), (2, 64, 7, 7))
    for shape, dtype, stride in itertools.product(shapes, TOLERANCE, (1, 2)):
        args = tuple(LAYOUTS[layout](t) for t in inputs(*shape, 3, stride, dtype, seed=stride))
        with backend():
            out = ddf(*args, stride=stride)
        with use("formula"):
            assert_close(out, ddf(*(t.double() for t in args), stride=stride), dtype)
        if layout == "channels_last" and shape[1] > 1 and min(shape[2:]) > 1:
            assert out.is_contiguous(memory_format=torch.channels_last)


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_empty_batch(backend, dtype):
    args = tuple(t.requires_grad_() for t in inputs(0, 4, 6, 5, dtype=dtype))
    with backend():
        out = ddf(*args)
        out.sum().backward()
    assert out.shape == (0, 4, 6, 5)
    assert [t.grad.shape for t in args] == [t.shape for t in args]


@BACKENDS
def test_empty_batch_with_shared_filters_gives_zero_gradients(backend):
    args = inputs(0, 4, 6, 5, filters=("one", "one"), requires_grad=True)
    with backend():
        ddf(*args).sum().backward()
    assert args[1].grad.abs().sum() == 0 and args[2].grad.abs().sum() == 0


@BACKENDS
def test_degenerate_filters_are_known_operators(backend):
    features, channel, spatial = inputs(2, 6, 9, 8)
    with backend():
        depthwise = ddf(features, channel, torch.ones(1, 9, 1, 1, dtype=torch.float64))
        depthwise_add = ddf(features, channel, torch.zeros(1, 9, 1, 1, dtype=torch.float64), kernel_combine="add")
        involution = ddf(features, torch.ones(1, 1, 3, 3, dtype=torch.float64), spatial)
    expected = torch.nn.functional.conv2d(
        features.reshape(1, 12, 9, 8), channel.reshape(12, 1, 3, 3), padding=1, groups=12
    ).reshape(2, 6, 9, 8)
    torch.testing.assert_close(depthwise, expected)
    torch.testing.assert_close(depthwise_add, expected)
    patches = torch.nn.functional.unfold(features, 3, padding=1).reshape(2, 6, 9, 9, 8)
    torch.testing.assert_close(involution, (patches * spatial[:, None]).sum(2))


@KERNEL.marks[0]
def test_kernel_is_deterministic_and_leaves_inputs_alone():
    for name, layout in itertools.product(
        ("ddf, heads", "ska", "involution", "carafe"), ("contiguous", "channels_last")
    ):
        tensors, options = of_case(name, torch.float32)
        args = arranged(*tensors, layout)
        before = [None if t is None else t.clone() for t in args]
        first, second = (with_gradients(call(dynamic_filter, **options), args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(a is None or torch.equal(a, b) for a, b in zip(args, before, strict=True))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    args = inputs(2, 4, 6, 5, dtype=torch.float32, requires_grad=True)
    mixed = (args[0].to(dtype), *args[1:])  # as after an autocast convolution
    with backend(), torch.autocast("cpu", dtype):
        out = ddf(*mixed)
    out.sum().backward()
    with use("formula"):
        assert_close(out, ddf(*(t.detach().double() for t in args)), dtype)
    assert [t.grad.dtype for t in args] == [torch.float32] * 3


X, INT = torch.zeros(2, 4, 6, 5), torch.int32
BAD = {
    "even K": (dict(kernel_size=4), "kernel_size must be odd and positive, got 4"),
    "negative K": (dict(kernel_size=-1), "kernel_size must be odd and positive, got -1"),
    "dilation": (dict(dilation=0), "dilation must be at least 1, got 0"),
    "stride": (dict(stride=0), "stride must be at least 1, got 0"),
    "upsample": (dict(upsample=0), "upsample must be at least 1, got 0"),
    "both": (dict(upsample=2, stride=2), "only one of stride and upsample may differ from 1, got 2 and 2"),
    "combine": (dict(kernel_combine="div"), "kernel_combine must be .*, got 'div'"),
    "grouping": (dict(grouping="random"), "grouping must be .*, got 'random'"),
    "parts": (dict(parts=3), "parts must divide the 2 filters, got 3"),
    "groups": (dict(filters=torch.zeros(2, 3, 9, 6, 5)), "number of filters must divide the 4 channels, got 3"),
    "rank": (dict(x=torch.zeros(3, 4, 5)), r"x must be \[B, C, H, W\].*got shape \[3, 4, 5\]"),
    "no pixels": (dict(x=torch.zeros(2, 4, 0, 5)), r"x must be .*got shape \[2, 4, 0, 5\]"),
    "channels": (
        dict(channel_filter=torch.zeros(2, 3, 9)),
        r"channel_filter must have shape \[2, 4, 9\].*got \[2, 3, 9\]",
    ),
    "rank of the channel filter": (
        dict(channel_filter=torch.zeros(2, 4, 3, 3)),
        r"channel_filter .*got \[2, 4, 3, 3\]",
    ),
    "rank of the filters": (dict(filters=torch.zeros(2, 9, 6, 5)), r"filters must be .*got shape \[2, 9, 6, 5\]"),
    "positions": (
        dict(filters=torch.zeros(2, 2, 9, 6, 4)),
        r"filters must have shape \[2, 2, 9, 6, 5\].*got \[2, 2, 9, 6, 4\]",
    ),
    "taps": (dict(filters=torch.zeros(2, 2, 1, 6, 5)), r"filters .*got \[2, 2, 1, 6, 5\]"),
    "batch": (dict(filters=torch.zeros(3, 2, 9, 6, 5)), r"filters .*got \[3, 2, 9, 6, 5\]"),
    "dtype": (
        dict(channel_filter=torch.zeros(2, 4, 9).double()),
        "channel_filter must have the dtype of x, torch.float32, got torch.float64",
    ),
    "integers": (
        dict(x=X.to(INT), filters=torch.zeros(2, 2, 9, 6, 5, dtype=INT)),
        "x must be one of .*got torch.int32",
    ),
    "device": (
        dict(filters=torch.zeros(2, 2, 9, 6, 5, device="meta")),
        "filters must be on the device of x, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        dynamic_filter(**{"x": X, "filters": torch.zeros(2, 2, 9, 6, 5), **change})


def test_bad_filters_of_ddf():
    features, channel, spatial = inputs(2, 4, 6, 5)
    with pytest.raises(ValueError, match=r"channel_filter must be \[B, C, 3, 3\], got \[2, 4, 9\]"):
        ddf(features, channel.flatten(2), spatial)
    with pytest.raises(ValueError, match=r"spatial_filter must be .*got shape \[2, 1, 9, 6, 5\]"):
        ddf(features, channel, spatial[:, None])


@KERNEL.marks[0]
@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(2, 4, 6)},
        {1: torch.zeros(2, 3, 9, 6, 5)},
        {1: torch.zeros(2, 2, 9, 6, 4)},
        {1: torch.zeros(2, 9, 6, 5)},
        {2: torch.zeros(2, 4, 9, dtype=torch.float64)},
        {2: torch.zeros(2, 3, 9)},
        {3: 2},
        {4: "div"},
        {5: 3},
        {6: 0},
        {7: 0},
        {7: 2, 8: 2},
        {8: 0},
    ],
    ids=str,
)
def test_raw_operator_refuses_what_would_read_out_of_bounds(change):
    args = [X, torch.zeros(2, 2, 9, 6, 5), torch.zeros(2, 4, 9), 3, "mul", 1, 1, 1, 1]
    for index, value in change.items():
        args[index] = value
    with pytest.raises(RuntimeError):
        torch.ops.timm_dynamic.dynamic_filter(*args)
