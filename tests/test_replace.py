"""`dynamize`: what it replaces, what it refuses, and that a network's output is kept."""

import copy
import functools
import re

import pytest
import timm
import torch
from pairs import in_turns
from timm.models import VGG
from timm.utils.model import reparameterize_model
from torch import nn

import timm_dynamic
from timm_dynamic import dynamize
from timm_dynamic.convert import load_checkpoint
from timm_dynamic.families import FAMILIES, layers
from timm_dynamic.layers import DCDConv2d, DDFConv2d, DDFPack, DynamicConv2d, PEDConv2d
from timm_dynamic.layers.base import DropInConv2d

SIZE, LAYERS = 64, layers()
NETWORKS = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=10),
    "resnext": lambda: timm.create_model("resnext26ts", num_classes=10),
    "seresnet": lambda: timm.create_model("seresnet18", num_classes=10, layers=(1, 1, 1, 1)),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=10),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=10),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "regnet": lambda: timm.create_model("regnetx_002", num_classes=10),
    "densenet": lambda: timm.create_model("densenet121", num_classes=10, block_config=(2, 2, 2, 2), growth_rate=8),
    "vgg": lambda: VGG([16, "M", 16, "M", 24, 24, "M", 32, 32, "M"], num_classes=10, mlp_ratio=0.01),  # without a cfg
}


@functools.cache
def network(family: str) -> nn.Module:
    """A static network in eval mode, every part of it at work. Not to be changed."""
    torch.manual_seed(0)
    model = NETWORKS[family]()
    for key, value in model.named_parameters():
        # A new network's branches can end in a scale of 0 or 1e-6, which would hide what is wrong in them.
        if value.ndim == 1:
            nn.init.normal_(value, std=0.1) if key.endswith("bias") else nn.init.uniform_(value, 0.5, 1.5)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, SIZE, SIZE) + 0.3)
    return model.eval()


def static_names(model: nn.Module) -> set[str]:
    """The convolutions that are not dynamic, nor a part of a layer that is."""
    dynamic = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, DropInConv2d))
    return {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and not n.startswith(dynamic)}


def dynamic_layers(model: nn.Module) -> dict[str, DropInConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DropInConv2d)}


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if FAMILIES[layer].keeps is None])
def test_outputs_of_layers_without_the_weights_stay_in_range(layer):
    """In evaluation, behind norms that know the static network: products of activations could overflow."""
    model = dynamize(timm.create_model("resnet18", zero_init_last=False).eval(), layer)
    assert model(torch.randn(2, 3, SIZE, SIZE)).abs().max() < 1e4


@pytest.mark.parametrize("layer", LAYERS)
def test_from_scratch(layer):
    torch.manual_seed(0)
    static = timm.create_model("test_resnet", num_classes=10)
    model = timm.create_model("dynamized", base="test_resnet", layer=layer, num_classes=10, from_scratch=True)
    assert not any(getattr(one, option, False) for one in dynamic_layers(model).values() for option in type(one).exact)
    exact = dynamize(static, layer)
    assert exact.state_dict().keys() == model.state_dict().keys()
    if layer not in ("ddf", "involution"):
        x = torch.randn(8, 3, SIZE, SIZE)
        spreads = [sum(timm_dynamic.inspect.routing_spread(one.eval(), x).values()) for one in (model, exact)]
        assert spreads[0] > 2 * spreads[1], spreads


# Each layer in a third of the networks, each network with a third of the layers; all in one without biases, one with.
PAIRS = [
    (layer, network)
    for i, layer in enumerate(LAYERS)
    for j, network in enumerate(NETWORKS)
    if network in ("resnet", "vgg") or (i + j) % 3 == 0
]


@pytest.mark.parametrize(("layer", "family"), [pair for pair in PAIRS if FAMILIES[pair[0]].keeps is not None])
def test_the_output_is_kept(family, layer):
    """In float64; faster ways to run a layer, in float32, are in two of the networks."""
    x, keeps = torch.randn(3, 3, SIZE, SIZE), FAMILIES[layer].keeps
    precisions = ((torch.float64, max(keeps, 1e-9)), (torch.float32, max(keeps, 1e-3)))
    for dtype, tolerance in precisions if family in ("resnet", "vgg") else precisions[:1]:
        static = copy.deepcopy(network(family)).to(dtype)
        model = dynamize(copy.deepcopy(static), layer)
        assert len(dynamic_layers(model)) >= (
            3 if (family, layer) == ("convnext", "fd") else 5
        )  # not the depthwise ones
        with torch.no_grad():
            expected, logits = static(x.to(dtype)), model(x.to(dtype))
        assert logits.dtype == dtype
        assert (logits - expected).abs().max() <= tolerance * expected.std()


@pytest.mark.parametrize(("layer", "family"), PAIRS)
def test_it_trains(family, layer):
    model = copy.deepcopy(network(family)).train()
    try:
        assert dynamize(model, layer) is model
    except ValueError as error:  # it is no general convolution
        assert re.search("cannot replace .*: .*(channels|groups)", str(error)) and FAMILIES[layer].keeps is None
        return
    model(torch.randn(2, 3, SIZE, SIZE)).square().mean().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), name
    terms = timm_dynamic.auxiliary_loss(model)
    assert len(terms) == len(dynamic_layers(model)) * len(FAMILIES[layer].terms)
    assert all(term > 0 for term in terms.values())


