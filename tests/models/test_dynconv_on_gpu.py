"""Sparse blocks and networks on a GPU: as dense ones, one wait a network, in CUDA graphs. `gpu.sh tests` runs these."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from dynconv_networks import SMALL, build, build_with_share, dense, every_kind, image, plain_with_share
from on_gpu import DEVICE, needs_gpu
from torch import nn

from timm_dynamic import optimize, use
from timm_dynamic.models.dynconv_mobilenetv2 import SparseInvertedResidual
from timm_dynamic.models.dynconv_resnet import SparseBasicBlock, SparseBottleneck
from timm_dynamic.ops.sparse import capacity, executor

pytestmark = needs_gpu()


@pytest.fixture(autouse=True)
def _setup():
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), use("kernel"):
        yield


def down(make):
    conv = nn.Conv2d(24, 32, 1, 2, bias=False)
    return make(24, 8 if make is SparseBottleneck else 32, 2, nn.Sequential(conv, nn.BatchNorm2d(32)))


BLOCKS = {
    "basic": lambda: SparseBasicBlock(24, 24),
    "basic, stride 2": lambda: down(SparseBasicBlock),
    "basic, dilated": lambda: SparseBasicBlock(24, 24, dilation=2),
    "bottleneck": lambda: SparseBottleneck(24, 6),
    "bottleneck, stride 2": lambda: down(SparseBottleneck),
    "inverted": lambda: SparseInvertedResidual(24, 24, exp_ratio=2.0, act_layer=nn.ReLU6),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


@every_block
class TestBlocks:
    @torch.no_grad()
    def run(self, block, x, execution):
        block.execution = execution
        with mock.patch.object(executor, "scatter_rows_", wraps=executor.scatter_rows_) as spy:
            y = block(x)
        assert spy.called == (execution == "sparse")
        return y

    def make(self, name):
        block = BLOCKS[name]()
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.weight, 1, 0.3)
                nn.init.normal_(norm.bias, 0, 0.3)
                nn.init.uniform_(norm.running_var, 0.5, 2)
        return block.eval().to(DEVICE)

    @pytest.mark.parametrize("size", [(57, 57), (7, 7), (5, 9), (1, 1)], ids=str)
    def test_sparse_is_dense(self, name, size):
        block, x = self.make(name), torch.randn(3, 24, *size, device=DEVICE)
        expected = self.run(block, x, "dense")
        for layout in (torch.contiguous_format, torch.channels_last):
            y = self.run(block, x.to(memory_format=layout), "sparse")
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    def test_nothing_active(self, name):
        block, x = self.make(name), torch.randn(2, 24, 9, 9, device=DEVICE)
        with torch.no_grad():
            block.masker.maskconv.fc.bias.fill_(-1e4)
        torch.testing.assert_close(self.run(block, x, "sparse"), self.run(block, x, "dense"), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, name, dtype):
        block, x = self.make(name), torch.randn(3, 24, 13, 13, device=DEVICE)
        x = x.to(dtype).to(memory_format=torch.channels_last)
        with torch.autocast(DEVICE, dtype):
            autocast = [self.run(block, x, execution) for execution in ("sparse", "dense")]
        block = block.to(dtype)
        for sparse_run, dense_run in (autocast, [self.run(block, x, execution) for execution in ("sparse", "dense")]):
            assert sparse_run.dtype == dtype
            torch.testing.assert_close(sparse_run, dense_run.to(dtype), rtol=0.1, atol=0.1)


@contextmanager
def no_waiting(reads):
    """An error where PyTorch makes the host wait for the GPU, but for the one read after the network."""
    own = capacity._read

    def read(counts):
        reads.append(counts)
        torch.cuda.set_sync_debug_mode("default")
        values = own(counts)
        torch.cuda.set_sync_debug_mode("error")
        return values

    wrapped = executor.neighbour_table
    with (
        mock.patch.object(capacity, "_read", read),
        mock.patch.object(executor, "neighbour_table", wraps=wrapped) as tables,
    ):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(len(call.args) == 7 for call in tables.call_args_list)  # with a capacity


def networks(kind, share, dtype, make=build_with_share):
    """On the GPU, with masks of this share, and a batch."""
    model = make(kind, share).to(DEVICE, dtype)
    x = torch.randn(8, 3, SMALL[kind][2], SMALL[kind][2], device=DEVICE, dtype=dtype)
    return model, x.to(memory_format=torch.channels_last)


def assert_near(actual, expected):
    """With the rounding of a whole network."""
    assert (actual - expected).norm() < (1e-3 if actual.dtype == torch.float32 else 0.1) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind
class TestNetworks:
    @torch.no_grad()
    def test_one_read_of_a_network(self, kind, dtype):
        reads = []
        model, x = networks(kind, [0.3], dtype)
        expected, blocks = dense(model, x), len(model.masked_blocks())
        for execution, max_active, counts in (("sparse", None, [blocks]), ("auto", 1.0, [blocks]), ("auto", 0.1, [])):
            model.execution, model.max_active = execution, max_active
            assert_near(model(x), expected)
            for _ in range(2):
                reads.clear()
                with no_waiting(reads):
                    y = model(x)
                assert [len(read) for read in reads] == counts
                assert_near(y, expected)

    @torch.no_grad()
    def test_too_little_room(self, kind, dtype):
        share = [0.2]
        model, x = networks(kind, share, dtype)
        for share[0] in (0.2, 0.2, 0.95, 0.95, 0.0, 1.0):
            assert_near(model(x), dense(model, x))

    @torch.no_grad()
    def test_graph(self, kind, dtype):
        share, reads = torch.full((1,), 0.3, device=DEVICE), []
        model, x = networks(kind, share, dtype, plain_with_share)
        graph, overflows = optimize(model, x, cuda_graph=True), 0
        for active, fits in ((0.3, True), (0.1, True), (0.0, True), (0.99, False), (0.99, True), (0.2, True)):
            share.fill_(active)
            for own in (x, -x):
                assert_near(graph(own), dense(model, own))
            overflows += not fits
            assert graph.cuda_graph.overflows == overflows
        with no_waiting(reads):
            graph(x)
        assert len(reads) == 1
        with torch.cuda.stream(torch.cuda.Stream()):
            late = graph(2 * x)
        torch.cuda.synchronize()
        assert_near(late, dense(model, 2 * x))

    @torch.no_grad()
    def test_graph_with_a_share(self, kind, dtype):
        model, x = networks(kind, [0.1], dtype, plain_with_share)
        for room, overflows in ((1.0, 0), (0.0, 2)):
            graph = optimize(model, x, cuda_graph=True, share=room)
            for _ in range(2):
                assert_near(graph(x), dense(model, x))
            assert graph.cuda_graph.overflows == overflows

    @torch.no_grad()
    def test_graph_with_own_masks_and_autocast(self, kind, dtype):
        model, x = build(kind).to(DEVICE, torch.float32), image(kind, 8, torch.float32).to(DEVICE)
        model.execution = "sparse"
        with torch.autocast(DEVICE, dtype, dtype != torch.float32):
            graph = optimize(model, x, cuda_graph=True)
            expected = [model(own) for own in (x, -x)]
        for own, eager in zip((x, -x), expected, strict=True):
            y = graph(own)
            assert y.dtype == eager.dtype and (y - eager).norm() < 0.1 * eager.norm()
