"""mixed_conv2d against the weights of the samples written out, in every situation, and what training keeps."""

import pytest
import torch
import torch.nn.functional as F
from pairs import in_turns
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic
from timm_dynamic.ops import mixed_conv2d
from timm_dynamic.ops.sample_conv import columns, samples, training
from timm_dynamic.ops.shapes import memory_format


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(columns, "_FEW", 0)  # the maps here are small: else all were by columns


# (B, C, O, kernel, H, W, groups, stride, padding, dilation). With one kernel, by columns where O > Ho * Wo.
CASES = {
    "1x1": (3, 4, 6, (1, 1), 7, 5, 1, (1, 1), (0, 0), (1, 1)),
    "1x1, strided": (3, 4, 6, (1, 1), 7, 6, 1, (2, 3), (0, 0), (1, 1)),
    "1x1, strided to a column": (2, 4, 6, (1, 1), 8, 1, 1, (3, 3), (0, 0), (1, 1)),
    "1x1, padded": (2, 4, 6, (1, 1), 7, 5, 1, (1, 1), (1, 0), (1, 1)),
    "1x1, grouped": (2, 4, 6, (1, 1), 7, 5, 2, (1, 1), (0, 0), (1, 1)),
    "1x1, small map": (2, 4, 40, (1, 1), 7, 5, 1, (2, 2), (0, 0), (1, 1)),
    "depthwise": (3, 4, 4, (3, 3), 8, 5, 4, (2, 2), (1, 1), (1, 1)),
    "depthwise, multiplied": (2, 4, 8, (5, 5), 8, 5, 4, (1, 1), (2, 2), (1, 1)),
    "dense": (3, 4, 6, (3, 3), 7, 5, 1, (1, 1), (1, 1), (1, 1)),
    "small map": (3, 4, 40, (3, 3), 7, 5, 1, (1, 1), (1, 1), (1, 1)),
    "small map, oblong and dilated": (2, 4, 99, (5, 3), 9, 8, 1, (1, 2), (0, 1), (1, 2)),
    "columns in the weight's order": (2, 3, 80, (3, 3), 3, 3, 1, (1, 1), (1, 1), (1, 1)),
    "grouped, oblong and dilated": (2, 4, 6, (3, 1), 9, 8, 2, (1, 2), (2, 0), (2, 1)),
    "one sample": (1, 4, 6, (3, 3), 7, 5, 1, (2, 2), (1, 1), (1, 1)),
    "one sample, small map": (1, 4, 40, (3, 3), 7, 5, 1, (1, 1), (1, 1), (1, 1)),
    "one sample, columns": (1, 3, 64, (3, 3), 4, 4, 1, (1, 1), (1, 1), (1, 1)),
    "one sample, 1x1": (1, 4, 6, (1, 1), 7, 5, 1, (2, 1), (0, 0), (1, 1)),
    "no sample": (0, 4, 6, (3, 3), 7, 5, 1, (1, 1), (1, 1), (1, 1)),
    "no sample, 1x1": (0, 4, 6, (1, 1), 7, 5, 1, (1, 1), (0, 0), (1, 1)),
    "no sample, small map": (0, 4, 40, (3, 3), 7, 5, 1, (1, 1), (1, 1), (1, 1)),
    "one pixel": (2, 4, 6, (1, 1), 1, 1, 1, (1, 1), (0, 0), (1, 1)),
}
FACTORS = {
    "mixed": (True, (False, False, False)),
    "gated": (False, (True, True, True)),
    "mixed and gated": (True, (True, True, True)),
    "some gates": (False, (True, False, True)),
    "mixed, some gates": (True, (False, True, False)),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a part": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}
NAMES = ("x", "attention", "kernels", "a_in", "a_tap", "a_out")


def tensors(B, C, O, kernel, H, W, groups, factors="mixed and gated", dtype=torch.float64, N=3):
    torch.manual_seed(0)
    mixed, gates = FACTORS[factors]
    I, taps = C // groups, kernel[0] * kernel[1]
    shapes = [(B, C, H, W), (B, N) if mixed else None, (N if mixed else 1, O, I, *kernel)]
    shapes += [(B, n) if gated else None for n, gated in zip((I, taps, O), gates, strict=True)]
    return [s and torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def case_of(name, factors="mixed and gated", **kwargs):
    *shape, groups, stride, padding, dilation = CASES[name]
    return tensors(*shape, groups, factors=factors, **kwargs), (stride, padding, dilation, groups)


def run(x, attention, kernels, a_in, a_tap, a_out, *options):
    return mixed_conv2d(x, attention, kernels, *options, a_in=a_in, a_tap=a_tap, a_out=a_out)


def written_out(x, attention, kernels, a_in, a_tap, a_out, *options):
    if len(x) == 0:
        return F.conv2d(x, kernels[0], None, *options)
    weights = kernels if attention is None else torch.einsum("bn,noikl->boikl", attention, kernels)
    if a_in is not None:
        weights = weights * a_in[:, None, :, None, None]
    if a_tap is not None:
        weights = weights * a_tap.view(len(x), 1, 1, *kernels.shape[3:])
    if a_out is not None:
        weights = weights * a_out[:, :, None, None, None]
    pairs = zip(x, weights.expand(len(x), *weights.shape[1:]), strict=True)
    return torch.stack([F.conv2d(sample, weight, None, *options) for sample, weight in pairs])


def gradients(y, inputs, grad=None):
    wanted = {name: t for name, t in zip(NAMES, inputs, strict=True) if t is not None and t.requires_grad}
    grad = torch.ones_like(y) if grad is None else grad
    return dict(zip(wanted, torch.autograd.grad(y, wanted.values(), grad), strict=True))


@pytest.mark.parametrize(("name", "factors", "layout"), in_turns(CASES, FACTORS, LAYOUTS))
def test_output_and_gradients(name, factors, layout):
    inputs, options = case_of(name, factors)
    x = LAYOUTS[layout](inputs[0].detach()).requires_grad_()
    inputs[0] = x
    expected = written_out(*inputs, *options)
    grad = torch.randn_like(expected)
    expected_grads = gradients(expected, inputs, grad) if len(x) else {}
    for everything in (None, "formula"):
        with timm_dynamic.use(everything):
            out = run(*inputs, *options)
        torch.testing.assert_close(out, expected)
        grads = gradients(out, inputs, grad)
        if len(x):
            torch.testing.assert_close(grads, expected_grads)
        else:
            assert not any(g.any() for g in grads.values())
        if len(x) and everything is None:
            assert layout == "channels_last" or out.is_contiguous()
            assert layout == "contiguous" or x.is_contiguous() or out.is_contiguous(memory_format=memory_format(x))


@pytest.mark.parametrize("name", ["dense", "small map", "1x1, small map", "one sample, small map"])
def test_channels_last_stays(name):
    """Also where weights outweigh maps, so that both are reordered for the kernel."""
    inputs, options = case_of(name, dtype=torch.float32)
    inputs = [None if t is None else t.detach() for t in inputs]
    expected = written_out(*(t.double() for t in inputs), *options)
    inputs[0] = LAYOUTS["channels_last"](inputs[0])
    out = run(*inputs, *options)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "factors", "layout"),
    in_turns(
        ("1x1", "1x1, strided to a column", "1x1, small map", "dense", "small map", "depthwise", "one sample"),
        FACTORS,
        ("contiguous", "channels_last", "strided arguments"),
    ),
)
def test_single_precision(name, factors, layout):
    inputs, options = case_of(name, factors, dtype=torch.float32)
    double = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    if layout == "strided arguments":
        inputs = [t if t is None else torch.stack([t.detach()] * 2, -1)[..., 0].requires_grad_() for t in inputs]
    else:
        inputs[0] = LAYOUTS[layout](inputs[0].detach()).requires_grad_()
    out, expected = run(*inputs, *options), written_out(*double, *options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    grads = gradients(out.square().sum(), inputs)
    for key, grad in gradients(expected.square().sum(), double).items():
        torch.testing.assert_close(grads[key].double(), grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("name", ["1x1", "dense", "depthwise", "small map"])
def test_parts_do_not_matter(name, factors, monkeypatch):
    inputs, options = case_of(name, factors)
    results = []
    for number, cached in ((1, 1), (2, 108), (2**30, 2**30)):  # 108: three outputs of one sample, or one of two
        monkeypatch.setattr(columns, "_CHUNK", number)
        monkeypatch.setattr(columns, "_FEW", number)
        monkeypatch.setitem(training._CACHED, "cpu", cached)
        monkeypatch.setattr(samples, "_GROUPED_WEIGHTS", number)
        monkeypatch.setattr(training, "_parts", lambda x, *_, n=number: (slice(b, b + n) for b in range(0, len(x), n)))
        out = run(*inputs, *options)
        results.append((out, gradients(out.square().sum(), inputs)))
    torch.testing.assert_close(results[:-1], results[-1:] * 2)


@pytest.mark.parametrize("name", ["1x1", "dense", "small map"])
@pytest.mark.parametrize("needed", NAMES)
def test_only_wanted_gradients(name, needed):
    inputs, options = case_of(name, "mixed and gated" if needed == "attention" else "gated")
    for key, t in zip(NAMES, inputs, strict=True):
        if t is not None:
            t.requires_grad_(key == needed)
    torch.testing.assert_close(*(gradients(f(*inputs, *options).square().sum(), inputs) for f in (run, written_out)))


@pytest.mark.parametrize(
    ("name", "factors"), [*zip(("1x1", "depthwise", "small map", "no sample", "dense"), FACTORS, strict=True)]
)
def test_registration(name, factors):
    inputs, options = case_of(name, factors)
    operators = torch.ops.timm_dynamic
    torch.library.opcheck(operators.mixed_conv2d, (*inputs, *options))
    inputs = [t if t is None else t.detach() for t in inputs]
    out, kept = operators.mixed_conv2d(*inputs, *options)
    needs = [t is not None for t in inputs]
    arguments = (torch.randn_like(out), *inputs, kept, *options, needs)
    torch.library.opcheck(operators.mixed_conv2d_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def from_one(w, v, kernels):
    """All arguments of a pointwise or a depthwise convolution, computed from one x and two matrices."""
    x = torch.sin(v)
    pooled = x.mean((2, 3))
    factors = ((pooled @ w).softmax(1), torch.tanh(pooled), torch.tanh(pooled[:, :1] * w[:1, :1]), torch.tanh(pooled))
    groups = x.shape[1] // kernels.shape[2]
    attention, a_in, a_tap, a_out = factors
    a_tap = a_tap.repeat(1, kernels.shape[3:].numel())
    padding = (kernels.shape[3] // 2,) * 2
    a_in = a_in[:, : kernels.shape[2]]
    return mixed_conv2d(x, attention, kernels, padding=padding, groups=groups, a_in=a_in, a_tap=a_tap, a_out=a_out)


@pytest.mark.parametrize("kernel", [(4, 4, 1, 1), (4, 1, 3, 3)], ids=str)
def test_derivatives_where_arguments_depend_on_each_other(kernel):
    torch.manual_seed(0)
    shapes = ((4, 2), (2, 4, 3, 2), (2, *kernel))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(from_one, inputs)
    assert torch.autograd.gradgradcheck(from_one, inputs)
    plain, graph = (
        torch.autograd.grad(from_one(*inputs).square().sum(), inputs, create_graph=create) for create in (False, True)
    )
    torch.testing.assert_close(plain, graph)


@pytest.mark.parametrize("factors", ["mixed", "gated", "mixed and gated"])
@pytest.mark.parametrize("name", ["1x1", "dense", "depthwise", "small map"])
def test_transforms(name, factors):
    inputs, options = case_of(name, factors)
    given = [t for t in inputs if t is not None]

    def loss(*some):
        some = iter(some)
        return run(*(None if t is None else next(some) for t in inputs), *options).square().sum()

    numbers = tuple(range(len(given)))
    expected = torch.autograd.grad(loss(*given), given)
    torch.testing.assert_close(torch.func.grad(loss, numbers)(*given), expected)
    torch.testing.assert_close(torch.func.jacrev(loss, numbers)(*given), expected)
    torch.testing.assert_close(torch.func.vjp(loss, *given)[1](torch.ones((), dtype=torch.float64)), expected)
    along = tuple(torch.randn_like(t) for t in given)
    product = sum((a * g).sum() for a, g in zip(along, expected, strict=True))
    torch.testing.assert_close(torch.func.jvp(loss, tuple(given), along)[1], product)

    shared = next(i for i, t in enumerate(given) if t is inputs[2])
    dims = tuple(None if i == shared else 0 for i in numbers)
    samples = [t if i == shared else t[:, None] for i, t in enumerate(given)]
    each = torch.vmap(torch.func.grad(loss, shared), dims)(*samples)
    torch.testing.assert_close(each.sum(0), expected[shared])


@pytest.mark.parametrize("factors", ["gated", "mixed and gated"])
def test_compiled_with_a_dynamic_batch(factors):
    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for B in (2, 3, 5):
        inputs = tensors(B, 4, 40, (3, 3), 7, 5, 1, factors)
        results = []
        for function in (run, compiled):
            out = function(*inputs, (1, 1), (1, 1), (1, 1), 1)
            results.append((out, gradients(out.square().sum(), inputs)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("name", ["1x1", "dense", "depthwise", "small map"])
def test_flops(name, factors):
    """Those of the static convolution, and of the mixing; backwards twice."""
    (x, attention, kernels, *gates), options = case_of(name, factors)
    with FlopCounterMode(display=False) as static:
        F.conv2d(x, kernels[0], None, *options)
    mixing = 0 if attention is None else 2 * attention.numel() * kernels[0].numel()
    with FlopCounterMode(display=False) as counter:
        run(x, attention, kernels, *gates, *options).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    counts = [counts[getattr(torch.ops.timm_dynamic, key)] for key in ("mixed_conv2d", "mixed_conv2d_backward")]
    assert counts == [static.get_total_flops() + mixing, 2 * static.get_total_flops() + 3 * mixing]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize(("size", "groups"), [(12, 1), (5, 1), (6, 2)], ids=["weights", "columns", "grouped"])
def test_gates_need_no_weight_for_every_sample(size, groups):
    """Nothing has as many elements as all samples' weights, in either pass: the mode sees inside, where it stands."""
    inputs = [t if t is None else t.detach() for t in tensors(6, 48, 48, (3, 3), size, size, groups, "gated")]
    limit, options = 6 * inputs[2].numel(), ((1, 1), (1, 1), (1, 1), groups)
    assert inputs[0].numel() < limit
    with Largest() as largest:
        out, kept = training.forward(*inputs, *options)
        training.backward(torch.ones_like(out), *inputs, kept, *options, [t is not None for t in inputs])
    assert inputs[2].numel() <= largest.elements < limit


@pytest.mark.parametrize("factors", FACTORS)
def test_training_keeps_only_the_arguments(factors):
    kept = []
    inputs = tensors(4, 8, 16, (3, 3), 6, 6, 1, factors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(*inputs, (1, 1), (1, 1), (1, 1), 1)
    assert {t.data_ptr() for t in kept if t.numel()} == {t.data_ptr() for t in inputs if t is not None}


def test_large_weights_are_mixed_in_parts(monkeypatch):
    monkeypatch.setitem(training._CHUNK, "cpu", 6 * 16)
    x, attention, kernels, *_ = tensors(9, 4, 4, (1, 1), 3, 3, 1)
    assert [(p.start, p.stop) for p in training._parts(x, attention, kernels)] == [(0, 6), (6, 12)]
    kernels = tensors(9, 4, 4, (3, 3), 3, 3, 1)[2]
    assert [p.start for p in training._parts(x, attention, kernels)] == [0, 4, 8]  # at least four at a time


@pytest.mark.parametrize(
    ("name", "factors", "dtype"),
    in_turns(
        ("1x1", "depthwise", "dense", "small map", "one sample"), ("mixed", "gated"), (torch.bfloat16, torch.float16)
    ),
    ids=str,
)
def test_autocast(name, factors, dtype):
    inputs, options = case_of(name, factors, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        out = run(*inputs, *options)
    assert out.dtype == dtype
    expected = written_out(*inputs, *options)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)
    grads = gradients(out.float().sum(), inputs)
    for key, grad in gradients(expected.sum(), inputs).items():
        assert grads[key].dtype == torch.float32
        torch.testing.assert_close(grads[key], grad, rtol=0.1, atol=0.1 * grad.abs().max().item())


@pytest.mark.parametrize("factors", ["mixed and gated", "gated"])
def test_gates_of_another_precision_than_the_kernels(factors):
    inputs, options = case_of("dense", factors, dtype=torch.float32)
    expected = run(*inputs, *options)
    wide = inputs[:3] + [t if t is None else t.double() for t in inputs[3:]]
    torch.testing.assert_close(run(*wide, *options), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5, 7, 7)}, r"x must be \[B, 4, H, W\], got shape \[2, 5, 7, 7\]"),
        ({"attention": (2, 4)}, r"attention must be \[2, 3\], got shape \[2, 4\]"),
        ({"x": (2, 4, 2, 7)}, r"x of size \[2, 7\] is too small for a 3x3 kernel"),
        ({"a_in": (2, 3)}, r"a_in must be \[2, 4\], got shape \[2, 3\]"),
        ({"a_tap": (1, 9)}, r"a_tap must be \[2, 9\]"),
        ({"a_out": (2, 6, 1)}, r"a_out must be \[2, 6\]"),
        ({"attention": None}, "3 kernels need an attention"),
    ],
    ids=str,
)
def test_bad_shapes(change, message):
    shapes = {"x": (2, 4, 7, 7), "attention": (2, 3), "kernels": (3, 6, 4, 3, 3)} | change
    gates = {name: torch.randn(shapes.pop(name)) for name in ("a_in", "a_tap", "a_out") if name in shapes}
    with pytest.raises(ValueError, match=message):
        mixed_conv2d(*(shape and torch.randn(shape) for shape in shapes.values()), **gates)
