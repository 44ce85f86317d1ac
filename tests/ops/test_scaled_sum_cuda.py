"""The CUDA kernels of scaled_sum against the reference on the CPU. `benchmarks/gpu.sh tests` runs these."""

import math

import pytest
import torch
from on_gpu import DEVICE, LAYOUTS, MIXED_DTYPES, TOLERANCE, every_layout, needs_gpu

from timm_dynamic.layers import DCDConv2d
from timm_dynamic.ops import (
    reference_only,
    scaled_sum,
    scaled_sum_reference,
    sum_and_project,
    sum_and_project_reference,
)

pytestmark = needs_gpu()

OPS = torch.ops.timm_dynamic
# B, O, L, H, W: around the ends of vectors, of tiles (32 and 64), of latent channels at once (16, 32 and 48).
CASES = [
    (0, 4, 2, 3, 3),
    (1, 1, 1, 1, 1),
    (2, 8, 4, 4, 8),
    (3, 37, 8, 5, 7),
    (2, 72, 17, 7, 7),
    pytest.param((1, 16, 31, 13, 16), marks=pytest.mark.sanitized),
    (1, 136, 50, 8, 8),
    (1, 24, 100, 3, 3),
    (2, 130, 33, 9, 10),
    (1, 65, 48, 1, 65),
    (1, 200, 16, 33, 2),
    (1, 1, 1, 1, 2),
]
LARGE = [(70000, 3, 2, 1, 2), (4, 512, 22, 28, 28), (128, 2048, 22, 7, 7), (2, 64, 8, 112, 112), (2, 5, 181, 70, 30)]


def arguments(case, layout, dtype, wide):
    """The incoming gradient and what the operator takes; no number is rounded in a cast."""
    B, O, L, H, W = case  # noqa: E741
    torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(shape).to(dtype)

    maps = (randn(B, O, H, W).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    others = (randn(B, O), randn(O, L, 1, 1), randn(B, L, H, W))
    return [*maps, *(t.float() if wide else t for t in others)]


def forward_and_backward(operators, grad, *args, **kwargs):
    return [operators.scaled_sum(*args, **kwargs), *operators.scaled_sum_backward(grad, *args, **kwargs)]


def expected_of(grad, *args):
    """In float64."""
    grad, *leaves = (t.detach().cpu().double() for t in (grad, *args))
    leaves = [t.requires_grad_() for t in leaves]
    out = scaled_sum_reference(*leaves)
    dy, dscale, _, dv = torch.autograd.grad(out, leaves, grad)
    return [out.detach(), dy, dscale, dv]


def check(actual, expected, args):
    y, scale, _, v = args
    for name, one, other, like in zip(("out", "dy", "dscale", "dv"), actual, expected, (y, y, scale, v), strict=True):
        assert one.dtype == like.dtype and one.shape == like.shape, name
        atol = TOLERANCE[y.dtype] * (other.abs().max().clamp(min=1).item() if other.numel() else 1)
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for own in actual[:2]:  # strides of single elements are nobody's business
        assert all(a == b for a, b, n in zip(own.stride(), torch.empty_like(y).stride(), y.shape, strict=True) if n > 1)
    assert actual[3].is_contiguous()


@every_layout
@MIXED_DTYPES
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_results(case, dtype, wide, layout):
    args = [t.to(DEVICE) for t in arguments(case, layout, dtype, wide)]
    check(forward_and_backward(OPS, *args), expected_of(*args), args[1:])


def other_layouts(grad, y, scale, p, v):
    """The same numbers elsewhere in memory."""

    def strided(t):
        return torch.stack([t, t], t.ndim)[..., 0]

    def misaligned(t):
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)

    yield misaligned(grad), misaligned(y), misaligned(scale), misaligned(p), misaligned(v)
    yield strided(grad), strided(y), strided(scale), strided(p), strided(v)
    yield grad.to(memory_format=torch.channels_last), y.contiguous(), scale, p, v
    yield grad.contiguous(), y.to(memory_format=torch.channels_last), scale, p, v
    yield grad, y, scale, p.flatten(1), v.to(memory_format=torch.channels_last)
    yield grad, y, scale, p, v.flatten(2)
    yield grad, y, scale, p, v.flatten(2).mT.contiguous().mT


@pytest.mark.sanitized
@every_layout
@MIXED_DTYPES
def test_other_layouts(dtype, wide, layout):
    args = [t.to(DEVICE) for t in arguments((2, 24, 9, 4, 6), layout, dtype, wide)]
    expected = expected_of(*args)
    for own in other_layouts(*args):
        for one, other in zip(forward_and_backward(OPS, *own), expected, strict=True):
            atol = TOLERANCE[dtype] * other.abs().max().item()
            torch.testing.assert_close(one.cpu().double().view(other.shape), other, rtol=0, atol=atol)


