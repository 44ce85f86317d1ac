"""The operators of spatially sparse execution against their references, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import in_turns

from timm_dynamic.ops import backend_info
from timm_dynamic.ops.registration import OPERATORS
from timm_dynamic.ops.sparse import definition as sparse

needs_kernels = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")
OPS = torch.ops.timm_dynamic
RELU6 = (0.0, 6.0)
NO_LIMITS = (-math.inf, math.inf)


def defined(name):
    """An operator's definition."""
    return OPERATORS[name].definition


# Of products: M, T, C, N. Few rows; tiles that are not full; more rows, inputs or outputs than one block of the kernel.
SIZES = [(m, 9, 5, 7) for m in range(21)]
SIZES += [(13, 1, 24, n) for n in (1, 16, 24, 48, 64, 96, 130)]
SIZES += [(500, 9, 16, 16), (7, 3, 300, 33), (250, 1, 257, 80)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def table(M, T, P):
    """Rows of a source, one in four outside; row 0 is never named, such that it may hold anything."""
    return torch.where(torch.rand(M, T) < 0.25, -1, torch.randint(1, P, (M, T))).int()


def product(M, T, C, N, P=40):
    """Arguments of `gather_conv` but the limits, the matrix unpacked."""
    return torch.randn(P, C), table(M, T, P), torch.randn(T * C, N) / math.sqrt(T * C), torch.randn(N)


def check(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)


def in_float64(matrix):
    return sparse.pack_matrix(matrix.double())


@needs_kernels
@pytest.mark.parametrize(("size", "limits"), in_turns(SIZES, (RELU6, NO_LIMITS)), ids=str)
class TestProducts:
    def test_gather_conv(self, size, limits):
        source, rows, matrix, bias = product(*size)
        expected = defined("gather_conv")(source.double(), rows, in_float64(matrix), bias.double(), *limits)
        source[0] = math.nan
        check(OPS.gather_conv(source, rows, sparse.pack_matrix(matrix), bias, *limits), expected)

    def test_without_a_table(self, size, limits):
        source, _, matrix, bias = product(size[0], 1, *size[2:], P=max(size[0], 2))
        source = source[: size[0]]
        expected = (source.double() @ matrix.double() + bias).clamp(*limits)
        args = (sparse.pack_matrix(matrix), bias, *limits)
        check(OPS.gather_conv(source, None, *args), expected)
        positions = torch.randperm(len(source) + 3).int()[: len(source)]
        out = torch.zeros(len(source) + 3, size[3])
        OPS.scatter_conv_(out, positions, source, None, *args)
        check(out[positions.long()], expected)

    def test_scatter_conv(self, size, limits):
        source, rows, matrix, bias = product(*size)
        positions = torch.randperm(len(rows) + 3).int()[: len(rows)]
        positions[torch.rand(len(rows)) < 0.2] = -1
        out = torch.randn(len(rows) + 3, size[3])
        expected = out.double()
        others = (source.double(), rows, in_float64(matrix), bias.double(), *limits)
        defined("scatter_conv_")(expected, positions, *others)
        untouched = torch.ones(len(out), dtype=torch.bool)
        untouched[positions[positions >= 0].long()] = False
        before = out[untouched]
        source[0] = math.nan
        OPS.scatter_conv_(out, positions, source, rows, sparse.pack_matrix(matrix), bias, *limits)
        check(out, expected)
        assert torch.equal(out[untouched], before)


@needs_kernels
@pytest.mark.parametrize(
    ("M", "C", "limits"), in_turns((0, 1, 2, 15, 16, 17, 40), (1, 5, 16, 24, 96, 130), (RELU6, NO_LIMITS)), ids=str
)
def test_gather_depthwise(M, C, limits):
    source, rows, weight, bias = torch.randn(30, C), table(M, 9, 30), torch.randn(9, C), torch.randn(C)
    expected = defined("gather_depthwise")(source.double(), rows, weight.double(), bias.double(), *limits)
    source[0] = math.nan
    check(OPS.gather_depthwise(source, rows, weight, bias, *limits), expected)


@needs_kernels
def test_nan_and_infinity_pass():
    """As through a convolution and a clamp: NaN stays NaN."""
    source = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0]])
    out = OPS.gather_conv(source, None, sparse.pack_matrix(torch.ones(2, 3)), torch.zeros(3), *RELU6)
    torch.testing.assert_close(out[:, 0], torch.tensor([math.nan, 6.0, 0.0]), equal_nan=True)
    rows = torch.arange(3).int()[:, None]
    out = OPS.gather_depthwise(source, rows, torch.ones(1, 2), torch.zeros(2), *RELU6)
    torch.testing.assert_close(out[:, 0], torch.tensor([math.nan, 6.0, 0.0]), equal_nan=True)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 24, 48, 64, 80, 96, 130])
