"""The networks of DY's other authors: sizes, their names of tensors, and what is another than in timm's networks."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_dynamic
from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.layers.progress import KEY
from timm_dynamic.models import skoltech_dy_deeplabv3plus, skoltech_dy_mobilenetv3

SMALL = "skoltech_dy_mobilenetv3_small"
LARGE = "skoltech_dy_mobilenetv3_large"
DEEPLAB = "skoltech_dy_deeplabv3plus"
# Of each block: kernel, expanded channels, channels, squeeze-and-excitation, stride; then the channels of the tail.
SMALL_050 = [
    *((3, 8, 8, 1, 2), (3, 40, 16, 0, 2), (3, 48, 16, 0, 1), (5, 48, 24, 1, 2), (5, 120, 24, 1, 1), (5, 120, 24, 1, 1)),
    *((5, 64, 24, 1, 1), (5, 72, 24, 1, 1), (5, 144, 48, 1, 2), (5, 288, 48, 1, 1), (5, 288, 48, 1, 1), 288),
]
STEM_NORM = "features.layers.0.layers.1"
SMALL_100 = [
    *((3, 16, 16, 1, 2), (3, 72, 24, 0, 2), (3, 88, 24, 0, 1), (5, 96, 40, 1, 2), *2 * ((5, 240, 40, 1, 1),)),
    *((5, 120, 48, 1, 1), (5, 144, 48, 1, 1), (5, 288, 96, 1, 2), *2 * ((5, 576, 96, 1, 1),), 576),
]
LARGE_100 = [
    *((3, 16, 16, 0, 1), (3, 64, 24, 0, 2), (3, 72, 24, 0, 1), (5, 72, 40, 1, 2), *2 * ((5, 120, 40, 1, 1),)),
    *((3, 240, 80, 0, 2), (3, 200, 80, 0, 1), *2 * ((3, 184, 80, 0, 1),), (3, 480, 112, 1, 1), (3, 672, 112, 1, 1)),
    *((5, 672, 160, 1, 2), *2 * ((5, 960, 160, 1, 1),), 960),
]


class Plain:
    """Their networks by PyTorch's functions, from weights by their names."""

    def __init__(self, state, temperature, training):
        self.state, self.temperature, self.training = state, temperature, training

    def conv(self, x, name, **options):
        """A dynamic one is the mixture of what its kernels give."""
        weights = [self.state.get(f"{name}.{key}") for key in ("weight", "bias", "kernels_weights", "kernels_bias")]
        if weights[0] is not None:
            return F.conv2d(x, *weights[:2], **options)
        parts = [self.state[f"{name}.attention.to_scores.{i}.{key}"] for i in (0, 2) for key in ("weight", "bias")]
        scores = F.linear(F.linear(x.mean((2, 3)), *parts[:2]).relu(), *parts[2:])
        shares = (scores / self.temperature).softmax(1)[..., None, None, None].unbind(1)
        biases = [None] * len(shares) if weights[3] is None else weights[3]
        return sum(
            share * F.conv2d(x, kernels, bias, **options)
            for share, kernels, bias in zip(shares, weights[2], biases, strict=True)
        )

    def norm(self, x, name):
        mean, variance, weight, bias = (
            self.state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        statistics = (None, None) if self.training else (mean, variance)
        return F.batch_norm(x, *statistics, weight, bias, self.training, eps=1e-5)

    def mobilenet(self, x, rows, relus, stem_stride):
        """The first so many blocks have ReLU."""
        x = F.hardswish(self.norm(self.conv(x, "features.layers.0.layers.0", stride=stem_stride, padding=1), STEM_NORM))
        for i, (kernel, expanded, _, squeeze, stride) in enumerate(rows[:-1], 1):
            block, act = f"features.layers.{i}.conv.layers", F.relu if i <= relus else F.hardswish
            y = act(self.norm(self.conv(x, f"{block}.0"), f"{block}.1"))
            y = self.conv(y, f"{block}.3", stride=stride, padding=kernel // 2, groups=expanded)
            y = self.norm(y, f"{block}.4")
            if squeeze:
                hidden = F.linear(y.mean((2, 3)), self.state[f"{block}.5.fc.0.weight"]).relu()
                y = y * F.hardsigmoid(F.linear(hidden, self.state[f"{block}.5.fc.2.weight"]))[..., None, None]
            y = self.norm(self.conv(act(y), f"{block}.7"), f"{block}.8")
            x = x + y if stride == 1 and x.shape == y.shape else y
        tail = f"features.layers.{len(rows)}.layers"
        x = F.hardswish(self.norm(self.conv(x, f"{tail}.0"), f"{tail}.1")).mean((2, 3), keepdim=True)
        x = F.hardswish(self.conv(x, f"features.layers.{len(rows) + 2}")).flatten(1)
        return F.linear(x, *(self.state[f"classifier.layers.1.{key}"] for key in ("weight", "bias")))

    def deeplab(self, x):
        """Of output stride 16."""
        size, name = x.shape[2:], "backbone.features"
        x = F.relu6(self.norm(self.conv(x, f"{name}.0.0", stride=2, padding=1), f"{name}.0.1"))
        x = F.relu6(self.norm(self.conv(x, f"{name}.1.conv.0", padding=1, groups=32), f"{name}.1.conv.1"))
        x = self.norm(self.conv(x, f"{name}.1.conv.3"), f"{name}.1.conv.4")
        for i in range(2, 18):
            block, d = f"{name}.{i}.conv", 2 if i == 17 else 1
            y = F.relu6(self.norm(self.conv(F.pad(x, (d, d, d, d)), f"{block}.0"), f"{block}.1"))
            y = self.conv(y, f"{block}.3", stride=2 if i in (2, 4, 7) else 1, dilation=d, groups=y.shape[1])
            y = self.norm(self.conv(F.relu6(self.norm(y, f"{block}.4")), f"{block}.6"), f"{block}.7")
            x = x + y if x.shape == y.shape else y
            if i == 3:
                low = x

        def layer(x, conv, norm, **options):
            return self.norm(self.conv(x, conv, **options), norm).relu()

        maps = [
            layer(x, f"aspp.aspp{k}.atrous_conv", f"aspp.aspp{k}.bn", padding=d if k > 1 else 0, dilation=d)
            for k, d in zip((1, 2, 3, 4), (1, 6, 12, 18), strict=True)
        ]
        pool = "aspp.global_avg_pool.layers"
        maps.append(layer(x.mean((2, 3), keepdim=True), f"{pool}.1", f"{pool}.2").expand_as(maps[0]))
        x, low = layer(torch.cat(maps, 1), "aspp.conv1", "aspp.bn1"), layer(low, "decoder.conv1", "decoder.bn1")
        x = torch.cat([F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True), low], 1)
        for k in (0, 4):
            x = layer(x, f"decoder.last_conv.layers.{k}", f"decoder.last_conv.layers.{k + 1}", padding=1)
        x = self.conv(x, "decoder.last_conv.layers.8")
        return F.interpolate(x, size, mode="bilinear", align_corners=True)


def check_against_plain(model, state, translate, plain, x):
    """Outputs in evaluation, and in training, at both ends of the temperature's schedule, and the gradients there."""
    model.load_state_dict(translate(state, model))
    for training in (False, True):
        for epoch, temperature in ((0, 30), (50, 1)):
            timm_dynamic.set_progress(model, epoch, 100)
            for name, one in state.items():
                one.requires_grad_(one.is_floating_point() and ".running_" not in name).grad = None
            expected, output = plain(Plain(state, temperature, training), x), model.train(training)(x)
            torch.testing.assert_close(output, expected)
        weight = torch.randn_like(output)
        model.zero_grad(), (output * weight).mean().backward(), (expected * weight).mean().backward()
        gradients = translate({key: value.grad for key, value in state.items() if value.grad is not None}, model)
        assert gradients.keys() == {key for key, _ in model.named_parameters()}
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-6, atol=1e-12)


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
            fan_in = torch.Size(shape[2 if name.endswith("kernels_weights") else 1 :]).numel()
            state[name] = torch.randn(shape) / fan_in**0.5

        def norm(name, channels):
            for part in ("weight", "bias", "running_mean", "running_var"):
                add(f"{name}.{part}", channels)
            state[f"{name}.running_var"] = 0.5 + torch.rand(channels)
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
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items() if k != KEY}
        assert skoltech_dy_mobilenetv3.checkpoint_filter_fn(ours, model) is ours
        strides = [block.conv_dw.stride[0] for stage in model.blocks[:-1] for block in stage]
        assert strides == [stride for *_, stride in rows[:-1]]
        layers = [module for module in model.modules() if isinstance(module, DynamicConv2d)]
        assert len(layers) == (3 * (len(rows) - 1) + 2) * dynamic

    @pytest.mark.parametrize(
        ("name", "rows", "relus", "stem_stride"),
        [(SMALL, SMALL_100, 3, 2), (LARGE, LARGE_100, 6, 1)],
    )
    def test_it_is_their_network(self, name, rows, relus, stem_stride):
        state = self.authors_state(rows, 10)
        state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
        check_against_plain(
            timm.create_model(name, num_classes=10, stem_stride=stem_stride).double(),
            state,
            skoltech_dy_mobilenetv3.checkpoint_filter_fn,
            lambda plain, x: plain.mobilenet(x, rows, relus, stem_stride),
            torch.randn(3, 3, 35, 43).double(),
        )

    @pytest.mark.parametrize(("name", "reductions"), [(SMALL, [1, 2, 4, 8]), (LARGE, [1, 2, 4, 8, 16])])
    @torch.no_grad()
    def test_stem_stride(self, name, reductions):
        model = timm.create_model(name, stem_stride=1, device="meta")
        assert [info["reduction"] for info in model.feature_info] == reductions
        features = model.forward_intermediates(torch.empty(1, 3, 64, 64, device="meta"), intermediates_only=True)
        assert [64 // feature.shape[-1] for feature in features] == reductions
        extractor = timm.create_model(name, features_only=True, stem_stride=1, device="meta")
        shapes = [feature.shape for feature in extractor(torch.empty(1, 3, 64, 64, device="meta"))]
        assert extractor.feature_info.reduction() == reductions and shapes == [feature.shape for feature in features]
        for wrong in (4, True):
            with pytest.raises(ValueError, match=f"stem_stride must be 1 or 2, got {wrong}"):
                timm.create_model(name, stem_stride=wrong)

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
    def test_another_backbone(self):
        with pytest.raises(ValueError, match="backbone='resnet18': this network has a MobileNetV2 alone"):
            timm.create_model(DEEPLAB, backbone="resnet18")

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
        assert ours.keys() == model.state_dict().keys() - {KEY} and len(theirs) > len(ours)
        strange = {"backbone.low_level_features.19.weight": torch.zeros(1)}
        assert skoltech_dy_deeplabv3plus.checkpoint_filter_fn({"model": strange}, model).keys() <= {
            "backbone.features.19.weight"
        }
        state = model.state_dict()
        assert skoltech_dy_deeplabv3plus.checkpoint_filter_fn(state, model) is state

    def test_it_is_their_network(self, golden):
        """At the whole width, and a size that no stride divides."""
        model = timm.create_model(DEEPLAB, drop_rate=0.0).double()
        names = [name for name in golden("dy_deeplabv3plus_w050").rows if "level_features" not in name]
        numbers = {name: torch.tensor(i) for i, name in enumerate(names)}
        ours = skoltech_dy_deeplabv3plus.checkpoint_filter_fn(numbers, model)
        state = {names[i]: model.state_dict()[name].clone() for name, i in ours.items()}
        for name, value in state.items():
            if name.endswith(("running_mean", "bias")):
                nn.init.normal_(value, std=0.3)
            elif name.endswith("running_var"):
                nn.init.uniform_(value, 0.5, 1.5)
        translate, x = skoltech_dy_deeplabv3plus.checkpoint_filter_fn, torch.randn(2, 3, 33, 43).double()
        check_against_plain(model, state, translate, Plain.deeplab, x)

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
