"""Dynamic channel fusion: what DCD computes (Li et al., ICLR 2021, arXiv 2103.08756)."""

from timm_dynamic.ops.channel_fusion.definition import channel_fusion

__all__ = ["channel_fusion"]
