"""Sparse execution with tables of fixed sizes, as on a GPU: the results are those of the exact tables."""

import copy
import threading
from unittest import mock

import pytest
import torch
from dynconv_networks import build, build_with_share, every_kind, image
from torch import nn

from timm_dynamic import optimize
from timm_dynamic.ops.sparse import capacity, executor
from timm_dynamic.ops.sparse.capacity import Capacities


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """With capacities that the small maps here fill only in part."""
    torch.manual_seed(0)
    monkeypatch.setattr(capacity, "has_kernels", lambda x: True)
    monkeypatch.setattr(capacity, "_MULTIPLE", 4)


class Counts:
    """How often tables were made, with the sizes that masks ask for and with fixed ones, and branches were run."""

    def __enter__(self):
        self.patches = [mock.patch.object(executor, name, wraps=getattr(executor, name)) for name in self.names]
        self.tables, self.steps, self.fused = (patch.__enter__() for patch in self.patches)
        return self

    def __exit__(self, *error):
        for patch in self.patches:
            patch.__exit__(*error)

    names = ("neighbour_table", "_run_in_steps", "_run_fused")

    @property
    def rooms(self):
        return [call.args[6] for call in self.tables.call_args_list if len(call.args) > 6]

    @property
    def fixed(self):
        return len(self.rooms)

    @property
    def exact(self):
        return self.tables.call_count - self.fixed

    @property
    def runs(self):
        return self.steps.call_count + self.fused.call_count


@torch.no_grad()
def dense(model, x):
    model.execution = "dense"
    y = model(x)
    model.execution = "sparse"
    return y


