"""Which implementation a call gets, and the reasons against the others."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toy_rows import Doubled

from timm_dynamic import dispatch
from timm_dynamic.layers import DCDConv2d
from timm_dynamic.ops import kernels, records

X = torch.randn(2, 4, 3, 3)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Doubled().eval()


def chosen(layer, x=X, gradients=False):
    with torch.set_grad_enabled(gradients):
        row = dispatch.choose(layer, x)
        assert torch.allclose(layer(x), 2 * layer.conv(x).to(x.dtype), atol=1e-5)
    return row and row.name


def reasons(layer, x=X) -> dict[str, str]:
    """Why not, by row."""
    lines = dispatch.explain(layer, x).splitlines()
    return dict(line.strip().removeprefix("not ").split(": ", 1) for line in lines[1:])


def test_the_first_row_without_a_reason_against_it(layer):
    assert chosen(layer) == "here"
    assert chosen(layer, X[:1]) == "second"
    assert chosen(layer, X[:, :, :1, :1]) == "second"
    assert chosen(layer, gradients=True) == "training"
    assert chosen(layer.double(), X.double(), gradients=True) == "training"
    assert chosen(layer, X.double()) is None


def test_explain_gives_every_reason(layer):
    text = dispatch.explain(nn.Sequential(layer).eval(), X)
    assert text.splitlines()[0] == "0 (Doubled): here" and repr(text) == text
    found = reasons(layer)
    assert found["on a GPU"] == "it is for cuda, the input is on cpu"
    assert found["training"] == "it is for training"
    assert found["second"] == "another one comes first"
    assert reasons(layer, X[:1])["here"] == "one sample is faster by the formula"
    assert reasons(layer, X[:, :, :1, :1])["here"] == "maps of one position"
    assert "float32, not torch.float64" in reasons(layer.double(), X.double())["here"]
    layer.float().train()
    assert reasons(layer)["here"] == "it has no gradient"
    with torch.autocast("cpu"):
        assert reasons(layer)["training"] == "autocast is on"


def test_use(layer):
    with dispatch.use(doubled="formula"):
        assert chosen(layer) is None
        with dispatch.use(doubled="second"):
            assert chosen(layer) == "second"
        assert chosen(layer) is None
    with dispatch.use("formula"):
        assert chosen(layer) is None
    with dispatch.use(dcd="formula"):
        assert chosen(layer) == "here"
    with dispatch.use(doubled="here"):
        assert chosen(layer, X[:1]) == "here"  # whether it pays is the caller's decision


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("nowhere", X, "has no implementation 'nowhere': it has formula, on a GPU, here, training, second"),
        ("on a GPU", X, "'on a GPU' of doubled cannot run: it is for cuda"),
        ("here", X[:, :, :1, :1], "maps of one position"),
        ("training", X, "it is for training"),
    ],
)
def test_use_of_what_cannot_run(layer, name, x, message):
    with dispatch.use(doubled=name), torch.no_grad(), pytest.raises(ValueError, match=message):
        layer(x)


def test_use_around_a_backward_pass_that_runs_layers_again():
    layer, x, gradients = DCDConv2d(8, 8, 3, padding=1), torch.randn(2, 8, 5, 5, requires_grad=True), []
    for again in (False, True):
        with dispatch.use(dcd="formula"):
            y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            gradients.append(torch.autograd.grad(y.square().sum(), x))
    torch.testing.assert_close(*gradients)


def test_use_of_everything_that_is_no_choice():
    with pytest.raises(ValueError, match="everything is 'formula' or 'kernel'"):
        dispatch.use("here")


def test_other_threads_do_not_notice(layer):
    found = []
    thread = threading.Thread(target=lambda: found.append(chosen(layer)))
    with dispatch.use("formula"):
        thread.start()
        thread.join()
        assert chosen(layer) is None
    assert found == ["here"]


def hook(layer):
    layer.conv.register_forward_hook(lambda *args: None)


def pre_hook(layer):
    layer.conv.register_forward_pre_hook(lambda *args: None)


def backward_hook(layer):
    layer.conv.register_full_backward_hook(lambda *args: None)


def wrapped(layer):
    layer.conv = nn.Sequential(layer.conv)
    layer.conv.weight = layer.conv[0].weight  # what a row that reads it would find


def pruned(layer):
    prune.random_unstructured(layer.conv, "weight", 0.5)


def parametrized(layer):
    parametrizations.weight_norm(layer.conv)


def other_forward(layer):
    forward = layer.conv.forward
    layer.conv.forward = lambda x: forward(x)


def quantised(layer):
    class Quantised(nn.Parameter):
        pass

    layer.conv.weight = Quantised(layer.conv.weight.detach())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "hooks on conv"),
        (pre_hook, "hooks on conv"),
        (backward_hook, "hooks on conv"),
        (wrapped, "conv is a Sequential, not the layer's Conv2d"),
        (pruned, "hooks on conv"),
        (parametrized, "conv is a ParametrizedConv2d"),
        (other_forward, "conv has another forward"),
        (quantised, "conv has a Quantised"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_part_that_is_not_as_the_layer_made_it_is_called(layer, change, reason):
    change(layer)
    assert chosen(layer) is None and chosen(layer, gradients=True) is None
    assert reason in reasons(layer)["here"]
    with dispatch.use(doubled="here"), torch.no_grad(), pytest.raises(ValueError, match=reason.split(",")[0]):
        layer(X)


def test_global_hooks(layer):
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert chosen(layer) is None and reasons(layer)["here"] == "global hooks"
    finally:
        handle.remove()
    assert chosen(layer) == "here"


def test_a_tensor_subclass(layer):
    class Marked(torch.Tensor):
        pass

    assert chosen(layer, X.as_subclass(Marked)) is None
    assert reasons(layer, X.as_subclass(Marked))["here"] == "the input is a Marked"


def test_transforms(layer):
    def formula_only(x):
        assert dispatch.choose(layer, x) is None
        return layer(x)

    with torch.no_grad():
        expected = 2 * layer.conv(X)
        assert torch.allclose(torch.vmap(formula_only)(X[:, None])[:, 0], expected)
        assert torch.allclose(torch.func.jvp(formula_only, (X,), (X,))[1], expected)
        torch.func.grad(lambda x: formula_only(x).sum())(X)
        with torch.autograd.forward_ad.dual_level():
            formula_only(torch.autograd.forward_ad.make_dual(X, X))


def test_a_dispatch_mode_sees_the_formula(layer):
    class Names(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Names() as names:
        assert dispatch.choose(layer, X) is None
        layer(X)
    assert "aten::mul.Tensor" in names.seen


def test_tracing_and_scripting(layer):
    with torch.no_grad():
        traced, scripted = torch.jit.trace(layer, X), torch.jit.script(layer)
        for module in (traced, scripted):
            assert torch.allclose(module(X), layer(X), atol=1e-6)
        assert "aten::mul" in str(traced.inlined_graph)


GRAPHS = """
import sys
import torch
sys.path.insert(0, {tests!r})
from toy_rows import Doubled

