"""DDF's layers, against the paper's formulas in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_dynamic.layers import DDFConv2d, DDFPack, DDFUpPack, FilterNorm

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normalised(filters, scale):
    """`[..., K*K]` filters, standardised one by one."""
    mean, std = filters.mean(-1, keepdim=True), filters.std(-1, keepdim=True, unbiased=True)
    return (filters - mean) / (std + 1e-10) * scale


def channel_filters(branch, x, K):
    """`[B, C, K*K]`, as a `channel_branch` makes them."""
    squeeze, expand, norm = branch[1], branch[3], branch[4]
    hidden = F.relu(x.mean((2, 3)) @ squeeze.weight[:, :, 0, 0].T + squeeze.bias)
    filters = (hidden @ expand.weight[:, :, 0, 0].T + expand.bias).reshape(*x.shape[:2], K * K)
    return normalised(filters, norm.std.reshape(-1, K * K))


def spatial_filters(conv, x, K, head, gain, stride=1):
    """`[B, head, Ho, Wo, K*K]`, as the last conv of a spatial branch makes them."""
    raw = F.conv2d(x, conv.weight, conv.bias)[:, :, ::stride, ::stride]
    return normalised(raw.reshape(len(x), head, K * K, *raw.shape[2:]).movedim(2, -1), gain / K)


def filtered(x, channel, spatial, K, stride, dilation, combine):
    """A filter for every output, written out, on the patches of `F.unfold`."""
    B, C = x.shape[:2]
    channel, spatial = channel[:, :, None, None], spatial.repeat_interleave(C // spatial.shape[1], 1)
    filters = channel * spatial if combine == "mul" else channel + spatial
    patches = F.unfold(x, K, dilation, dilation * (K // 2), stride).reshape(B, C, K * K, *filters.shape[2:4])
    return (filters * patches.movedim(2, -1)).sum(-1)


def pack_formula(layer, x):
    K, stride, dilation = layer.kernel_size[0], layer.stride[0], layer.dilation[0]
    channel = channel_filters(layer.channel_branch, x, K)
    spatial = spatial_filters(layer.spatial_branch[0], x, K, layer.head, math.sqrt(2), stride)  # ReLU's gain
    return filtered(x, channel, spatial, K, stride, dilation, layer.kernel_combine)


class TestFilterNorm:
    @pytest.mark.parametrize("filter_type", ["spatial", "channel"])
    def test_formula(self, filter_type):
        norm = FilterNorm(3, 5, filter_type, "relu").double()
        x = torch.randn(2, 75, 4, 6, dtype=torch.float64)
        expected = normalised(x.reshape(2, 3, 25, 4, 6).movedim(2, -1), math.sqrt(2) / 5).movedim(-1, 2)
        torch.testing.assert_close(norm(x), expected.reshape(x.shape))
        assert not list(norm.parameters())

    def test_learned_scale_and_offset(self):
        norm = FilterNorm(4, 3, "channel", running_std=True, running_mean=True).double()
        assert {name: list(p.shape) for name, p in norm.named_parameters()} == {"std": [36], "mean": [36]}
        nn.init.normal_(norm.mean)
        x = torch.randn(2, 36, 1, 1, dtype=torch.float64)
        expected = normalised(x.reshape(2, 4, 9), norm.std.reshape(4, 9)) + norm.mean.reshape(4, 9)
        torch.testing.assert_close(norm(x), expected.reshape(x.shape))

    def test_initial_scale(self):
        norm = FilterNorm(2000, 3, "channel", "relu", running_std=True)
        assert norm.std.std().item() == pytest.approx(math.sqrt(2) / 3, rel=0.05)
        assert abs(norm.std.mean().item()) < 0.02

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
    def test_constant_filter_is_zero_not_nan(self, dtype):
        norm = FilterNorm(2, 3, "spatial")
        x = torch.full((1, 18, 2, 2), 0.3, dtype=dtype, requires_grad=True)
        y = norm(x)
        assert y.dtype == dtype
        assert y.abs().max() < 1
        y.sum().backward()
        assert not x.grad.isnan().any()

    def test_half_precision_computes_in_float32(self):
        x = torch.randn(1, 18, 8, 8).half() * 1e-3  # squares underflow in float16
        y = FilterNorm(2, 3, "spatial")(x)
        torch.testing.assert_close(y.float(), FilterNorm(2, 3, "spatial")(x.float()), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((2, 1, "spatial"), "kernel_size.*1"),
            ((2, 3, "depth"), "filter_type.*'depth'"),
            ((2, 3, "spatial", "gelu"), "nonlinearity.*'gelu'"),
        ],
    )
    def test_bad_arguments(self, args, message):
        with pytest.raises(ValueError, match=message):
            FilterNorm(*args)


class TestDDFPack:
    @pytest.mark.parametrize("kernel_combine", ["mul", "add"])
    @pytest.mark.parametrize(
        ("kernel_size", "stride", "dilation", "head"), [(3, 1, 1, 1), (3, 2, 1, 1), (5, 1, 2, 2), (7, 3, 1, 4)]
    )
    def test_formula(self, kernel_size, stride, dilation, head, kernel_combine):
        layer = DDFPack(8, kernel_size, stride, dilation, head, 0.5, kernel_combine=kernel_combine).double()
        x = torch.randn(2, 8, 11, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x), pack_formula(layer, x))

    def test_the_authors_parameter_names_and_widths(self):
        state = DDFPack(16, 3, head=2, se_ratio=0.2).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == {
            "spatial_branch.0.weight": [18, 16, 1, 1],
            "spatial_branch.0.bias": [18],
            "channel_branch.1.weight": [3, 16, 1, 1],
            "channel_branch.1.bias": [3],
            "channel_branch.3.weight": [144, 3, 1, 1],
            "channel_branch.3.bias": [144],
            "channel_branch.4.std": [144],
        }

    def test_narrow_layer_keeps_one_hidden_channel(self):
        assert DDFPack(2, se_ratio=0.2).channel_branch[1].out_channels == 1

    @pytest.mark.parametrize("batch", [0, 1])
    @pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3)], ids=str)
    def test_small_inputs(self, batch, size):
        layer = DDFPack(4, stride=2, head=2)
        y = layer(torch.randn(batch, 4, *size))
        assert y.shape == (batch, 4, -(-size[0] // 2), -(-size[1] // 2))
        assert y.isfinite().all()

    def test_constant_map(self):
        x = torch.ones(2, 4, 6, 6, requires_grad=True)
        y = DDFPack(4)(x)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()

    def test_every_parameter_gets_its_gradient(self):
        layer = DDFPack(4, stride=2, head=2).double()
        x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
        names, parameters = zip(*layer.named_parameters(), strict=True)

        def run(x, *parameters):
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *parameters))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_half_precision(self, dtype):
        layer, x = DDFPack(8), torch.randn(2, 8, 9, 9)
        expected = layer(x)
        y = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)

    def test_autocast(self):
        layer, x = DDFPack(8), torch.randn(2, 8, 9, 9, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters()) and x.grad.isfinite().all()

    @pytest.mark.parametrize("head", [1, 2])
    def test_channels_last(self, head):
        layer, x = DDFPack(8, head=head).double(), torch.randn(2, 8, 6, 7, dtype=torch.float64)
        y = copy.deepcopy(layer).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(y, layer(x))
        assert head > 1 or y.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("head", [1, 2])
    def test_compile_fullgraph(self, head):
        layer, x = DDFPack(8, stride=2, head=head), torch.randn(2, 8, 7, 7, requires_grad=True)
        compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        assert [g.shape for g in torch.autograd.grad(y.sum(), (x, *compiled.parameters()))]

    def test_torchscript(self):
        layer, x = DDFPack(8, head=2), torch.randn(2, 8, 7, 7)
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"in_channels": 0}, "in_channels.*0"),
            ({"kernel_size": 4}, "kernel_size.*odd.*4"),
            ({"kernel_size": 1}, "kernel_size.*1"),
            ({"stride": 0}, "stride.*0"),
            ({"dilation": 0}, "dilation.*0"),
            ({"head": 3}, "head.*3.*8"),
            ({"head": 0}, "head.*0"),
            ({"se_ratio": -0.1}, "se_ratio.*-0.1"),
            ({"nonlinearity": "gelu"}, "nonlinearity.*'gelu'"),
            ({"kernel_combine": "max"}, "kernel_combine.*'max'"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, kwargs, message):
        for layer in (DDFPack, DDFUpPack):
            if "stride" not in kwargs or layer is DDFPack:
                with pytest.raises(ValueError, match=message):
                    layer(**{"in_channels": 8, **kwargs})

    @pytest.mark.parametrize("shape", [(2, 7, 5, 5), (8, 5, 5)], ids=str)
    def test_bad_input(self, shape):
        with pytest.raises(ValueError, match=r"x must be \[B, 8, H, W\], got shape \[" + str(shape)[1:-1]):
            DDFPack(8)(torch.randn(shape))


class TestDDFConv2d:
    @pytest.mark.parametrize("groups", [1, 6])
    @pytest.mark.parametrize("size", [(7, 10), (12, 9), (1, 1)], ids=str)
    @pytest.mark.parametrize(
        ("kernel_size", "stride", "padding", "dilation"),
        [(3, 1, 1, 1), (3, 2, 1, 1), ((5, 5), (3, 3), (4, 4), (2, 2)), (7, 1, "same", 2), (5, 1, "same", 1)],
    )
    def test_output_shape_and_attributes_are_the_convolutions(
        self, size, kernel_size, stride, padding, dilation, groups
    ):
        conv = nn.Conv2d(6, 6, kernel_size, stride, padding, dilation, groups)
        layer = DDFConv2d(6, 6, kernel_size, stride, padding, dilation, groups)
        x = torch.randn(2, 6, *size)
        assert layer(x).shape == conv(x).shape
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(layer, name) == getattr(conv, name), name
        assert layer.padding_mode == conv.padding_mode and layer.bias.shape == conv.bias.shape
        assert layer.extra_repr() == conv.extra_repr()

    def test_is_a_ddf_pack_plus_bias(self):
        layer = DDFConv2d(8, 8, 3, padding=1, head=2, kernel_combine="add").double()
        pack = DDFPack(8, head=2, kernel_combine="add").double()
        state = layer.state_dict()
        assert not state["bias"].any()
        nn.init.normal_(layer.bias)
        pack.load_state_dict({key: value for key, value in state.items() if key != "bias"})
        x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(layer(x), pack(x) + layer.bias[:, None, None])

    def test_device_and_dtype(self):
        layer = DDFConv2d(4, 4, 3, 1, 1, 1, 1, True, "zeros", "meta", torch.float64)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("layer", [DDFConv2d, DDFPack])
    def test_from_conv(self, layer, bias):
        conv = nn.Conv2d(6, 6, 5, 2, 4, 2, bias=bias, dtype=torch.float64).eval()
        built = layer.from_conv(conv, head=3, se_ratio=0.5)
        assert type(built) is DDFConv2d and not built.training
        assert (built.head, built.channel_branch[1].out_channels) == (3, 3)
        x = torch.randn(2, 6, 9, 13, dtype=torch.float64)
        assert built(x).shape == conv(x).shape and built(x).dtype == torch.float64
        assert torch.equal(built.bias, conv.bias) if bias else built.bias is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"out_channels": 16}, "out_channels.*8.*16"),
            ({"in_channels": 0, "out_channels": 0}, "in_channels.*0"),
            ({"kernel_size": 4, "padding": 2}, "kernel_size.*4"),
            ({"kernel_size": 1, "padding": 0}, "kernel_size.*1"),
            ({"kernel_size": 0}, "kernel_size.*0"),
            ({"kernel_size": (3, 5), "padding": (1, 2)}, r"kernel_size.*\(3, 5\)"),
            ({"stride": (1, 2)}, r"stride.*\(1, 2\)"),
            ({"dilation": (1, 2), "padding": (1, 2)}, r"dilation.*\(1, 2\)"),
            ({"padding": 0}, "padding.*= 1, got 0"),
            ({"padding": (1, 0)}, r"padding.*\(1, 0\)"),
            ({"padding": "valid"}, "padding.*'valid'"),
            ({"padding": "same", "stride": 2}, "padding='same'"),
            ({"padding": "full"}, "padding.*'full'"),
            ({"groups": 2}, "groups must be 1 or 8, got 2"),
            ({"groups": 3}, "groups"),
            ({"padding_mode": "reflect"}, "padding_mode.*'reflect'"),
        ],
        ids=str,
    )
    def test_what_it_cannot_replace(self, change, message):
        with pytest.raises(ValueError, match=message):
            DDFConv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, **change})


class TestDDFUpPack:
    @pytest.mark.parametrize(
        ("kernel_size", "scale_factor", "dilation", "head", "joint_channels", "combine"),
        [(3, 2, 1, 1, -1, "mul"), (5, 3, 2, 2, -1, "add"), (3, 2, 1, 2, 3, "mul"), (3, 1, 2, 1, 1, "add")],
    )
    def test_formula(self, kernel_size, scale_factor, dilation, head, joint_channels, combine):
        layer = DDFUpPack(
            4, kernel_size, scale_factor, dilation, head, 0.5, joint_channels=joint_channels, kernel_combine=combine
        ).double()
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        joint_x = torch.randn(2, joint_channels, 5, 6, dtype=torch.float64) if joint_channels > 0 else None
        y = layer(x, joint_x)
        assert y.shape == (2, 4, 5 * scale_factor, 6 * scale_factor)
        for i, (channel, spatial) in enumerate(zip(layer.channel_branch, layer.spatial_branch, strict=True)):
            if joint_x is None:
                depthwise, (conv, _) = spatial
                guide = F.conv2d(x, depthwise.weight, depthwise.bias, padding=1, groups=4)
            else:
                conv, guide = spatial[0], joint_x
            channel = channel_filters(channel, x, kernel_size)
            spatial = spatial_filters(conv, guide, kernel_size, head, 1)
            expected = filtered(x, channel, spatial, kernel_size, 1, dilation, combine)
            dy, dx = divmod(i, scale_factor)
            torch.testing.assert_close(y[:, :, dy::scale_factor, dx::scale_factor], expected)

    @pytest.mark.parametrize("joint_channels", [-1, 3])
    def test_the_authors_parameter_names(self, joint_channels):
        layer = DDFUpPack(8, 3, 2, head=2, dw_kernel_size=5, joint_channels=joint_channels)
        expected = {}
        for i in range(4):
            expected |= {
                f"channel_branch.{i}.1.weight": [1, 8, 1, 1],
                f"channel_branch.{i}.1.bias": [1],
                f"channel_branch.{i}.3.weight": [72, 1, 1, 1],
                f"channel_branch.{i}.3.bias": [72],
                f"channel_branch.{i}.4.std": [72],
            }
            if joint_channels < 1:
                expected |= {
                    f"spatial_branch.{i}.0.weight": [8, 1, 5, 5],
                    f"spatial_branch.{i}.0.bias": [8],
                    f"spatial_branch.{i}.1.0.weight": [18, 8, 1, 1],
                    f"spatial_branch.{i}.1.0.bias": [18],
                }
            else:
                expected |= {f"spatial_branch.{i}.0.weight": [18, 3, 1, 1], f"spatial_branch.{i}.0.bias": [18]}
        assert {key: list(value.shape) for key, value in layer.state_dict().items()} == expected

    def test_trains_compiles_and_scripts(self):
        layer, x = DDFUpPack(4), torch.randn(2, 4, 5, 5)
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(y, torch.jit.script(layer)(x))
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_half_precision(self, dtype):
        layer, x = DDFUpPack(4, joint_channels=2), torch.randn(1, 4, 5, 5)
        expected = layer(x, x[:, :2])
        y = layer.to(dtype)(x.to(dtype), x[:, :2].to(dtype))
        torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [({"scale_factor": 0}, "scale_factor.*0"), ({"dw_kernel_size": 2}, "dw_kernel_size.*odd.*2")],
    )
    def test_bad_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            DDFUpPack(8, **kwargs)

    @pytest.mark.parametrize(
        ("joint_channels", "x", "joint_x", "message"),
        [
            (-1, (1, 5, 4, 4), None, r"x must be \[B, 4"),
            (-1, (1, 4, 4, 4), (1, 4, 4, 4), "joint_x was given"),
            (3, (1, 4, 4, 4), None, "joint_x.*missing"),
            (3, (1, 4, 4, 4), (1, 4, 4, 4), r"joint_x must be \[B, 3"),
            (3, (1, 4, 4, 4), (1, 3, 8, 8), r"joint_x.*\[1, 3, 8, 8\]"),
            (3, (1, 4, 4, 4), (2, 3, 4, 4), r"joint_x.*\[2, 3, 4, 4\]"),
        ],
    )
    def test_bad_input(self, joint_channels, x, joint_x, message):
        layer = DDFUpPack(4, joint_channels=joint_channels)
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(x), None if joint_x is None else torch.randn(joint_x))
