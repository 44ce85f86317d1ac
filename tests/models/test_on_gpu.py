"""Whole models on a GPU: as exact as on a CPU, in bfloat16, compiled, in CUDA graphs. `benchmarks/gpu.sh` runs these.

What float32 loses on the CPU says how much it may lose on the GPU; the truth is float64 on the CPU.
"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import CASES, NO_MODELS
from on_gpu import DEVICE, needs_gpu

from timm_dynamic.families import FAMILIES, family_of

pytestmark = needs_gpu()

LAYOUTS = (torch.contiguous_format, torch.channels_last)
TINY = [family.tiny for family in FAMILIES.values()]
GOLDEN = [name for name in CASES if name not in NO_MODELS]


@pytest.fixture(autouse=True)
def _setup():
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def create(name, **kwargs):
    return timm.create_model(name, **kwargs, **family_of(name).exact).eval()


def tiny(name):
    """The model with its weights of the digits, and images."""
    model = create(name, pretrained=True)
    return model, torch.randn(4, *model.pretrained_cfg["input_size"])


@pytest.fixture(scope="module", params=[*TINY, *GOLDEN])
def case(request, golden, tmp_path_factory):
    """A model with weights that mean something, and images."""
    if request.param in TINY:
        return tiny(request.param)
    case = golden(request.param)
    return case.network(tmp_path_factory.mktemp("authors")).eval(), case.input()


@pytest.fixture(params=TINY)
def small(request):
    return tiny(request.param)


def outputs(model, x):
    with torch.no_grad():
        return model(x).double().cpu()


def gradients(model, x):
    """Of every parameter, in training mode."""
    output = model.train()(x)
    maps = output if isinstance(output, (list, tuple)) else [output]
    logits = [one.flatten(2).mean(2) if one.ndim > 2 else one for one in maps]
    sum(F.cross_entropy(one, torch.arange(len(x), device=x.device)) for one in logits).backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters()}


def on(device, model, **to):
    return copy.deepcopy(model).to(device, **to)


def error(actual, truth):
    return ((actual - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def test_evaluation(case):
    model, x = case
    truth = outputs(copy.deepcopy(model).double(), x.double())
    on_cpu = error(outputs(model, x), truth)
    for layout in LAYOUTS:
        actual = outputs(on(DEVICE, model, memory_format=layout), x.to(DEVICE, memory_format=layout))
        assert error(actual, truth) <= 10 * on_cpu + 1e-5, layout


def test_gradients(case):
    model, x = case
    truth = gradients(copy.deepcopy(model).double(), x.double())
    # Some of them amplify what rounding does by far: how much, both layouts on the CPU show.
    cpu, gpu = (
        [gradients(on(device, model, memory_format=layout), x.to(device, memory_format=layout)) for layout in LAYOUTS]
        for device in ("cpu", DEVICE)
    )
    largest = max(grad.norm() for grad in truth.values())
    for name, expected in truth.items():
        allowed, lost = (max((g[name] - expected).norm() / largest for g in grads) for grads in (cpu, gpu))
        assert lost <= 10 * allowed + 5e-3, name  # a ReLU's input of nearly 0 can have the other sign


def test_autocast_bfloat16_channels_last(small):
    model, x = small
    truth = outputs(model, x)
    model = on(DEVICE, model, memory_format=torch.channels_last)
    x = x.to(DEVICE, memory_format=torch.channels_last)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = outputs(model, x)
        loss = F.cross_entropy(model.train()(x), torch.arange(len(x), device=DEVICE))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # A mask may be another one where it was undecided, so the numbers of masked models are only near.
    assert error(actual, truth) < (0.5 if hasattr(model, "masked_blocks") else 0.05)


def test_a_stream_of_ones_own(small):
    model, x = small
    expected = outputs(on(DEVICE, model), x.to(DEVICE))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model, x = on(DEVICE, model), x.to(DEVICE)
        torch.cuda._sleep(10**7)  # whatever ran on another stream would be too early
        x = x * 1
        actual = outputs(model, x)
    stream.synchronize()
    assert error(actual, expected) < 1e-5


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_cuda_graph(small, amp):
    model, x = small
    model, x = on(DEVICE, model, memory_format=torch.channels_last), x.to(DEVICE, memory_format=torch.channels_last)
    if hasattr(model, "execution"):
        model.execution = "dense"  # sparse execution waits for the number of active positions
    images, stream = x.flip(0), torch.cuda.Stream()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=amp, cache_enabled=False):
        expected = outputs(model, x)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(images)
    images.copy_(x)
    graph.replay()
    assert error(captured.double().cpu(), expected) < (1e-2 if amp else 1e-5)


def test_second_run_after_compile(small):
    """In evaluation and in training; last, as it takes longest."""
    model, x = small
    model, x = on(DEVICE, model), x.to(DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model))
    for images in (x, x.flip(0)):
        assert error(outputs(compiled, images), outputs(model, images)) < 1e-3
    expected, actual = gradients(model, x), gradients(compiled, x)
    largest = max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert (actual[f"_orig_mod.{name}"] - grad).norm() <= 1e-2 * largest, name
