"""`mask_logits`: DynConv's mask unit, for inference on channels_last maps.

    logits = conv3x3(x; C -> 1) + linear(mean(x); C -> 1)

(Verelst and Tuytelaars, CVPR 2020, arXiv 1912.03203, section 3.1.) Libraries convolve to one channel as slowly as to
sixteen, and the mean reads the map once more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE, inference_kernel_serves


def mask_logits_reference(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor, fc_weight: Tensor, fc_bias: Tensor, stride: int
) -> Tensor:
    """Defines the operator `torch.ops.timm_dynamic.mask_logits`.

    Args:
        x: `[B, C, H, W]`.
        conv_weight, conv_bias: `[1, C, 3, 3]` and `[1]`.
        fc_weight, fc_bias: `[1, C]` and `[1]`.
        stride: Of the convolution, whose padding is 1.

    Returns:
        `[B, 1, ceil(H/stride), ceil(W/stride)]`.
    """
    return (
        F.conv2d(x, conv_weight, conv_bias, stride, 1) + F.linear(x.mean((2, 3)), fc_weight, fc_bias)[:, :, None, None]
    )


torch.library.define(
    f"{NAMESPACE}::mask_logits",
    "(Tensor x, Tensor conv_weight, Tensor conv_bias, Tensor fc_weight, Tensor fc_bias, int stride) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(f"{NAMESPACE}::mask_logits", "CompositeExplicitAutograd")(mask_logits_reference)


@torch.library.register_fake(f"{NAMESPACE}::mask_logits")
def _mask_logits_fake(x, conv_weight, conv_bias, fc_weight, fc_bias, stride):
    return x.new_empty(x.shape[0], 1, *((n - 1) // stride + 1 for n in x.shape[2:]))


def mask_logits(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor, fc_weight: Tensor, fc_bias: Tensor, stride: int
) -> Tensor:
    """See `mask_logits_reference`."""
    parameters = (conv_weight, conv_bias, fc_weight, fc_bias)
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    serves = channels_last and inference_kernel_serves(x, *parameters)
    return (torch.ops.timm_dynamic.mask_logits if serves else mask_logits_reference)(x, *parameters, stride)
