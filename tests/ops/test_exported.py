"""What the operators are in ONNX graphs, beside their definitions; as a whole: tests/test_onnx.py."""

import pytest
import torch

from timm_dynamic.ops.dynamic_filter import definition as filtering
from timm_dynamic.ops.dynamic_filter import exported as filtering_exported
from timm_dynamic.ops.sample_conv import definition as mixing
from timm_dynamic.ops.sample_conv import exported as mixing_exported


@pytest.mark.parametrize(
    ("kernel", "combine", "options", "width"),
    [
        (3, "mul", (1, 1, 1, 1), 41),
        (5, "add", (1, 2, 1, 1), 40),
        (3, "mul", (1, 1, 2, 1), 41),
        (3, "add", (2, 1, 1, 2), 5),
    ],
)
@torch.no_grad()
def test_dynamic_filter(kernel, combine, options, width):
    """Wide and narrow maps; with stride, and with groups and upsampling."""
    torch.manual_seed(0)
    parts, _, stride, upsample = options
    x = torch.randn(3, 4, 7, width)
    size = [(n * upsample - 1) // stride + 1 for n in x.shape[2:]]
    arguments = (x, torch.randn(3, parts, kernel**2, *size), torch.randn(3, 4, kernel**2), kernel, combine, *options)
    expected = filtering.definition(*arguments)
    torch.testing.assert_close(filtering_exported.dynamic_filter(*arguments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gates", [(), ("a_in", "a_out"), ("a_tap",), ("a_in", "a_tap", "a_out")], ids=" ".join)
@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize(("outputs", "groups"), [(6, 1), (4, 4), (70, 2)])
@torch.no_grad()
def test_mixed_conv2d(outputs, groups, attends, gates):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5)
    kernels = torch.randn(2 if attends else 1, outputs, 4 // groups, 3, 3)
    attention = torch.randn(3, 2) if attends else None
    sizes = {"a_in": 4 // groups, "a_tap": 9, "a_out": outputs}
    factors = [torch.randn(3, size) if name in gates else None for name, size in sizes.items()]
    arguments = (x, attention, kernels, *factors, (2, 1), (1, 0), (1, 1), groups)
    expected = mixing._definition(*arguments)
    torch.testing.assert_close(mixing_exported.mixed_conv2d(*arguments), expected, rtol=1e-5, atol=1e-4)
    bias = torch.randn(2, outputs) if attends else torch.randn(outputs)
    found = mixing_exported.mixed_conv2d(*arguments, bias=bias, limits=(0.0, 6.0))
    shift = attention @ bias if attends else bias[None]
    torch.testing.assert_close(found, (expected + shift[:, :, None, None]).clamp(0, 6), rtol=1e-5, atol=1e-4)
