"""What people do with an optimized model."""

import copy
import io
import pickle
import re
import threading

import pytest
import timm
import torch
from timm.models import create_model
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic
from timm_dynamic.optimize import PackedConv2d, layout


@pytest.fixture(autouse=True)
def packed(monkeypatch):
    """All convolutions run packed, without measuring."""
    torch.manual_seed(0)
    monkeypatch.setattr(layout, "_convs_that_gain", lambda convs, form: set(convs))
    monkeypatch.setattr(layout, "_fastest", lambda ways, seconds: (list(ways)[-1], {}))


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def build(name="test_efficientnet", **kwargs):
    model = timm.create_model(name, num_classes=5).eval()
    return model, timm_dynamic.optimize(model, X, **kwargs)


@torch.no_grad()
def same(y, model, x=X):
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


class TestGraphs:
    def test_compile(self):
        model, fast = build("test_resnet")
        with torch.no_grad():
            same(torch.compile(fast, backend="aot_eager", fullgraph=True)(X), model)
        model, fast = build("test_resnet", compile={"backend": "eager", "fullgraph": True})
        with torch.no_grad():
            same(fast(X), model)
            same(copy.deepcopy(fast)(X), model)
        assert "compiled at the first call" in fast.report

    def test_export(self):
        model, fast = build("test_resnet")
        batch = torch.export.Dim("batch", min=2, max=9)
        program = torch.export.export(fast, (X,), dynamic_shapes=({0: batch},))
        assert not [node for node in program.graph.nodes if "mkldnn" in str(node.target) or "batch_norm" in str(node)]
        with torch.no_grad():
            same(program.module()(X[:1].repeat(3, 1, 1, 1)), model, X[:1].repeat(3, 1, 1, 1))

    def test_onnx(self):
        session = pytest.importorskip("onnxruntime").InferenceSession
        model, fast = build("test_resnet")
        file = io.BytesIO()
        torch.onnx.export(fast, (X,), dynamo=True, verbose=False).save(file)
        run = session(file.getvalue(), providers=["CPUExecutionProvider"])
        (y,) = run.run(None, {run.get_inputs()[0].name: X.numpy()})
        same(torch.from_numpy(y), model)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_script_and_trace(self):
        model, fast = build("test_resnet")
        with torch.no_grad():
            file = io.BytesIO()
            torch.jit.save(torch.jit.script(fast), file)
            file.seek(0)
            same(torch.jit.load(file)(X), model)
            same(torch.jit.trace(fast, X)(X), model)

    def test_fx(self):
        model, fast = build("test_resnet")
        with torch.no_grad():
            same(torch.fx.symbolic_trace(fast)(X), model)


class TestTransforms:
    def test_vmap(self):
        model, fast = build("test_resnet")
        with torch.no_grad():
            same(torch.vmap(fast)(X[:, None])[:, 0], model)

    def test_autocast(self):
        model, fast = build()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y, expected = fast(X), model(X)
        assert y.dtype == expected.dtype == torch.bfloat16
        assert (y - expected).abs().max() < 0.1 * expected.std()

    def test_counts(self):
        model, fast = build("test_resnet")
        counts = []
        for one in (model, fast):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                one(X)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0

    def test_other_dtypes(self):
        model, fast = build()
        with torch.no_grad():
            y = copy.deepcopy(model).double()(X.double())
            torch.testing.assert_close(fast.double()(X.double()), y, rtol=1e-4, atol=1e-6)
            same(fast.float()(X), model)

    def test_empty_batches_and_bad_inputs(self):
        model, fast = build("test_resnet")
        assert fast(X[:0]).shape == (0, 5)
        for x in (torch.randn(1, 4, 64, 64), torch.randn(64)):
            errors = []
            for one in (model, fast):
                with pytest.raises(RuntimeError) as error, torch.no_grad():
                    one(x)
                errors.append(str(error.value))
            assert errors[0].split(",")[0] == errors[1].split(",")[0]


