"""Layers of dynamic convolution, usable in any network."""

from timm_dynamic.layers.auxiliary import attach_loss
from timm_dynamic.layers.base import load_reference
from timm_dynamic.layers.carafe import CARAFE
from timm_dynamic.layers.cond import CondConv2d, RoutedConv2d
from timm_dynamic.layers.cot import CoTLayer
from timm_dynamic.layers.dcd import DCDConv2d, DCDLinear
from timm_dynamic.layers.ddf import DDFConv2d, DDFPack, DDFUpPack
from timm_dynamic.layers.dynamic_conv import DynamicConv2d
from timm_dynamic.layers.filter_norm import FilterNorm
from timm_dynamic.layers.involution import Involution2d
from timm_dynamic.layers.kernel_attention import KernelAttention
from timm_dynamic.layers.lsnet import SKA, LSConv
from timm_dynamic.layers.mask_unit import MaskUnit
from timm_dynamic.layers.od import ODConv2d
from timm_dynamic.layers.ped import PEDConv2d
from timm_dynamic.layers.sparse_branch import SparseBranch
from timm_dynamic.layers.sparse_stage import SparseStage

__all__ = [
    "CondConv2d",
    "CARAFE",
    "SKA",
    "CoTLayer",
    "DCDConv2d",
    "DCDLinear",
    "DDFConv2d",
    "DDFPack",
    "DDFUpPack",
    "DynamicConv2d",
    "FilterNorm",
    "Involution2d",
    "KernelAttention",
    "LSConv",
    "MaskUnit",
    "ODConv2d",
    "PEDConv2d",
    "RoutedConv2d",
    "SparseBranch",
    "SparseStage",
    "attach_loss",
    "load_reference",
]
