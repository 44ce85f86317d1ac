"""`pooled_heads`, a private operator: what layers that mix and gate kernels do for inference.

    hidden = relu(hidden_weight . mean(x) + hidden_bias)
    head_i = activation_i((weight_i . hidden + bias_i) / temperature)

with the mean over positions, and, given kernels, the convolution that the heads' values describe: up to a dozen small
operations a layer, whose overhead is most of their time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.precision import accumulation_dtype
from timm_dynamic.ops.registration import register
from timm_dynamic.ops.sample_conv.definition import mixed_conv2d
from timm_dynamic.ops.sample_conv.samples import around_mean
from timm_dynamic.ops.shapes import Pair, memory_format, output_size, window

# What a head's numbers are: gates of inputs, outputs or taps, the attention over the kernels, or scores as they are.
INPUTS, OUTPUTS, TAPS, KERNELS, SCORES = "iotks"


def average(x: Tensor) -> Tensor:
    """`[B, C]`: the mean of `[B, C, H, W]` over positions, in float32 or wider: float16 does not hold the sums."""
    # The gradient of a sum, unlike that of a mean, is an expanded view: no tensor of the size of x.
    return x.sum((2, 3), dtype=accumulation_dtype(x)) / (x.shape[2] * x.shape[3])


def _definition(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    roles: str,
    neutral: bool = False,
    temperature: float = 1.0,
    kernels: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    low: float | None = None,
    high: float | None = None,
) -> list[Tensor]:
    """Of the registered operator.

    Args:
        x: `[B, C, H, W]`.
        hidden_weight, hidden_bias: `[hidden, C]` and `[hidden]`.
        weights, biases: Of every head, `[n, hidden]` and `[n]`.
        roles: Of every head a letter, what its numbers are: see above.
        neutral: Gates are `2 * sigmoid`, and kernels and biases are stored as `around_mean` says.
        temperature: Of all scores.
        kernels: `[N, O, C, Kh, Kw]`, or of a depthwise convolution `[N, C, 1, Kh, Kw]`.
        bias: `[O]`; or `[N, O]`, which is mixed as the kernels are.
        stride, padding, dilation: Of the convolution.
        low, high: Limits of its result.

    Returns:
        With kernels, the convolution's result; else `[B, n]` of every head. In float32, or float64 for float64 inputs.
    """

    def linear(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(t, weight.to(t.dtype), None if bias is None else bias.to(t.dtype))

    def activate(scores: Tensor, role: str) -> Tensor:
        if role == SCORES:
            return scores
        if role == KERNELS:
            return F.softmax(scores, 1)
        return torch.sigmoid(scores) * (2 if neutral else 1)

    hidden = F.relu(linear(average(x), hidden_weight, hidden_bias))
    heads = zip(weights, biases, roles, strict=True)
    values = [activate(linear(hidden, weight, bias) / temperature, role) for weight, bias, role in heads]
    if kernels is None:
        return values
    found = dict(zip(roles, values, strict=True))
    attention = found.get(KERNELS)
    if attention is not None and neutral:
        attention = around_mean(attention, torch.ones_like(attention[:, :1]))
    options = (stride, padding, dilation, x.shape[1] // kernels.shape[2])
    y = mixed_conv2d(x, attention, kernels, *options, *(found.get(role) for role in (INPUTS, TAPS, OUTPUTS)))
    if bias is not None:
        bias = bias[None] if bias.ndim == 1 else attention.to(bias.dtype) @ bias
        y = y + bias[:, :, None, None].to(y.dtype)
    y = y if low is high is None else y.clamp(low, high)
    return [y.contiguous(memory_format=memory_format(x))]


def _fake(x, hidden_weight, hidden_bias, weights, biases, roles, *others):
    kernels = others[2] if len(others) > 2 else None  # arguments at the end are missing where they are the default's
    if kernels is None:
        return [x.new_empty(x.shape[0], weight.shape[0], dtype=accumulation_dtype(x)) for weight in weights]
    size = output_size(x.shape[2:], kernels.shape[3:], *window(others[4:7]))
    return [x.new_empty(x.shape[0], kernels.shape[1], *size).contiguous(memory_format=memory_format(x))]


def _flops(x, hidden_weight, hidden_bias, weights, biases, roles, *others, out_shape) -> int:
    heads = x[0] * sum(math.prod(weight) for weight in (hidden_weight, *weights))
    kernels = others[2] if len(others) > 2 else None
    if kernels is None:
        return 2 * heads
    mixing = x[0] * math.prod(kernels) if KERNELS in roles else 0
    return 2 * (heads + mixing + math.prod(out_shape[0]) * math.prod(kernels[2:]))


register(
    "pooled_heads",
    "(Tensor x, Tensor hidden_weight, Tensor? hidden_bias, Tensor[] weights, Tensor[] biases, str roles, "
    "bool neutral=False, float temperature=1.0, Tensor? kernels=None, Tensor? bias=None, int[2] stride=1, "
    "int[2] padding=0, int[2] dilation=1, float? low=None, float? high=None) -> Tensor[]",
    _definition,
    _fake,
    flops=_flops,
    differentiable=False,
)
