"""Sparse execution is of the block as it is, whatever has happened to it."""

import copy
import pickle

import pytest
import torch
from sparse_blocks import assert_sparse_is_dense, make, optimized, run
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, prune


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
    run(block, torch.randn(1, 24, 3, 3).double(), sparse_runs=False)
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


def edits_of_data(block):
    block.conv1.weight.data.mul_(1.1)


def vector_to_parameters(block):
    torch.nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in block.parameters())).double(), block.parameters()
    )


def hook_that_moves(block):
    """From one module to another."""
    block.conv1.register_forward_hook(lambda *args: None).remove()
    block.conv2.register_forward_hook(lambda module, args, y: 2 * y)


CHANGES = [training_step, step_in_eval_mode, training_forward, load_state_dict, assign_state_dict, casts]
CHANGES += [change_of_a_copy, averaging, other_statistics, other_module, other_parameter, weight_norm, pruning]
CHANGES += [fused_step_in_eval_mode, other_eps, norm_in_training_mode, edits_of_data, vector_to_parameters]
DENSE = (weight_norm, pruning, norm_in_training_mode, hook_that_moves)


@pytest.mark.parametrize("change", [*CHANGES, hook_that_moves])
def test_notices_that_the_block_has_changed(change):
    block, x = make("basic"), torch.randn(2, 24, 9, 9).double()
    y = run(block, x)
    block = (change(block) or block).eval() if change is not norm_in_training_mode else change(block) or block
    changed = run(block, x, sparse_runs=change not in DENSE)
    assert not torch.allclose(changed, y, rtol=1e-6)
    torch.testing.assert_close(changed, run(block, x, "dense"))


@torch.inference_mode()
def test_inference_tensors():
    block, x = make("basic"), torch.randn(2, 24, 9, 9).double()
    for _ in range(2):
        assert_sparse_is_dense(block, x)
        load_state_dict(block)


class TestOptimized:
    """Its packed weights are those of its state."""

    @pytest.mark.parametrize("name", ["basic, stride 2, average", "inverted"])
    def test_state_copies_and_casts(self, name):
        block, other, x = make(name), make(name), torch.randn(2, 24, 9, 9).double()
        form, expected = optimized(block), run(block, x)
        before = {key: value.clone() for key, value in block.state_dict().items()}
        torch.testing.assert_close(run(form, x), expected)
        assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
        for same in (copy.deepcopy(form), pickle.loads(pickle.dumps(form))):
            torch.testing.assert_close(run(same, x), expected)
        same.load_state_dict(optimized(other).state_dict())
        torch.testing.assert_close(run(same, x), run(other, x))
        torch.testing.assert_close(run(form, x), expected)
        torch.testing.assert_close(run(form.float(), x.float()), expected.float(), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["bottleneck, stride 2", "inverted"])
    def test_graphs(self, name):
        form, x = optimized(make(name)), torch.randn(2, 24, 9, 9).double()
        expected = run(form, x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(form, backend="eager", fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(form, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.jit.trace(form, x)(x), expected)
        torch.testing.assert_close(torch.jit.script(form)(x), expected)
