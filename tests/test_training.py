"""Auxiliary losses: attached to a model's graph, and read from it."""

import pytest
import torch
from torch import nn

import timm_dynamic
from timm_dynamic.layers.progress import Progress
from timm_dynamic.training import attach_loss, auxiliary_loss, budget_loss


def test_they_are_public():
    assert timm_dynamic.auxiliary_loss is auxiliary_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attached_gradient(dtype):
    x = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    w = torch.randn(3, requires_grad=True)
    y = attach_loss(x * 2, w.square().sum() + x.float().sum(), 0.25)
    assert y.dtype == dtype and torch.equal(y, x * 2)
    # Whatever the task's gradient is, the attached one is that of 0.25 * loss.
    (1000 * y.float().sum()).backward()
    torch.testing.assert_close(w.grad, 0.25 * 2 * w.detach())
    torch.testing.assert_close(x.grad, torch.full_like(x, 2000.25))


def test_backward_twice_attaches_twice():
    x, w = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    for _ in range(2):
        attach_loss(x, 3 * w, 1.0).sum().backward()
    assert w.grad.item() == 6


def test_terms_are_named_after_layers():
    class Layer(nn.Module):
        auxiliary_terms = ("a", "b")

        def __init__(self):
            super().__init__()
            for i, term in enumerate(self.auxiliary_terms):
                self.register_buffer(term, torch.tensor(float(i)), persistent=False)

    layer = Layer()
    model = nn.Sequential(nn.Identity(), nn.Sequential(layer))
    terms = auxiliary_loss(model)
    assert terms == {"1.0.a": 0.0, "1.0.b": 1.0}
    assert auxiliary_loss(layer) == {"a": 0.0, "b": 1.0}
    layer.b.fill_(5)
    assert terms["1.0.b"] == 1.0, "a later forward must not change what was returned"
    assert auxiliary_loss(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("progress", [0.0, 0.2, 1])
def test_budget_loss_takes_a_number(progress):
    costs = [(torch.tensor(3.0), torch.tensor(4.0)), (torch.tensor(1.0), torch.tensor(8.0))]
    assert budget_loss(costs, 0.5, progress) == budget_loss(costs, 0.5, torch.tensor(float(progress)))


def test_epochs_beyond_the_last_are_the_end():
    """timm trains on for `--cooldown-epochs`."""
    progress = Progress()
    for epoch in (10, 10.5, 13):
        timm_dynamic.set_progress(nn.Sequential(progress), epoch, 10)
        assert progress() == 1
