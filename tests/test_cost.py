"""MACs against numbers worked out by hand. tests/models/test_dynconv_golden.py has those of the authors."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic
from timm_dynamic.cost import Macs, count_active, count_macs
from timm_dynamic.families import FAMILIES
from timm_dynamic.layers import DDFPack, MaskUnit
from timm_dynamic.ops import kernels

X = torch.randn(3, 8, 10, 7)


def test_it_is_public():
    assert timm_dynamic.count_macs is count_macs


@pytest.mark.parametrize(
    "layer, expected",
    [
        pytest.param(nn.Conv2d(8, 6, 3, padding=1), 6 * 10 * 7 * 8 * 9, id="plain"),
        pytest.param(nn.Conv2d(8, 6, 3, padding=1, groups=2), 6 * 10 * 7 * 4 * 9, id="grouped"),
        pytest.param(nn.Conv2d(8, 8, 5, padding=2, groups=8), 8 * 10 * 7 * 25, id="depthwise"),
        pytest.param(nn.Conv2d(8, 6, 3, padding=1, stride=2), 6 * 5 * 4 * 8 * 9, id="strided"),
        pytest.param(nn.Conv2d(8, 6, 3, dilation=2), 6 * 6 * 3 * 8 * 9, id="dilated"),
        pytest.param(nn.Conv2d(8, 6, (1, 3), bias=False), 6 * 10 * 5 * 8 * 3, id="oblong"),
        # every input position meets every weight of its group once
        pytest.param(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), 8 * 10 * 7 * 3 * 4, id="transposed"),
    ],
)
def test_convolutions(layer, expected):
    assert count_macs(layer, X) == Macs(static=expected, executed=expected, linear=0)


def test_functional_calls_count_and_linear_is_apart():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            x = F.conv2d(x, torch.ones(4, 8, 1, 1))
            x = self.fc(x.mean((2, 3)))
            return x @ torch.ones(5, 2)

    assert count_macs(Net(), X) == Macs(static=4 * 70 * 8, executed=4 * 70 * 8, linear=4 * 5 + 5 * 2)


@pytest.mark.parametrize("stride, outputs", [(1, 70), (2, 20)])
def test_ddf_counts_the_same_with_and_without_kernels(stride, outputs):
    layer = DDFPack(8, kernel_size=3, stride=stride, se_ratio=0.25)
    operator, spatial, channel = 9 * 8 * outputs, 8 * 9 * outputs, 8 * 2 + 2 * 8 * 9
    expected = operator + spatial + channel
    assert count_macs(layer, X) == Macs(expected, expected, 0)
    with timm_dynamic.use("formula"):
        assert count_macs(layer, X) == Macs(expected, expected, 0)


@pytest.mark.parametrize(
    "name, gmacs",
    [
        ("resnet50", 4.089),  # as torchvision lists it
        # The authors report 2.298; two for each output of a BatchNorm and one for each of a ReLU would add 0.032.
        ("ddf_mul_resnet50", 2.267),
    ],
)
def test_published_models(name, gmacs):
    with torch.device("meta"):
        model, x = timm.create_model(name), torch.empty(1, 3, 224, 224)
        macs = count_macs(model, x)
    assert macs.static == macs.executed
    assert macs.linear == 2048 * 1000
    assert (macs.executed + macs.linear) / 1e9 == pytest.approx(gmacs, abs=5e-4)


def test_counts_are_ints_per_image_in_inference_mode_too():
    model = timm.create_model("test_ddf_resnet")
    one = count_macs(model, torch.randn(1, 3, 64, 64))
    assert all(type(count) is int and count > 0 for count in one)
    assert count_macs(model, torch.randn(5, 3, 64, 64)) == one
    with torch.inference_mode():
        assert count_macs(model, torch.randn(2, 3, 64, 64)) == one


def test_the_model_is_left_as_it_was():
    model = timm.create_model("test_ddf_resnet").train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    torch.set_rng_state(random_state)
    count_macs(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and x.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    model(x).sum().backward()  # gradients still flow
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Dropout()).train()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.randn(1, 3, 10, 10))
    assert all(module.training for module in model.modules())


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"at least one image, got shape \[0, 8, 10, 7\]"):
        count_macs(nn.Conv2d(8, 6, 3), X[:0])


@torch.no_grad()
@pytest.mark.parametrize("name", [family.tiny for family in FAMILIES.values()])
def test_a_flop_counter_by_itself_sees_all(name, monkeypatch):
    model = timm.create_model(name).eval()
    x = torch.zeros(2, *model.pretrained_cfg["input_size"])
    totals = []
    for status in ("loaded", "not built"):
        monkeypatch.setitem(kernels._status, "cpu", status)
        with FlopCounterMode(display=False) as counter:
            model(x)
        totals.append(counter.get_total_flops())
    macs = count_macs(model, x)
    biases = sum(block.positions for block in _all_active(model, x).values())
    assert totals == [2 * 2 * (macs.static + macs.linear) - 2 * biases] * 2


def _all_active(model, x):
    with count_active(model) as active:
        model(x)
    return active.blocks


@pytest.mark.parametrize("batch", [1, 5])
def test_dcd_has_the_convolutions_of_its_twin_and_some_more(batch):
    x = torch.zeros(batch, 3, 64, 64)
    dynamic, static = (count_macs(timm.create_model(name), x) for name in ("dcd_mobilenetv2_035", "mobilenetv2_035"))
    assert static.static < dynamic.static < 1.4 * static.static and dynamic.linear > static.linear


def masked(name="dynconv_resnet8", **kwargs):
    """A model with random weights, and masks that are partly on."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for unit in model.modules():
        if isinstance(unit, MaskUnit):
            nn.init.zeros_(unit.maskconv.fc.weight)  # the mean would decide for the whole image
    return model


