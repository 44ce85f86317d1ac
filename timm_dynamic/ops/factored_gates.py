"""`factored_gates`: a PED convolution's gates of inputs, outputs and taps, for inference.

    hidden = relu(hidden_weight . mean(x) + hidden_bias)        gate_h = sigmoid(weight_h . hidden + bias_h)

with the mean over positions (Hou and Kung, PEDConv, BMVC 2021): eleven small operations a layer, whose overhead is most
of their time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE, accumulation_dtype


def factored_gates_reference(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Defines the operator `torch.ops.timm_dynamic.factored_gates`.

    Args:
        x: `[B, C, H, W]`.
        hidden_weight, hidden_bias: `[hidden, C]` and `[hidden]`.
        weight1, bias1, ...: Of the three heads, `[n, hidden]` and `[n]`.

    Returns:
        `[B, n]` of each head, in float32, or float64 for float64 inputs.
    """
    dtype = accumulation_dtype(x)
    hidden = F.relu(F.linear(x.mean((2, 3), dtype=dtype), hidden_weight.to(dtype), hidden_bias.to(dtype)))
    heads = ((weight1, bias1), (weight2, bias2), (weight3, bias3))
    return tuple(torch.sigmoid(F.linear(hidden, weight.to(dtype), bias.to(dtype))) for weight, bias in heads)


_HEADS = "Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor weight3, Tensor bias3"
torch.library.define(
    f"{NAMESPACE}::factored_gates",
    f"(Tensor x, Tensor hidden_weight, Tensor hidden_bias, {_HEADS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(f"{NAMESPACE}::factored_gates", "CompositeExplicitAutograd")(factored_gates_reference)


@torch.library.register_fake(f"{NAMESPACE}::factored_gates")
def _factored_gates_fake(x, hidden_weight, hidden_bias, *heads):
    return tuple(x.new_empty(x.shape[0], bias.shape[0], dtype=accumulation_dtype(x)) for bias in heads[1::2])
