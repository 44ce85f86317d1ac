"""Layers of dynamic convolution, usable in any network."""

from timm_dynamic.layers.base import load_reference
from timm_dynamic.layers.ddf import DDFConv2d, DDFPack, DDFUpPack, FilterNorm

__all__ = ["DDFConv2d", "DDFPack", "DDFUpPack", "FilterNorm", "load_reference"]
