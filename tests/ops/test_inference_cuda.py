"""The CUDA kernels that fuse layers' small operations for inference. `benchmarks/gpu.sh tests` runs these."""

import math
from unittest import mock

import pytest
import timm
import torch
from on_gpu import DEVICE, LAYOUTS, MIXED_DTYPES, TOLERANCE, every_layout, needs_gpu

from timm_dynamic.layers import DCDConv2d, DynamicConv2d, PEDConv2d
from timm_dynamic.ops import (
    affine_reference_,
    dcd_factors_reference,
    factored_gates_reference,
    kernel_attention_reference,
    mixed_conv2d,
    mixed_conv2d_reference,
    reference_only,
)

pytestmark = needs_gpu()

OPS = torch.ops.timm_dynamic
NO_LIMITS = (-math.inf, math.inf)
LIMITS = pytest.mark.parametrize("limits", [(0.0, 6.0), NO_LIMITS], ids=str)
SHAPES = [
    (2, 8, 4, 8),
    (1, 1, 1, 1),
    pytest.param((3, 37, 5, 7), marks=pytest.mark.sanitized),
    (2, 1030, 2, 2),
    (2, 3, 60, 70),
    (1, 16, 40, 30),
    (5, 24, 1, 9),
]
SHAPES_OF_MAPS = pytest.mark.parametrize("shape", SHAPES, ids=str)
NAMES = ["affine_", "kernel_attention", "factored_gates", "dcd_factors"]
every_operator = pytest.mark.parametrize("name", NAMES)
REFERENCES = {
    "kernel_attention": kernel_attention_reference,
    "factored_gates": factored_gates_reference,
    "dcd_factors": dcd_factors_reference,
}


def arguments(name, shape, layout="NCHW", dtype=torch.float32, wide=False):
    """On the CPU; no number is rounded in a cast."""
    torch.manual_seed(0)
    C = shape[1]

    def parameter(*size):
        t = (torch.randn(size) / (size[-1] ** 0.5 if len(size) > 1 else 1)).to(dtype)
        return t.float() if wide else t

    def linear(outputs, inputs):
        return parameter(outputs, inputs), parameter(outputs)

    x, hidden = torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout]) + 0.5, max(1, C // 3)
    if name == "affine_":
        return [x, parameter(C), parameter(C), 0.0, 6.0]
    if name == "kernel_attention":
        return [x, *linear(hidden, C), *linear(35 if C == 37 else 4, hidden), 3.0]
    if name == "factored_gates":
        return [x, *linear(hidden, C), *linear(C, hidden), *linear(70, hidden), *linear(9, hidden)]
    return [x, [parameter(hidden, C), parameter(hidden, hidden), parameter(49, hidden), parameter(70, hidden)]]


def mapped(function, args):
    """`function` of every tensor."""
    if isinstance(args, (list, tuple)):
        return type(args)(mapped(function, a) for a in args)
    return function(args) if isinstance(args, torch.Tensor) else args


def flat(results):
    return results if isinstance(results, tuple) else (results,)


def check(actual, expected, dtype):
    for one, other in zip(flat(actual), flat(expected), strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        scale = other.abs().max().clamp(min=1).item() if other.numel() else 1
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=TOLERANCE[dtype] * scale)


def misaligned(t):
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


def check_affine(operator, y, scale, shift, limits):
    dtype, expected = y.dtype, y.cpu().double()
    affine_reference_(expected, scale.cpu().double(), shift.cpu().double(), *limits)
    for place in (lambda t: t.clone(), *([misaligned] if y.is_contiguous() else [])):
        own = place(y)
        operator(own, scale, shift, *limits)
        check(own, expected, dtype)


def check_operator(operator, name, args, wide):
    """The results are float32, but for DCD's, of the parameters' dtype."""
    expected = REFERENCES[name](*mapped(lambda t: t.cpu().double(), args))
    dtype = args[0].dtype if name == "dcd_factors" and not wide else torch.float32
    check(operator(*args), expected, dtype)
    x = args[0]
    check(operator(x.repeat_interleave(2, 3)[..., ::2], *args[1:]), expected, dtype)
    if x.is_contiguous():
        check(operator(misaligned(x), *args[1:]), expected, dtype)


@every_layout
@MIXED_DTYPES
@LIMITS
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 3, 3), (64, 256, 56, 56)], ids=str)
def test_affine(shape, limits, dtype, wide, layout):
    y, scale, shift, *_ = arguments("affine_", shape, layout, dtype, wide)
    check_affine(OPS.affine_, *(t.to(DEVICE) for t in (y, scale, shift)), limits)