def test_pack_matrix(N):
    matrix = torch.randn(7, N)
    packed = sparse.pack_matrix(matrix)
    assert packed.shape[1] == 7 and packed.shape[2] in (16, 32, 48, 64) and packed.is_contiguous()
    columns = packed.transpose(0, 1).flatten(1)
    assert torch.equal(columns[:, :N], matrix) and not columns[:, N:].any()
    assert columns.shape[1] - N < 16


@pytest.mark.parametrize("limits", [RELU6, NO_LIMITS], ids=str)
@pytest.mark.parametrize("M", [0, 1, 9])
def test_products_of_three_parts(M, limits):
    """As on a GPU: every element by the definition."""
    source, rows, matrix, bias = (t.double() if t.is_floating_point() else t for t in product(M, 3, 5, 7))
    out, positions = torch.randn(M + 4, 7).double(), torch.randperm(M + 4)[:M].int()
    expected, scattered = torch.empty(M, 7).double(), out.clone()
    for m in range(M):
        taps = [source[at] if at >= 0 else torch.zeros(5).double() for at in rows[m].tolist()]
        expected[m] = bias + torch.cat(taps) @ matrix
        scattered[positions[m]] = (out[positions[m]] + expected[m]).clamp(*limits)
    args = (source, rows, matrix[None], bias)
    check(sparse.gather_conv(*args, *limits), expected.clamp(*limits))
    sparse.scatter_conv_(out, positions, *args, *limits)
    check(out, scattered)


SMALL = st.integers(1, 3)


@st.composite
def convolutions(draw):
    """Batch, size of the map, kernel size, stride, dilation; padded such that only strides make maps smaller."""
    B, H, W = draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kernel = (2 * draw(st.integers(0, 2)) + 1, 2 * draw(st.integers(0, 2)) + 1)
    stride, dilation = (draw(SMALL), draw(SMALL)), (draw(SMALL), draw(SMALL))
    return B, H, W, kernel, stride, dilation


