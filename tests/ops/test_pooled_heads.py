"""The CPU kernel of pooled_heads, against its formula in float64."""

import random

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import INF, LAYOUTS, OPS, check, double
from pairs import in_turns
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_dynamic.ops import backend_info

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


ACTIVATIONS = {
    "s": lambda z: z,
    "i": torch.sigmoid,
    "o": lambda t: 2 * torch.sigmoid(t),
    "k": lambda t: torch.softmax(t, 1),
}


@pytest.mark.parametrize(
    ("shape", "sizes", "role", "biased"),
    in_turns(((1, 1, 1, 1), (3, 37, 5, 7), (16, 96, 14, 14)), ([4], [33, 17, 9], [1, 200]), ACTIVATIONS, (True, False)),
    ids=str,
)
def test_pooled_heads(shape, sizes, biased, role):
    hidden = 11
    weights, biases = [torch.randn(n, hidden) for n in sizes], [torch.randn(n) for n in sizes]
    args = torch.randn(shape), torch.randn(hidden, shape[1]), torch.randn(hidden) if biased else None, weights, biases
    x, hidden_weight, hidden_bias, weights, biases = double(args)
    z = F.relu(F.linear(x.mean((2, 3)), hidden_weight, hidden_bias))
    roles = (role + "sik")[: len(sizes)]
    neutral = role == "o"
    for layout in LAYOUTS.values():
        outputs = OPS.pooled_heads(args[0].contiguous(memory_format=layout), *args[1:], roles, neutral, 3.0)
        for out, weight, bias, letter in zip(outputs, weights, biases, roles, strict=True):
            letter = "o" if neutral and letter == "i" else letter
            check(out, ACTIVATIONS[letter](F.linear(z, weight, bias) / 3.0))


def heads_convolve(
    x, hidden_weight, hidden_bias, weights, biases, roles, neutral, temperature, kernels, bias, *options
):
    *options, low, high = options
    B, N, I = len(x), len(kernels), kernels.shape[2]
    z = F.relu(F.linear(x.mean((2, 3)), hidden_weight, hidden_bias))
    scores = {r: F.linear(z, w, b) / temperature for r, w, b in zip(roles, weights, biases, strict=True)}
    gates = {role: torch.sigmoid(t) * (2 if neutral else 1) for role, t in scores.items()}
    attention = torch.softmax(scores["k"], 1) if "k" in scores else x.new_ones(B, 1)
    if neutral and N > 1:
        attention = torch.cat([x.new_ones(B, 1), attention[:, 1:] - attention[:, :1]], 1)
    outputs = []
    for b in range(B):
        weight = (attention[b] @ kernels.flatten(1)).view(kernels.shape[1:])
        if "t" in gates:
            weight = weight * gates["t"][b].view(kernels.shape[3:])
        if "o" in gates:
            weight = weight * gates["o"][b][:, None, None, None]
        one = x[b : b + 1] * (gates["i"][b][:, None, None] if "i" in gates else 1)
        shift = attention[b] @ bias if bias.ndim == 2 else bias
        outputs.append(F.conv2d(one, weight, shift, *options, x.shape[1] // I))
    return torch.cat(outputs).clamp(low, high)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(80))
def test_pooled_heads_convolve(seed, layout):
    choose = random.Random(seed).choice
    _, C, H, W = shape = choose(((1, 1, 4, 3), (2, 3, 9, 7), (3, 37, 5, 16), (1, 48, 28, 30), (17, 16, 3, 5)))
    depthwise, N, neutral, hidden = choose((False, True)), choose((1, 3, 4)), choose((False, True)), 7
    inputs, outputs = (1, C) if depthwise else (C, choose((1, 5, 24, 130)))
    roles = choose(("", "i", "iot")) + ("k" if N > 1 else "o" * (seed % 2)) or "i"
    roles = "".join(dict.fromkeys(roles))
    options = choose((((1, 1), (1, 1), (1, 1)), ((2, 2), (2, 1), (1, 1)), ((1, 2), (3, 3), (2, 1))))
    kernels = 0.1 * torch.randn(N, outputs, inputs, *choose(((3, 3), (1, 1), (3, 2))))
    sizes = {"i": C, "o": outputs, "t": kernels[0, 0, 0].numel(), "k": N}
    weights, biases = [torch.randn(sizes[r], hidden) for r in roles], [torch.randn(sizes[r]) for r in roles]
    bias = choose((torch.randn(outputs), torch.randn(N, outputs)) if N > 1 else (torch.randn(outputs),))
    heads = torch.randn(hidden, C), torch.randn(hidden), weights, biases, roles, neutral, 2.0
    x, args = torch.randn(shape), (*heads, kernels, bias, *options, *choose(((-INF, INF), (0.0, 6.0))))
    (y,) = OPS.pooled_heads(x.contiguous(memory_format=LAYOUTS[layout]), *args)
    check(y, heads_convolve(*double((x, *args))), layout if C > 1 and outputs > 1 else "NCHW")


def test_shapes_where_arguments_are_left_out():
    """Fakes are not given the last ones that are the default's."""
    with FakeTensorMode():
        x, hidden = torch.randn(2, 16, 5, 6), (torch.randn(4, 16), None, [torch.randn(16, 4)], [torch.randn(16)])
        (scores,) = OPS.pooled_heads(x, *hidden, "s")
        (mixed,) = OPS.pooled_heads(x, *hidden, "i", False, 1.0, torch.randn(1, 8, 16, 1, 1))
        (strided,) = OPS.pooled_heads(x, *hidden, "i", False, 1.0, torch.randn(1, 8, 16, 1, 1), None, (2, 2))
        fused = OPS.channel_fusion(x, torch.randn(1, 8, 16, 1, 1), *(None,) * 6, -INF, INF)
    assert (scores.shape, mixed.shape, strided.shape) == ((2, 16), (2, 8, 5, 6), (2, 8, 3, 3))
    assert fused.shape == mixed.shape


def test_pooled_heads_refuses():
    x, hidden, weight, bias = torch.randn(2, 4, 3, 3), torch.randn(5, 4), torch.randn(6, 5), torch.randn(6)
    with pytest.raises(RuntimeError, match="roles must be of the letters i, o, t, k and s, got a"):
        OPS.pooled_heads(x, hidden, None, [weight], [bias], "a")
    for biases, roles in (([], "i"), ([bias], "")):
        with pytest.raises(RuntimeError, match="as many weights as biases and roles"):
            OPS.pooled_heads(x, hidden, None, [weight], biases, roles)
    for kernels, error in (
        ((5, 4), "kernels must be"),
        ((1, 5, 3, 1, 1), "3 gates of inputs and taps"),
        ((1, 5, 4, 1, 1), "4 gates"),
    ):
        with pytest.raises(RuntimeError, match=error):
            OPS.pooled_heads(x, hidden, None, [weight], [bias], "i", kernels=torch.randn(kernels))
    with pytest.raises(RuntimeError, match="one gate or 4 gates of inputs, got 6"):
        OPS.pooled_heads(x, hidden, None, [weight], [bias], "i", kernels=torch.randn(1, 4, 1, 3, 3))