@every_layout
@MIXED_DTYPES
@SHAPES_OF_MAPS
@pytest.mark.parametrize("name", REFERENCES)
def test_results(name, shape, dtype, wide, layout):
    args = mapped(lambda t: t.to(DEVICE), arguments(name, shape, layout, dtype, wide))
    check_operator(getattr(OPS, name), name, args, wide)


@every_layout
@pytest.mark.parametrize("name", REFERENCES)
def test_large(name, layout):
    for shape in ((32, 64, 112, 112), (32, 2048, 7, 7), (1, 960, 14, 14)):
        args = mapped(lambda t: t.to(DEVICE), arguments(name, shape, layout))
        check_operator(getattr(OPS, name), name, args, False)


def test_nan_and_limits():
    y = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=DEVICE).view(1, 1, 2, 2)
    one = torch.ones(1, device=DEVICE)
    OPS.affine_(y, one, one, 0.0, 6.0)
    assert y.isnan().flatten().tolist() == [True, False, False, False]
    assert y.flatten()[1:].tolist() == [6, 0, 2]


@every_layout
@pytest.mark.parametrize("name", REFERENCES)
def test_nan_stays_in_its_sample(name, layout):
    args = mapped(lambda t: t.to(DEVICE), arguments(name, (3, 24, 9, 7), layout))
    args[0][1, 3, 2, 2] = math.nan
    for out in flat(getattr(OPS, name)(*args)):
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def call(name, args):
    result = getattr(OPS, name)(*args)
    return flat(args[0] if name == "affine_" else result)


@every_operator
def test_opcheck(name):
    args = mapped(lambda t: t.to(DEVICE), arguments(name, (2, 24, 7, 9), "channels_last"))
    torch.library.opcheck(getattr(OPS, name).default, tuple(args))
    args = mapped(torch.Tensor.bfloat16, args)
    torch.library.opcheck(getattr(OPS, name).default, tuple(args), test_utils=("test_schema", "test_faketensor"))


@every_operator
def test_another_stream(name):
    """Inputs that another stream has yet to write."""
    args = mapped(lambda t: t.to(DEVICE), arguments(name, (2, 24, 7, 9)))
    late, expected = mapped(torch.zeros_like, args), call(name, mapped(torch.clone, args))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on the default stream would overtake this
        late[0].copy_(args[0])
        actual = call(name, [late[0], *args[1:]])
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_operator
def test_cuda_graph(name):
    args = mapped(lambda t: t.to(DEVICE), arguments(name, (2, 24, 7, 9), "channels_last"))
    x = args[0].clone()
    call(name, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(name, args)
    args[0].copy_(x * 2)
    expected = call(name, mapped(torch.clone, args))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
@every_operator
def test_another_device(name):
    args = mapped(lambda t: t.to("cuda:1"), arguments(name, (2, 24, 7, 9)))
    with torch.cuda.device(0):
        call(name, args)
    torch.cuda.synchronize(1)


REFUSED = [
    ("affine_", 0, lambda t: t[:, :, 1:], "y must be contiguous"),
    ("affine_", 0, torch.Tensor.double, "y must be .B, C, H, W., float32"),
    ("affine_", 1, lambda t: t[1:].clone(), "scale must be 24 contiguous"),
    ("affine_", 1, torch.Tensor.half, "scale must be float32 or of the dtype of y"),
    ("affine_", 2, torch.Tensor.half, "shift must be 24 contiguous"),
    ("kernel_attention", 0, lambda t: t[:0], "x must not be empty"),
    ("kernel_attention", 0, lambda t: t[0], "x must be .B, C, H, W"),
    ("kernel_attention", 1, torch.Tensor.half, "parameters must be float32 or of the dtype of x"),
    ("kernel_attention", 1, lambda t: t[:, 1:], "hidden_weight must be 192 contiguous"),
    ("kernel_attention", 4, torch.Tensor.half, "score_bias must be 4 contiguous"),
    ("factored_gates", 3, lambda t: t[1:], "weight must be 192 contiguous"),
    ("factored_gates", 8, torch.Tensor.double, "bias must be 9 contiguous"),
    ("dcd_factors", 1, lambda fc: fc[:3], "fc must be 4 weights, got 3"),
    ("dcd_factors", 1, lambda fc: [*fc[:3], fc[3][0]], "fc must be matrices"),
    ("dcd_factors", 1, lambda fc: [*fc[:2], fc[2][1:], fc[3]], "fc must be 392 contiguous"),
]


@pytest.mark.parametrize(("name", "index", "change", "message"), REFUSED)
def test_bad_arguments_are_refused(name, index, change, message):
    args = mapped(lambda t: t.to(DEVICE), arguments(name, (2, 24, 7, 9)))
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, name)(*args)


