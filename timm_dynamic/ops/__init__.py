"""Operators of dynamic convolution: one public function each, a plain-PyTorch reference, and kernels where built."""

from timm_dynamic.ops import kernels
from timm_dynamic.ops._library import backend_info, load_kernels, reference_only
from timm_dynamic.ops.channel_fusion import channel_fusion
from timm_dynamic.ops.ddf import ddf, ddf_reference
from timm_dynamic.ops.ddf_filters import ddf_filters_reference
from timm_dynamic.ops.factored_conv import factored_conv2d, factored_conv2d_reference
from timm_dynamic.ops.factored_gates import factored_gates_reference
from timm_dynamic.ops.filter_norm import filter_norm, filter_norm_reference
from timm_dynamic.ops.kernel_attention import kernel_attention_reference
from timm_dynamic.ops.learned_mask import learned_mask_reference, pack_mask_weights
from timm_dynamic.ops.mask_logits import mask_logits, mask_logits_reference
from timm_dynamic.ops.mixed_conv import mixed_conv2d, mixed_conv2d_reference
from timm_dynamic.ops.per_sample_conv import per_sample_conv2d, per_sample_conv2d_reference

load_kernels()
kernels.load_kernels()

__all__ = [
    "backend_info",
    "ddf",
    "ddf_filters_reference",
    "ddf_reference",
    "factored_conv2d",
    "factored_conv2d_reference",
    "factored_gates_reference",
    "filter_norm",
    "filter_norm_reference",
    "kernel_attention_reference",
    "learned_mask_reference",
    "mask_logits",
    "mask_logits_reference",
    "mixed_conv2d",
    "mixed_conv2d_reference",
    "pack_mask_weights",
    "per_sample_conv2d",
    "per_sample_conv2d_reference",
    "reference_only",
]