@pytest.mark.parametrize(
    ("family", "static"),
    [
        ("resnet", {"conv1.0", "layer2.0.downsample.1", "layer3.0.downsample.1", "layer4.0.downsample.1"}),
        ("mobilenetv3", {"conv_stem", "conv_head", "...se..."}),
        ("seresnet", {"conv1", "...downsample...", "...se..."}),
        ("resnext", {"stem.conv1.conv", "...shortcut..."}),
        ("regnet", {"stem.conv", "...downsample..."}),
        ("vgg", {"features.0", "pre_logits.fc1", "pre_logits.fc2"}),
        ("densenet", {"features.conv0"}),
        ("convnext", {"stem.0"}),
    ],
)
def test_default_choice(family, static):
    model = dynamize(copy.deepcopy(network(family)), "dy")
    parts = {name.strip(".") for name in static if name.startswith("...")}
    found = {next((f"...{p}..." for p in parts if p in name.split(".")), name) for name in static_names(model)}
    assert found == static


def test_default_choice_by_name():
    """Stems of several convolutions, classifiers that are one, attention under any name, and extractors."""
    with torch.device("meta"):
        mobileone = dynamize(timm.create_model("mobileone_s0"), "dy")
        dpn = dynamize(timm.create_model("dpn48b"), "dy")
        resnest = dynamize(timm.create_model("resnest14d"), "dy")
        coatnet = dynamize(timm.create_model("test_coatnet"), "dy")
        features = dynamize(timm.create_model("test_convnext", features_only=True), "dy")
    assert static_names(mobileone) == set(mobileone.pretrained_cfg["first_conv"])
    assert {"classifier"} <= static_names(dpn) and all(".c3x3_" not in name for name in static_names(dpn))
    assert "layer1.0.conv2.conv" in static_names(resnest) and "layer1.0.conv1" not in static_names(resnest)
    assert {part for name in static_names(coatnet) for part in name.split(".")[-2:-1]} == {
        "stem",
        "se",
        "shortcut",
        "attn",
    }
    assert static_names(features) == {"stem_0"}


def test_what_a_layer_cannot_replace_is_left_out_by_default():
    model = dynamize(timm.create_model("test_convnext"), "dcd")
    assert static_names(model) == {"stem.0", *(f"stages.{i}.downsample.1" for i in (1, 2, 3))}  # even kernels
    model = dynamize(timm.create_model("tf_mobilenetv3_small_minimal_100"), "ped")
    assert {type(model.get_submodule(name)).__name__ for name in static_names(model)} == {"Conv2d", "Conv2dSame"}
    assert isinstance(model.blocks[0][0].conv_pw, PEDConv2d)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("layer1.0.conv1", {"layer1.0.conv1"}),
        ("*.conv2", {f"layer{i}.0.conv2" for i in (1, 2, 3, 4)}),
        (["layer1.*", "conv1.0"], {"conv1.0", "layer1.0.conv1", "layer1.0.conv2"}),
        (
            lambda name, conv: "downsample" in name and conv.kernel_size == (1, 1),
            {f"layer{i}.0.downsample.1" for i in (2, 3, 4)},
        ),
    ],
)
def test_where(where, expected):
    model = network("resnet")
    model = dynamize(copy.deepcopy(model), DynamicConv2d, where, num_kernels=3)
    layers = dynamic_layers(model)
    assert layers.keys() == expected
    assert all(layer.num_kernels == 3 for layer in layers.values())


@pytest.mark.parametrize(
    ("layer", "where", "kwargs", "message"),
    [
        ("ddf", "layer2.0.conv*", {}, "cannot replace layer2.0.conv1: .* must equal in_channels"),
        ("ddf", lambda *_: True, {}, "conv1.0.*layer2.0.downsample.1"),
        ("dcd", ["layer1.*", "even"], {}, "cannot replace even: .*must be odd"),
        ("dy", "same", {}, "cannot replace same: .*Conv2dSame"),
        ("dy", "hooked", {}, "cannot replace hooked: it has hooks"),
        ("dy", "layer9.*", {}, "where='layer9.*' matches no convolution of conv1.0, "),
        ("dy", ["layer1.*", "fc"], {}, "where='fc' matches no convolution"),
        ("dy", [], {}, "where chooses none of the 18 convolutions of test_resnet"),
        ("dy", lambda *_: False, {}, "where chooses none"),
        ("dy", None, {"num_kernels": 0}, "conv1.3, conv1.6, .* and 8 others: num_kernels must be at least 1"),
        ("ODConv", None, {}, "got 'ODConv'; did you mean od"),
        ("dyn", None, {}, "layer must be one of 'cond', .* or .*, got 'dyn'; did you mean dy"),
        (nn.Conv2d, None, {}, "got <class 'torch.nn.modules.conv.Conv2d'>"),
    ],
)
def test_refusals_leave_the_model_as_it_was(layer, where, kwargs, message):
    model = copy.deepcopy(network("resnet"))
    model.even = nn.Conv2d(8, 8, 2)
    model.same = timm.layers.Conv2dSame(8, 8, 3)
    model.hooked = nn.Conv2d(8, 8, 3)
    model.hooked.register_forward_hook(print)
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=message) as error:
        dynamize(model, layer, where, **kwargs)
    assert "\n" not in str(error.value)
    assert list(model.named_modules()) == before


