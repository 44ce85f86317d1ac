"""factored_conv2d against the per-sample weights written out, and what training with it may keep in memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_dynamic.ops import factored_conv, factored_conv2d, factored_conv2d_reference

# (B, C, Co, kernel, H, W, rank, groups, stride, padding, dilation); by columns where Co > Ho * Wo.
CASES = {
    "by sample": (2, 4, 6, (3, 3), 7, 5, 1, 1, (1, 1), (1, 1), (1, 1)),
    "by columns": (3, 4, 40, (3, 3), 7, 5, 1, 1, (1, 1), (1, 1), (1, 1)),
    "by columns, strided": (3, 4, 40, (3, 3), 8, 9, 1, 1, (2, 2), (1, 1), (1, 1)),
    "by columns, oblong and dilated": (2, 4, 99, (5, 3), 9, 8, 1, 1, (1, 2), (0, 1), (1, 2)),
    "by columns, 1x1": (2, 4, 40, (1, 1), 7, 5, 1, 1, (2, 2), (0, 0), (1, 1)),
    "columns in the weight's order": (2, 3, 80, (3, 3), 3, 3, 1, 1, (1, 1), (1, 1), (1, 1)),
    "one sample": (1, 4, 6, (3, 3), 7, 5, 1, 1, (1, 1), (1, 1), (1, 1)),
    "one sample, few positions": (1, 4, 40, (3, 3), 7, 5, 1, 1, (1, 1), (1, 1), (1, 1)),
    "one sample, columns": (1, 3, 64, (3, 3), 4, 4, 1, 1, (1, 1), (1, 1), (1, 1)),
    "no sample": (0, 4, 6, (3, 3), 7, 5, 1, 1, (1, 1), (1, 1), (1, 1)),
    "no sample, columns": (0, 4, 40, (3, 3), 7, 5, 1, 1, (1, 1), (1, 1), (1, 1)),
    "rank 3": (2, 4, 40, (3, 3), 7, 5, 3, 1, (1, 1), (1, 1), (1, 1)),
    "grouped": (2, 4, 6, (3, 3), 8, 9, 2, 2, (2, 1), (2, 1), (2, 1)),
    "depthwise": (3, 4, 4, (3, 3), 7, 5, 1, 4, (1, 1), (1, 1), (1, 1)),
    "one pixel": (2, 4, 6, (3, 3), 1, 1, 1, 1, (1, 1), (1, 1), (1, 1)),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def tensors(B, C, Co, kernel, H, W, rank, groups, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((B, C, H, W), (Co, C // groups, *kernel), (B, C // groups, rank), (B, kernel[0] * kernel[1], rank))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in (*shapes, (B, Co, rank))]


def written_out(x, weight, a_in, a_tap, a_out, stride, padding, dilation, groups):
    gates = torch.einsum("bir,bkr,bor->boik", a_in, a_tap, a_out)
    own = weight * gates.view(len(x), *weight.shape)
    return torch.stack(
        [F.conv2d(xb, wb, None, stride, padding, dilation, groups) for xb, wb in zip(x, own, strict=True)]
    )


@pytest.fixture(params=CASES)
def case(request):
    *shape, groups, stride, padding, dilation = CASES[request.param]
    return tensors(*shape, groups), (stride, padding, dilation, groups)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_forward_and_gradients(case, layout):
    inputs, options = case
    inputs[:2] = (t.detach().contiguous(memory_format=layout).requires_grad_() for t in inputs[:2])
    output, reference = factored_conv2d(*inputs, *options), factored_conv2d_reference(*inputs, *options)
    torch.testing.assert_close(output, reference)
    assert output.is_contiguous(memory_format=layout) or output.numel() == 0
    if len(output):
        torch.testing.assert_close(output, written_out(*inputs, *options))
    grad = torch.randn_like(output)
    names = ("x", "weight", "a_in", "a_tap", "a_out")
    grads = zip(names, *(torch.autograd.grad(y, inputs, grad) for y in (output, reference)), strict=True)
    for name, ours, expected in grads:
        torch.testing.assert_close(ours, expected, msg=lambda message, name=name: f"{name}: {message}")


def test_operator_check(case):
    inputs, options = case
    torch.library.opcheck(torch.ops.timm_dynamic.factored_conv2d, (*inputs, *options))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_the_compiler_is_told_of_the_backward_pass(case, layout):
    inputs, options = case
    inputs = [t.detach().contiguous(memory_format=layout) if t.ndim == 4 else t.detach() for t in inputs]
    forward, backward = torch.ops.timm_dynamic.factored_conv2d, torch.ops.timm_dynamic.factored_conv2d_backward
    output, rows = forward(*inputs, *options)
    arguments = (torch.randn_like(output), *inputs, rows, *options, [True, True])
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["by sample", "by columns", "rank 3"])
def test_float32(name):
    *shape, groups, stride, padding, dilation = CASES[name]
    inputs, options = tensors(*shape, groups, dtype=torch.float32), (stride, padding, dilation, groups)
    double = [t.double() for t in inputs]
    output = factored_conv2d(*inputs, *options)
    torch.testing.assert_close(output.double(), factored_conv2d_reference(*double, *options), rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(output.sum(), inputs)
    expected = torch.autograd.grad(factored_conv2d_reference(*double, *options).sum(), inputs)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_wanted_gradients(case, frozen):
    inputs, options = case
    wanted = [t for i, t in enumerate(inputs) if i != frozen]
    inputs[frozen].requires_grad_(False)
    output, reference = factored_conv2d(*inputs, *options), factored_conv2d_reference(*inputs, *options)
    for ours, expected in zip(*(torch.autograd.grad(y.sum(), wanted) for y in (output, reference)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_second_derivative():
    inputs = tensors(2, 2, 2, (3, 3), 3, 4, 1, 1)
    assert torch.autograd.gradgradcheck(lambda *t: factored_conv2d(*t, (1, 1), (1, 1)), inputs)


def test_chunks_do_not_matter(monkeypatch):
    inputs = tensors(5, 3, 40, (3, 3), 6, 6, 1, 1)
    results = []
    for chunk in (1, 2 * 36 * 27, 10**6):
        monkeypatch.setattr(factored_conv, "_CHUNK", chunk)
        output = factored_conv2d(*inputs, (1, 1), (1, 1))
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for a, b in itertools.pairwise(results):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize(
    ("B", "C", "Co", "size", "rank", "groups"),
    [(6, 48, 48, 12, 1, 1), (6, 48, 48, 5, 1, 1), (6, 48, 48, 5, 4, 1), (2, 48, 48, 5, 1, 1), (6, 64, 64, 6, 1, 2)],
    ids=["by sample", "by columns", "rank 4", "two samples", "grouped"],
)
def test_no_weight_per_sample(B, C, Co, size, rank, groups):
    """Nothing has as many elements as all samples' weights, in either pass: a mode sees inside the operators too."""
    x, weight, a_in, a_tap, a_out = (t.detach() for t in tensors(B, C, Co, (3, 3), size, size, rank, groups))
    limit = B * weight.numel()
    assert x.numel() < limit
    with Largest() as forward:
        output, rows = factored_conv._forward(x, weight, a_in, a_tap, a_out, (1, 1), (1, 1), (1, 1), groups)
    arguments = (torch.ones_like(output), x, weight, a_in, a_tap, a_out, rows)
    with Largest() as backward:
        factored_conv._backward(*arguments, (1, 1), (1, 1), (1, 1), groups, [True, True])
    assert weight.numel() <= forward.elements < limit and weight.numel() <= backward.elements < limit


