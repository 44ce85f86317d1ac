"""sample_conv2d against one convolution after the other."""

import pytest
import torch
import torch.nn.functional as F

import timm_dynamic
from timm_dynamic.ops import sample_conv2d
from timm_dynamic.ops.sample_conv import samples

# (B, C, O, kernel, stride, padding, dilation, groups)
CASES = {
    "1x1": (3, 6, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1, strided": (3, 6, 8, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "1x1, padded": (3, 6, 8, (1, 1), (2, 2), (1, 1), (1, 1), 1),
    "1x1, grouped": (3, 6, 8, (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "depthwise, strided and doubled": (3, 6, 12, (5, 5), (2, 2), (2, 2), (1, 1), 6),
    "dense": (3, 6, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "oblong": (2, 6, 8, (3, 5), (2, 1), (0, 2), (1, 2), 1),
    "grouped": (2, 6, 8, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    "one sample": (1, 6, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no sample": (0, 6, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no sample, 1x1": (0, 6, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}


@pytest.fixture(params=CASES)
def case(request):
    B, C, O, kernel, *options, groups = CASES[request.param]
    torch.manual_seed(0)
    x = torch.randn(B, C, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(B, O, C // groups, *kernel, dtype=torch.float64, requires_grad=True)
    return x, weight, (*options, groups)


def one_by_one(x, weight, *options):
    if len(x) == 0:
        return F.conv2d(x, weight.new_zeros(weight.shape[1:]), None, *options)
    return torch.stack([F.conv2d(*pair, None, *options) for pair in zip(x, weight, strict=True)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("everything", [None, "formula"])
@pytest.mark.parametrize("grouped", [0, 10**6])
def test_output_and_gradients(case, layout, everything, grouped, monkeypatch):
    monkeypatch.setattr(samples, "_GROUPED_WEIGHTS", grouped)
    x, weight, options = case
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    expected = one_by_one(x, weight, *options)
    with timm_dynamic.use(everything):
        output = sample_conv2d(x, weight, *options)
    torch.testing.assert_close(output, expected)
    if len(x):
        grad = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad(y, (x, weight), grad) for y in (output, expected))
        torch.testing.assert_close(ours, theirs)
        assert everything or output.is_contiguous(memory_format=layout)


def test_transforms(case):
    x, weight, options = case
    if len(x) == 0:
        return

    def loss(x, weight):
        return sample_conv2d(x, weight, *options).square().sum()

    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, weight), expected)
    each = torch.vmap(torch.func.grad(loss, (0, 1)))(x[:, None], weight[:, None])
    torch.testing.assert_close(tuple(t[:, 0] for t in each), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", ["1x1, strided", "depthwise, strided and doubled", "grouped"], indirect=True)
def test_compiled_exported_and_traced_with_a_dynamic_batch(case):
    x, weight, options = case

    class Net(torch.nn.Module):
        def forward(self, x, weight):
            return sample_conv2d(x, weight, *options)

    torch.compiler.reset()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Net(), (x, weight), dynamic_shapes={"x": {0: batch}, "weight": {0: batch}})
    compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True, dynamic=True)
    for function in (program.module(), compiled, torch.jit.trace(Net(), (x, weight))):
        for B in (1, 2, 5):
            inputs = torch.randn(B, *x.shape[1:]).double(), torch.randn(B, *weight.shape[1:]).double()
            torch.testing.assert_close(function(*inputs), one_by_one(*inputs, *options))


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"x must be \[B, 4, H, W\], got shape \[2, 5, 7, 7\]"):
        sample_conv2d(torch.randn(2, 5, 7, 7), torch.randn(2, 6, 4, 3, 3))
    with pytest.raises(ValueError, match="weight must be for 2 samples, got 3"):
        sample_conv2d(torch.randn(2, 4, 7, 7), torch.randn(3, 6, 4, 3, 3))
