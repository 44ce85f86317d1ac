"""`optimize(cuda_graph=True)` without a GPU: what it captures and when. Instead of a graph, the function runs again."""

import contextlib
import copy
import pickle
import re
from unittest import mock

import pytest
import timm
import torch
from dynconv_networks import build, build_with_share, dense, every_kind, image

from timm_dynamic import optimize
from timm_dynamic.ops.sparse import capacity
from timm_dynamic.optimize import graph as module
from timm_dynamic.optimize.graph import CudaGraph


class Recorder:
    """Makes the graphs. Every replay has the sizes of the capture, whatever was seen since."""

    def __init__(self):
        self.captures = 0
        self.model = None
        self.fails = False

    def seen(self):
        return [block.seen for block in self.model.masked_blocks()]

    def __call__(self, device):
        return Recorded(self)


class Recorded:
    def __init__(self, recorder):
        self.recorder, self.forward = recorder, None
        self.in_order = contextlib.nullcontext

    def drop(self):
        self.forward = None

    def capture(self, forward):
        self.recorder.captures += 1
        forward()
        if self.recorder.fails:
            raise RuntimeError("CUDA out of memory")
        self.forward, self.captured = forward, copy.deepcopy(self.recorder.seen())

    def replay(self):
        if self.forward is not None:
            with mock.patch.object(capacity, "remember"):
                for seen, before in zip(self.recorder.seen(), self.captured, strict=False):
                    seen.update(copy.deepcopy(before))
                self.forward()
        return self.forward is not None


class Graphed:
    """A model that runs as a graph, as it is."""

    def __init__(self, model, x, share=None):
        self.model, self.graph = model, CudaGraph(share)
        self(x)

    def __call__(self, x):
        return self.graph.run(self.model, self.model, x)

    @property
    def overflows(self):
        return self.graph.overflows


def optimized():
    return optimize(build(), image(), memory_format=torch.channels_last)


@pytest.fixture
def recorder(monkeypatch):
    """As if this were a GPU, with capacities that the small maps here fill only in part."""
    torch.manual_seed(0)
    recorder = Recorder()
    monkeypatch.setattr(module, "_Graph", recorder)
    monkeypatch.setattr(module, "_problem_with", lambda model, x: None)
    monkeypatch.setattr(capacity, "has_kernels", lambda x: True)
    monkeypatch.setattr(capacity, "_MULTIPLE", 4)
    return recorder


class TestMasks:
    @every_kind
    def test_follows_the_masks(self, kind, recorder):
        share = [0.3]
        recorder.model = model = build_with_share(kind, share)
        graph, overflows, captures = Graphed(model, image(kind, 3)), 0, 1
        for share[0], fits in (
            (0.3, True),
            (0.3, True),
            (0.0, True),
            (0.9, False),
            (0.9, True),
            (0.2, True),
            (1.0, True),
        ):
            x = image(kind, 3)
            y = graph(x)
            torch.testing.assert_close(y, dense(model, x))
            overflows, captures = overflows + (not fits), captures + (not fits)
            assert (graph.overflows, recorder.captures) == (overflows, captures)

    @every_kind
    def test_share(self, kind, recorder):
        share = [0.9]
        recorder.model = model = build_with_share(kind, share)
        for room, active, fits in ((1.0, 1.0, True), (0.0, 0.0, True), (0.4, 0.9, False), (0.9, 0.1, True)):
            share[0], x = active, image(kind)
            graph = Graphed(model, x, share=room)
            captures = recorder.captures
            for _ in range(2):
                torch.testing.assert_close(graph(x), dense(model, x))
            assert (graph.overflows, recorder.captures) == (0 if fits else 2, captures)

    def test_auto_runs_everywhere_if_that_is_faster(self, recorder):
        recorder.model = model = build_with_share("basic", [0.3])
        model.execution, model.max_active, x = "auto", 0.5, image()
        for share, blocks in ((0.4, 3), (0.6, 0), (None, 3)):
            graph = Graphed(model, x, share)
            assert (0 if graph.graph._counts is None else len(graph.graph._counts)) == blocks
            torch.testing.assert_close(graph(x), dense(model, x))

    def test_no_masks(self, recorder):
        model, x = timm.create_model("resnet18", num_classes=5).eval(), torch.randn(2, 3, 32, 32)
        recorder.model = mock.Mock(masked_blocks=lambda: [])
        graph = Graphed(model, x, 0.3)
        torch.testing.assert_close(graph(-x), model(-x).detach())
        assert graph.overflows == 0


