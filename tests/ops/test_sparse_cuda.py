"""The CUDA kernels of sparse execution against the references on the CPU. `benchmarks/gpu.sh tests` runs these."""

import math

import pytest
import torch
from on_gpu import DEVICE, DTYPES, TOLERANCE, needs_gpu

from timm_dynamic.ops.sparse import definition as sparse

pytestmark = needs_gpu()

OPS = torch.ops.timm_dynamic
RELU6 = (0.0, 6.0)
NO_LIMITS = (-math.inf, math.inf)
LIMITS = pytest.mark.parametrize("limits", [RELU6, NO_LIMITS], ids=str)
CHANNELS = pytest.mark.parametrize("C", [1, 3, 8, 12, 24, 96, 130, 520, 1000])
ROWS = pytest.mark.parametrize("M", [0, 1, 33, 1030])


@pytest.fixture(autouse=True)
def _setup():
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def randn(*shape, dtype=torch.float32):
    """In float64 on the CPU, but rounded to `dtype`."""
    return torch.randn(shape).to(dtype).double()


def table(M, T, P):
    """Rows of a source, one in four outside; row 0 is never named, such that it may hold anything."""
    return torch.where(torch.rand(M, T) < 0.25, -1, torch.randint(1, P, (M, T))).int()


def on_gpu(tensors, dtype):
    """Float tensors in `dtype`, the others as they are."""
    return [
        t if not isinstance(t, torch.Tensor) else t.to(DEVICE, dtype if t.is_floating_point() else t.dtype)
        for t in tensors
    ]