class TestMasks:
    @pytest.mark.parametrize("name", ["dynconv_resnet8", "dynconv_mobilenetv2_050"])
    def test_static_is_the_twin_and_the_mask_units(self, name):
        """Without masks there are no mask units; a full mask skips nothing, an empty one all of the branches."""
        x = torch.randn(2, 3, 33, 40)
        model, twin = masked(name), count_macs(timm.create_model(name, budget=-1), x)
        units = branches = 0
        with count_active(model) as active:
            static = count_macs(model, x).static
        for block, positions in zip(model.masked_blocks(), active.blocks.values(), strict=True):
            units += (9 * block.masker.in_channels + 1) * positions.positions // 2
            first, others = block.macs_per_position()
            branches += (first * positions.dilated_positions + others * positions.positions) // 2
        assert static == twin.static + units
        for bias, executed in ((1e9, static), (-1e9, static - branches)):
            for block in model.masked_blocks():
                nn.init.constant_(block.masker.maskconv.conv.bias, bias)
            assert count_macs(model, x) == Macs(static, executed, twin.linear + sum(_fc_macs(model)))

    def test_mean_of_a_batch(self):
        model, x = masked(), torch.randn(3, 3, 32, 32)
        single = [count_macs(model, image[None]).executed for image in x]
        assert len(set(single)) == 3
        assert count_macs(model, x).executed == round(sum(single) / 3)

    def test_without_values(self):
        with torch.device("meta"):
            model, x = timm.create_model("dynconv_resnet8"), torch.empty(2, 3, 32, 32)
        assert count_macs(model, x) == count_macs(masked(), torch.randn(1, 3, 32, 32))._replace(
            executed=count_macs(model, x).static
        )

    @pytest.mark.parametrize("execution", ["sparse", "dense"])
    def test_over_batches(self, execution):
        """Of different size; outputs and model stay as they were. Compiled: tests/cli/test_validate.py."""
        model, x = masked(), torch.randn(5, 3, 32, 32)
        static = count_macs(model, x).static
        single = [count_macs(model, image[None]).executed for image in x]
        model.execution = execution
        with torch.inference_mode():
            expected = model(x)
            with count_active(model) as active:
                assert (active.images, active.skipped_macs, active.share) == (0, 0, None)
                output = torch.cat([model(x[:3]), model(x[3:])])
        torch.testing.assert_close(output, expected)
        assert active.images == 5
        assert static - active.skipped_macs == pytest.approx(sum(single) / 5, rel=1e-12)
        with count_active(model) as nothing:
            for block in model.masked_blocks():
                nn.init.constant_(block.masker.maskconv.fc.bias, -1e9)
            model(x)
        assert nothing.share == 0
        assert active.share == pytest.approx(1 - active.skipped_macs / nothing.skipped_macs, rel=1e-12)
        assert list(active.blocks) == ["layer1.0", "layer2.0", "layer3.0"]
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_model_without_masks(self):
        with count_active(nn.Conv2d(8, 6, 3)) as active:
            pass
        assert (active.blocks, active.skipped_macs) == ({}, 0)


def _fc_macs(model):
    return (unit.maskconv.fc.weight.numel() for unit in model.modules() if isinstance(unit, MaskUnit))
