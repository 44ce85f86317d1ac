"""DY networks: the authors' numbers, and what is theirs beyond what every model can do."""

import copy

import pytest
import timm
import torch
from torch import nn

import timm_dynamic
from timm_dynamic.families import FAMILIES, static_twin
from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.models import dy_mobilenetv2, dy_mobilenetv3, dy_resnet

TINY = "test_dy_resnet"
FILES = {"dy_resnet18": dy_resnet, "dy_mobilenetv2": dy_mobilenetv2, "dy_mobilenetv3": dy_mobilenetv3}
LIST = [2, 2, 2, 3, 2, 3, 6, 3, 6, 9, 6]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def dynamic(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv2d)}


def parameters(name, **kwargs):
    model = timm.create_model(name, device="meta", **kwargs)
    return sum(p.numel() for p in model.parameters()) / 1e6


class TestArchitecture:
    @pytest.mark.parametrize("name", FAMILIES["dy"].twins)
    def test_every_convolution_but_the_first_and_squeeze_excitation(self, name):
        model = timm.create_model(name, device="meta")
        twin = timm.create_model(static_twin(name), device="meta")
        convs = {name: module for name, module in twin.named_modules() if isinstance(module, nn.Conv2d)}
        first, *others = convs
        expected = [name for name in others if ".se." not in name]
        assert list(dynamic(model)) == expected and first not in expected
        for name, layer in dynamic(model).items():
            for attribute in nn.Conv2d.__constants__:
                assert getattr(layer, attribute) == getattr(convs[name], attribute)
            assert (layer.num_kernels, layer.attention.to_scores[0].out_features) == (4, layer.in_channels // 4)
        static = {
            key: value.shape for key, value in twin.state_dict().items() if key.rpartition(".")[0] not in expected
        }
        own = {k: v.shape for k, v in model.state_dict().items() if not any(k.startswith(f"{n}.") for n in expected)}
        assert own == {**static, "progress.done": torch.Size([])}

    @pytest.mark.parametrize(
        ("name", "kwargs", "millions"),
        [
            ("dy_resnet10", {"num_classes": 10, "small_stem": True}, 19.71),
            ("dy_resnet10", {"num_classes": 200, "small_stem": True}, 19.80),
            ("dy_resnet10", {"num_classes": 200, "small_stem": True, "width_multiplier": 0.5}, 4.97),
            ("dy_resnet10", {"num_classes": 200, "small_stem": True, "width_multiplier": 0.25}, 1.25),
            ("dy_mobilenetv2", {"num_classes": 10}, 11.14),
            ("dy_mobilenetv2_035", {"num_classes": 200}, 2.09),
        ],
    )
    def test_published_numbers_of_parameters(self, name, kwargs, millions):
        assert parameters(name, **kwargs) == pytest.approx(millions, abs=0.01)

    def test_macs(self):
        """The paper has 312.9 million, 12.9 more than for the static network, for 224 pixels."""
        model = timm.create_model("dy_mobilenetv2", device="meta")
        macs = timm_dynamic.count_macs(model, torch.empty(1, 3, 224, 224, device="meta"))
        assert (macs.static + macs.linear) / 1e6 == pytest.approx(312.9, rel=0.01)

    def test_mobilenetv3_head_is_dynamic(self):
        layer = timm.create_model("dy_mobilenetv3", device="meta").conv_head
        assert isinstance(layer, DynamicConv2d) and layer.kernels_bias.shape == (4, 1280)

    def test_one_number_of_kernels_for_each_convolution(self):
        kwargs = {"small_stem": True, "width_multiplier": 0.25}
        model = timm.create_model("dy_resnet10", num_kernels=LIST, **kwargs)
        numbers = {name: layer.num_kernels for name, layer in dynamic(model).items()}
        assert list(numbers.values()) == LIST
        assert (numbers["layer2.0.conv1"], numbers["layer2.0.downsample.0"], numbers["layer4.0.conv2"]) == (2, 2, 9)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1000)

    @pytest.mark.parametrize("depth", [10, 18, 50])
    def test_small_stem(self, depth):
        model = timm.create_model(f"dy_resnet{depth}", small_stem=True, device="meta")
        assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
        assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4, 8]
        assert model.forward_features(torch.empty(1, 3, 32, 32, device="meta")).shape[2:] == (4, 4)

    def test_width_multiplier(self):
        model = timm.create_model("dy_resnet18", width_multiplier=0.25, device="meta")
        assert [info["num_chs"] for info in model.feature_info] == [16, 16, 32, 64, 128]
        assert model.layer1[0].downsample is None and (model.conv1.kernel_size, model.conv1.stride) == ((7, 7), (2, 2))
        assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)

    def test_the_tiny_model_is_tiny(self):
        assert parameters(TINY) < 0.5

    @pytest.mark.parametrize("name", ["dy_mobilenetv2_035", "dy_mobilenetv3_small_025", "dy_resnet10"])
    def test_kernels_are_initialised_as_timm_does(self, name):
        model = timm.create_model(name)
        for layer in dynamic(model).values():
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2 // layer.groups
            if layer.kernels_weights[0].numel() > 1000:
                for kernel in layer.kernels_weights:
                    assert kernel.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"num_kernels": [4, 4]}, "num_kernels must have a number for each of 11 convolutions, got 2"),
            ({"num_kernels": 0}, "num_kernels must be at least 1, got 0"),
            ({"anneal_steps": 0}, "anneal_steps must be at least 1, got 0"),
            ({"width_multiplier": 0.01}, "width_multiplier is too small.*0.01"),
            ({"cardinality": 2}, "a basic block has cardinality 1.*2"),
        ],
        ids=str,
    )
    def test_options_it_cannot_have(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            timm.create_model("dy_resnet10", **kwargs)

    @pytest.mark.parametrize(
        "kwargs", [{"cardinality": 4, "base_width": 16}, {"block_args": {"attn_layer": "se"}}], ids=str
    )
    def test_options_of_timms_resnet(self, kwargs):
        model = timm.create_model("dy_resnet50", layers=(1, 1, 1, 1), width_multiplier=0.25, small_stem=True, **kwargs)
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert not any(".se." in name for name in dynamic(model))


class TestAnnealing:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def temperatures(self, model):
        return {float(layer.temperature()) for layer in dynamic(model).values()}

    def test_not_unless_asked_for(self):
        model = timm.create_model(TINY).train()
        for _ in range(2):
            model(self.x)
        assert self.temperatures(model) == {1.0}

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_by_training_forwards(self, checkpointing):
        model = timm.create_model(TINY, anneal_steps=4).train()
        model.set_grad_checkpointing(checkpointing)
        for done in range(6):
            assert self.temperatures(model.eval()) == {max(1.0, 30 - 29 * done / 4)}
            model(self.x)
            model.train()(self.x).sum().backward()

    @pytest.mark.parametrize("feature_cls", ["list", "getter"])
    def test_in_a_feature_extractor(self, feature_cls):
        model = timm.create_model(TINY, anneal_steps=4, features_only=True, feature_cls=feature_cls).train()
        for _ in range(2):
            model(self.x)
        assert self.temperatures(model.eval()) == {15.5}

    def test_resuming_continues_it(self):
        model = timm.create_model(TINY, anneal_steps=4).train()
        model(self.x)
        other = timm.create_model(TINY, anneal_steps=4).eval()
        other.load_state_dict(model.state_dict())
        averaged = copy.deepcopy(other)
        assert self.temperatures(other) == self.temperatures(averaged) == {30 - 29 / 4}
        assert torch.equal(other(self.x), model.eval()(self.x))

    def test_progress_goes_before(self):
        model = timm.create_model(TINY, anneal_steps=4)
        timm_dynamic.set_progress(model, 9, 10)
        assert self.temperatures(model.eval()) == {1.0}


class TestCheckpointFilter:
    @pytest.mark.parametrize(("name", "file"), FILES.items())
    def test_native_keys_return_at_once(self, name, file):
        model = timm.create_model(name, device="meta")
        state = model.state_dict()
        assert file.checkpoint_filter_fn(state, model) is state

    def test_foreign_keys_are_left_to_strict_loading(self):
        for name, file in FILES.items():
            model = timm.create_model(name, device="meta")
            foreign = {"features.99.conv.0.weight": torch.ones(1), "features.2.conv.5.weight": torch.ones(1)}
            assert foreign.keys() <= file.checkpoint_filter_fn(foreign, model).keys()
