"""The record of attention and gates, and their entropy."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_dynamic
from timm_dynamic.families import FAMILIES
from timm_dynamic.inspect import ponder_cost, routing_entropy
from timm_dynamic.layers import DCDConv2d, DCDLinear, DDFConv2d, DynamicConv2d, MaskUnit, PEDConv2d
from timm_dynamic.ops import mixed_conv2d


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


LAYERS = tuple(family.layer for family in FAMILIES.values() if family.layer and family.routing)


def recorded(layer, *batches):
    with timm_dynamic.record(layer) as record:
        outputs = [layer(x) for x in batches]
    return record[""], torch.cat(outputs)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


class TestWhatTheLayersUsed:
    """What is recorded reproduces the layer's output."""

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_attention(self, training):
        layer, x = DynamicConv2d(8, 6, 3, bias=False).double().train(training), 9 * torch.randn(5, 8, 7, 7).double()
        timm_dynamic.set_progress(layer, 8, 10)  # a temperature of 4.2
        attention, output = recorded(layer, x[:2], x[2:])
        assert attention.shape == (5, 4) and not torch.allclose(attention, attention[:1])
        torch.testing.assert_close(mixed_conv2d(x, attention, layer.kernels_weights), output)

    @pytest.mark.parametrize("rank", [1, 2])
    def test_gates(self, rank):
        layer, x = PEDConv2d(8, 6, 3, groups=2, bias=False, rank=rank).double().eval(), torch.randn(5, 8, 7, 7).double()
        gates, output = recorded(layer, x)
        assert gates.shape == (5, (4 + 6 + 9) * rank)
        terms = []
        for term in gates.unflatten(1, (-1, rank)).unbind(2):
            a_in, a_out, a_tap = term.split((4, 6, 9), 1)
            terms.append(mixed_conv2d(x, None, layer.kernel[None], groups=2, a_in=a_in, a_tap=a_tap, a_out=a_out))
        torch.testing.assert_close(sum(terms), output)

    @pytest.mark.parametrize("size", [1, 16])
    def test_scale(self, size):
        layer, x = DCDConv2d(8, 6, 3, padding=1, pool_size=2).double().eval(), torch.randn(5, 8, size, size).double()
        nn.init.zeros_(layer.p.weight)
        scale, output = recorded(layer, x)
        assert scale.shape == (5, 6) and not torch.allclose(scale, scale[:1])
        torch.testing.assert_close(layer.conv(x) * scale[:, :, None, None], output)

    def test_scale_of_a_classifier(self):
        layer, x = DCDLinear(8, 6).eval(), torch.randn(5, 8)
        nn.init.zeros_(layer.p.weight)
        with timm_dynamic.record(layer) as record:
            output = layer(x=x)
        torch.testing.assert_close(layer.linear(x) * record[""], output)
        assert record.resolutions == {"": (1, 1)}

    @pytest.mark.parametrize("options", [{}, {"stride": 2}, {"kernel_size": 1}], ids=str)
    def test_mask(self, options):
        layer, x = MaskUnit(8, **options).eval(), torch.randn(5, 8, 9, 7)
        mask, output = recorded(layer, x[:2], x[2:])
        assert torch.equal(mask, output) and 0 < mask.mean() < 1

    @pytest.mark.parametrize("layer", LAYERS)
    def test_under_autocast(self, layer):
        layer, x = layer(8, 6, 3, padding=1).eval(), torch.randn(2, 8, 16, 16)
        expected, _ = recorded(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            routing, _ = recorded(layer, x)
        assert routing.dtype == torch.float32
        torch.testing.assert_close(routing, expected)


@pytest.mark.parametrize("name", [family.tiny for family in FAMILIES.values() if family.layer and family.routing])
def test_models(name):
    """Names, resolutions, all batches; the outputs and the model stay as they were."""
    model, batches = timm.create_model(name).eval(), (torch.randn(2, 3, 64, 64), torch.randn(1, 3, 64, 64))
    with torch.inference_mode():
        expected = [model(x) for x in batches]
        with timm_dynamic.record(model) as record:
            assert len(record) == 0
            assert torch.equal(model(batches[0]), expected[0])
            assert len(record["layer1.0.conv1"]) == 2
            assert torch.equal(model(batches[1]), expected[1])
        model(batches[0])
    assert hooks(model) == 0
    dynamic = {key for key, layer in model.named_modules() if isinstance(layer, LAYERS)}
    assert set(record) - {"fc"} == dynamic
    assert all(len(routing) == 3 and routing.device.type == "cpu" for routing in record.values())
    assert record.resolutions["layer2.0.conv1"] == (16, 16) and record.resolutions["layer2.0.conv2"] == (8, 8)


@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_models_with_masks(execution):
    model, x = timm.create_model("dynconv_resnet8").eval(), torch.randn(3, 3, 33, 24)
    model.execution = execution
    with torch.inference_mode():
        expected = model(x)
        with timm_dynamic.record(model) as record:
            assert torch.equal(model(x), expected)
    sizes = {name: tuple(mask.shape) for name, mask in record.items()}
    assert sizes == {
        "layer1.0.masker": (3, 1, 33, 24),
        "layer2.0.masker": (3, 1, 17, 12),
        "layer3.0.masker": (3, 1, 9, 6),
    }
    assert all(set(mask.unique().tolist()) <= {0, 1} for mask in record.values())


def test_both_kinds():
    model, x = timm.create_model("dynconv_resnet8").eval(), torch.randn(3, 3, 32, 32)
    timm_dynamic.dynamize(model, "dcd", where="conv1")
    with torch.inference_mode():
        model(x)
        with timm_dynamic.record(model) as record:
            model(x)
    assert [len(value) for value in record.values()] == [3] * 4 and "conv1" in record


def test_exceptions_and_nesting():
    layer, x = DynamicConv2d(8, 6, 3), torch.randn(2, 8, 7, 7)
    with timm_dynamic.record(layer) as outer:
        with pytest.raises(ValueError, match="x must be"), timm_dynamic.record(layer) as inner:
            layer(x)
            layer(x[0])
        layer(x)
    assert (len(inner[""]), len(outer[""])) == (2, 4)
    assert hooks(layer) == 0


def test_training_with_checkpointing_counts_once():
    model = timm.create_model("test_ped_resnet")
    model.set_grad_checkpointing()
    with timm_dynamic.record(model) as record:
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(len(routing) == 2 and not routing.requires_grad for routing in record.values())


COMPILED = """
import torch
import timm_dynamic
from timm_dynamic.layers import DynamicConv2d

layer, x = torch.nn.Sequential(DynamicConv2d(8, 6, 3)), torch.randn(2, 8, 7, 7)
compiled = torch.compile(layer, backend="eager", fullgraph=True)
expected = compiled(x)
with timm_dynamic.record(compiled) as record:
    torch.testing.assert_close(compiled(x), expected)
assert record["0"].shape == (2, 4)
with torch.compiler.set_stance("fail_on_recompile"):  # what was compiled still serves
    torch.testing.assert_close(compiled(x), expected)
assert len(record["0"]) == 2
"""


def test_compiled_models(processes, tmp_path):
    """In a process of its own: what other tests compiled before decides what is compiled again."""
    status, log = processes.run(folder=tmp_path, code=COMPILED)
    assert status == 0, log


@pytest.mark.parametrize("model", [nn.Conv2d(8, 8, 3), DDFConv2d(8, 8, 3, padding=1)], ids=["static", "DDF"])
def test_nothing_to_record(model):
    with pytest.raises(ValueError, match=f"no layer with attention, gates or masks in this {type(model).__name__}"):
        with timm_dynamic.record(model):
            raise AssertionError


class TestEntropy:
    def test_attention(self):
        attention = torch.tensor([[0.25] * 4, [0, 1, 0, 0], [0.5, 0.5, 0, 0]])
        entropy, highest = routing_entropy(DynamicConv2d(8, 6, 3), attention)
        torch.testing.assert_close(entropy, torch.tensor([math.log(4), 0, math.log(2)]))
        assert highest == math.log(4)

    def test_one_kernel(self):
        entropy, highest = routing_entropy(DynamicConv2d(8, 6, 3, num_kernels=1), torch.ones(2, 1))
        assert highest == 0 and torch.equal(entropy, torch.zeros(2))

    @pytest.mark.parametrize("layer, limit", [(PEDConv2d(8, 6, 3), 1), (DCDConv2d(8, 6, 1), 2), (DCDLinear(8, 6), 2)])
    def test_gates(self, layer, limit):
        gates = limit * torch.tensor([[0.5, 0.5], [0, 1], [0.5, 0], [0.1, 0.9]])
        entropy, highest = routing_entropy(layer, gates)
        binary = F.binary_cross_entropy(torch.tensor(0.1), torch.tensor(0.1)).item()
        torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0, math.log(2) / 2, binary]))
        assert highest == math.log(2)


class TestPonderCost:
    def test_by_hand(self):
        large = torch.tensor([[[[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]], [[[0.0] * 3] * 3]])
        small = torch.tensor([[[[1.0, 0], [0, 1]]], [[[0.0, 1], [0, 0]]]])
        cost = ponder_cost([large, small, torch.ones(2, 1, 1, 1)])
        # of two positions for three, the first stands for two
        assert cost.tolist() == [
            [[3, 2, 2], [2, 2, 1], [2, 2, 3]],
            [[1, 1, 2], [1, 1, 2], [1, 1, 1]],
        ]

    def test_no_masks(self):
        with pytest.raises(ValueError, match="at least one mask"):
            ponder_cost({}.values())
