"""`pooled_heads`, a private operator: the small network in front of a dynamic convolution, for inference.

    hidden = relu(hidden_weight . mean(x) + hidden_bias)
    head_i = activation_i((weight_i . hidden + bias_i) / temperature)

with the mean over positions: up to a dozen small operations a layer, whose overhead is most of their time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.precision import accumulation_dtype
from timm_dynamic.ops.registration import register


def average(x: Tensor) -> Tensor:
    """`[B, C]`: the mean of `[B, C, H, W]` over positions, in float32 or wider: float16 does not hold the sums."""
    # The gradient of a sum, unlike that of a mean, is an expanded view: no tensor of the size of x.
    return x.sum((2, 3), dtype=accumulation_dtype(x)) / (x.shape[2] * x.shape[3])


_ACTIVATIONS = {
    "none": lambda z: z,
    "sigmoid": torch.sigmoid,
    "sigmoid2": lambda z: 2 * torch.sigmoid(z),
    "softmax": lambda z: F.softmax(z, 1),
}


def _definition(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    activations: list[str],
    temperature: float,
) -> list[Tensor]:
    """Of the registered operator.

    Args:
        x: `[B, C, H, W]`.
        hidden_weight, hidden_bias: `[hidden, C]` and `[hidden]`.
        weights, biases: Of every head, `[n, hidden]` and `[n]`.
        activations: Of every head: `"none"`, `"sigmoid"`, `"sigmoid2"` (2 * sigmoid), or `"softmax"`.
        temperature: Of all scores.

    Returns:
        `[B, n]` of every head, in float32, or float64 for float64 inputs.
    """
    pooled = average(x)

    def linear(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(t, weight.to(t.dtype), None if bias is None else bias.to(t.dtype))

    hidden = F.relu(linear(pooled, hidden_weight, hidden_bias))
    heads = zip(weights, biases, activations, strict=True)
    return [_ACTIVATIONS[name](linear(hidden, weight, bias) / temperature) for weight, bias, name in heads]


def _fake(x, hidden_weight, hidden_bias, weights, biases, activations, temperature):
    return [x.new_empty(x.shape[0], weight.shape[0], dtype=accumulation_dtype(x)) for weight in weights]


def _flops(x, hidden_weight, hidden_bias, weights, *others, out_shape) -> int:
    return 2 * x[0] * sum(math.prod(weight) for weight in (hidden_weight, *weights))


register(
    "pooled_heads",
    "(Tensor x, Tensor hidden_weight, Tensor? hidden_bias, Tensor[] weights, Tensor[] biases, str[] activations, "
    "float temperature) -> Tensor[]",
    _definition,
    _fake,
    flops=_flops,
    differentiable=False,
)