def test_what_is_kept_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        inputs = tensors(4, 8, 8, (3, 3), 9, 9, 1, 1)
        factored_conv2d(*inputs, (1, 1), (1, 1))
    own = {t.data_ptr() for t in inputs}
    assert all(t.data_ptr() in own or t.numel() == 0 for t in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("Co", [6, 64])
def test_autocast(dtype, Co):
    inputs = tensors(2, 4, Co, (3, 3), 7, 5, 1, 1, dtype=torch.float32)
    expected = factored_conv2d(*inputs, (1, 1), (1, 1))
    with torch.autocast("cpu", dtype):
        output = factored_conv2d(*inputs, (1, 1), (1, 1))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.1)
    grads = [torch.autograd.grad(y.float().square().mean(), inputs) for y in (output, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1 * theirs.abs().max().item())


def test_compiled_with_a_dynamic_batch(monkeypatch):
    def broken(*args):
        raise AssertionError("the compiled graph must call the operators")

    monkeypatch.setattr(factored_conv, "factored_conv2d_reference", broken)
    compiled = torch.compile(factored_conv2d, backend="aot_eager", fullgraph=True, dynamic=True)
    for B, Co in itertools.product((1, 2, 5), (6, 40)):
        inputs = tensors(B, 4, Co, (3, 3), 7, 5, 1, 1)
        results = []
        for function in (factored_conv2d, compiled):
            output = function(*inputs, (1, 1), (1, 1))
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        torch.testing.assert_close(*results)


def test_bad_input():
    x, weight, a_in, a_tap, a_out = tensors(2, 4, 6, (3, 3), 7, 5, 1, 1)
    with pytest.raises(ValueError, match=r"x must be \[B, 4, H, W\], got shape \[2, 3, 7, 5\]"):
        factored_conv2d(x[:, :3], weight, a_in, a_tap, a_out)
    with pytest.raises(ValueError, match="too small for a 3x3 kernel"):
        factored_conv2d(x[..., :2], weight, a_in, a_tap, a_out)
    for name, gates in (
        ("a_in", (a_in[:, 1:], a_tap, a_out)),
        ("a_tap", (a_in, a_tap[:1], a_out)),
        ("a_out", (a_in, a_tap, a_out.repeat(1, 1, 2))),
    ):
        with pytest.raises(ValueError, match=f"{name} must be "):
            factored_conv2d(x, weight, *gates)
