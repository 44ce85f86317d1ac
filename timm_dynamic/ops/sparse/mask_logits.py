"""DynConv's mask unit as one operation: `conv3x3(x; C -> 1) + linear(mean(x); C -> 1)`.

(Verelst and Tuytelaars, CVPR 2020, arXiv 1912.03203, section 3.1.) Libraries convolve to one channel as slowly as to
sixteen, and the mean reads the map once more. The kernel is for channels_last maps on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops.kernels import runs_kernel
from timm_dynamic.ops.registration import register


def has_mask_kernel(x: Tensor) -> bool:
    """Whether the kernel takes a map like this; NCHW would have to be converted."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and runs_kernel("mask_logits", x)
    )


def mask_logits(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor, fc_weight: Tensor, fc_bias: Tensor, stride: int
) -> Tensor:
    """Where a mask is on: at 0 and above.

    Args:
        x: `[B, C, H, W]`.
        conv_weight, conv_bias: `[1, C, 3, 3]` and `[1]`.
        fc_weight, fc_bias: `[1, C]` and `[1]`.
        stride: Of the convolution, whose padding is 1.

    Returns:
        `[B, 1, ceil(H/stride), ceil(W/stride)]`.
    """
    run = torch.ops.timm_dynamic.mask_logits if has_mask_kernel(x) else _definition
    return run(x, conv_weight, conv_bias, fc_weight, fc_bias, stride)


def _definition(x, conv_weight, conv_bias, fc_weight, fc_bias, stride: int) -> Tensor:
    logits = F.conv2d(x, conv_weight, conv_bias, stride, 1)
    return logits + F.linear(x.mean((2, 3)), fc_weight, fc_bias)[:, :, None, None]


def _fake(x, conv_weight, conv_bias, fc_weight, fc_bias, stride: int) -> Tensor:
    return x.new_empty(x.shape[0], 1, *((n - 1) // stride + 1 for n in x.shape[2:]))


def _flops(x, conv_weight, conv_bias, fc_weight, fc_bias, stride: int, *args, out_shape=None, **kwargs) -> int:
    B, C = x[:2]
    return 2 * C * (9 * out_shape.numel() + B)


register(
    "mask_logits",
    "(Tensor x, Tensor conv_weight, Tensor conv_bias, Tensor fc_weight, Tensor fc_bias, int stride) -> Tensor",
    _definition,
    _fake,
    flops=_flops,
)