class TestCalls:
    @every_kind
    def test_after_a_capture_that_failed(self, kind, recorder):
        share = [0.1]
        recorder.model = model = build_with_share(kind, share)
        graph = Graphed(model, image(kind, 3))
        share[0], recorder.fails = 1.0, True
        with pytest.raises(RuntimeError, match="out of memory"):
            graph(image(kind, 3))
        recorder.fails = False
        for captures in (3, 3):
            x = image(kind, 3)
            torch.testing.assert_close(graph(x), dense(model, x))
            assert recorder.captures == captures

    def test_results_and_inputs_are_the_callers(self, recorder):
        recorder.model, x = optimized(), image()
        before = x.clone()
        graph = Graphed(recorder.model, x)
        with torch.inference_mode():
            y = graph(x)
            kept = y.clone()
            graph(image())
        graph(image().to(memory_format=torch.channels_last))
        assert torch.equal(y, kept) and torch.equal(x, before) and not y.requires_grad

    def test_autocast_is_that_of_the_capture(self, recorder):
        recorder.model, x = optimized().float(), image().float()
        with torch.autocast("cpu", torch.bfloat16):
            graph = Graphed(recorder.model, x)
        assert graph(x).dtype == torch.bfloat16
        graph = Graphed(recorder.model, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert graph(x).dtype == torch.float32

    @pytest.mark.parametrize("change", [lambda x: x[:1], torch.Tensor.float, lambda x: x.to("meta")])
    def test_other_inputs(self, change, recorder):
        recorder.model, x = optimized(), image()
        graph, other = Graphed(recorder.model, x), change(x)
        message = f"captured for [2, 3, 32, 32], torch.float64, cpu; got {list(other.shape)}, {other.dtype}"
        with pytest.raises(ValueError, match=re.escape(message)):
            graph(other)

    def test_models_without_graphs(self, recorder):
        recorder.model, x = optimized(), image()
        recorder.model.layer1.register_forward_hook(lambda *args: None)
        with pytest.raises(ValueError, match="has some inside: remove them"):
            Graphed(recorder.model, x)
        with pytest.raises(ValueError, match="must give one tensor, got list"):
            Graphed(timm.create_model("resnet18", features_only=True).eval(), torch.randn(1, 3, 32, 32))

    @pytest.mark.parametrize("share", [-0.1, 1.1, "all", float("nan")])
    def test_shares(self, share):
        with pytest.raises(ValueError, match="share must be between 0 and 1, or None, got"):
            optimize(build(), image(), cuda_graph=True, share=share)


class TestOptimized:
    @pytest.fixture
    def model(self, recorder):
        recorder.model = mock.Mock(masked_blocks=lambda: [])
        return timm.create_model("test_resnet", num_classes=5).double().eval()

    def test_runs_as_a_graph(self, model, recorder):
        x = torch.randn(2, 3, 32, 32).double()
        fast = optimize(model, x, cuda_graph=True)
        for _ in range(2):
            torch.testing.assert_close(fast(-x), model(-x).detach())
        assert recorder.captures == 1 and fast.cuda_graph.overflows == 0 and "a CUDA graph for" in str(fast.report)
        with pytest.raises(ValueError, match="a CUDA graph takes one tensor"):
            fast(x=x)

    @pytest.mark.parametrize("copies", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
    def test_copies_capture_anew(self, model, copies, recorder):
        x = torch.randn(2, 3, 32, 32).double()
        fast = copies(optimize(model, x, cuda_graph=True, share=0.5))
        assert fast.cuda_graph.share == 0.5
        torch.testing.assert_close(fast(x[:1]), model(x[:1]).detach())
        assert recorder.captures == 2

    def test_other_weights_capture_anew(self, model, recorder):
        x = torch.randn(2, 3, 32, 32).double()
        fast = optimize(model, x, cuda_graph=True)
        fast.load_state_dict({name: -value for name, value in fast.state_dict().items()})
        fast(x)
        assert recorder.captures == 2
        fast.float()(x.float())
        assert recorder.captures == 3


def test_needs_a_gpu():
    with pytest.raises(ValueError, match="on a CUDA device, got an input on cpu"):
        optimize(build(), image(), cuda_graph=True)
