"""Operators of dynamic convolution: one public function each, a plain-PyTorch reference, and kernels where built."""

from timm_dynamic.ops._library import backend_info, load_kernels, reference_only
from timm_dynamic.ops.ddf import ddf, ddf_reference

load_kernels()

__all__ = ["backend_info", "ddf", "ddf_reference", "reference_only"]