def optimized(kind="basic"):
    model = optimize(build(kind), image(kind, 1), memory_format=torch.channels_last)
    model.execution = "sparse"
    return model


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
            with Counts() as counts:
                y = model(x)
            runs.append((counts.exact // blocks, counts.fixed // blocks))
            assert (counts.exact % blocks, counts.fixed % blocks) == (0, 0)
            torch.testing.assert_close(y, dense(model, x))
        first, steady, again = (1, 0), (0, 1), (1, 1)
        assert runs == [first, steady, steady, steady, again, steady, steady, steady, steady, steady]

    @torch.no_grad()
    def test_fixed_share(self, kind):
        share = [0.2]
        model, x = build_with_share(kind, share), image(kind)
        for room, share[0] in ((0.0, 0.0), (1.0, 1.0), (1.0, 0.3), (0.9, 0.05)):
            with Capacities(room) as capacities, Counts() as counts:
                y = model(x)
            assert not counts.exact and capacities.suffice(capacities.counts())
            torch.testing.assert_close(y, dense(model, x))
        share[0] = 0.5
        with Capacities(0.3) as capacities:
            model(x)  # garbage, but nothing breaks
        assert not capacities.suffice(capacities.counts())

    @torch.no_grad()
    def test_own_masks(self, kind):
        model, x = optimized(kind), image(kind, 3)
        for own in (x, x, -x, x * 3, x[:1], x[:1], x[..., 3:], x, x.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(model(own), dense(model, own))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @torch.no_grad()
    def test_autocast(self, kind, dtype):
        model, x = build_with_share(kind, [0.3]).float(), image(kind).float()
        with torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
            for _ in range(2):
                with Counts() as counts:
                    y = model(x)
            assert counts.fixed and y.isfinite().all()
            torch.testing.assert_close(y, dense(model, x), rtol=0.1 if dtype == torch.bfloat16 else 1e-4, atol=0.1)

    @torch.no_grad()
    def test_who_looks_sees_every_module_once(self, kind):
        """Where somebody looks, blocks ask, as a network that ran twice would show."""
        share, seen = [0.2], []
        model, x = build_with_share(kind, share), image(kind)
        handle = model.masked_blocks()[1].register_forward_hook(lambda *args: seen.append(args))
        for share[0] in (0.2, 0.9):
            with Counts() as counts:
                torch.testing.assert_close(model(x), dense(model, x))
            assert not counts.fixed
        assert len(seen) == 4
        handle.remove()
        model.register_forward_hook(lambda *args: seen.append(args))
        for share[0] in (0.1, 0.1, 0.95):
            torch.testing.assert_close(model(x), dense(model, x))
        assert len(seen) == 4 + 6


class TestAuto:
    """Which execution is chosen, without reading a mask."""

    @torch.no_grad()
    def run(self, model, x):
        """How many blocks ran with exact tables, and with fixed ones."""
        with Counts() as counts:
            y = model(x)
        torch.testing.assert_close(y, dense(model, x))
        model.execution = "auto"
        return counts.exact, counts.fixed, counts.runs

    def test_share(self):
        share = [0.2]
        model, x = build_with_share("basic", share), image()
        model.execution, model.max_active = "auto", 0.5
        assert self.run(model, x) == (3, 0, 3)
        assert self.run(model, x) == (0, 3, 3)
        share[0] = 0.9  # too many for sparse execution: seen when it had too little room
        assert self.run(model, x) == (3, 3, 3)
        assert self.run(model, x) == (0, 0, 0)
        model.max_active = 1.0
        assert self.run(model, x) == (0, 3, 3)

    def test_first_call(self):
        model, x = build_with_share("basic", [0.9]), image()
        model.execution, model.max_active = "auto", 0.5
        assert self.run(model, x) == (3, 0, 0)
        assert self.run(model, x) == (0, 0, 0)


class TestState:
    """What was seen is no part of a model."""

    @torch.no_grad()
    def test_copies(self):
        model, x = optimized(), image(batch=1)  # the example's shape, which the model has seen
        keys = list(model.state_dict())
        y = model(x)
        model(x)
        assert all(len(block.seen) == 1 for block in model.masked_blocks()) and list(model.state_dict()) == keys
        other = copy.deepcopy(model)
        assert [block.seen for block in other.masked_blocks()] == [{}] * 3
        for _ in range(2):
            torch.testing.assert_close(other(x), y)
        nn.init.constant_(other.masked_blocks()[0].masker.maskconv.conv.bias, 1e9)
        torch.testing.assert_close(other(x), dense(other, x))
        torch.testing.assert_close(model(x), y)

    @torch.no_grad()
    def test_starts_anew_with_other_weights(self):
        model, x = optimized(), image()
        for change in (lambda: model.load_state_dict(model.state_dict()), model.double):
            model(x)
            assert all(block.seen for block in model.masked_blocks())
            change()
            with Counts() as counts:
                model(x)
            assert counts.exact == 3

    @torch.no_grad()
    def test_a_plain_model_remembers_nothing(self):
        model, x = build(), image()
        model.execution = "sparse"
        for _ in range(2):
            with Counts() as counts:
                model(x)
            assert (counts.exact, counts.fixed) == (3, 0)

    @torch.no_grad()
    def test_many_shapes(self, monkeypatch):
        monkeypatch.setattr(capacity, "_MAX_SHAPES", 2)
        model = optimized()
        for size in (8, 12, 16, 20, 8, 8):
            x = image()[..., :size]
            torch.testing.assert_close(model(x), dense(model, x))
            assert all(1 <= len(block.seen) <= 2 for block in model.masked_blocks())

    def test_threads(self):
        """As the replicas of nn.DataParallel run."""
        before = []
        with Capacities(0.5) as capacities:
            thread = threading.Thread(target=lambda: before.append(capacity.current()))
            thread.start()
            thread.join()
            assert capacity.current() is capacities
            with pytest.raises(ZeroDivisionError), Capacities():
                1 / 0  # noqa: B018
            assert capacity.current() is capacities
        assert before == [None] and capacity.current() is None

    @torch.no_grad()
    def test_blocks_and_features_alone_ask(self):
        model, x = build_with_share("basic", [0.3]), image()
        for call in (model.forward_features, lambda x: model.layer1(model.conv1(x))):
            for _ in range(2):
                with Counts() as counts:
                    call(x)
                assert not counts.fixed


def test_room():
    """A quarter more than was seen, in whole steps, and at most all."""
    with mock.patch.object(capacity, "_MULTIPLE", 128):
        capacities = Capacities()
        assert capacities.room((0, 1), (1000, 1000)) == (128, 128)
        assert capacities.room((100, 103), (1000, 1000)) == (128, 256)
        assert capacities.room((900, 40), (1000, 49)) == (1000, 49)
    assert Capacities(0.25).expected({}, (), (10, 16)) == Capacities(0.25).room((3, 4), (10, 16)) == (3, 4)


def test_recent(monkeypatch):
    monkeypatch.setattr(capacity, "_RECENT", 3)
    recent = capacity.Recent()
    recent.add((5, 9))
    recent.add((7, 8))
    assert [recent.most() for _ in range(8)] == [(7, 9)] * 6 + [None] * 2
    for counts, most in (((4, 4), (4, 4)), ((6, 2), (6, 4)), ((1, 1), (6, 4)), ((1, 1), (6, 4)), ((2, 1), (2, 1))):
        recent.add(counts)
        assert recent.most() == most


@torch.no_grad()
def test_forgets(monkeypatch):
    """One image whose masks are full does not make all later ones slow."""
    monkeypatch.setattr(capacity, "_RECENT", 2)
    share, rooms = [1.0], []
    model, x = build_with_share("basic", share), image()
    model(x)
    share[0] = 0.03
    for _ in range(6):
        with Counts() as counts:
            torch.testing.assert_close(model(x), dense(model, x))
        rooms.append([room / (2 * 32 * 32) for room in counts.rooms[0]])
    assert rooms[0] == [1, 1] and rooms[-1][0] < 0.1 and rooms[-1][1] < 0.5
    model.execution, model.max_active, share[0] = "auto", 0.5, 1.0
    ran = []
    for _ in range(9):
        with Counts() as counts:
            model(x)
        ran.append((counts.exact, counts.runs))
    share[0] = 0.1
    for _ in range(9):
        torch.testing.assert_close(model(x), dense(model, x))
        model.execution = "auto"
    assert set(ran[1:]) == {(0, 0), (3, 0)}  # everywhere; now and then blocks ask
    with Counts() as counts:
        model(x)
    assert counts.runs == 3


def what_was_seen(blocks):
    return [{key: vars(recent)["_now"] for key, recent in block.seen.items()} for block in blocks]


@torch.no_grad()
def test_only_what_had_a_right_input_is_remembered():
    """Masks behind the first block that had too little room saw something else."""
    share = [0.9]
    model, x = build_with_share("basic", share), image()
    first, *others = model.masked_blocks()
    first.masker.share = [0.1]
    model(x)
    first.masker.share, before = [0.8], what_was_seen(others)
    with Capacities() as capacities:
        for block in others:
            block.masker.share = [1.0]
        model(x)
    assert not capacities.suffice(capacities.counts())
    assert what_was_seen(others) == before
