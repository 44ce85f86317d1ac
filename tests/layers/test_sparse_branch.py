"""Sparse execution of residual blocks: it equals dense execution, whatever the masks and whatever happened before."""

import copy
import gc
import math
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import downsample_avg, downsample_conv
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, prune

from timm_dynamic.layers import SparseStage, folding, load_reference, sparse_branch
from timm_dynamic.models.dynconv_mobilenetv2 import SparseInvertedResidual
from timm_dynamic.models.dynconv_resnet import SparseBasicBlock, SparseBottleneck
from timm_dynamic.ops import sparse


def basic(stride=1, shortcut=None, **kwargs):
    downsample = shortcut and shortcut(24, 20 if stride > 1 else 24, 1, stride)
    return SparseBasicBlock(24, 20 if stride > 1 else 24, stride, downsample, **kwargs)


def bottleneck(stride=1, shortcut=None, kernel_size=1, **kwargs):
    downsample = shortcut and shortcut(24, 24, kernel_size, stride)
    return SparseBottleneck(24, 6, stride, downsample, **kwargs)


def inverted(**kwargs):
    return SparseInvertedResidual(24, 24, **{"exp_ratio": 2.0, "act_layer": nn.ReLU6, **kwargs})


BLOCKS = {
    "basic": basic,
    "basic, stride 2": lambda: basic(2, downsample_conv),
    "basic, stride 2, average": lambda: basic(2, downsample_avg),
    "basic, dilated": lambda: basic(dilation=2),
    "basic, dilated first": lambda: basic(dilation=2, first_dilation=3),
    "basic, reduced": lambda: basic(reduce_first=2),
    "bottleneck": bottleneck,
    "bottleneck, stride 2": lambda: bottleneck(2, downsample_conv),
    "bottleneck, stride 2, average": lambda: bottleneck(2, downsample_avg),
    "bottleneck, stride 2, 3x3": lambda: bottleneck(2, downsample_conv, 3),
    "bottleneck, convolved shortcut": lambda: bottleneck(1, downsample_conv),
    "bottleneck, dilated": lambda: bottleneck(dilation=2),
    "inverted": inverted,
    "inverted, 5x5, dilated": lambda: inverted(dw_kernel_size=5, dilation=2),
    "inverted, ReLU": lambda: inverted(act_layer=nn.ReLU, exp_ratio=1.5, mask_kernel_size=1),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Fixed(nn.Module):
    """Instead of a mask unit."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return self.mask.to(x.dtype)


def randomize(module):
    """Norms as after some training; in eval mode."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, mean in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0)):
                nn.init.normal_(tensor, mean, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval()


def make(name, dtype=torch.float64):
    return randomize(BLOCKS[name]()).to(dtype)


def give_mask(block, x, density=0.3):
    """A random mask, the same at every call; all of it or nothing in some samples."""
    size = [-(-n // block.masker.stride) for n in x.shape[2:]]
    mask = torch.rand(len(x), 1, *size) < torch.tensor([density, 0.0, 1.0, 0.5])[: len(x), None, None, None]
    stride = block.masker.stride
    block.masker = Fixed(mask)
    block.masker.stride = stride
    return mask


@torch.no_grad()
def run(block, x, execution="sparse", sparse_runs=True):
    """The output; which of the two executions it was is checked."""
    for module in block.modules():
        module.execution = execution
    with mock.patch.object(sparse, "scatter_conv_", wraps=sparse.scatter_conv_) as spy:
        y = block(x)
    assert spy.called == (execution == "sparse" and sparse_runs and x.numel() > 0)
    return y


def assert_sparse_is_dense(block, x, sparse_runs=True, **close):
    before = x.clone()
    y = run(block, x, sparse_runs=sparse_runs)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y, run(block, x, "dense"), equal_nan=True, **close)
    return y


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
        monkeypatch.setattr(sparse_branch, "_WIDE_BYTES", 2 * 7 * 9 * 48 * 8)  # two samples of the inverted residual
        block, x = make(name), torch.randn(4, 24, 7, 9).double()
        give_mask(block, x)
        with mock.patch.object(sparse, "neighbour_table", wraps=sparse.neighbour_table) as spy:
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
        with mock.patch.object(sparse, "scatter_conv_") as spy:
            block(x).sum().backward()
        assert not spy.called and all(p.grad is not None for key, p in block.named_parameters() if "masker" not in key)

    def test_names(self, name):
        """As the authors': a timm block's, and those of the mask unit."""
        block = BLOCKS[name]()
        extra = {key for key in block.state_dict() if key.startswith("masker.")}
        parts = ["maskconv"] if name == "inverted, ReLU" else ["maskconv.fc", "maskconv.conv"]
        assert extra == {f"masker.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
        other, x = make(name, torch.float32), torch.randn(2, 24, 6, 6)
        load_reference(block, other.state_dict())
        assert torch.equal(run(block.eval(), x), run(other, x))


def test_blocks_without_masks_run_in_parts(monkeypatch):
    sizes = []

    def recording(block):
        folded = folding.folded_copy(block)
        folded.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        return folded

    monkeypatch.setattr(sparse_branch, "folded_copy", recording)
    monkeypatch.setattr(sparse_branch, "_WIDE_BYTES", 2 * 8 * 6 * 144 * 4)  # two samples
    plain = randomize(InvertedResidual(24, 32, stride=2, exp_ratio=6.0))
    stage, x = SparseStage(plain).eval(), torch.randn(5, 24, 8, 6)
    with torch.no_grad():
        torch.testing.assert_close(stage(x), plain(x), rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("act", [nn.SiLU, nn.LeakyReLU], ids=lambda act: act.__name__)
def test_other_activations_run_densely(act):
    for block in (basic(act_layer=act), bottleneck(act_layer=act), inverted(act_layer=act)):
        x = torch.randn(2, 24, 6, 6).double()
        assert_sparse_is_dense(randomize(block).double(), x, sparse_runs=False)


def test_other_norms_run_densely():
    block = bottleneck(norm_layer=lambda channels, **dd: nn.GroupNorm(2, channels, **dd))
    assert_sparse_is_dense(block.double().eval(), torch.randn(2, 24, 6, 6).double(), sparse_runs=False)


# What may happen to a block; some give another one.


def training_step(block):
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    block.train()(torch.randn(3, 24, 9, 9).double()).square().sum().backward()
    optimizer.step()
    block.eval()


def step_in_eval_mode(block):
    block(torch.randn(3, 24, 9, 9).double()).square().sum().backward()
    torch.optim.SGD(block.parameters(), 0.1).step()


def training_forward(block):
    with torch.no_grad():
        block.train()(torch.randn(3, 24, 9, 9).double())
    block.eval()


def load_state_dict(block):
    block.load_state_dict(make("basic").state_dict())


def assign_state_dict(block):
    for _ in range(3):
        block.load_state_dict(make("basic").state_dict(), assign=True)


def casts(block):
    block.half().double()


def change_of_a_copy(block):
    other = copy.deepcopy(block)
    nn.init.normal_(other.conv1.weight)
    return other


def averaging(block):
    """As timm does it: in an averaged model that never trains."""
    ema = ModelEmaV3(block, decay=0.5)
    run(ema.module, torch.randn(1, 24, 3, 3).double())
    nn.init.normal_(block.conv1.weight)
    ema.update(block)
    return ema.module


def other_statistics(block):
    block.bn1.running_var.mul_(2)


def other_module(block):
    block.conv1 = nn.Conv2d(24, 24, 3, padding=1, bias=False).double()


def other_parameter(block):
    block.conv1.weight = nn.Parameter(torch.randn_like(block.conv1.weight))


def weight_norm(block):
    parametrizations.weight_norm(block.conv1)
    run(block, torch.randn(1, 24, 3, 3).double())
    nn.init.normal_(block.conv1.parametrizations.weight.original0)


def pruning(block):
    prune.random_unstructured(block.conv1, "weight", 0.5)
    run(block, torch.randn(1, 24, 3, 3).double(), sparse_runs=False)
    nn.init.normal_(block.conv1.weight_orig)


def fused_step_in_eval_mode(block):
    """Which leaves the parameters' version counters alone."""
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(block.parameters(), lr=0.1, fused=True).step()


def other_eps(block):
    block.bn1.eps = 0.5


def norm_in_training_mode(block):
    block.bn1.train()


CHANGES = [training_step, step_in_eval_mode, training_forward, load_state_dict, assign_state_dict, casts]
CHANGES += [change_of_a_copy, averaging, other_statistics, other_module, other_parameter, weight_norm, pruning]


@pytest.mark.parametrize("change", [*CHANGES, fused_step_in_eval_mode, other_eps, norm_in_training_mode])
def test_notices_that_the_block_has_changed(change):
    block, x = make("basic"), torch.randn(2, 24, 9, 9).double()
    y = run(block, x)
    block = change(block) or block
    sparse_runs = change not in (pruning, norm_in_training_mode)
    changed = run(block, x, sparse_runs=sparse_runs)
    assert not torch.allclose(changed, y, rtol=1e-6)
    torch.testing.assert_close(changed, run(block, x, "dense"))


@torch.inference_mode()
def test_notices_that_inference_tensors_are_loaded():
    block, x = make("basic"), torch.randn(2, 24, 9, 9).double()
    for _ in range(2):
        assert_sparse_is_dense(block, x)
        load_state_dict(block)


def test_a_change_of_a_copy_does_not_matter():
    block, x = make("basic"), torch.randn(2, 24, 9, 9).double()
    y = run(block, x)
    other = copy.deepcopy(block)
    assert torch.equal(run(other, x), y)
    with torch.no_grad():
        other.conv1.weight.mul_(2)
    run(other, x)
    assert torch.equal(run(block, x), y)


def test_blocks_are_not_kept_alive():
    block = make("basic")
    run(block, torch.randn(2, 24, 9, 9).double())
    reference = weakref.ref(block)
    del block
    gc.collect()
    assert reference() is None


class TestHooks:
    def stage(self, name="bottleneck"):
        return SparseStage(make("bottleneck, convolved shortcut"), *(make(name) for _ in range(3)))

    x = torch.randn(2, 24, 9, 9, generator=torch.Generator().manual_seed(0)).double()

    @pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted"])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_a_stage_is_its_blocks(self, name, layout):
        """It overwrites what is between the blocks, not what is its own or others'."""
        stage, x = self.stage(name), self.x.to(memory_format=layout)
        y = assert_sparse_is_dense(stage, x)
        for block in stage:
            x = run(block, x)
        torch.testing.assert_close(y, x)

    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("index", range(4))
    def test_what_hooks_saw_stays(self, index, before):
        stage, seen = self.stage(), []
        if before:
            stage[index].register_forward_pre_hook(lambda module, args: seen.extend(args))
        else:
            stage[index].register_forward_hook(lambda module, args, out: seen.append(out))
        y = run(stage, self.x)
        torch.testing.assert_close(y, run(stage, self.x, "dense"))
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

    def test_is_reported_in_training_only(self):
        block, x, costs = make("basic"), torch.randn(3, 24, 11, 8).double(), []
        block.on_cost = costs.append
        run(block, x)
        run(block, x, "dense")
        assert not costs
        block.train()(x)
        assert len(costs) == 1


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
