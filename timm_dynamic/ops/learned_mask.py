"""`learned_mask`: DynConv's mask unit on a GPU, from weights that are prepared once.

    mask = 1 where conv3x3(x; C -> 1) + linear(mean(x); C -> 1) >= 0, else 0

As `mask_logits`; the kernels see every map once, as dot products of its positions with ten vectors.
"""

import torch
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE, cuda_inference_kernel_serves
from timm_dynamic.ops.mask_logits import mask_logits_reference


def pack_mask_weights(conv_weight: Tensor, conv_bias: Tensor, fc_weight: Tensor, fc_bias: Tensor) -> Tensor:
    """The parameters of `mask_logits` as `learned_mask` takes them.

    Returns:
        `[10*C + 1]` in float32 (float64 stays): the nine taps, the linear layer's weight, and the sum of both biases.
    """
    parts = (conv_weight.permute(0, 2, 3, 1), fc_weight, conv_bias + fc_bias)
    packed = torch.cat([part.flatten() for part in parts])
    return packed if packed.dtype == torch.float64 else packed.float()


def learned_mask_reference(x: Tensor, weights: Tensor, stride: int) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.learned_mask`.

    Args:
        x: `[B, C, H, W]`.
        weights: Of `pack_mask_weights`.
        stride: Of the convolution, whose padding is 1.

    Returns:
        `[B, 1, ceil(H/stride), ceil(W/stride)]`, in the dtype of x.
    """
    taps, fc, bias = weights.split((9 * x.shape[1], x.shape[1], 1))
    conv_weight = taps.view(1, 3, 3, -1).permute(0, 3, 1, 2)
    logits = mask_logits_reference(x.to(weights.dtype), conv_weight, bias, fc[None], torch.zeros_like(bias), stride)
    return (logits >= 0).to(x.dtype)


torch.library.define(
    f"{NAMESPACE}::learned_mask",
    "(Tensor x, Tensor weights, int stride) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(f"{NAMESPACE}::learned_mask", "CompositeExplicitAutograd")(learned_mask_reference)


@torch.library.register_fake(f"{NAMESPACE}::learned_mask")
def _learned_mask_fake(x, weights, stride):
    return x.new_empty(x.shape[0], 1, *((n - 1) // stride + 1 for n in x.shape[2:]))


def learned_mask_serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether there is a kernel, and nobody wants the logits, for this input and a mask unit with these parameters."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return channels_last and cuda_inference_kernel_serves(x, *parameters)