@every_layout
def test_nan_stays_in_its_sample(layout):
    grad, y, scale, p, v = (t.to(DEVICE) for t in arguments((3, 24, 9, 4, 6), layout, torch.float32, False))
    grad[1, 3, 2, 2] = y[1, 5, 1, 1] = v[1, 2, 0, 0] = math.nan
    out, dy, dscale, dv = forward_and_backward(OPS, grad, y, scale, p, v)
    assert all(t[[0, 2]].isfinite().all() for t in (out, dy, dscale, dv))
    assert out[1, :, 0, 0].isnan().all() and out[1].isnan().sum() == 25
    assert dy[1].isnan().sum() == 1 and dscale[1].isnan().sum() == 2 and dv[1].isnan().sum() == 9


def test_float16_keeps_large_numbers_finite():
    y, scale, p, v = (t.to(DEVICE) for t in arguments((1, 8, 3, 2, 2), "NCHW", torch.float16, True)[1:])
    assert OPS.scaled_sum(y, scale, p * 0, v + 1e6).isfinite().all()


@every_layout
@MIXED_DTYPES
def test_deterministic(dtype, wide, layout):
    args = [t.to(DEVICE) for t in arguments((8, 512, 22, 28, 28), layout, dtype, wide)]
    first = forward_and_backward(OPS, *args)
    for _ in range(3):
        again = forward_and_backward(OPS, *args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@every_layout
def test_memory_is_what_the_results_need(layout):
    args = [t.to(DEVICE) for t in arguments((32, 256, 16, 28, 28), layout, torch.bfloat16, False)]
    map_bytes = args[1].nbytes
    for call in (lambda: OPS.scaled_sum(*args[1:]), lambda: OPS.scaled_sum_backward(*args)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before <= 1.5 * map_bytes


def test_another_stream():
    """Inputs that another stream has yet to write."""
    args = [t.to(DEVICE) for t in arguments((4, 64, 8, 28, 28), "channels_last", torch.float32, False)]
    expected, late = forward_and_backward(OPS, *args), [torch.zeros_like(t) for t in args]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on the default stream would overtake this
        for to, from_ in zip(late, args, strict=True):
            to.copy_(from_)
        actual = forward_and_backward(OPS, *late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_another_device():
    args = [t.to("cuda:1") for t in arguments(CASES[3], "NCHW", torch.float32, False)]
    with torch.cuda.device(0):
        actual = forward_and_backward(OPS, *args)
    check(actual, expected_of(*args), args[1:])


@every_layout
def test_cuda_graph(layout):
    args = [t.to(DEVICE) for t in arguments((4, 64, 8, 14, 14), layout, torch.bfloat16, True)]
    forward_and_backward(OPS, *args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(OPS, *args)
    for t in args:
        t.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, forward_and_backward(OPS, *args), strict=True):
        assert torch.equal(one, other)


@every_layout
@MIXED_DTYPES
def test_opcheck(dtype, wide, layout):
    grad, *args = (t.to(DEVICE) for t in arguments((2, 8, 3, 4, 5), layout, dtype, wide))
    if dtype == torch.float32:  # its tolerances are of no other
        torch.library.opcheck(OPS.scaled_sum.default, tuple(t.clone().requires_grad_() for t in args))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.scaled_sum.default, tuple(args), test_utils=tests)
    torch.library.opcheck(OPS.scaled_sum_backward.default, (grad, *args), test_utils=tests)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, torch.Tensor.double, "y must be"),
        (1, lambda t: t[0], "y must be"),
        (2, lambda t: t[:, 1:], "scale must have shape .2, 24"),
        (2, torch.Tensor.half, "scale must be beside"),
        (3, lambda t: t[1:], "p must have shape"),
        (3, torch.Tensor.bfloat16, "p must be beside"),
        (4, lambda t: t[:, :, 1:], "v must have shape"),
        (4, torch.Tensor.double, "v must be beside"),
        (0, lambda t: t[:1], "grad must have shape"),
    ],
)
def test_bad_arguments_are_refused(index, change, message):
    args = [t.to(DEVICE) for t in arguments((2, 24, 9, 4, 6), "NCHW", torch.float32, False)]
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        OPS.scaled_sum_backward(*args)


def projection(case, layout, dtype, wide):
    """What `sum_and_project` and its gradient take: the latter's two gradients first."""
    x, _, dsums, q, dz = arguments(case, layout, dtype, wide)
    return dsums.float(), dz, x, q.transpose(0, 1).contiguous()