class TestCopies:
    @pytest.mark.parametrize("way", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
    def test_copies(self, way):
        model, fast = build()
        other = way(fast)
        same(other(X), model)
        assert isinstance(other, type(model)) and other.report == fast.report
        assert any(conv._packed for conv in other.modules() if isinstance(conv, PackedConv2d))
        with pytest.raises(ValueError, match="inference only"):
            other.train()

    def test_save_and_state_dict(self, tmp_path):
        model, fast = build()
        torch.save(fast, tmp_path / "fast.pth")
        same(torch.load(tmp_path / "fast.pth", weights_only=False)(X), model)
        _, other = build()
        other.load_state_dict(fast.state_dict())
        same(other(X), model)

    def test_threads(self):
        model, fast = build()
        results = {}

        def work(i):
            torch.manual_seed(i)
            x = torch.randn(1 + i, 3, 64, 64 + i)
            with torch.no_grad():
                results[i] = (x, fast(x))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [one.start() for one in threads]
        [one.join() for one in threads]
        for x, y in results.values():
            same(y, model, x)

    def test_is_of_the_weights_as_they_were(self):
        model, fast = build("test_resnet")
        y = fast(X)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.mul_(-1)
        assert torch.equal(fast(X), y)

    def test_made_in_inference_mode(self):
        model = timm.create_model("test_resnet").eval()
        with torch.inference_mode():
            fast = timm_dynamic.optimize(model)
        with torch.no_grad():
            same(fast(X), model)
        state = torch.get_rng_state()
        timm_dynamic.optimize(model)
        assert torch.equal(state, torch.get_rng_state())

    def test_results_kept_in_the_model(self):
        """As pruning and losses do."""
        model = timm.create_model("test_resnet").eval()
        prune.l1_unstructured(model.layer1[0].conv1, "weight", 3)
        model.loss = model(X).sum()
        same(timm_dynamic.optimize(model, X)(X), model)


class TestErrors:
    def test_training(self):
        model, fast = build("test_resnet")
        fast.eval()
        for call in (fast.train, fast.requires_grad_):
            with pytest.raises(ValueError, match="train the model that it was made of"):
                call()
        with pytest.raises(ValueError, match="^the model is in training mode: call model.eval"):
            timm_dynamic.optimize(model.train())
        model.eval().layer1[0].bn1.train()
        with pytest.raises(ValueError, match="layer1.0.bn1 of the model is in training mode"):
            timm_dynamic.optimize(model)

    def test_gradients(self):
        _, fast = build("test_resnet")
        assert not fast(X).requires_grad
        x = X.clone().requires_grad_()
        with pytest.raises(ValueError, match="for inference: it gives no gradients"):
            fast(x)
        fast.fc.weight.requires_grad = True
        with pytest.raises(ValueError, match="for inference: it gives no gradients"):
            fast(X)
        with torch.no_grad():
            fast(x)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"memory_format": "nhwc"}, 'memory_format must be "auto", torch.contiguous_format or torch.channels_last'),
            ({"compile": "inductor"}, "compile must be True, False or the arguments of torch.compile"),
            ({"share": 0.5}, "share is for cuda_graph=True"),
            ({"cuda_graph": True, "share": 2}, "share must be between 0 and 1, or None, got 2"),
            ({"cuda_graph": True}, "a CUDA graph needs model and input on a CUDA device, got an input on cpu"),
            ({"example_inputs": torch.zeros(1, 4, 64, 64)}, "the model does not run on [[1, 4, 64, 64]]: "),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            timm_dynamic.optimize(create_model("test_resnet").eval(), **kwargs)
        assert "\n" not in str(error.value)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_models(self):
        layer = nn.Conv2d(3, 4, 3).eval()
        for model, message in (
            ("resnet18", "optimize takes a model, got str"),
            (layer, "no default_cfg that names its input_size: give example_inputs"),
            (timm_dynamic.optimize(layer, X), "the model is optimized already"),
            (torch.jit.script(layer), "a scripted or traced model cannot be changed"),
            (torch.compile(layer), "the model is compiled: optimize the model within"),
            (nn.Conv2d(3, 4, 3, device="meta").eval(), "the model has no weights yet"),
        ):
            with pytest.raises(ValueError, match=message):
                timm_dynamic.optimize(model)

    def test_code_for_one_memory_format_only(self, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setattr(layout, "_SECONDS", 0)

        class Views(nn.Sequential):
            def forward(self, x):
                return super().forward(x).view(len(x), -1)

        model = Views(nn.Conv2d(3, 8, 3)).eval()
        same(timm_dynamic.optimize(model, X)(X), model)
