"""FDConv's layer."""

import copy
from fractions import Fraction

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_dynamic import dynamize
from timm_dynamic.layers import FDConv2d
from timm_dynamic.layers.fd_parts import BandModulation, with_real_edges


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((32, 48, 3), {"padding": 1}),
        ((32, 64, 1), {"bias": False}),
        ((10, 7, (2, 5)), {"stride": 2, "padding": "valid", "dilation": 2}),
        ((6, 6, 3), {"padding": 1, "padding_mode": "circular"}),
    ],
)
def test_from_conv(args, kwargs, orthonormal):
    conv, x = nn.Conv2d(*args, **kwargs), torch.randn(2, args[0], 11, 14)
    layer, expected = FDConv2d.from_conv(conv, orthonormal=orthonormal), conv(x)
    assert (layer(x) - expected).abs().max() <= 1e-5 * expected.std()
    x, expected = x.double(), conv.double()(x.double())
    assert (layer.double()(x) - expected).abs().max() <= 2e-6 * expected.std()  # the spectrum is of float32


@pytest.mark.parametrize("arguments", [(8, 8, 3, 1, 0, 1, 2), (9, 8, 1), (1, 8, 2), (8, 1, 3)])
def test_what_it_cannot_be(arguments):
    with pytest.raises(ValueError, match="FDConv needs groups=1, two or more channels, and an even"):
        FDConv2d(*arguments)


def test_number_of_groups():
    assert (FDConv2d(64, 64, 3).num_kernels, FDConv2d(64, 32, 1).num_kernels) == (64, 48)
    with pytest.raises(ValueError, match="num_kernels must divide the 1056 frequencies of the kernel, got 64"):
        FDConv2d(64, 32, 1, num_kernels=64)


def test_dynamize_leaves_what_it_cannot_be():
    model = dynamize(timm.create_model("test_efficientnet"), "fd")
    for module in model.modules():
        assert not isinstance(module, FDConv2d) or module.groups == 1
    assert any(type(m) is nn.Conv2d and m.groups > 1 for m in model.modules())
    with pytest.raises(ValueError, match="FDConv needs groups=1"):
        dynamize(timm.create_model("test_efficientnet"), "fd", "*conv_dw*")


def test_default_groups_go_by_distance():
    layer = FDConv2d(6, 4, 3, num_kernels=8)
    R, C = 12, 10
    frequencies = [(Fraction(min(r, R - r), R) ** 2 + Fraction(c, 18) ** 2, r, c) for r in range(R) for c in range(C)]
    expected = torch.zeros(R, C)
    for rank, (_, r, c) in enumerate(sorted(frequencies)):
        expected[r, c] = rank // 15
    assert torch.equal(layer.frequency_group.float(), expected)


def test_groups_are_saved_and_can_be_set():
    layer, x = FDConv2d(6, 4, 3), torch.randn(2, 6, 5, 5)
    for head in layer.KSM_Global.heads():
        nn.init.normal_(head.weight)
    layer.eval()
    before = layer(x)
    layer.frequency_group.copy_(layer.frequency_group.flip(1))
    other = FDConv2d(6, 4, 3).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and not torch.allclose(layer(x), before)
    state = {key: value for key, value in layer.state_dict().items() if key != "frequency_group"}
    other.load_state_dict(state)  # the authors'
    assert torch.equal(other(x), layer(x))
    with torch.device("meta"):
        other = FDConv2d(6, 4, 3).eval()
    other.load_state_dict(state, assign=True)
    torch.testing.assert_close(other(x), before)


def test_half_spectra_without_symmetry():
    """As the inverse by rows, complex, and then by columns to real numbers."""
    spectrum = torch.randn(2, 6, 5, 2, dtype=torch.float64)
    expected = torch.fft.irfft(torch.fft.ifft(torch.view_as_complex(spectrum), dim=1), n=8)
    torch.testing.assert_close(torch.fft.irfft2(torch.view_as_complex(with_real_edges(spectrum)), s=(6, 8)), expected)


@pytest.mark.parametrize("size", [(7, 9), (16, 16), (56, 56), (64, 64), (97, 33)])
def test_bands_are_those_of_64_positions(size):
    """As float32 compares: 0.25 is not less than 0.25 + 1e-8."""
    rows, columns = torch.fft.fftfreq(64).abs()[:, None], torch.fft.rfftfreq(64).abs()
    for part, highest in ((2, 15), (4, 8), (8, 4)):
        mask = (torch.maximum(rows, columns) < 0.5 / part + 1e-8).float()
        wanted = F.interpolate(mask[None, None], (size[0], size[1] // 2 + 1))[0, 0]
        assert torch.equal(BandModulation(1).low_pass(torch.empty(1, 1, *size), highest), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_sample_and_autocast(dtype):
    layer, x = FDConv2d(16, 16, 3, padding=1), torch.randn(1, 16, 12, 9)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == dtype and all(p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits(dtype):
    layer, x = FDConv2d(8, 8, 3).to(dtype), torch.randn(4, 8, 6, 6).to(dtype)
    layer(x).float().square().mean().backward()
    norm = layer.KSM_Global.bn
    assert norm.running_mean.dtype == dtype and norm.running_mean.any() and norm.num_batches_tracked == 1
    expected = copy.deepcopy(layer).float().eval()(x.float())
    torch.testing.assert_close(layer.eval()(x).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_torchscript(kernel_size):
    layer, x = FDConv2d(8, 6, kernel_size, padding=kernel_size // 2).eval(), torch.randn(2, 8, 7, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
