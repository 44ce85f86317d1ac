"""Filters that depend on the position: DDF (Zhou et al., CVPR 2021), involution, SKA, CoT, CARAFE."""

from timm_dynamic.ops.dynamic_filter.filter_norm import filter_norm
from timm_dynamic.ops.dynamic_filter.functions import ddf, ddf_with_heads, dynamic_filter

__all__ = ["ddf", "ddf_with_heads", "dynamic_filter", "filter_norm"]
