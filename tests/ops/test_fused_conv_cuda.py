"""The CUDA kernels of fused convolutions on a GPU, against float64 on the CPU. `benchmarks/gpu.sh tests` runs these."""

import copy

import pytest
import torch
from on_gpu import DEVICE, needs_gpu

from timm_dynamic.layers import DynamicConv2d, PEDConv2d
from timm_dynamic.ops import factored_conv2d, fused_conv, mixed_conv2d

pytestmark = needs_gpu(tensor_cores=True)

TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
KINDS = pytest.mark.parametrize("kind", ["mixed", "gated"])
PUBLIC = {"mixed": mixed_conv2d, "gated": factored_conv2d}
CASES = {
    # B, C, Co, kernel, H, W, stride, padding, dilation, N
    "7x7": (64, 512, 512, (3, 3), 7, 7, (1, 1), (1, 1), (1, 1), 4),
    "14x14": (16, 256, 256, (3, 3), 14, 14, (1, 1), (1, 1), (1, 1), 4),
    "28x28": (8, 128, 128, (3, 3), 28, 28, (1, 1), (1, 1), (1, 1), 4),
    "56x56": (4, 64, 64, (3, 3), 56, 56, (1, 1), (1, 1), (1, 1), 4),
    "strided": (8, 64, 128, (3, 3), 56, 56, (2, 2), (1, 1), (1, 1), 4),
    "odd and strided": (5, 24, 40, (3, 3), 15, 13, (2, 2), (1, 1), (1, 1), 5),
    "dilated": (3, 8, 72, (3, 3), 19, 18, (1, 1), (2, 2), (2, 2), 8),
    "oblong": (6, 40, 24, (5, 2), 12, 9, (3, 1), (4, 0), (1, 3), 6),
    "two pixels": (130, 136, 8, (3, 3), 1, 2, (1, 1), (1, 1), (1, 1), 1),
    "inputs that nothing reads": (2, 8, 8, (2, 2), 11, 19, (5, 7), (0, 0), (1, 1), 4),
    "1x1": (9, 48, 56, (1, 1), 10, 10, (2, 2), (0, 0), (1, 1), 3),
}
ODD = CASES["odd and strided"]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def arguments(kind, case, dtype, seed=0, device=DEVICE):
    """The tensors of a call of a public operator, its options, and the gradient of its output."""
    B, C, Co, kernel, H, W, stride, padding, dilation, N = case
    g = torch.Generator().manual_seed(seed)
    taps, scale = kernel[0] * kernel[1], (C * kernel[0] * kernel[1]) ** -0.5
    size = fused_conv.output_size((H, W), kernel, stride, padding, dilation)
    if kind == "mixed":
        factors = [torch.randn(B, N, generator=g).softmax(1), torch.randn(N, Co, C, *kernel, generator=g) * scale]
    else:
        gates = [torch.rand(B, n, 1, generator=g) for n in (C, taps, Co)]
        factors = [torch.randn(Co, C, *kernel, generator=g) * scale, *gates]
    x, grad = (torch.randn(shape, generator=g).to(dtype) for shape in ((B, C, H, W), (B, Co, *size)))
    x, grad = (t.to(device).contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return [x, *(t.to(device) for t in factors)], (stride, padding, dilation), grad


def run(function, tensors, options, grad):
    """The output and all gradients."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors, *options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def wide(tensors):
    return [t.cpu().double() for t in tensors]


def check(results, expected, dtype):
    for i, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        assert actual.shape == wanted.shape
        tolerance = TOLERANCE[dtype] * wanted.abs().max().item()
        torch.testing.assert_close(
            actual.cpu().double(), wanted, rtol=0, atol=tolerance, msg=lambda m, i=i: f"result {i}: {m}"
        )


@pytest.fixture(autouse=True)
def _small_batches_too(monkeypatch):
    monkeypatch.setattr(fused_conv, "LEAST_BATCH", 2)


@pytest.fixture
def calls(monkeypatch):
    """What ran of `fused_conv`, by name."""
    calls = []

    def recorded(name, function):
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    for name in ("mixed", "mixed_backward", "gated", "gated_backward"):
        monkeypatch.setattr(fused_conv, name, recorded(name, getattr(fused_conv, name)))
    return calls


@every_case
@DTYPES
@KINDS
def test_output_and_gradients(kind, dtype, case, calls):
    tensors, options, grad = arguments(kind, case, dtype)
    results = run(PUBLIC[kind], tensors, options, grad)
    assert calls == ([] if kind == "mixed" and case[3] == (1, 1) else [kind, f"{kind}_backward"])
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    check(results, run(PUBLIC[kind], wide(tensors), options, grad.cpu().double()), dtype)


@KINDS
def test_factors_of_the_dtype_of_the_input(kind):
    tensors, options, grad = arguments(kind, ODD, torch.bfloat16)
    tensors = [t.bfloat16() for t in tensors]
    results = run(PUBLIC[kind], tensors, options, grad)
    assert all(r.dtype == torch.bfloat16 for r in results)
    check(results, run(PUBLIC[kind], wide(tensors), options, grad.cpu().double()), torch.bfloat16)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "every second channel": lambda t: torch.stack([t, t], 2).flatten(1, 2)[:, ::2],
    "some samples": lambda t: torch.cat([t[:1], t]).contiguous(memory_format=torch.channels_last)[1:],
    "misaligned": lambda t: (
        torch.cat([t.permute(0, 2, 3, 1).flatten()[:1], t.permute(0, 2, 3, 1).flatten()])[1:]
        .view(t.permute(0, 2, 3, 1).shape)
        .permute(0, 3, 1, 2)
    ),
}


@pytest.mark.sanitized
@pytest.mark.parametrize("layout", LAYOUTS)
@KINDS
def test_layouts(kind, layout):
    tensors, options, grad = arguments(kind, ODD, torch.float16)
    tensors[0] = LAYOUTS[layout](tensors[0])
    results = run(PUBLIC[kind], tensors, options, LAYOUTS[layout](grad))
    check(results, run(PUBLIC[kind], wide(tensors), options, grad.cpu().double()), torch.float16)


@KINDS
def test_the_gradient_of_a_sum(kind):
    """It has strides of 0."""
    tensors, options, grad = arguments(kind, ODD, torch.float16)
    ones = torch.ones((), dtype=torch.float16, device=DEVICE).expand(grad.shape)
    results = run(PUBLIC[kind], tensors, options, ones)
    check(results, run(PUBLIC[kind], wide(tensors), options, ones.cpu().double()), torch.float16)


@KINDS
def test_deterministic(kind):
    call = arguments(kind, CASES["14x14"], torch.bfloat16)
    first = run(PUBLIC[kind], *call)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(PUBLIC[kind], *call), strict=True))


@KINDS
def test_no_weights_of_samples_in_memory(kind):
    """64 samples' would be 302 MB in bfloat16; columns 29 MB."""
    tensors, options, grad = arguments(kind, CASES["7x7"], torch.bfloat16)
    run(PUBLIC[kind], tensors, options, grad)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(PUBLIC[kind], tensors, options, grad)
    kernels = tensors[-1] if kind == "mixed" else tensors[1]
    # Kernels in another order, their gradient and its parts; parts of the others' gradients are 29 MB at most.
    assert torch.cuda.max_memory_allocated() - before <= 5 * kernels.nbytes + 40e6


@KINDS
def test_another_stream(kind):
    tensors, options, grad = arguments(kind, CASES["14x14"], torch.bfloat16)
    expected = run(PUBLIC[kind], [tensors[0] * 2, *tensors[1:]], options, grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on the default stream would overtake this
        late = [tensors[0] * 2, *tensors[1:]]
        actual = run(PUBLIC[kind], late, options, grad)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
@KINDS
def test_another_device(kind):
    tensors, options, grad = arguments(kind, ODD, torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0):
        results = run(PUBLIC[kind], tensors, options, grad)
    check(results, run(PUBLIC[kind], wide(tensors), options, grad.cpu().double()), torch.bfloat16)


@KINDS
def test_cuda_graph(kind):
    tensors, options, grad = arguments(kind, ODD, torch.bfloat16)
    run(PUBLIC[kind], tensors, options, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(PUBLIC[kind], tensors, options, grad)
    tensors[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(PUBLIC[kind], tensors, options, grad)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@KINDS
def test_compile_fullgraph_and_run_again(kind):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *others: PUBLIC[kind](x * 1.0, *others).relu(), fullgraph=True)
    for seed in range(2):
        tensors, options, grad = arguments(kind, ODD, torch.bfloat16, seed)
        expected = run(lambda *a: PUBLIC[kind](*a).relu(), tensors, options, grad)
        check(run(compiled, tensors, options, grad), wide(expected), torch.bfloat16)


@KINDS
def test_opcheck(kind):
    tensors, options, _ = arguments(kind, ODD, torch.bfloat16)
    name = "mixed_conv2d" if kind == "mixed" else "factored_conv2d"
    torch.library.opcheck(
        getattr(torch.ops.timm_dynamic, name).default,
        (*(t.requires_grad_() for t in tensors), *options, 1),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@KINDS
def test_bad_arguments_are_refused(kind):
    tensors, options, _ = arguments(kind, ODD, torch.bfloat16)
    taps = torch.ones(1, 9, 40, 24, device=DEVICE)
    factors = [torch.ones(5, 1)] if kind == "mixed" else [torch.ones(5, 9, 24), torch.ones(5, 40)]
    operator = getattr(torch.ops.timm_dynamic, f"fused_{kind}_conv")
    factors = [t.to(DEVICE) for t in factors]
    with pytest.raises(RuntimeError, match="x must be"):
        operator(tensors[0].contiguous(), *factors, taps, (8, 7), (3, 3), *options, False)
    with pytest.raises(RuntimeError, match="no convolution with these options"):
        operator(tensors[0], *factors, taps, (9, 7), (3, 3), *options, False)
    with pytest.raises(RuntimeError, match="float32"):
        operator(tensors[0], *(f.cpu() for f in factors), taps, (8, 7), (3, 3), *options, False)


LAYERS = {
    "mixed": lambda **options: DynamicConv2d(32, 48, 3, padding=1, **options),
    "gated": lambda **options: PEDConv2d(32, 48, 3, padding=1, noise_std=0, **options),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("stride", [1, 2])
@KINDS
def test_layers_under_autocast(kind, stride, compiled, training, calls):
    torch.manual_seed(0)
    layer = LAYERS[kind](stride=stride).train(training)
    expected_layer = copy.deepcopy(layer).double()
    layer = layer.to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(6, 32, 13, 12).bfloat16().float()
    on_gpu = x.to(DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True) if compiled else layer
    with torch.autocast("cuda", torch.bfloat16):
        out = call(on_gpu)
    assert out.dtype == torch.bfloat16
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(grad.to(DEVICE))
    assert calls == [kind, f"{kind}_backward"]

    leaf = x.double().requires_grad_()
    expected = expected_layer(leaf)
    expected.backward(grad.double())
    check([out, on_gpu.grad], [expected.detach(), leaf.grad], torch.bfloat16)
    for (name, p), wanted in zip(layer.named_parameters(), expected_layer.parameters(), strict=True):
        assert (p.grad is None) == (wanted.grad is None), name
        if p.grad is not None:
            scale = wanted.grad.abs().max().item()
            torch.testing.assert_close(
                p.grad.cpu().double(), wanted.grad, rtol=0, atol=3e-2 * scale + 1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
