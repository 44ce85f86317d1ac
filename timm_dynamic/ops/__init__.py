"""Operators of dynamic convolution: one public function each, a plain-PyTorch reference, and kernels where built."""

from timm_dynamic.ops import kernels
from timm_dynamic.ops._library import backend_info, load_kernels, reference_only
from timm_dynamic.ops.channel_fusion import channel_fusion
from timm_dynamic.ops.dynamic_filter import ddf, filter_norm
from timm_dynamic.ops.learned_mask import learned_mask_reference, pack_mask_weights
from timm_dynamic.ops.mask_logits import mask_logits, mask_logits_reference
from timm_dynamic.ops.sample_conv import mixed_conv2d, sample_conv2d

load_kernels()
kernels.load_kernels()

__all__ = [
    "backend_info",
    "channel_fusion",
    "ddf",
    "filter_norm",
    "learned_mask_reference",
    "mask_logits",
    "mask_logits_reference",
    "mixed_conv2d",
    "pack_mask_weights",
    "reference_only",
    "sample_conv2d",
]