LAYERS = {
    "kernel_attention": lambda: DynamicConv2d(24, 40, 3, stride=2, padding=1),
    "factored_gates": lambda: PEDConv2d(24, 40, 3, stride=2, padding=1, rank=2),
    "dcd_factors": lambda: DCDConv2d(24, 40, 3, stride=2, padding=1),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@every_layout
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_who_takes_the_kernel(name, layout, batch, dtype):
    torch.manual_seed(0)
    layer = LAYERS[name]().to(DEVICE).eval()
    x = torch.randn(batch, 24, 29, 31, device=DEVICE).to(memory_format=LAYOUTS[layout])
    calls = mock.Mock(wraps=getattr(OPS, name))
    off = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with off, mock.patch.object(OPS, name, calls), torch.autocast(DEVICE, dtype, dtype is not None):
        actual = layer(x)
        assert calls.call_count == 1
        with reference_only():
            expected = layer(x)
        layer(x.repeat(33, 1, 1, 1)[:33])
        with torch.enable_grad():
            layer(x)
    assert calls.call_count == 1
    tolerance = 1e-4 if dtype is None else 0.05
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("name", ["dy_mobilenetv2_050", "ped_mobilenetv2", "dcd_resnet18"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@every_layout
@torch.no_grad()
def test_model(name, layout, dtype):
    torch.manual_seed(0)
    model = timm.create_model(name).to(DEVICE, memory_format=LAYOUTS[layout]).eval()
    x = torch.randn(4, 3, 96, 96, device=DEVICE).to(memory_format=LAYOUTS[layout])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(DEVICE, dtype, dtype is not None):
        actual = model(x)
        with reference_only():
            expected = model(x)
    tolerance = 1e-4 if dtype is None else 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [(3, 1, 1), (3, 2, 1), (5, 1, 2), (5, 2, 1), (7, 3, 1)], ids=str)
@every_layout
def test_mixed_depthwise_convolution(options, layout, dtype):
    """By ddf's kernels: the output and the gradients."""
    K, stride, dilation = options
    torch.manual_seed(0)
    x, attention, kernels = torch.randn(5, 36, 13, 12), torch.rand(5, 4), torch.randn(4, 36, 1, K, K) / K
    padding = dilation * (K // 2)
    options = ((stride,) * 2, (padding,) * 2, (dilation,) * 2, 36)
    leaves = [t.to(dtype).double().requires_grad_() for t in (x, attention, kernels)]
    expected = mixed_conv2d_reference(*leaves, *options)
    grad = torch.randn_like(expected).to(dtype)
    own = [t.detach().to(DEVICE, dtype) for t in leaves]
    own[0] = own[0].to(memory_format=LAYOUTS[layout])
    own = [t.requires_grad_() for t in own]
    with mock.patch.object(OPS, "ddf", mock.Mock(wraps=OPS.ddf)) as calls:
        actual = mixed_conv2d(*own, *options)
    assert calls.call_count == 1 and actual.is_contiguous(memory_format=LAYOUTS[layout])
    pairs = [(actual, expected)]
    pairs += zip(
        torch.autograd.grad(actual, own, grad.to(DEVICE)),
        torch.autograd.grad(expected, leaves, grad.double()),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == dtype
        atol = 2 * TOLERANCE[dtype] * other.abs().max().item()  # the mixture is rounded too
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=atol)
