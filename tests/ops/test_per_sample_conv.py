"""per_sample_conv2d against one convolution after the other."""

import pytest
import torch
import torch.nn.functional as F

from timm_dynamic.ops import per_sample_conv, per_sample_conv2d, per_sample_conv2d_reference

# (B, C, Co, kernel, stride, padding, dilation, groups)
CASES = {
    "1x1": (3, 6, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1, strided": (3, 6, 8, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "1x1, padded": (3, 6, 8, (1, 1), (2, 2), (1, 1), (1, 1), 1),
    "1x1, grouped": (3, 6, 8, (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "depthwise": (3, 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "depthwise, strided and doubled": (3, 6, 12, (5, 5), (2, 2), (2, 2), (1, 1), 6),
    "dense": (3, 6, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "dense, oblong": (2, 6, 8, (3, 5), (2, 1), (0, 2), (1, 2), 1),
    "grouped": (2, 6, 8, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    "one sample": (1, 6, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no sample": (0, 6, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no sample, 1x1": (0, 6, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}


@pytest.fixture(params=CASES)
def case(request):
    B, C, Co, kernel, *options, groups = CASES[request.param]
    torch.manual_seed(0)
    x = torch.randn(B, C, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(B, Co, C // groups, *kernel, dtype=torch.float64, requires_grad=True)
    return x, weight, (*options, groups)


def one_by_one(x, weight, stride, padding, dilation, groups):
    if len(x) == 0:
        return F.conv2d(x, weight.new_zeros(weight.shape[1:]), None, stride, padding, dilation, groups)
    pairs = zip(x, weight, strict=True)
    return torch.stack([F.conv2d(xb, wb, None, stride, padding, dilation, groups) for xb, wb in pairs])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("grouped", [0, 10**6])
def test_forward_and_gradients(case, layout, grouped, monkeypatch):
    monkeypatch.setattr(per_sample_conv, "_GROUPED_WEIGHTS", grouped)
    x, weight, options = case
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    expected = one_by_one(x, weight, *options)
    grad = torch.randn_like(expected)
    for function in (per_sample_conv2d, per_sample_conv2d_reference):
        output = function(x, weight, *options)
        torch.testing.assert_close(output, expected)
        if len(x):
            for ours, theirs in zip(
                *(torch.autograd.grad(y, (x, weight), grad, retain_graph=True) for y in (output, expected)), strict=True
            ):
                torch.testing.assert_close(ours, theirs)
    output = per_sample_conv2d(x, weight, *options)
    assert output.is_contiguous(memory_format=layout) or output.numel() == 0


def test_compiled_and_exported_with_a_dynamic_batch(case):
    x, weight, options = case
    if len(x) < 2:
        pytest.skip("traced with more")

    class Net(torch.nn.Module):
        def forward(self, x, weight):
            return per_sample_conv2d(x, weight, *options)

    torch.compiler.reset()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Net(), (x, weight), dynamic_shapes={"x": {0: batch}, "weight": {0: batch}})
    compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True, dynamic=True)
    for function in (program.module(), compiled):
        for B in (1, 2, 5):
            inputs = torch.randn(B, *x.shape[1:]).double(), torch.randn(B, *weight.shape[1:]).double()
            torch.testing.assert_close(function(*inputs), one_by_one(*inputs, *options))