def misaligned(t):
    """The same numbers at an address that no vector of them can have."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


def check(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=1).item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@DTYPES
@CHANNELS
@ROWS
class TestRows:
    def test_gather_rows(self, M, C, dtype):
        source, rows = 4 * torch.randn(40, C).to(dtype), table(M, 3, 40)
        expected = [sparse._gather_rows(source, rows, *limits) for limits in (RELU6, NO_LIMITS)]
        source[0] = math.nan
        source, rows = source.to(DEVICE), rows.to(DEVICE)
        for from_ in (source, misaligned(source)):
            for limits, own in zip((RELU6, NO_LIMITS), expected, strict=True):
                assert torch.equal(OPS.gather_rows(from_, rows, *limits).cpu(), own)

    def test_scatter_rows(self, M, C, dtype):
        out, positions = randn(M + 3, C, dtype=dtype), torch.randperm(M + 3)[:M].int()
        rows = randn(M, C, dtype=dtype)
        nowhere = torch.rand(M) < 0.3
        positions[nowhere], rows[nowhere] = -1, math.nan
        out[0, 0] = math.nan
        for limits in (RELU6, NO_LIMITS):
            for place in (lambda t: t, misaligned):
                expected, actual = out.clone(), place(out.to(DEVICE, dtype))
                sparse._scatter_rows_(expected, positions, rows, *limits)
                OPS.scatter_rows_(actual, *on_gpu([positions, rows], dtype), *limits)
                where_nan = expected.isnan()
                assert torch.equal(actual.isnan().cpu(), where_nan)
                check(actual.nan_to_num(0), expected.masked_fill(where_nan, 0), dtype)
                untouched = torch.ones(M + 3, dtype=torch.bool)
                untouched[positions[~nowhere].long()] = False
                assert torch.equal(actual.cpu().double().nan_to_num(9)[untouched], out.nan_to_num(9)[untouched])

    def test_gather_depthwise(self, M, C, dtype):
        source, rows = randn(40, C, dtype=dtype), table(M, 9, 40)
        weight, bias = randn(9, C, dtype=dtype), randn(C, dtype=dtype)
        for limits in (RELU6, NO_LIMITS):
            expected = sparse._gather_depthwise(source, rows, weight, bias, *limits)
            args = on_gpu([source, rows, weight, bias], dtype)
            args[0][0] = math.nan
            check(OPS.gather_depthwise(*args, *limits), expected, dtype)
            args[0] = misaligned(args[0])
            check(OPS.gather_depthwise(*args, *limits), expected, dtype)


@DTYPES
@LIMITS
@pytest.mark.parametrize("size", [(0, 9, 5, 7), (1, 9, 24, 16), (70, 9, 16, 24), (300, 1, 130, 40)], ids=str)
def test_products(size, limits, dtype):
    M, T, C, N = size
    source, rows = randn(40, C, dtype=dtype), table(M, T, 40)
    matrix, bias = randn(T * C, N, dtype=dtype) / 16, randn(N, dtype=dtype)
    expected = sparse._gather_conv(source, rows, sparse.pack_matrix(matrix), bias, *limits)
    args = on_gpu([source, rows, matrix, bias], dtype)
    args[0][0], args[2] = math.nan, sparse.pack_matrix(args[2])
    check(sparse.gather_conv(*args, *limits), expected, dtype)
    check(OPS.gather_conv(*args, *limits), expected, dtype)
    positions, out = torch.randperm(M + 3)[:M].int(), randn(M + 3, N, dtype=dtype)
    actual = out.to(DEVICE, dtype)
    sparse._scatter_conv_(out, positions, source, rows, sparse.pack_matrix(matrix), bias, *limits)
    sparse.scatter_conv_(actual, positions.to(DEVICE), *args, *limits)
    check(actual, out, dtype)


# Batch, map, kernel size, stride, dilation.
CONVOLUTIONS = [
    (0, (5, 4), (3, 3), (1, 1), (1, 1)),
    (1, (1, 1), (3, 3), (2, 2), (1, 1)),
    (2, (7, 9), (1, 1), (1, 1), (1, 1)),
    (3, (8, 5), (3, 3), (2, 2), (1, 1)),
    (3, (13, 8), (3, 5), (1, 3), (2, 1)),
    (5, (57, 40), (3, 3), (1, 1), (1, 1)),
    (2, (200, 100), (3, 3), (1, 1), (3, 3)),  # sets of more words than a block counts at once
    (9, (14, 14), (5, 5), (2, 2), (50, 1)),
]


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_tables(case, density):
    B, size, kernel, stride, dilation = case
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))
    output, window = tuple((n - 1) // s + 1 for n, s in zip(size, stride, strict=True)), (kernel, stride, dilation)
    mask = torch.rand(B, 1, *output) < density
    expected = sparse._neighbour_table(mask, size, *window, padding)
    signed = torch.where(mask, 1.0, -0.0)
    for own in (mask, signed, signed.half(), signed.bfloat16()):
        actual = OPS.neighbour_table(own.to(DEVICE), size, *window, padding, None)
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == torch.int32 and one.is_contiguous() and torch.equal(one.cpu(), other)
    outputs, inputs = mask.numel(), B * math.prod(size)
    for room in ((outputs, inputs), (outputs // 2, inputs // 2), (outputs // 3, inputs), tuple(expected[3].tolist())):
        fixed = sparse._neighbour_table(mask, size, *window, padding, room)
        for own in (mask, signed, signed.bfloat16()):
            actual = OPS.neighbour_table(own.to(DEVICE), size, *window, padding, room)
            for one, other in zip(actual, fixed, strict=True):
                assert one.dtype == torch.int32 and one.is_contiguous() and torch.equal(one.cpu(), other)
    positions = torch.cat([expected[0], expected[0].new_full((3,), -1)])
    geometry = (size, output, *window, padding)
    actual = OPS.window_table(positions.to(DEVICE), *geometry)
    assert actual.dtype == torch.int32
    assert torch.equal(actual.cpu(), sparse._window_table(positions, *geometry))


def arguments(dtype=torch.float32):
    """Of every operator, on the GPU."""
    source, rows, bias = randn(30, 5), table(6, 9, 30), randn(5)
    window = ([3, 3], [2, 2], [1, 1], [1, 1])
    every = {
        "gather_rows": (source, rows, *RELU6),
        "scatter_rows_": (randn(8, 7), torch.arange(6).int(), randn(6, 7), *RELU6),
        "gather_depthwise": (source, rows, randn(9, 5), bias, *RELU6),
        "window_table": (torch.tensor([0, 5, 23]).int(), [5, 7], [3, 4], *window),
        "neighbour_table": (torch.rand(2, 1, 3, 4) < 0.5, [5, 7], *window, None),
        "neighbour_table with a capacity": (torch.rand(2, 1, 3, 4) < 0.5, [5, 7], *window, [9, 40]),
    }
    return {name: on_gpu(args, dtype) for name, args in every.items()}


OPERATORS = ["gather_rows", "scatter_rows_", "gather_depthwise", "window_table", "neighbour_table"]
OPERATORS += ["neighbour_table with a capacity"]
every_operator = pytest.mark.parametrize("name", OPERATORS)


@every_operator
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name.split()[0]).default, tuple(arguments()[name]))


@every_operator
def test_another_stream(name):
    """Inputs that another stream has yet to write."""
    args = arguments()[name]
    late = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in args]

    def call(args):
        result = getattr(OPS, name.split()[0])(*args)
        return args[0] if name == "scatter_rows_" else result

    expected = call([a.clone() if isinstance(a, torch.Tensor) else a for a in args])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on the default stream would overtake this
        for to, from_ in zip(late, args, strict=True):
            if isinstance(to, torch.Tensor):
                to.copy_(from_)
        actual = call(late)
    stream.synchronize()
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, expected)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
@every_operator
def test_another_device(name):
    args = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in arguments()[name]]
    with torch.cuda.device(0):
        getattr(OPS, name.split()[0])(*args)
    torch.cuda.synchronize(1)


@pytest.mark.parametrize(
    ("name", "index", "change", "message"),
    [
        ("gather_rows", 0, lambda t: t.t().contiguous().t(), "source must be contiguous"),
        ("gather_rows", 0, torch.Tensor.double, "source must be contiguous float32, float16 or bfloat16"),
        ("gather_rows", 1, torch.Tensor.long, "table must be contiguous int32"),
        ("scatter_rows_", 0, lambda t: t.t().contiguous().t(), "out must be contiguous"),
        ("scatter_rows_", 1, lambda t: t[:5], "rows must be 35 contiguous"),
        ("scatter_rows_", 2, torch.Tensor.half, "rows must be 42 contiguous"),
        ("gather_depthwise", 1, lambda t: t[:, :8], "table must be contiguous"),
        ("gather_depthwise", 2, lambda t: t[:8], "weight must be 45 contiguous"),
        ("gather_depthwise", 3, torch.Tensor.cpu, "bias must be 5 contiguous elements of the same dtype and device"),
        ("window_table", 0, torch.Tensor.long, "positions must be contiguous int32"),
        ("window_table", 4, lambda stride: [1 << 16, 1], "stride must be in .1, 32768., got 65536"),
        ("neighbour_table", 0, torch.Tensor.double, "mask must be"),
        ("neighbour_table", 0, lambda t: t.transpose(2, 3), "mask must be"),
        ("neighbour_table", 1, lambda size: size + [1], "must be pairs, got 3"),
        ("neighbour_table with a capacity", 6, lambda room: [25, 40], "capacity must be two numbers up to 24 and 70"),
    ],
)
def test_bad_arguments_are_refused(name, index, change, message):
    args = arguments()[name]
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, name.split()[0])(*args)