def test_nothing_to_replace():
    with pytest.raises(ValueError, match="by default, none of the 1 convolutions of test_vit is replaced"):
        dynamize(timm.create_model("test_vit"), "dy")
    with pytest.raises(ValueError, match="ScaledStdConv2d"):
        dynamize(timm.create_model("test_nfnet"), "dcd")


def test_dynamic_layers_are_not_replaced():
    model = dynamize(copy.deepcopy(network("resnet")), DDFPack)
    kept = dynamic_layers(model)
    dynamize(model, "dcd")
    layers = dynamic_layers(model)
    assert {type(layer) for layer in kept.values()} == {DDFConv2d}
    assert all(layers[name] is layer for name, layer in kept.items())
    assert {type(layers[name]) for name in layers.keys() - kept.keys()} == {DCDConv2d}
    with pytest.raises(ValueError, match="none of the 4 convolutions"):
        dynamize(model, "ped")


@pytest.mark.parametrize("layer", LAYERS)
def test_mask_units_are_not_replaced(layer):
    model = dynamize(timm.create_model("dynconv_resnet8"), layer).eval()
    for block in model.masked_blocks():
        assert type(block.masker.maskconv.conv) is nn.Conv2d
        assert isinstance(block.conv2, DropInConv2d)
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        expected, model.execution = model(x), "dense"
        torch.testing.assert_close(model(x), expected)


def test_blocks_that_timm_merges():
    """A dynamic layer's `weight` is not all of it."""
    model = timm.create_model("repvgg_a0")
    dynamic = dynamize(copy.deepcopy(model), "ped", where="stages.0.0.*")
    with pytest.raises(ValueError, match="reparameterize the model before"):
        reparameterize_model(dynamic)
    merged = reparameterize_model(model.eval()).double()
    with torch.no_grad():
        x = torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64)
        torch.testing.assert_close(dynamize(copy.deepcopy(merged), "ped")(x), merged(x))


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if FAMILIES[layer].keeps is not None])
def test_modules_that_ask_a_convolution_for_its_dtype(layer):
    model = dynamize(timm.create_model("edgenext_xx_small"), layer, where="*.token_projection")
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, SIZE, SIZE)).isfinite().all()


def test_a_convolution_in_two_places():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = dynamize(nn.Sequential(nn.Conv2d(3, 8, 3), conv, nn.Sequential(conv)), "dy")
    assert isinstance(model[1], DynamicConv2d) and model[2][0] is model[1]


def taken_over(layer: str) -> set[str]:
    """The parameters that depend on the convolution that is replaced."""
    states = []
    for value in (0.5, 1.0):
        conv = nn.Conv2d(8, 8, 3, padding=1)
        for parameter in conv.parameters():
            nn.init.constant_(parameter, value)
        torch.manual_seed(0)
        states.append(dict(FAMILIES[layer].layer.from_conv(conv).named_parameters()))
    return {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_like_what_they_replace(layer):
    def build(**kwargs):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, **kwargs))

    model = dynamize(build(dtype=torch.bfloat16, device="meta").eval(), layer)
    assert not model[1].training
    assert {(v.dtype, v.device.type) for v in model[1].parameters()} == {(torch.bfloat16, "meta")}

    frozen = dynamize(build().requires_grad_(False), layer)[1]
    assert frozen.training
    assert {name for name, value in frozen.named_parameters() if not value.requires_grad} == taken_over(layer)
    assert all(value.requires_grad for value in dynamize(build(), layer)[1].parameters())


def test_temperature_is_1_until_progress_is_set():
    model = dynamize(copy.deepcopy(network("resnet")), "dy")
    x = torch.randn(2, 3, SIZE, SIZE)
    model.train()(x)
    assert all(layer.temperature() == 1 for layer in dynamic_layers(model).values())
    timm_dynamic.set_progress(model, 0, 90)
    assert all(layer.temperature() == 30 for layer in dynamic_layers(model).values())


@pytest.mark.parametrize(("layer", "family"), in_turns(LAYERS, ["resnet", "convnext", "efficientnet"]))
def test_checkpoint(tmp_path, family, layer):
    model, x = dynamize(copy.deepcopy(network(family)), layer), torch.randn(2, 3, SIZE, SIZE)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    other = dynamize(NETWORKS[family](), layer)
    load_checkpoint(other, tmp_path / "a.pth")
    outputs = []
    for one in (other, model):
        torch.manual_seed(0)
        outputs.append(one.train()(x))  # in evaluation an involution's numbers grow beyond all bounds here
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
