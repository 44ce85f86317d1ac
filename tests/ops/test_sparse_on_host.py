"""The CUDA kernels of tables of fixed sizes, and what works with these, against the references; on an emulated GPU."""

import math

import cuda_on_host
import pytest
import torch

from timm_dynamic.ops import learned_mask_reference, pack_mask_weights, sparse

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="no g++")
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
NO_LIMITS = (-math.inf, math.inf)

# Batch, map, kernel size, stride, dilation.
CONVOLUTIONS = [
    (0, (5, 4), (3, 3), (1, 1), (1, 1)),
    (1, (1, 1), (3, 3), (2, 2), (1, 1)),
    (2, (7, 9), (1, 1), (1, 1), (1, 1)),
    (3, (8, 5), (3, 3), (2, 2), (1, 1)),
    (3, (13, 8), (3, 5), (1, 3), (2, 1)),
    (2, (20, 17), (3, 3), (1, 1), (1, 1)),
]


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    return cuda_on_host.load(tmp_path_factory.getbasetemp() / "sparse_on_host", "sparse")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@SEEDS
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_tables(ops, case, density, seed):
    B, size, kernel, stride, dilation = case
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))
    output = tuple((n - 1) // s + 1 for n, s in zip(size, stride, strict=True))
    mask = torch.rand(B, 1, *output) < density
    window = (size, kernel, stride, dilation, padding)
    expected = sparse.neighbour_table_reference(mask, *window)
    for one, other in zip(ops.neighbour_table(mask, *window, seed=seed), expected, strict=True):
        assert torch.equal(one, other)
    outputs, inputs, counts = mask.numel(), B * math.prod(size), tuple(map(len, expected[:2]))
    rooms = [(0, 0), (outputs, inputs), (outputs // 2, inputs // 2), (outputs, inputs // 3), (outputs // 3, inputs)]
    signed = torch.where(mask, 1.0, -0.0)
    for room in (*rooms, counts):
        expected = sparse.fixed_neighbour_table_reference(mask, *window, room)
        for own in (mask, signed, signed.half()):
            actual = ops.fixed_neighbour_table(own, *window, room, seed=seed)
            for one, other in zip(actual, expected, strict=True):
                assert one.dtype == torch.int32 and torch.equal(one, other)
        positions = expected[0]
        table = ops.window_table(positions, size, output, kernel, stride, dilation, padding, seed=seed)
        assert torch.equal(table, sparse.window_table_reference(positions, size, output, *window[1:]))
        assert (table[positions < 0] == -1).all()


@pytest.mark.parametrize("room", [(13, 5), (-1, 5), (12, 36), (12, 5, 5)], ids=str)
def test_capacities_that_cannot_be(ops, room):
    mask = torch.ones(1, 1, 3, 4)
    with pytest.raises(RuntimeError, match="capacity must be two numbers up to 12 and 35"):
        ops.fixed_neighbour_table(mask, (5, 7), (3, 3), (2, 2), (1, 1), (1, 1), room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("limits", [(0.0, 1.0), (0.0, math.inf), NO_LIMITS], ids=str)
@pytest.mark.parametrize("C", [1, 8, 12, 130])
class TestRows:
    def test_gather(self, ops, C, limits, dtype):
        source, table = torch.randn(20, C).to(dtype), torch.randint(-1, 20, (33, 9)).int()
        expected = sparse.gather_rows_reference(source, table, *limits)
        for own in (source, torch.cat([source.flatten()[:1], source.flatten()])[1:].view(source.shape)):
            assert torch.equal(ops.gather_rows(own, table, *limits), expected)
        source[3] = math.nan
        assert torch.equal(
            ops.gather_rows(source, table, *limits).isnan(), sparse.gather_rows_reference(source, table, *limits).isnan()
        )

    def test_scatter(self, ops, C, limits, dtype):
        positions = torch.randperm(40)[:33].int()
        positions[torch.rand(33) < 0.3] = -1
        out, rows = torch.randn(40, C).to(dtype), torch.randn(33, C).to(dtype)
        rows[positions < 0] = math.nan
        expected, actual = out.double(), out.clone()
        sparse.scatter_rows_reference_(expected, positions, rows.double(), *limits)
        ops.scatter_rows_(actual, positions, rows, *limits)
        torch.testing.assert_close(actual, expected.to(dtype), rtol=0, atol=torch.finfo(dtype).eps * 4)


@SEEDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 5, 7, 6, 1), (1, 16, 1, 1, 2), (3, 24, 20, 13, 3), (1, 304, 9, 8, 2)], ids=str)
def test_learned_mask(ops, size, dtype, seed):
    *shape, stride = size
    C = shape[1]
    x = torch.randn([shape[i] for i in (0, 2, 3, 1)]).to(dtype).permute(0, 3, 1, 2)  # channels_last
    # Integers, whose sums are exact.
    parameters = [torch.randint(-2, 3, s).float() for s in ((1, C, 3, 3), (1,), (1, C), (1,))]
    x = (2 * x).round()
    weights = pack_mask_weights(*parameters)
    mask, expected = ops.learned_mask(x, weights, stride, seed=seed), learned_mask_reference(x, weights, stride)
    assert mask.dtype == dtype
    logits = torch.nn.functional.conv2d(x.float(), parameters[0], parameters[1], stride, 1)
    logits += (x.float().mean((2, 3)) @ parameters[2].T + parameters[3])[:, :, None, None]
    decided = logits.abs() > 1e-3
    assert torch.equal(mask[decided], expected[decided]) and decided.float().mean() > 0.5
