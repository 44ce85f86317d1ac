"""Filters that depend on the position: what DDF computes (Zhou et al., CVPR 2021, arXiv 2104.14107)."""

from timm_dynamic.ops.dynamic_filter.definition import ddf
from timm_dynamic.ops.dynamic_filter.filter_norm import filter_norm

__all__ = ["ddf", "filter_norm"]