def check_projection(operators, dsums, dz, x, q, **kwargs):
    sums, z = operators.sum_and_project(x, q, **kwargs)
    dx = operators.sum_and_project_backward(dsums, dz, x, q, **kwargs)
    assert (sums.dtype, z.dtype, dx.dtype) == (torch.float32, q.dtype, x.dtype) and z.is_contiguous()
    assert dx.stride() == torch.empty_like(x).stride()
    leaf, *others = (t.detach().cpu().double() for t in (x, q, dsums, dz))
    expected = sum_and_project_reference(leaf.requires_grad_(), others[0])
    expected += torch.autograd.grad(expected, leaf, others[1:])
    for name, one, other in zip(("sums", "z", "dx"), (sums, z, dx), expected, strict=True):
        precision = torch.float32 if one.dtype == torch.float32 else x.dtype
        atol = TOLERANCE[precision] * (other.abs().max().clamp(min=1).item() if other.numel() else 1)
        torch.testing.assert_close(
            one.cpu().double(), other.detach(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_layout
@MIXED_DTYPES
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_projection(case, dtype, wide, layout):
    check_projection(OPS, *(t.to(DEVICE) for t in projection(case, layout, dtype, wide)))


@every_layout
def test_projection_on_another_stream_and_in_a_graph(layout):
    args = [t.to(DEVICE) for t in projection((2, 64, 8, 14, 14), layout, torch.bfloat16, True)]

    def run():
        return [*OPS.sum_and_project(*args[2:]), OPS.sum_and_project_backward(*args)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captures from a stream of its own
        captured = run()
    for t in args:
        t.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@every_layout
def test_opcheck_of_projection(layout):
    dsums, dz, x, q = (t.to(DEVICE) for t in projection((2, 8, 3, 4, 5), layout, torch.float32, False))
    torch.library.opcheck(OPS.sum_and_project.default, (x.clone().requires_grad_(), q.clone().requires_grad_()))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.sum_and_project_backward.default, (dsums, dz, x, q), test_utils=tests)


REFUSED_PROJECTIONS = [
    (2, torch.Tensor.double, "x must be"),
    (3, lambda t: t[:, 1:], "q must have shape"),
    (3, torch.Tensor.half, "q must be beside"),
    (0, lambda t: t[1:], "dsums must have shape"),
    (1, lambda t: t[:, 1:], "dz must have shape"),
    (1, torch.Tensor.double, "dz must be beside"),
]


@pytest.mark.parametrize(("index", "change", "message"), REFUSED_PROJECTIONS)
def test_bad_arguments_of_projections_are_refused(index, change, message):
    args = [t.to(DEVICE) for t in projection((2, 24, 9, 4, 6), "NCHW", torch.float32, False)]
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        OPS.sum_and_project_backward(*args)


def layer_and_input(layout, stride=2):
    torch.manual_seed(0)
    layer = DCDConv2d(24, 40, 3, stride, padding=1).to(DEVICE)
    return layer, torch.randn(5, 24, 15, 13, device=DEVICE).to(memory_format=LAYOUTS[layout])


def step(layer, x, dtype=None):
    """Output and gradients, after the running statistics' update."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    with torch.autocast(DEVICE, dtype, dtype is not None):
        out = layer(x)
    out.float().square().mean().backward()
    return [t.detach().clone() for t in (out, x.grad, *(p.grad for p in layer.parameters()))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@every_layout
def test_layer(layout, stride, dtype, training, monkeypatch):
    layer, x = layer_and_input(layout, stride)
    layer.train(training)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with reference_only():
            expected = step(layer, x, dtype)
        calls, served = [], scaled_sum.serves
        monkeypatch.setattr(scaled_sum, "serves", lambda *args: calls.append(served(*args)) or calls[-1])
        projections, projects = [], sum_and_project.serves
        monkeypatch.setattr(sum_and_project, "serves", lambda *args: projections.append(args) or projects(*args))
        actual = step(layer, x, dtype)
    assert calls and all(calls)
    assert bool(projections) == (stride == 1 and dtype is not None)
    tolerance = 1e-4 if dtype is None else 0.05
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1e-3, other.abs().max().item()))


@every_layout
def test_layer_compiled_and_run_again(layout):
    torch._dynamo.reset()
    layer, x = layer_and_input(layout)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(2):
            for one, other in zip(step(compiled, x), step(layer, x), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
            x = x.flip(0)


def test_gradcheck_in_float64():
    layer, x = layer_and_input("NCHW")
    layer, x = layer.double().eval(), x[:2, :, :4, :3].double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x, nondet_tol=1e-10)  # cuDNN adds up in any order
