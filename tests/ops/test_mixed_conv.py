"""mixed_conv2d against the per-sample weights written out, and what training with it may keep in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from timm_dynamic.ops import (
    affine_reference_,
    backend_info,
    mixed_conv,
    mixed_conv2d,
    mixed_conv2d_reference,
    reference_only,
)
from timm_dynamic.ops.affine import NO_NORM

# (B, C, Co, kernel, H, W, groups, stride, padding, dilation)
CASES = {
    "1x1": (3, 4, 6, (1, 1), 7, 5, 1, (1, 1), (0, 0), (1, 1)),
    "1x1, strided": (3, 4, 6, (1, 1), 7, 6, 1, (2, 3), (0, 0), (1, 1)),
    "1x1, padded": (2, 4, 6, (1, 1), 7, 5, 1, (1, 1), (1, 0), (1, 1)),
    "1x1, grouped": (2, 4, 6, (1, 1), 7, 5, 2, (1, 1), (0, 0), (1, 1)),
    "depthwise": (3, 4, 4, (3, 3), 8, 5, 4, (2, 2), (1, 1), (1, 1)),
    "depthwise, multiplied": (2, 4, 8, (5, 5), 8, 5, 4, (1, 1), (2, 2), (1, 1)),
    "dense": (3, 4, 6, (3, 3), 7, 5, 1, (1, 1), (1, 1), (1, 1)),
    "grouped, oblong and dilated": (2, 4, 6, (3, 1), 9, 8, 2, (1, 2), (2, 0), (2, 1)),
    "one sample": (1, 4, 6, (3, 3), 7, 5, 1, (2, 2), (1, 1), (1, 1)),
    "one sample, 1x1": (1, 4, 6, (1, 1), 7, 5, 1, (2, 1), (0, 0), (1, 1)),
    "no sample": (0, 4, 6, (3, 3), 7, 5, 1, (1, 1), (1, 1), (1, 1)),
    "no sample, 1x1": (0, 4, 6, (1, 1), 7, 5, 1, (1, 1), (0, 0), (1, 1)),
    "one pixel": (2, 4, 6, (1, 1), 1, 1, 1, (1, 1), (0, 0), (1, 1)),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def tensors(B, C, Co, kernel, H, W, groups, dtype=torch.float64, N=3):
    torch.manual_seed(0)
    shapes = ((B, C, H, W), (B, N), (N, Co, C // groups, *kernel))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def written_out(x, attention, kernels, stride, padding, dilation, groups):
    if len(x) == 0:
        return F.conv2d(x, kernels[0], None, stride, padding, dilation, groups)
    weights = torch.einsum("bn,noikl->boikl", attention, kernels)
    options = (None, stride, padding, dilation, groups)
    return torch.cat([F.conv2d(x[b : b + 1], weights[b], *options) for b in range(len(x))])


@pytest.fixture(params=CASES)
def case(request):
    *shape, groups, stride, padding, dilation = CASES[request.param]
    return tensors(*shape, groups), (stride, padding, dilation, groups)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("parts", [None, 1], ids=["whole", "in parts"])
@pytest.mark.parametrize("grouped", [None, 0], ids=["", "one by one"])
def test_output_and_gradients(case, layout, dtype, parts, grouped, monkeypatch):
    if parts:
        monkeypatch.setattr(mixed_conv, "_parts", lambda x, kernels: (slice(b, b + 1) for b in range(len(x))))
    if grouped is not None:
        monkeypatch.setattr(mixed_conv, "_GROUPED_WEIGHTS", grouped)
    arguments, options = case
    arguments = [t.detach().to(dtype).requires_grad_() for t in arguments]
    x = arguments[0].detach().to(memory_format=layout).requires_grad_()
    out, expected = mixed_conv2d(x, *arguments[1:], *options), written_out(*arguments, *options)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, expected, **tolerance)
    assert len(x) == 0 or out.is_contiguous(memory_format=layout)
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(out, [x, *arguments[1:]], grad)
    if len(x):
        for own, written in zip(grads, torch.autograd.grad(expected, arguments, grad), strict=True):
            torch.testing.assert_close(own, written, **tolerance)
    else:
        assert not any(g.any() for g in grads)


def test_reference(case):
    arguments, options = case
    torch.testing.assert_close(mixed_conv2d_reference(*arguments, *options), written_out(*arguments, *options))


# Kernel size, stride and dilation.
DEPTHWISE = [(3, 1, 1), (3, 2, 1), (3, 1, 2), (5, 2, 1), (5, 1, 3), (7, 3, 1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise_is_decoupled_dynamic_filtering(case, layout, monkeypatch):
    K, stride, dilation = case
    x, *others = tensors(3, 6, 6, (K, K), 9, 8, 6)
    x = x.detach().to(memory_format=layout).requires_grad_()
    padding = dilation * (K // 2)
    options = ((stride, stride), (padding, padding), (dilation, dilation), 6)
    monkeypatch.setattr(mixed_conv, "_is_ddf", lambda *args: True)
    out, expected = mixed_conv2d(x, *others, *options), written_out(x, *others, *options)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=layout)
    grad = torch.randn_like(expected)
    for wanted in ([x, *others], others):
        own, written = (torch.autograd.grad(y, wanted, grad, retain_graph=True) for y in (out, expected))
        for one, other in zip(own, written, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        ({}, True),
        ({"stride": (2, 2), "K": 5, "padding": (4, 4), "dilation": (2, 2)}, True),
        ({"device": "cpu"}, False),
        ({"K": 2}, False),
        ({"K": 1, "padding": (0, 0)}, False),
        ({"padding": (1, 0)}, False),
        ({"padding": (0, 0)}, False),
        ({"stride": (1, 2)}, False),
        ({"dilation": (1, 2)}, False),
        ({"Co": 8}, False),
        ({"groups": 2}, False),
        ({"dtype": torch.int32}, False),
    ],
    ids=str,
)
def test_who_is_decoupled_dynamic_filtering(change, serves, monkeypatch):
    monkeypatch.setattr(mixed_conv, "has_kernel", lambda device_type: True)
    case = {"K": 3, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 4, "Co": 4}
    case |= {"device": "cuda", "dtype": torch.float32} | change
    with FakeTensorMode():
        x = torch.empty(2, 4, 9, 9, dtype=case["dtype"], device=case["device"])
        kernels = torch.empty(3, case["Co"], 4 // case["groups"], case["K"], case["K"], device=case["device"])
    options = (case[name] for name in ("stride", "padding", "dilation", "groups"))
    assert mixed_conv._is_ddf(x, kernels, *options) == serves


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_wanted_gradients(needed):
    for name in ("1x1", "dense"):
        *shape, groups, stride, padding, dilation = CASES[name]
        arguments = [t.requires_grad_(i == needed) for i, t in enumerate(tensors(*shape, groups))]
        options = (stride, padding, dilation, groups)
        torch.compile(mixed_conv2d, backend="aot_eager")(*arguments, *options).square().sum().backward()
        assert [t.grad is not None for t in arguments] == [i == needed for i in range(3)]
        (expected,) = torch.autograd.grad(written_out(*arguments, *options).square().sum(), arguments[needed])
        torch.testing.assert_close(arguments[needed].grad, expected)


def test_expanded_gradient():
    arguments = tensors(2, 4, 6, (1, 1), 5, 5, 1)
    mixed_conv2d(*arguments).sum().backward()  # the gradient of a sum has strides of 0
    assert all(t.grad.isfinite().all() for t in arguments)


def test_second_derivative():
    arguments = tensors(2, 2, 4, (3, 3), 4, 3, 2)
    assert torch.autograd.gradgradcheck(lambda *t: mixed_conv2d(*t, (1, 1), (1, 1), (1, 1), 2), arguments)


@pytest.mark.parametrize("name", ["1x1", "dense"])
def test_registration(name):
    *shape, groups, stride, padding, dilation = CASES[name]
    torch.library.opcheck(
        torch.ops.timm_dynamic.mixed_conv2d, (*tensors(*shape, groups), stride, padding, dilation, groups)
    )


def test_training_keeps_only_the_arguments():
    """In particular not the weights of the samples."""
    kept = []
    x, attention, kernels = tensors(4, 8, 16, (3, 3), 6, 6, 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixed_conv2d(x, attention, kernels, (1, 1), (1, 1))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, attention, kernels)}


def test_large_weights_are_mixed_in_parts(monkeypatch):
    monkeypatch.setitem(mixed_conv._CHUNK, "cpu", 6 * 16)
    x, _, kernels = tensors(9, 4, 4, (1, 1), 3, 3, 1)
    assert [(p.start, p.stop) for p in mixed_conv._parts(x, kernels)] == [(0, 6), (6, 12)]
    kernels = tensors(9, 4, 4, (3, 3), 3, 3, 1)[2]
    assert [p.start for p in mixed_conv._parts(x, kernels)] == [0, 4, 8]  # at least four at a time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["1x1", "depthwise", "dense", "one sample"])
def test_autocast(name, dtype):
    *shape, groups, stride, padding, dilation = CASES[name]
    arguments, options = tensors(*shape, groups, dtype=torch.float32), (stride, padding, dilation, groups)
    with torch.autocast("cpu", dtype):
        out = mixed_conv2d(*arguments, *options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), written_out(*arguments, *options), rtol=0.05, atol=0.1)
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5, 7, 7)}, r"x must be \[B, 4, H, W\], got shape \[2, 5, 7, 7\]"),
        ({"attention": (2, 4)}, r"attention must be \[2, 3\], got shape \[2, 4\]"),
        ({"x": (2, 4, 2, 7)}, r"x of size \[2, 7\] is too small for a 3x3 kernel"),
    ],
    ids=str,
)
def test_bad_shapes(change, message):
    shapes = {"x": (2, 4, 7, 7), "attention": (2, 3), "kernels": (3, 6, 4, 3, 3)} | change
    with pytest.raises(ValueError, match=message):
        mixed_conv2d(*(torch.randn(shape) for shape in shapes.values()))


needs_kernel = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")


@needs_kernel
@pytest.mark.parametrize(
    "shape",  # B, C, Co, H, W, N
    [
        *[
            (1, 1, 1, 1, 1, 1),
            (3, 5, 7, 5, 9, 3),
            (16, 33, 65, 14, 13, 4),
            (1, 600, 130, 7, 7, 4),
            (5, 700, 3, 3, 3, 2),
        ],
        *[(2, 40, 16, 33, 31, 5), (1, 3, 40, 57, 60, 2)],
    ],
    ids=str,
)
def test_pointwise_kernel(shape):
    B, C, Co, H, W, N = shape
    x, _, kernels = (t.detach() for t in tensors(B, C, Co, (1, 1), H, W, 1, torch.float32, N))
    attention = torch.rand(B, N).softmax(1)
    wide = (t.double() for t in (x, attention, kernels))
    expected = mixed_conv2d_reference(*wide).float()
    operator = torch.ops.timm_dynamic.mixed_pointwise
    torch.testing.assert_close(operator(x, attention, kernels, *NO_NORM), expected, rtol=0, atol=1e-6 * C + 1e-5)
    norm = (torch.rand(Co) - 0.5, torch.randn(Co), -0.1, 0.4)
    affine_reference_(expected, *norm)
    torch.testing.assert_close(operator(x, attention, kernels, *norm), expected, rtol=0, atol=1e-6 * C + 1e-5)


@pytest.mark.parametrize("norm", [NO_NORM, (torch.ones(6), None, 0.0, 6.0), (None, torch.ones(6), 0.0, 6.0)], ids=str)
def test_pointwise_registration(norm):
    arguments = [t.detach() for t in tensors(2, 4, 6, (1, 1), 7, 5, 1, torch.float32)]
    torch.library.opcheck(torch.ops.timm_dynamic.mixed_pointwise.default, (*arguments, *norm))


@needs_kernel
@pytest.mark.parametrize(
    ("change", "serves"),
    [
        (lambda *t: t, True),
        (lambda x, a, k: (x.requires_grad_(), a, k), True),
        (lambda x, a, k: (x[:, :, ::2], a, k), True),
        (lambda x, a, k: (x, a.t().contiguous().t(), k), True),
        (lambda x, a, k: (x.to(memory_format=torch.channels_last), a, k), False),
        (lambda x, a, k: (x, a, k.transpose(3, 4).transpose(1, 2).contiguous().transpose(1, 2)), False),
        (lambda x, a, k: (x[:0], a[:0], k), False),
        (lambda *tensors: tuple(t.double() for t in tensors), False),
        (lambda x, a, k: (x.bfloat16(), a, k), False),
    ],
    ids=["plain", "gradient", "strided", "attention", "channels_last", "kernels", "empty", "double", "bfloat16"],
)
def test_pointwise_kernel_runs_where_it_serves(monkeypatch, change, serves):
    calls = []
    operator = torch.ops.timm_dynamic.mixed_pointwise
    monkeypatch.setattr(
        torch.ops.timm_dynamic, "mixed_pointwise", lambda *args: calls.append(args) or operator(*args), raising=False
    )
    arguments = change(*(t.detach() for t in tensors(2, 4, 6, (1, 1), 8, 6, 1, torch.float32)))
    out = mixed_conv2d(*arguments)
    with reference_only():
        torch.testing.assert_close(out, mixed_conv2d(*arguments))
    assert bool(calls) == serves


@needs_kernel
def test_pointwise_kernel_refuses_bad_arguments():
    x, attention, kernels = (t.detach() for t in tensors(2, 4, 6, (1, 1), 7, 5, 1, torch.float32))
    operator = torch.ops.timm_dynamic.mixed_pointwise
    with pytest.raises(RuntimeError, match=r"kernels must be \[N, Co, 5, 1, 1\]"):
        operator(torch.randn(2, 5, 7, 5), attention, kernels, *NO_NORM)
    with pytest.raises(RuntimeError, match="attention must be 6 contiguous float32"):
        operator(x, attention[:1], kernels, *NO_NORM)
    with pytest.raises(RuntimeError, match="norm_scale must be 6 contiguous float32"):
        operator(x, attention, kernels, torch.ones(5), None, 0.0, 6.0)
    with pytest.raises(RuntimeError, match="x must be"):
        operator(x.double(), attention, kernels, *NO_NORM)
