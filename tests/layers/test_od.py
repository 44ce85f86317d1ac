"""What only ODConv has: its gates against the equation, its schedule, a batch of one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import timm_dynamic
from timm_dynamic.layers import ODConv2d, load_reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def equation(layer, x, temperature=1.0):
    """The paper's, sample by sample, of a layer in evaluation."""
    net, outputs = layer.attention, []
    z = F.relu(net.bn(net.fc(x.mean((2, 3)))))
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    a_in, a_out, a_tap = (
        ones if head is None else torch.sigmoid(head(z) / temperature)
        for head in (net.channel_fc, net.filter_fc, net.spatial_fc)
    )
    pi = ones if net.kernel_fc is None else torch.softmax(net.kernel_fc(z) / temperature, 1)
    for b, sample in enumerate(x):
        weight = torch.einsum("n,noikl->oikl", pi[b], layer.kernels)
        if net.spatial_fc is not None:
            weight = weight * a_tap[b].view(layer.kernel_size)
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        y = F.conv2d((sample * a_in[b, :, None, None])[None], weight, None, *options)
        outputs.append(y * a_out[b, :, None, None])
    y = torch.cat(outputs)
    return y if layer.bias is None else y + layer.bias[:, None, None]


CASES = {
    "four kernels": ((16, 24, 3, 1, 1), {}),
    "one kernel": ((16, 24, 3, 2, 1), {"num_kernels": 1}),
    "1x1": ((16, 24, 1), {}),
    "static between two scalings": ((16, 24, 1), {"num_kernels": 1, "bias": False}),
    "grouped": ((32, 32, 3, 2, 1, 1, 4), {}),
    "depthwise": ((32, 32, 3, 1, 1, 1, 32), {"num_kernels": 1}),
    "depthwise, more outputs": ((16, 32, 5, 1, 2, 1, 16), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equation(case):
    """In double precision, and in single with whatever runs, for one sample too."""
    args, kwargs = CASES[case]
    layer, x = ODConv2d(*args, **kwargs).double(), torch.randn(5, args[0], 9, 7).double()
    for _ in range(3):
        layer(x)
    layer.eval()
    expected = equation(layer, x)
    torch.testing.assert_close(layer(x), expected)
    assert (layer.attention.filter_fc is None) == (case == "depthwise")
    assert (layer.attention.spatial_fc is None) == (args[2] == 1)
    timm_dynamic.set_progress(layer, 0, 100)
    torch.testing.assert_close(layer(x), equation(layer, x, 30.0))
    timm_dynamic.set_progress(layer, 50, 100)
    with torch.no_grad():
        layer, single = layer.float(), x.float()
        for one in (layer, layer.absorb(torch.ones(args[1]), torch.zeros(args[1]))):
            runs = "one call" if layer.groups in (1, args[1]) else "formula"
            assert f"ODConv2d): {runs}" in timm_dynamic.explain(one, single)
            for output in (one(single), torch.cat([one(sample) for sample in single.split(1)])):
                torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neutral", [True, False])
@pytest.mark.parametrize("num_kernels", [1, 3])
def test_takes_the_place_of_a_convolution(neutral, num_kernels):
    """At every temperature; and its kernels go different ways."""
    conv, x = nn.Conv2d(16, 16, 3, padding=1).double(), torch.randn(4, 16, 6, 6).double()
    layer = ODConv2d.from_conv(conv, num_kernels=num_kernels, neutral_gates=neutral)
    for epoch in (0, 100):
        timm_dynamic.set_progress(layer, epoch, 100)
        torch.testing.assert_close(layer(x), conv(x))
    before = layer.kernels.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    moved = layer.kernels.detach() - before
    assert moved.flatten(1).norm(dim=1).min() > 0
    if num_kernels > 1:
        assert (moved[1:] - moved[:1]).abs().max() > 0


def test_one_sample_in_training():
    """It is normalised with the running statistics, which stay."""
    layer, x = ODConv2d(8, 8, 3).train(), torch.randn(1, 8, 5, 5)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    output = layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())
    torch.testing.assert_close(output, layer.eval()(x))


def test_the_temperature_falls_with_every_forward():
    """As in the authors' script: 1 + 29 (N - t) / N in the t-th, from 1."""
    layer, x = ODConv2d(4, 4, 1).train(), torch.randn(2, 4, 3, 3)
    assert layer.temperature() == 1
    layer.progress.begin(10)
    temperatures = []
    for _ in range(12):
        layer(x)
        temperatures.append(layer.temperature().item())
    assert temperatures == pytest.approx([1 + max(0, 29 * (10 - t) / 10) for t in range(1, 13)])
    assert layer.eval().temperature() == 1
    timm_dynamic.set_progress(layer, 2.5, 300)
    assert layer.temperature() == 1 + 29 * 0.75


def test_initialisation():
    """By the fan-out of each kernel, whose groups do not count."""
    layer = ODConv2d(64, 64, 3, groups=64, bias=False, num_kernels=16)
    assert layer.kernels.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert layer.attention.fc.weight.shape == (16, 64) and ODConv2d(512, 8, 1).attention.fc.weight.shape == (32, 512)
    assert layer.attention.spatial_fc.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.2)


def test_authors_names():
    layer = ODConv2d(8, 8, 3, bias=False)
    state = {key.replace("kernels", "weight"): value for key, value in layer.state_dict().items()}
    load_reference(ODConv2d(8, 8, 3, bias=False), state)
    assert layer.weight.shape == (8, 8, 3, 3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("case", ["four kernels", "depthwise", "grouped"])
def test_graphs(case):
    """Compiled, scripted, traced, and exported with a dynamic batch."""
    args, kwargs = CASES[case]
    layer, x = ODConv2d(*args, **kwargs).eval(), torch.randn(4, args[0], 9, 7)
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    graphs = (
        torch.compile(layer, backend="eager", fullgraph=True),
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
        torch.export.export(layer, (x,), dynamic_shapes=shapes).module(),
    )
    with torch.no_grad():
        for graph in graphs:
            for inputs in (x, x[:3]):
                torch.testing.assert_close(graph(inputs), layer(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{"num_kernels": 0}, {"reduction": 0.0}, {"reduction": 16}])
def test_unusable_arguments(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        ODConv2d(8, 8, 3, **kwargs)
