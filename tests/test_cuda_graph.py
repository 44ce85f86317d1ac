"""`CudaGraph` without a GPU: what it captures and when. Instead of a graph, the function runs again."""

import contextlib
import copy
import re
from unittest import mock

import pytest
import timm
import torch
from dynconv_networks import build, build_with_share, dense, every_kind, image
from torch import nn

from timm_dynamic import CudaGraph, cuda_graph
from timm_dynamic.layers import capacity
from timm_dynamic.layers.folding import kept_for


class Recorder:
    """Makes the graphs. Every replay has the sizes of the capture, whatever was seen since."""

    def __init__(self):
        self.captures = 0
        self.model = None
        self.fails = False

    def seen(self):
        kept = [kept_for(block) for block in self.model.masked_blocks()]
        return [one[2].seen for one in kept if one is not None]

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


@pytest.fixture
def recorder(monkeypatch):
    """As if this were a GPU, with capacities that the small maps here fill only in part."""
    torch.manual_seed(0)
    recorder = Recorder()
    monkeypatch.setattr(cuda_graph, "_Graph", recorder)
    monkeypatch.setattr(cuda_graph, "_problem_with", lambda model, x: None)
    monkeypatch.setattr(capacity, "serves", lambda x: True)
    monkeypatch.setattr(capacity, "_MULTIPLE", 4)
    return recorder


class TestMasks:
    @every_kind
    def test_follows_the_masks(self, kind, recorder):
        share = [0.3]
        recorder.model = model = build_with_share(kind, share)
        graph, overflows, captures = CudaGraph(model, image(kind, 3)), 0, 1
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
            graph = CudaGraph(model, x, share=room)
            captures = recorder.captures
            for _ in range(2):
                torch.testing.assert_close(graph(x), dense(model, x))
            assert (graph.overflows, recorder.captures) == (0 if fits else 2, captures)

    def test_auto_runs_everywhere_if_that_is_faster(self, recorder):
        recorder.model = model = build_with_share("basic", [0.3])
        model.execution, model.max_active, x = "auto", 0.5, image()
        for share, blocks in ((0.4, 3), (0.6, 0), (None, 3)):
            graph = CudaGraph(model, x, share)
            assert (0 if graph._counts is None else len(graph._counts)) == blocks
            torch.testing.assert_close(graph(x), dense(model, x))

    def test_no_masks(self, recorder):
        model, x = timm.create_model("resnet18", num_classes=5).eval(), torch.randn(2, 3, 32, 32)
        recorder.model = mock.Mock(masked_blocks=lambda: [])
        graph = CudaGraph(model, x, 0.3)
        torch.testing.assert_close(graph(-x), model(-x).detach())
        assert graph.overflows == 0


def other_weights(model):
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(-1)


def data_of_the_head(model):
    model.fc.weight.data = -model.fc.weight.data


def other_head(model):
    model.reset_classifier(7)
    model.double()


def fused_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def fused_step_of_one_convolution(model):
    weight = model.layer1[0].conv1.weight
    weight.grad = torch.randn_like(weight)
    torch.optim.AdamW([weight], lr=1.0, fused=True).step()


def loaded(model):
    model.load_state_dict(build().state_dict())


def other_activation(model):
    model.act1 = nn.Tanh()


CHANGES = [
    other_weights,
    data_of_the_head,
    other_head,
    fused_step,
    fused_step_of_one_convolution,
    loaded,
    other_activation,
]


class TestCalls:
    @pytest.mark.parametrize("change", CHANGES)
    def test_notices_that_the_model_has_changed(self, change, recorder):
        recorder.model, x = build(), image()
        graph = CudaGraph(recorder.model, x)
        y = graph(x)
        graph(x)
        assert recorder.captures == 1
        change(recorder.model)
        changed = graph(x)
        assert recorder.captures == 2 and (changed.shape != y.shape or not torch.allclose(changed, y))
        torch.testing.assert_close(changed, dense(recorder.model, x))
        graph(x)
        assert recorder.captures == 2

    def test_training_of_another_model_is_no_change(self, recorder):
        recorder.model, x = build(), image()
        graph = CudaGraph(recorder.model, x)
        fused_step(build())
        graph(x)
        assert recorder.captures == 1

    @every_kind
    def test_after_a_capture_that_failed(self, kind, recorder):
        share = [0.1]
        recorder.model = model = build_with_share(kind, share)
        graph = CudaGraph(model, image(kind, 3))
        share[0], recorder.fails = 1.0, True
        with pytest.raises(RuntimeError, match="out of memory"):
            graph(image(kind, 3))
        recorder.fails = False
        for captures in (3, 3):
            x = image(kind, 3)
            torch.testing.assert_close(graph(x), dense(model, x))
            assert recorder.captures == captures

    def test_results_and_inputs_are_the_callers(self, recorder):
        recorder.model, x = build(), image()
        before = x.clone()
        graph = CudaGraph(recorder.model, x)
        with torch.inference_mode():
            y = graph(x)
            kept = y.clone()
            graph(image())
        graph(image().to(memory_format=torch.channels_last))
        assert torch.equal(y, kept) and torch.equal(x, before) and not y.requires_grad

    def test_autocast_is_that_of_the_capture(self, recorder):
        recorder.model, x = build().float(), image().float()
        with torch.autocast("cpu", torch.bfloat16):
            graph = CudaGraph(recorder.model, x)
        assert graph(x).dtype == torch.bfloat16
        graph = CudaGraph(recorder.model, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert graph(x).dtype == torch.float32

    @pytest.mark.parametrize("change", [lambda x: x[:1], torch.Tensor.float, lambda x: x.to("meta")])
    def test_other_inputs(self, change, recorder):
        recorder.model, x = build(), image()
        graph, other = CudaGraph(recorder.model, x), change(x)
        message = f"captured for [2, 3, 32, 32], torch.float64, cpu; got {list(other.shape)}, {other.dtype}"
        with pytest.raises(ValueError, match=re.escape(message)):
            graph(other)

    def test_models_without_graphs(self, recorder):
        recorder.model, x = build(), image()
        graph = CudaGraph(recorder.model, x)
        recorder.model.train()
        for call in (lambda: CudaGraph(recorder.model, x), lambda: graph(x)):
            with pytest.raises(ValueError, match="in training mode: call model.eval"):
                call()
        recorder.model.eval().layer1.register_forward_hook(lambda *args: None)
        for call in (lambda: CudaGraph(recorder.model, x), lambda: graph(x)):
            with pytest.raises(ValueError, match="has some inside: remove them"):
                call()
        with pytest.raises(ValueError, match="must give one tensor, got list"):
            CudaGraph(timm.create_model("resnet18", features_only=True).eval(), torch.randn(1, 3, 32, 32))

    @pytest.mark.parametrize("share", [-0.1, 1.1, "all", float("nan")])
    def test_shares(self, share, recorder):
        with pytest.raises(ValueError, match="share must be between 0 and 1, or None, got"):
            CudaGraph(build(), image(), share)


def test_needs_a_gpu():
    with pytest.raises(ValueError, match="on a CUDA device, got an input on cpu"):
        CudaGraph(build(), image())
