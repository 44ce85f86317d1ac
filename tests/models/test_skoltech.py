"""The networks of DY's other authors: sizes, their names of tensors, and what is another than in timm's networks."""

import pytest
import timm
import torch
from torch import nn

import timm_dynamic
from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.models import skoltech_dy_deeplabv3plus, skoltech_dy_mobilenetv3

SMALL = "skoltech_dy_mobilenetv3_small"
LARGE = "skoltech_dy_mobilenetv3_large"
DEEPLAB = "skoltech_dy_deeplabv3plus"
# Of each block: kernel, expanded channels, channels, squeeze-and-excitation, stride; then the channels of the tail.
SMALL_050 = [
    *((3, 8, 8, 1, 2), (3, 40, 16, 0, 2), (3, 48, 16, 0, 1), (5, 48, 24, 1, 2), (5, 120, 24, 1, 1), (5, 120, 24, 1, 1)),
    *((5, 64, 24, 1, 1), (5, 72, 24, 1, 1), (5, 144, 48, 1, 2), (5, 288, 48, 1, 1), (5, 288, 48, 1, 1), 288),
]
SMALL_100 = [
    *((3, 16, 16, 1, 2), (3, 72, 24, 0, 2), (3, 88, 24, 0, 1), (5, 96, 40, 1, 2), *2 * ((5, 240, 40, 1, 1),)),
    *((5, 120, 48, 1, 1), (5, 144, 48, 1, 1), (5, 288, 96, 1, 2), *2 * ((5, 576, 96, 1, 1),), 576),
]
LARGE_100 = [
    *((3, 16, 16, 0, 1), (3, 64, 24, 0, 2), (3, 72, 24, 0, 1), (5, 72, 40, 1, 2), *2 * ((5, 120, 40, 1, 1),)),
    *((3, 240, 80, 0, 2), (3, 200, 80, 0, 1), *2 * ((3, 184, 80, 0, 1),), (3, 480, 112, 1, 1), (3, 672, 112, 1, 1)),
    *((5, 672, 160, 1, 2), *2 * ((5, 960, 160, 1, 1),), 960),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def size(name, **kwargs):
    return sum(p.numel() for p in timm.create_model(name, device="meta", **kwargs).parameters())


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        (f"{SMALL}_025", 10, 998_570),
        (f"{SMALL}_050", 200, 2_525_336),
        (SMALL, 10, 5_805_068),
        (SMALL, 200, 6_048_458),
        (LARGE, 200, 14_319_290),
        (DEEPLAB, 21, 18_414_806),
    ],
)
def test_size(name, classes, parameters):
    assert size(name, num_classes=classes) == parameters


@pytest.mark.parametrize(
    ("name", "side", "kwargs", "millions"),
    [
        (f"{SMALL}_025", 224, {}, 13.2),
        (SMALL, 224, {}, 58.4),
        (f"{SMALL}_050", 56, {"stem_stride": 1}, 17.6),
        (SMALL, 56, {"stem_stride": 1}, 51.9),
        (DEEPLAB, 513, {}, 27_070),
        (f"{DEEPLAB}_050", 513, {}, 9_390),
    ],
)
def test_macs(name, side, kwargs, millions):
    """Of the convolutions, a dynamic one as a static one; squeeze-and-excitation is linear in theirs."""
    model = timm.create_model(name, device="meta", dynamic=False, **kwargs).eval()
    static = timm_dynamic.count_macs(model, torch.empty(1, 3, side, side, device="meta")).static
    linear = sum(p.numel() for key, p in model.named_parameters() if ".se." in key)
    assert (static - linear) / 1e6 == pytest.approx(millions, abs=0.05 if millions < 100 else 5)