def geometry(H, W, kernel, stride, dilation):
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))
    output = ((H - 1) // stride[0] + 1, (W - 1) // stride[1] + 1)
    return output, (kernel, stride, dilation, padding)


@given(convolutions(), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_tables_make_convolutions(case, density, seed):
    """The tables against a convolution; the kernel's against the reference's."""
    B, H, W, *conv = case
    output, window = geometry(H, W, *conv)
    torch.manual_seed(seed)
    mask = torch.rand(B, 1, *output) < density
    if B > 1:
        mask[0] = False
    positions, needed, table, _ = expected = defined("neighbour_table")(mask, (H, W), *window)
    assert all(t.dtype == torch.int32 for t in expected)
    assert torch.equal(positions, mask.flatten().nonzero()[:, 0].int())
    own = defined("window_table")(positions, (H, W), output, *window)
    if backend_info()["cpu"] == "loaded":
        for own_mask in (mask, mask.float()):
            for one, other in zip(OPS.neighbour_table(own_mask, [H, W], *window, None), expected, strict=True):
                assert torch.equal(one, other) and one.dtype == torch.int32
        assert torch.equal(OPS.window_table(positions, [H, W], output, *window), own)
        some = torch.cat([positions, positions.new_full((2,), -1)])
        assert torch.equal(
            OPS.window_table(some, [H, W], output, *window), torch.cat([own, own.new_full((2, own.shape[1]), -1)])
        )
        assert torch.equal(
            OPS.window_table(some, [H, W], output, *window), sparse.window_table(some, (H, W), output, *window)
        )

    x, weight = torch.randn(B, 2, H, W).double(), torch.randn(3, 2, *window[0]).double()
    kernel, stride, dilation, padding = window
    y = F.conv2d(x, weight, None, stride, padding, dilation) if B else x.new_zeros(0, 3, *output)
    wanted = y.permute(0, 2, 3, 1).reshape(-1, 3)[positions.long()]
    rows, matrix = x.permute(0, 2, 3, 1).reshape(-1, 2), weight.permute(2, 3, 1, 0).flatten(0, 2)
    args = (sparse.pack_matrix(matrix), x.new_zeros(3), *NO_LIMITS)
    torch.testing.assert_close(sparse.gather_conv(rows, own, *args), wanted)
    torch.testing.assert_close(sparse.gather_conv(rows[needed.long()], table, *args), wanted)
    unneeded = torch.ones(len(rows), dtype=torch.bool)
    unneeded[own[own >= 0].long()] = False
    unneeded[needed.long()] ^= True
    assert unneeded.all()


@given(convolutions(), st.floats(0, 1), st.tuples(st.floats(0, 1), st.floats(0, 1)), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_tables_of_fixed_sizes(case, density, room, seed):
    """The first rows are those of the exact tables; what there is no room for is left out and counted."""
    B, H, W, *conv = case
    output, window = geometry(H, W, *conv)
    torch.manual_seed(seed)
    mask, inputs = torch.rand(B, 1, *output) < density, B * H * W
    for capacity in ((round(room[0] * mask.numel()), round(room[1] * inputs)), (mask.numel(), inputs)):
        fixed = defined("neighbour_table")(mask, (H, W), *window, capacity)
        for one, other in zip(sparse.neighbour_table(mask, (H, W), *window, capacity), fixed, strict=True):
            assert torch.equal(one, other) and one.dtype == torch.int32
        positions, needed, table, counts = (t.tolist() for t in fixed)
        assert (len(positions), len(needed), len(table)) == (capacity[0], capacity[1], capacity[0])
        exact = [t.tolist() for t in defined("neighbour_table")(mask, (H, W), *window)]
        everything = capacity[1] == inputs
        assert counts == [len(exact[0]), len(exact[1])]
        for m in range(capacity[0]):
            assert positions[m] == (exact[0][m] if m < len(exact[0]) else -1)
            for tap in range(len(table[m])):
                place = exact[2][m][tap] if m < len(exact[0]) else -1
                reads = exact[1][place] if place >= 0 and (everything or place < capacity[1]) else -1
                assert (needed[table[m][tap]] if table[m][tap] >= 0 else -1) == reads
        assert needed == (list(range(inputs)) if everything else (exact[1] + [-1] * inputs)[: capacity[1]])


def arguments(dtype=torch.float32):
    """Of every operator."""
    source, rows, matrix, bias = product(6, 9, 5, 7)
    source, bias = source.to(dtype), bias.to(dtype)
    conv = (source, rows, sparse.pack_matrix(matrix.to(dtype)), bias, *RELU6)
    window = ([3, 3], [2, 2], [1, 1], [1, 1])
    mask = torch.rand(2, 1, 3, 4) < 0.5
    return {
        "gather_rows": (source, rows, *RELU6),
        "scatter_rows_": (
            torch.randn(8, 7, dtype=dtype),
            torch.arange(6).int(),
            torch.randn(6, 7, dtype=dtype),
            *RELU6,
        ),
        "gather_conv": conv,
        "scatter_conv_": (torch.randn(8, 7, dtype=dtype), torch.arange(6).int(), *conv),
        "gather_depthwise": (source, rows, torch.randn(9, 5, dtype=dtype), bias[:5].contiguous(), *RELU6),
        "window_table": (torch.tensor([0, 5, 23]).int(), [5, 7], [3, 4], *window),
        "neighbour_table": (mask, [5, 7], *window, None),
        "neighbour_table with a capacity": (mask, [5, 7], *window, [9, 40]),
    }


@needs_kernels
@pytest.mark.parametrize("name", arguments())
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name.split()[0]).default, arguments()[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gather_rows", "scatter_rows_", "gather_conv", "scatter_conv_", "gather_depthwise"])
def test_other_dtypes_are_left_to_the_reference(name, dtype):
    args = arguments(dtype)[name]
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    result, expected = getattr(sparse, name)(*args), defined(name)(*copies)
    if name.startswith("scatter"):
        result, expected = args[0], copies[0]
    assert torch.equal(result, expected) and result.dtype == dtype


@needs_kernels
@pytest.mark.parametrize(
    ("name", "index", "change", "message"),
    [
        ("gather_conv", 0, lambda t: t.t().contiguous().t(), "source must be contiguous float32"),
        ("gather_conv", 0, torch.Tensor.double, "source must be contiguous float32"),
        ("gather_conv", 1, torch.Tensor.long, "table must be contiguous int32"),
        ("gather_conv", 1, lambda t: t.t().contiguous().t(), "table must be contiguous int32"),
        ("gather_conv", 2, lambda t: t[:, :-1].contiguous(), "matrix must be"),
        ("gather_conv", 2, lambda t: t[..., :7].contiguous(), "matrix must be"),
        ("gather_conv", 2, lambda t: t[0], "matrix must be"),
        ("gather_conv", 3, torch.Tensor.double, "bias must be 7 contiguous float32"),
        ("scatter_conv_", 0, lambda t: t.t().contiguous().t(), "out must be contiguous float32"),
        ("scatter_conv_", 0, lambda t: t[:, :6].contiguous(), "out must be"),
        ("scatter_conv_", 1, lambda t: t[:5], "positions must be 6 numbers, got 5"),
        ("scatter_conv_", 1, torch.Tensor.long, "positions must be contiguous int32"),
        ("gather_depthwise", 1, lambda t: t[:, :8], "table must be contiguous"),
        ("gather_depthwise", 2, lambda t: t[:8], "weight must be 45 contiguous float32"),
        ("window_table", 0, torch.Tensor.long, "positions must be contiguous int32"),
        ("neighbour_table", 0, torch.Tensor.double, "mask must be"),
        ("neighbour_table", 0, lambda t: t.transpose(2, 3), "mask must be"),
        ("neighbour_table", 1, lambda size: size + [1], "must be pairs, got 3"),
    ],
)
def test_bad_arguments_are_refused(name, index, change, message):
    args = list(arguments()[name])
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, name)(*args)
