"""Operators of dynamic convolution: one public function each, a plain-PyTorch reference, and kernels where built."""

from timm_dynamic.ops.channel_fusion import channel_fusion
from timm_dynamic.ops.dynamic_filter import ddf, dynamic_filter, filter_norm
from timm_dynamic.ops.kernels import backend_info, load_kernels
from timm_dynamic.ops.sample_conv import mixed_conv2d, sample_conv2d

load_kernels()

__all__ = [
    "backend_info",
    "channel_fusion",
    "ddf",
    "dynamic_filter",
    "filter_norm",
    "mixed_conv2d",
    "sample_conv2d",
]