graphs = []
with torch.no_grad():
    torch.compile(Doubled().eval(), backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(
        torch.randn(2, 4, 3, 3)
    )
assert len(graphs) == 1, graphs
"""


def test_compiling(processes, tmp_path):
    """In a process of its own: what other tests compiled before decides what is compiled again."""
    status, log = processes.run(folder=tmp_path, code=GRAPHS.format(tests=str(Path(__file__).parent)))
    assert status == 0, log


class TestDevices:
    """Another device than a CPU: the CPU's tensors, said to be on one."""

    @pytest.fixture
    def on_gpu(self, monkeypatch, tmp_path):
        situation = dispatch.situation_of
        monkeypatch.setattr(dispatch, "situation_of", lambda x: situation(x)._replace(device="cuda"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        here = {"device": "A GPU", "capability": "9.0", "build": "abc", "torch": torch.__version__}
        monkeypatch.setattr(records, "place", lambda *args: here)
        monkeypatch.setattr(records, "SHIPPED", tmp_path / "measured")
        monkeypatch.setenv("TIMM_DYNAMIC_CACHE", str(tmp_path))
        records.forget()
        yield here
        records.forget()

    def record(self, here, on, path=None):
        records.write(path or records.path_of_user(), here | {"names": {"doubled: on a GPU": {"on": on}}, "cases": []})
        records.forget()

    def test_nothing_runs_that_is_not_measured(self, layer, on_gpu):
        assert chosen(layer) is None
        assert reasons(layer)["on a GPU"].startswith("not measured as faster on this cuda device: `timm-dynamic check")
        for everything, choices in ((["kernel"], {}), ([], {"doubled": "kernel"}), ([], {"doubled": "on a GPU"})):
            with dispatch.use(*everything, **choices):
                assert chosen(layer) == "on a GPU"

    def test_what_is_measured_as_faster_runs(self, layer, on_gpu):
        self.record(on_gpu, True)
        assert chosen(layer) == "on a GPU"
        self.record(on_gpu, False)
        assert chosen(layer) is None

    @pytest.mark.parametrize("key", ["device", "capability", "build", "torch"])
    def test_elsewhere_it_does_not(self, layer, on_gpu, key):
        self.record(on_gpu | {key: "other"}, True)
        assert chosen(layer) is None

    def test_records_of_the_package(self, layer, on_gpu):
        self.record(on_gpu | {"torch": "other"}, True, records.SHIPPED / "a_gpu.json")
        assert chosen(layer) == "on a GPU"
        self.record(on_gpu, False)  # the user's own counts first
        assert chosen(layer) is None

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"records": 1}', '{"records": [1, {"names": {}}]}'])
    def test_a_file_that_is_no_record(self, layer, on_gpu, text):
        records.path_of_user().write_text(text)
        assert chosen(layer) is None
        self.record(on_gpu, True)
        assert chosen(layer) == "on a GPU"

    def test_operators(self, on_gpu, monkeypatch):
        monkeypatch.setitem(kernels._status, "cuda", "loaded")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(kernels, "operators_with_kernel", lambda device_type: ["ddf", "gather_rows"])
        assert not kernels.has_kernel("cuda", "ddf") and "0 of 2 are on" in kernels.backend_info()["cuda"]
        with dispatch.use(ddf="kernel"):
            assert kernels.has_kernel("cuda", "ddf") and not kernels.has_kernel("cuda", "gather_rows")
        records.write(records.path_of_user(), on_gpu | {"names": {"ddf": {"on": True}}, "cases": []})
        records.forget()
        assert kernels.has_kernel("cuda", "ddf") and not kernels.has_kernel("cuda", "gather_rows")
        assert kernels.backend_info()["cuda"].startswith("loaded; 1 of 2 are on: `timm-dynamic check --device cuda`")

    def test_it_is_known_while_compiling(self, on_gpu):
        records.write(records.path_of_user(), on_gpu | {"names": {"ddf": {"on": True}}, "cases": []})
        records.forget()

        def function(x):
            return x + 1 if kernels.is_measured("cuda", "ddf") else x

        assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1)) == 1


def test_names_of_the_same_place_are_replaced(tmp_path):
    path, here = tmp_path / "new" / "check.json", {"device": "d", "capability": None, "build": "b", "torch": "t"}
    for names, row in (({"a": {"on": True}, "b": {"on": True}}, "old"), ({"b": {"on": False}}, "new")):
        cases = [{"name": name, "row": row} for name in names]
        records.write(path, here | {"names": names, "cases": cases})
    records.write(path, here | {"build": "c", "names": {}, "cases": []})
    first, second = records.read(path)
    assert first["names"] == {"a": {"on": True}, "b": {"on": False}} and second["build"] == "c"
    assert first["cases"] == [{"name": "a", "row": "old"}, {"name": "b", "row": "new"}]
    assert [p.name for p in path.parent.iterdir()] == ["check.json"]


def test_the_build_of_a_binary(tmp_path):
    path = tmp_path / "_cuda.so"
    assert records.build_of(path) == "none"
    path.write_bytes(b"")
    assert records.build_of(path) == "none"
    path.write_bytes(b"no note")
    assert len(records.build_of(path)) == 40
    path.write_bytes(b"\x7fELF" + b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0" + bytes(range(20)) + b"rest")
    assert records.build_of(path) == bytes(range(20)).hex()
