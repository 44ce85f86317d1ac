"""Sparse execution with tables of fixed sizes, as on a GPU: the results are those of the exact tables."""

from unittest import mock

import pytest
import torch
from dynconv_networks import build, build_with_share, every_kind, image

from timm_dynamic.layers import capacity
from timm_dynamic.layers.capacity import Capacities
from timm_dynamic.ops import sparse


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """With capacities that the small maps here fill only in part."""
    torch.manual_seed(0)
    monkeypatch.setattr(capacity, "serves", lambda x: True)
    monkeypatch.setattr(capacity, "_MULTIPLE", 4)


def counting(name):
    own = getattr(sparse, name)
    return mock.patch.object(sparse, name, wraps=own)


@torch.no_grad()
def dense(model, x):
    model.execution = "dense"
    y = model(x)
    model.execution = "sparse"
    return y


@every_kind
class TestNetworks:
    @torch.no_grad()
    def test_every_mask(self, kind):
        """What fits the capacities, and what does not, equals dense execution; the first call asks every block."""
        share = [0.2]
        model, x = build_with_share(kind, share), image(kind, 3)
        blocks = len(model.masked_blocks())
        runs = []
        for share[0] in (0.2, 0.2, 0.21, 0.0, 0.9, 0.9, 0.2, 1.0, 1.0, 0.0):
            with counting("neighbour_table") as exact, counting("fixed_neighbour_table") as fixed:
                y = model(x)
            runs.append((exact.call_count // blocks, fixed.call_count // blocks))
            assert (exact.call_count % blocks, fixed.call_count % blocks) == (0, 0)
            torch.testing.assert_close(y, dense(model, x))
        first, steady, again = (1, 0), (0, 1), (1, 1)
        assert runs == [first, steady, steady, steady, again, steady, steady, steady, steady, steady]

    @torch.no_grad()
    def test_fixed_share(self, kind):
        share = [0.2]
        model, x = build_with_share(kind, share), image(kind)
        for room, share[0] in ((0.0, 0.0), (1.0, 1.0), (1.0, 0.3), (0.9, 0.05)):
            with Capacities(room) as capacities, counting("neighbour_table") as exact:
                y = model(x)
            assert not exact.called and capacities.suffice(capacities.counts())
            torch.testing.assert_close(y, dense(model, x))
        share[0] = 0.5
        with Capacities(0.3) as capacities:
            model(x)  # garbage, but nothing breaks
        assert not capacities.suffice(capacities.counts())

    @torch.no_grad()
    def test_own_masks(self, kind):
        model, x = build(kind), image(kind, 3)
        model.execution = "sparse"
        for own in (x, x, -x, x * 3, x[:1], x[:1], x[..., 3:], x):
            torch.testing.assert_close(model(own), dense(model, own))
