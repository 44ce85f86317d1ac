"""Convolutions with a weight for every sample."""

from timm_dynamic.ops.sample_conv.definition import mixed_conv2d, sample_conv2d

__all__ = ["mixed_conv2d", "sample_conv2d"]
