"""`kernel_attention`: how much of every kernel a sample gets, for inference.

    attention = softmax((score_weight . relu(hidden_weight . mean(x) + hidden_bias) + score_bias) / temperature)

with the mean over positions (Chen et al., "Dynamic Convolution: Attention over Convolution Kernels", CVPR 2020, section
3.2): seven small operations a layer, whose overhead is most of their time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE, accumulation_dtype


def kernel_attention_reference(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    temperature: float,
) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.kernel_attention`.

    Args:
        x: `[B, C, H, W]`.
        hidden_weight, hidden_bias: `[hidden, C]` and `[hidden]`.
        score_weight, score_bias: `[N, hidden]` and `[N]`.
        temperature: Of the softmax.

    Returns:
        `[B, N]`, in float32, or float64 for float64 inputs.
    """
    dtype = accumulation_dtype(x)
    hidden = F.relu(F.linear(x.mean((2, 3), dtype=dtype), hidden_weight.to(dtype), hidden_bias.to(dtype)))
    return F.softmax(F.linear(hidden, score_weight.to(dtype), score_bias.to(dtype)) / temperature, 1)


torch.library.define(
    f"{NAMESPACE}::kernel_attention",
    "(Tensor x, Tensor hidden_weight, Tensor hidden_bias, Tensor score_weight, Tensor score_bias, float temperature) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(f"{NAMESPACE}::kernel_attention", "CompositeExplicitAutograd")(kernel_attention_reference)


@torch.library.register_fake(f"{NAMESPACE}::kernel_attention")
def _kernel_attention_fake(x, hidden_weight, hidden_bias, score_weight, score_bias, temperature):
    return x.new_empty(x.shape[0], score_weight.shape[0], dtype=accumulation_dtype(x))
