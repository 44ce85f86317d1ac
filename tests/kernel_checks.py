"""What the tests of CPU kernels share: their operators, layouts, and how results are compared."""

import math

import torch
from torch import Tensor

OPS = torch.ops.timm_dynamic
INF = math.inf
SCHEMAS = {
    "channel_fusion": "(Tensor x, Tensor weight, Tensor? attention, Tensor? in_scale, Tensor? out_scale, Tensor? p, "
    "Tensor? v, Tensor? shift, float low, float high, int[2] stride=1, int[2] padding=0, int[2] dilation=1) -> Tensor",
    "channel_fusion_backward": "(Tensor grad, Tensor dz, Tensor x, Tensor v, Tensor scale, Tensor weight) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    "dcd_conv": "(Tensor x, Tensor[] heads, Tensor q, Tensor[] norm1, Tensor[] norm2, float eps1, float eps2, "
    "int pool_size, Tensor p, Tensor? shift, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, float low, float high, Tensor? q_bias=None) -> Tensor",
    "pooled_heads": "(Tensor x, Tensor hidden_weight, Tensor? hidden_bias, Tensor[] weights, Tensor[] biases, "
    "str roles, bool neutral=False, float temperature=1.0, Tensor? kernels=None, Tensor? bias=None, int[2] stride=1, "
    "int[2] padding=0, int[2] dilation=1, float? low=None, float? high=None) -> Tensor[]",
}
for _name, _schema in SCHEMAS.items():
    if not hasattr(OPS, _name):
        torch.library.define(f"timm_dynamic::{_name}", _schema)

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def check(actual: Tensor, expected: Tensor, layout: str = "NCHW", tolerance: float = 2e-5) -> None:
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=LAYOUTS[layout])
    scale = expected.abs().max().clamp(min=1).item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


def double(arguments):
    """The same, in float64."""
    if isinstance(arguments, Tensor):
        return arguments.double()
    return type(arguments)(map(double, arguments)) if isinstance(arguments, (list, tuple)) else arguments