class TestMobileNetV3:
    def authors_state(self, rows, classes, dynamic=True):
        """Names and shapes of their checkpoints, in their order."""
        state = {}

        def add(name, *shape):
            state[name] = torch.randn(shape)

        def norm(name, channels):
            for part in ("weight", "bias", "running_mean", "running_var"):
                add(f"{name}.{part}", channels)
            state[f"{name}.num_batches_tracked"] = torch.tensor(0)

        def conv(name, inputs, outputs, kernel=1, groups=1, bias=False):
            shape = (outputs, inputs // groups, kernel, kernel)
            if not dynamic:
                add(f"{name}.weight", *shape)
                if bias:
                    add(f"{name}.bias", outputs)
                return
            add(f"{name}.kernels_weights", 4, *shape)
            if bias:
                add(f"{name}.kernels_bias", 4, outputs)
            hidden = max(1, inputs // 4)
            for i, (units, of) in {0: (hidden, inputs), 2: (4, hidden)}.items():
                add(f"{name}.attention.to_scores.{i}.weight", units, of)
                add(f"{name}.attention.to_scores.{i}.bias", units)

        add("features.layers.0.layers.0.weight", 16, 3, 3, 3)
        norm("features.layers.0.layers.1", 16)
        *rows, tail = rows
        channels = 16
        for i, (kernel, expanded, outputs, squeeze, _) in enumerate(rows, 1):
            block = f"features.layers.{i}.conv.layers"
            conv(f"{block}.0", channels, expanded)
            norm(f"{block}.1", expanded)
            conv(f"{block}.3", expanded, expanded, kernel, expanded)
            norm(f"{block}.4", expanded)
            if squeeze:
                add(f"{block}.5.fc.0.weight", expanded // 4, expanded)
                add(f"{block}.5.fc.2.weight", expanded, expanded // 4)
            conv(f"{block}.7", expanded, outputs)
            norm(f"{block}.8", outputs)
            channels = outputs
        conv(f"features.layers.{len(rows) + 1}.layers.0", channels, tail)
        norm(f"features.layers.{len(rows) + 1}.layers.1", tail)
        conv(f"features.layers.{len(rows) + 3}", tail, 1280, bias=True)
        add("classifier.layers.1.weight", classes, 1280)
        add("classifier.layers.1.bias", classes)
        return state

    @pytest.mark.parametrize(
        ("name", "rows", "dynamic"),
        [
            (SMALL, SMALL_100, True),
            (LARGE, LARGE_100, True),
            (f"{SMALL}_050", SMALL_050, True),
            (f"{SMALL}_050", SMALL_050, False),
        ],
    )
    def test_their_checkpoints_load(self, name, rows, dynamic):
        model = timm.create_model(name, num_classes=10, dynamic=dynamic, device="meta")
        theirs = self.authors_state(rows, 10, dynamic)
        ours = skoltech_dy_mobilenetv3.checkpoint_filter_fn({"model": theirs, "optimizer": {}, "epoch": 1}, model)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert skoltech_dy_mobilenetv3.checkpoint_filter_fn(ours, model) is ours
        strides = [block.conv_dw.stride[0] for stage in model.blocks[:-1] for block in stage]
        assert strides == [stride for *_, stride in rows[:-1]]
        layers = [module for module in model.modules() if isinstance(module, DynamicConv2d)]
        assert len(layers) == (3 * (len(rows) - 1) + 2) * dynamic

    @pytest.mark.parametrize(("name", "reductions"), [(SMALL, [1, 2, 4, 8]), (LARGE, [1, 2, 4, 8, 16])])
    @torch.no_grad()
    def test_stem_stride(self, name, reductions):
        model = timm.create_model(name, stem_stride=1, device="meta")
        assert [info["reduction"] for info in model.feature_info] == reductions
        features = model.forward_intermediates(torch.empty(1, 3, 64, 64, device="meta"), intermediates_only=True)
        assert [64 // feature.shape[-1] for feature in features] == reductions
        with pytest.raises(ValueError, match="stem_stride must be 1 or 2, got 4"):
            timm.create_model(name, stem_stride=4)

    def test_squeeze_and_excitation_comes_before_the_activation(self):
        block = timm.create_model(f"{SMALL}_025").double().eval().blocks[0][0]
        nn.init.normal_(block.se[0].fc1.weight), nn.init.normal_(block.se[0].fc2.weight)
        x = torch.randn(2, 16, 9, 7).double()
        u = block.bn2(block.conv_dw(block.bn1(block.conv_pw(x))))
        hidden = (u.mean((2, 3)) @ block.se[0].fc1.weight[:, :, 0, 0].T).relu()
        gates = ((hidden @ block.se[0].fc2.weight[:, :, 0, 0].T + 3) / 6).clamp(0, 1)
        expected = block.bn3(block.conv_pwl((u * gates[:, :, None, None]).relu()))
        assert (u < 0).any()
        torch.testing.assert_close(block(x), expected)

    def test_initialisation(self):
        """The fan-out is not divided by the groups, and the attention starts nearly even."""
        model = timm.create_model(f"{SMALL}_050")
        for layer in (module for module in model.modules() if isinstance(module, DynamicConv2d)):
            expected = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            if layer.kernels_weights.numel() > 2000:
                assert layer.kernels_weights.std().item() == pytest.approx(expected, rel=0.1)
        linear = [model.classifier, model.conv_head.attention.to_scores[0], model.blocks[0][0].se[0].fc1]
        assert all(0.005 < one.weight.std() < 0.015 for one in linear)
        assert not model.conv_head.kernels_bias.any() and not model.classifier.bias.any()


class TestDeepLabV3Plus:
    @pytest.mark.parametrize(("stride", "dilations"), [(16, [1] * 15 + [2]), (8, [1] * 9 + [2] * 6 + [4])])
    def test_padding_and_dilation(self, stride, dilations):
        """Blocks 2 to 17; the first one has no expansion."""
        backbone = timm.create_model(DEEPLAB, output_stride=stride, device="meta").backbone
        first, *blocks = [block for stage in backbone.blocks for block in stage]
        assert (first.conv_dw.padding, first.conv_dw.dilation) == ((1, 1), (1, 1))
        assert [block.conv_dw.dilation for block in blocks] == [(d, d) for d in dilations]
        assert [block.conv_pw.padding for block in blocks] == [(d, d) for d in dilations]
        assert {block.conv_dw.padding for block in blocks} == {(0, 0)}

    @torch.no_grad()
    def test_beyond_the_border_is_what_the_norm_makes_of_zero(self):
        block = timm.create_model(DEEPLAB).double().eval().backbone.blocks[1][0]
        nn.init.uniform_(block.bn1.running_mean), nn.init.normal_(block.bn1.bias)
        x = torch.randn(1, 16, 9, 7).double()
        u = block.bn1(nn.functional.conv2d(x, block.conv_pw.weight))
        ring = block.bn1(torch.zeros(1, 96, 1, 1).double())
        padded = ring.repeat(1, 1, 11, 9)
        padded[:, :, 1:-1, 1:-1] = u
        y = nn.functional.conv2d(padded, block.conv_dw.weight, stride=2, groups=96)
        assert ring.any()
        torch.testing.assert_close(block(x), block.bn3(block.conv_pwl(block.bn2(y))))

    @pytest.mark.parametrize("dynamic", [True, False])
    def test_their_checkpoints_load(self, golden, dynamic):
        """At the whole width; the file has the backbone twice."""
        model = timm.create_model(DEEPLAB, device="meta", dynamic=dynamic)
        names = golden("dy_deeplabv3plus_w050").rows
        if not dynamic:
            names = [
                name.replace("kernels_weights", "weight").replace("kernels_bias", "bias")
                for name in names
                if ".attention." not in name
            ]
        theirs = {name: torch.zeros(()) for name in names}
        ours = skoltech_dy_deeplabv3plus.checkpoint_filter_fn({"model": theirs}, model)
        assert ours.keys() == model.state_dict().keys() and len(theirs) > len(ours)
        strange = {"backbone.low_level_features.19.weight": torch.zeros(1)}
        assert skoltech_dy_deeplabv3plus.checkpoint_filter_fn({"model": strange}, model).keys() <= {
            "backbone.features.19.weight"
        }
        state = model.state_dict()
        assert skoltech_dy_deeplabv3plus.checkpoint_filter_fn(state, model) is state

    def test_initialisation(self):
        model = timm.create_model(f"{DEEPLAB}_050")
        layer, static = model.decoder.conv1.conv, model.backbone.blocks[5][0].conv_pw
        assert layer.kernels_weights.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
        assert static.weight.std().item() == pytest.approx((2 / 96) ** 0.5, rel=0.02)
        assert not model.classifier.kernels_bias.any()
        model.reset_classifier(3)
        assert not model.classifier.kernels_bias.any() and model(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name", [f"{SMALL}_025", f"{DEEPLAB}_050"])
@torch.no_grad()
def test_optimized(name):
    model, x = timm.create_model(name).double(), torch.randn(2, 3, 64, 64).double()
    for _ in range(3):
        model(x)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias, std=0.2)
    expected = model.eval()(x)
    fast = timm_dynamic.optimize(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    torch.testing.assert_close(fast(x), expected, rtol=1e-6, atol=1e-6 * expected.std().item())
