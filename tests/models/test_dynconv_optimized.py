"""DynConv networks as `optimize` makes them, and where plain ones are sparse."""

import warnings
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from dynconv_networks import assert_same_in_all_executions, build, every_kind, image, run
from torch import nn

from timm_dynamic import backend_info, count_macs, explain, optimize, use
from timm_dynamic.ops.sparse import table


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@every_kind
class TestOptimized:
    def test_equals_the_model(self, kind):
        model, x = build(kind), image(kind, 3)
        expected = run(model, x, "dense")
        fast = optimize(model, x)
        torch.testing.assert_close(assert_same_in_all_executions(fast, x), expected)
        assert "PackedBlock" in {type(block).__name__ for block in fast.masked_blocks()}
        fast, x = optimize(model.float(), x.float()), x.float()
        with mock.patch.object(F, "batch_norm") as norm:
            for execution in ("sparse", "auto", "dense"):
                torch.testing.assert_close(run(fast, x, execution), expected.float(), rtol=1e-3, atol=1e-4)
        assert not norm.called
        assert count_macs(fast, x) == count_macs(model, x)

    @torch.no_grad()
    def test_what_runs(self, kind):
        """Sparse without asking, but for what the user sets."""
        model, x = build(kind).float(), image(kind).float()
        for block in model.masked_blocks():  # a mask of nothing would run at any limit
            nn.init.zeros_(block.masker.maskconv.fc.weight)
        fast = optimize(model, x)
        blocks = len(fast.masked_blocks())
        for execution, max_active, runs in (("auto", None, blocks), ("auto", 0.0, 0), ("sparse", 0.0, blocks)):
            fast.execution, fast.max_active = execution, max_active
            with mock.patch.object(table, "execute", wraps=table.execute) as spy:
                fast(x)
            assert spy.call_count == runs
        fast.execution = "dense"
        with use(dynconv="sparse"), pytest.raises(ValueError, match="its execution is 'dense'"):
            fast(x)

    @torch.no_grad()
    def test_half_precision(self, kind):
        model, x = build(kind).float(), image(kind).float()
        fast = optimize(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            for execution in ("dense", "sparse"):
                y = run(fast, x, execution)
                assert y.isfinite().all() and y.dtype == run(model, x, execution).dtype

    def test_hooks_are_called(self, kind):
        """A block that has some is left, and so is what it reads and gives."""
        model, x, calls = build(kind), image(kind), []
        block = model.masked_blocks()[1]
        for module in (block, block.masker, block.steps()[0][0]):
            module.register_forward_hook(lambda module, *args: calls.append(module))
        fast = optimize(model, x)
        calls.clear()
        torch.testing.assert_close(run(fast, x, "sparse"), run(model, x, "dense"))
        assert len(calls) == 6


@torch.no_grad()
def test_graphs():
    """Of the other blocks: tests/layers/test_sparse_branch_changes.py."""
    model, x = build(), image()
    fast, expected = optimize(model, x), run(model, x, "dense")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fast, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        for graph in (torch.jit.script(fast), torch.jit.trace(fast, x)):
            torch.testing.assert_close(graph(x), expected)


@pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason="there are no CPU kernels here")
@torch.no_grad()
def test_where_a_plain_model_is_sparse():
    """Where it pays to fold and pack the weights for one call: not in late stages at batch 1."""
    model = timm.create_model("dynconv_resnet18").eval()
    for batch, sparse in ((1, 6), (8, 8)):
        lines = explain(model, torch.randn(batch, 3, 224, 224)).splitlines()
        assert sum("SparseBasicBlock): sparse" in line for line in lines) == sparse
        assert sum("SparseBasicBlock): formula" in line for line in lines) == 8 - sparse
