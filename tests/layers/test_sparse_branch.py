"""Sparse execution of residual blocks: it equals dense execution, whatever the masks."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_blocks import (
    BLOCKS,
    assert_sparse_is_dense,
    basic,
    bottleneck,
    give_mask,
    inverted,
    make,
    randomize,
    run,
)
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import downsample_conv
from torch import nn

import timm_dynamic
from timm_dynamic.layers import SparseStage, load_reference
from timm_dynamic.layers.budget import Budget
from timm_dynamic.models.dynconv_mobilenetv2 import SparseInvertedResidual
from timm_dynamic.ops.sparse import executor, table

every_block = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def read_by(conv, active, size):
    """What a convolution reads at active positions, of a map of this size."""
    x = torch.zeros(size[0], 1, *size[2:], requires_grad=True)
    ones = torch.ones(1, 1, *conv.kernel_size)
    y = F.conv2d(x, ones, None, conv.stride, conv.padding, conv.dilation)
    return torch.autograd.grad(y, x, active.float())[0] > 0


@every_block
class TestSparseIsDense:
    @given(
        st.sampled_from([(57, 57), (7, 7), (5, 9), (1, 1), (2, 1), (8, 8)]),
        st.integers(0, 4),
        st.floats(0, 1),
        st.booleans(),
    )
    @settings(max_examples=12, deadline=None, derandomize=True)
    def test_random_masks(self, name, size, batch, density, channels_last):
        block, x = make(name), torch.randn(batch, 24, *size).double()
        give_mask(block, x, density)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        assert_sparse_is_dense(block, x)

    def test_dtypes(self, name):
        x = torch.randn(3, 24, 13, 13)
        block = make(name)
        give_mask(block, x)
        assert_sparse_is_dense(block.float(), x, rtol=1e-5, atol=1e-5)
        assert_sparse_is_dense(block.bfloat16(), x.bfloat16(), rtol=0.1, atol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            assert_sparse_is_dense(block.float(), x.bfloat16(), rtol=0.1, atol=0.1)

    def test_its_own_mask(self, name):
        block, x = make(name), torch.randn(3, 24, 9, 9).double()
        with torch.no_grad():
            assert 0 < block.masker(x).mean() < 1
        assert_sparse_is_dense(block, x)
        assert_sparse_is_dense(block, x * math.nan)

    def test_large_batches_run_in_parts(self, name, monkeypatch):
        monkeypatch.setattr(executor, "_WIDE_BYTES", 2 * 7 * 9 * 48 * 8)  # two samples of the inverted residual
        block, x = make(name), torch.randn(4, 24, 7, 9).double()
        give_mask(block, x)
        with mock.patch.object(executor, "neighbour_table", wraps=executor.neighbour_table) as spy:
            run(block, x)
        assert_sparse_is_dense(block, x)
        assert spy.call_count == (2 if name.startswith("inverted") else 1)

    def test_garbage_where_nothing_is_computed(self, name):
        """What no active position depends on may be anything."""
        block, x = make(name), torch.randn(4, 24, 14, 11).double()
        mask = give_mask(block, x, 0.1)
        y = run(block, x)
        (first, *_), (second, *_), *_ = block.steps()
        middle = x.shape if second.stride != (1, 1) else mask.shape
        needed = read_by(first, read_by(second, mask, middle), x.shape)
        garbage = torch.where(needed, x, math.nan)
        assert garbage.isnan().any()
        active = mask.expand(-1, y.shape[1], -1, -1)
        assert torch.equal(run(block, garbage)[active], y[active])

    def test_gradients_are_dense(self, name):
        block, x = make(name), torch.randn(2, 24, 6, 6).double()
        with mock.patch.object(table, "execute") as spy:
            block(x).sum().backward()
        assert not spy.called and all(p.grad is not None for key, p in block.named_parameters() if "masker" not in key)

    def test_names(self, name):
        """As the authors': a timm block's, and those of the mask unit."""
        block = BLOCKS[name]()
        extra = {key for key in block.state_dict() if key.startswith("masker.")}
        parts = ["maskconv"] if name == "inverted, ReLU" else ["maskconv.fc", "maskconv.conv"]
        names = {f"masker.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
        assert extra == {*names, "masker.progress.done"}
        other, x = make(name, torch.float32), torch.randn(2, 24, 6, 6)
        load_reference(block, other.state_dict())
        assert torch.equal(run(block.eval(), x), run(other, x))


def test_blocks_without_masks_run_in_parts(monkeypatch):
    """In an optimized model; not where somebody looks."""
    monkeypatch.setattr(executor, "_WIDE_BYTES", 2 * 8 * 6 * 144 * 4)  # two samples
    plain = randomize(InvertedResidual(24, 32, stride=2, exp_ratio=6.0))
    stage, x = SparseStage(plain).eval(), torch.randn(5, 24, 8, 6)
    fast, sizes = timm_dynamic.optimize(stage, x, memory_format=torch.channels_last), []
    with mock.patch.object(type(fast[0]), "forward", autospec=True, side_effect=type(fast[0]).forward) as spy:
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
        sizes = [len(call.args[1]) for call in spy.call_args_list if call.args[0] is fast[0]]
    assert sizes == [2, 2, 1]
    fast[0].conv_dw.register_forward_hook(lambda module, args, y: sizes.append(len(y)))
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2, 1, 5]


@pytest.mark.parametrize("act", [nn.SiLU, nn.LeakyReLU], ids=lambda act: act.__name__)
def test_other_activations_run_densely(act):
    for block in (basic(act_layer=act), bottleneck(act_layer=act), inverted(act_layer=act)):
        x = torch.randn(2, 24, 6, 6).double()
        assert_sparse_is_dense(randomize(block).double(), x, sparse_runs=False)


def test_other_norms_run_densely():
    block = bottleneck(norm_layer=lambda channels, **dd: nn.GroupNorm(2, channels, **dd))
    assert_sparse_is_dense(block.double().eval(), torch.randn(2, 24, 6, 6).double(), sparse_runs=False)


class TestHooks:
    def stage(self, name="bottleneck"):
        return SparseStage(make("bottleneck, convolved shortcut"), *(make(name) for _ in range(3))).eval()

    x = torch.randn(2, 24, 9, 9, generator=torch.Generator().manual_seed(0)).double()

    @pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted"])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_a_stage_is_its_blocks(self, name, layout):
        """An optimized one overwrites what is between the blocks, not what is others'."""
        stage, x = self.stage(name), self.x.to(memory_format=layout)
        y, before = assert_sparse_is_dense(stage, x), x.clone()
        fast = timm_dynamic.optimize(stage, x)
        for one in (fast, fast[1:]):
            inputs = x if one is fast else fast[0](x)
            own = inputs.clone()
            torch.testing.assert_close(run(one, inputs), y)
            assert torch.equal(inputs, own) and torch.equal(x, before)
        forward = type(fast[1]).overwrite
        with mock.patch.object(type(fast[1]), "overwrite", autospec=True, side_effect=forward) as spy:
            run(fast, x)
        assert spy.call_count == (2 if name == "inverted" else 3)  # its first one would have to clamp
        for block in stage:
            x = run(block, x)
        torch.testing.assert_close(y, x)

    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("index", range(4))
    def test_what_hooks_saw_stays(self, index, before):
        stage = self.stage()
        for one in (stage, timm_dynamic.optimize(stage, self.x)):
            seen = []
            if before:
                one[index].register_forward_pre_hook(lambda module, args, seen=seen: seen.extend(args))
            else:
                one[index].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
            y = run(one, self.x)
            torch.testing.assert_close(y, run(one, self.x, "dense"))
            assert len(seen) == 2
            torch.testing.assert_close(*seen)

    @pytest.mark.parametrize("name", ["conv1", "bn2", "conv3", "act3", "act2", "downsample", "downsample.0"])
    def test_hooks_within_a_block_are_called(self, name):
        block, calls = make("bottleneck, convolved shortcut"), []
        for expected in range(3):
            run(block, self.x, sparse_runs=expected == 0 or name.startswith("downsample"))
            assert len(calls) == expected
            if not calls:
                hook = block.get_submodule(name).register_forward_hook(lambda *args: calls.append(args))
        hook.remove()
        run(block, self.x)

    def test_a_stage_of_other_modules(self):
        stage = SparseStage(nn.Identity(), make("bottleneck"), nn.ReLU(inplace=True), make("basic"))
        assert_sparse_is_dense(stage, self.x)


class TestCost:
    @every_block
    def test_counts(self, name):
        block, x = make(name), torch.randn(3, 24, 11, 8).double()
        mask = give_mask(block, x)
        cost = block.cost(mask.double(), x)
        (first, *_), (second, *_), *others = block.steps()
        marked = read_by(second, mask, first(x).shape)
        assert torch.equal(block.dilated(mask.double(), x), marked.double())
        at_first = first.weight.numel()
        at_others = second.weight.numel() + sum(conv.weight.numel() for conv, *_ in others)
        assert cost.executed == at_first * marked.sum() + at_others * mask.sum()
        assert cost.total == at_first * marked.numel() + at_others * mask.numel()

    def test_gradient_is_the_masks(self):
        block, x = make("bottleneck"), torch.randn(3, 24, 11, 8).double()
        mask = give_mask(block, x).double().requires_grad_()
        block.cost(mask, x).executed.backward()
        assert (mask.grad == 6 * 6 * 9 + 6 * 24).all()

    def test_counts_in_training_only(self):
        block, x, budget = make("basic"), torch.randn(3, 24, 11, 8).double(), Budget(0.9, 1.0)
        block.use_budget(budget, 1, closes=True)
        run(block, x)
        run(block, x, "dense")
        assert budget.network_budget == 0
        block.train()(x)
        assert budget.network_budget > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: basic(attn_layer="se"), "takes no attn_layer"),
        (lambda: bottleneck(attn_layer="se"), "takes no attn_layer"),
        (lambda: bottleneck(2, downsample_conv, aa_layer=nn.AvgPool2d), "takes no aa_layer"),
        (lambda: bottleneck(cardinality=2), "cardinality must be 1, got 2"),
        (lambda: basic(cardinality=2), "cardinality 1 and base_width 64, got 2 and 64"),
        (lambda: basic(base_width=128), "cardinality 1 and base_width 64, got 1 and 128"),
        (lambda: basic(temperature=-1), "temperature must be positive"),
        (lambda: SparseInvertedResidual(24, 32), "needs a shortcut: .* 24; got 32"),
        (lambda: inverted(stride=2), "needs a shortcut"),
        (lambda: inverted(noskip=True), "needs a shortcut"),
        (lambda: inverted(se_layer=lambda channels, **_: nn.Conv2d(channels, channels, 1)), "takes no attention"),
        (lambda: inverted(group_size=4), "needs a depthwise convolution"),
    ],
)
def test_what_a_sparse_block_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()
