"""The hourglass network for pose estimation: its maths, its sizes, and what it has of timm's contract."""

import copy
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sparse_blocks import optimized
from timm.models import model_entrypoint

import timm_dynamic
from timm_dynamic.card import model_card
from timm_dynamic.convert import convert, load_checkpoint
from timm_dynamic.layers import SparseBranch
from timm_dynamic.models.dynconv_hourglass import checkpoint_filter_fn

MODELS = timm.list_models("dynconv_hourglass*")
TINY = {"num_features": 12, "num_stacks": 2, "num_joints": 5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**kwargs):
    return timm.create_model("dynconv_hourglass", **{**TINY, **kwargs})


def image(height=64, width=64, batch=2):
    return torch.randn(batch, 3, height, width)


def authors_state(features, stacks, blocks, joints, masked):
    """Random weights, in float64, by the authors' names; masks are on at about half of all positions."""
    state = {}

    def conv(name, outputs, inputs, size=1, bias=True):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, size, size) / (inputs * size**2) ** 0.5
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(outputs)

    def norm(name, channels):
        for key, value in (("weight", 1 + 0.3 * torch.randn(channels)), ("bias", 0.3 * torch.randn(channels))):
            state[f"{name}.{key}"] = value
        state[f"{name}.running_mean"] = 0.3 * torch.randn(channels)
        state[f"{name}.running_var"] = 0.5 + torch.rand(channels)
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)

    def residual(name, inputs, outputs):
        for i, (out, into, size) in enumerate([(6 * inputs, inputs, 1), (6 * inputs, 1, 3), (outputs, 6 * inputs, 1)]):
            conv(f"{name}.conv.{3 * i}", out, into, size, bias=False)
            norm(f"{name}.conv.{3 * i + 1}", out)
        if masked and inputs == outputs:
            conv(f"{name}.masker.maskconv", 1, inputs)

    stem, channels = features // 4, 2 * (features // 2)
    conv("conv1", stem, 3, 7)
    norm("bn1", stem)
    for i, sizes in enumerate([(stem, 2 * stem), (2 * stem, 4 * stem), (4 * stem, channels)]):
        residual(f"layer{i + 1}.0", *sizes)
    for s in range(stacks):
        for level in range(4):
            for place in range(3 if level else 4):
                for k in range(blocks):
                    residual(f"hg.{s}.hg.{level}.{place}.{k}", channels, channels)
        for k in range(blocks):
            residual(f"res.{s}.{k}", channels, channels)
        conv(f"fc.{s}.0", channels, channels)
        norm(f"fc.{s}.1", channels)
        conv(f"score.{s}", joints, channels)
        if s < stacks - 1:
            conv(f"fc_.{s}", channels, channels)
            conv(f"score_.{s}", channels, joints)
    return {key: value.double() if value.is_floating_point() else value for key, value in state.items()}


class Plain:
    """The network by PyTorch's functions, from such weights; every branch at all positions."""

    def __init__(self, state, stacks, blocks):
        self.state, self.stacks, self.blocks = state, stacks, blocks

    def conv(self, x, name, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def norm(self, x, name):
        mean, variance, weight, bias = (
            self.state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    def residual(self, x, name):
        y = F.relu6(self.norm(self.conv(x, f"{name}.conv.0"), f"{name}.conv.1"))
        y = F.relu6(self.norm(self.conv(y, f"{name}.conv.3", padding=1, groups=y.shape[1]), f"{name}.conv.4"))
        y = self.norm(self.conv(y, f"{name}.conv.6"), f"{name}.conv.7")
        if f"{name}.masker.maskconv.weight" in self.state:
            y = y * (self.conv(x, f"{name}.masker.maskconv") >= 0)
        return x + y if x.shape == y.shape else y

    def residuals(self, x, name):
        for k in range(self.blocks):
            x = self.residual(x, f"{name}.{k}")
        return x

    def hourglass(self, x, stack, level):
        name = f"hg.{stack}.hg.{level}"
        skip, low = self.residuals(x, f"{name}.0"), self.residuals(F.max_pool2d(x, 2), f"{name}.1")
        low = self.hourglass(low, stack, level - 1) if level else self.residuals(low, f"{name}.3")
        return skip + self.residuals(low, f"{name}.2").repeat_interleave(2, 2).repeat_interleave(2, 3)

    def __call__(self, x):
        x = self.residual(self.norm(self.conv(x, "conv1", stride=2, padding=3), "bn1").relu(), "layer1.0")
        x = self.residual(self.residual(F.max_pool2d(x, 2), "layer2.0"), "layer3.0")
        maps = []
        for s in range(self.stacks):
            y = self.residuals(self.hourglass(x, s, 3), f"res.{s}")
            y = self.norm(self.conv(y, f"fc.{s}.0"), f"fc.{s}.1").relu()
            maps.append(self.conv(y, f"score.{s}"))
            if s < self.stacks - 1:
                x = x + self.conv(y, f"fc_.{s}") + self.conv(maps[-1], f"score_.{s}")
        return maps


class TestMaths:
    @pytest.mark.parametrize(
        ("features", "stacks", "blocks", "joints", "budget"),
        [(24, 2, 1, 16, 0.5), (24, 2, 1, 16, -1), (10, 1, 2, 3, 0.5), (7, 2, 1, 1, -1), (8, 1, 1, 4, 0)],
    )
    @torch.no_grad()
    def test_it_is_the_authors_network(self, tmp_path, features, stacks, blocks, joints, budget):
        """From a checkpoint as their scripts write it; in every way to run it, and optimized."""
        state = authors_state(features, stacks, blocks, joints, masked=budget >= 0)
        wrapped = {f"module.{key}": value for key, value in state.items()}
        content = {"epoch": 3, "model": "hourglass_mn", "state_dict": wrapped, "perf": 0.5, "optimizer": {}}
        torch.save(content, tmp_path / "checkpoint.pth")
        sizes = {"num_features": features, "num_stacks": stacks, "num_blocks": blocks, "num_joints": joints}
        model = timm.create_model("dynconv_hourglass", budget=budget, **sizes).double()
        load_checkpoint(model, tmp_path / "checkpoint.pth")
        x = image(64, 128).double()
        expected, model = Plain(state, stacks, blocks)(x), model.eval()
        for execution in ("dense", "sparse", "auto"):
            model.execution = execution
            torch.testing.assert_close(model.forward_stacks(x), expected)
            assert torch.equal(model(x), model.forward_stacks(x)[-1])
        fast = timm_dynamic.optimize(model, x, memory_format=torch.channels_last)
        torch.testing.assert_close(fast(x), expected[-1])
        masks = [mask.mean().item() for mask in recorded(model, x).values()] if budget >= 0 else []
        assert len(masks) == ((features % 4 == 0) + 14 * stacks * blocks) * (budget >= 0)
        assert budget < 0 or 0.2 < sum(masks) / len(masks) < 0.8  # else the test would show little
        fast = timm_dynamic.optimize(model.float(), x.float(), memory_format=torch.channels_last)
        close = {"rtol": 0, "atol": 1e-4 * expected[-1].std().item()}
        torch.testing.assert_close(fast(x.float()).double(), expected[-1], **close)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @torch.no_grad()
    def test_a_lone_block_whose_masks_are_empty(self, dtype):
        """In one sample, and in all; there the output is the input."""
        state, x = authors_state(12, 1, 1, 5, True), torch.randn(3, 12, 7, 9).double()
        state["res.0.0.masker.maskconv.bias"] = torch.tensor([-0.05]).double()
        x[1] = 0
        expected = Plain(state, 1, 1).residual(x, "res.0.0").to(dtype)
        model = tiny(num_stacks=1).double()
        model.load_state_dict(checkpoint_filter_fn(state, model))
        block, x = model.to(dtype).eval().stacks[0].res[0], x.to(dtype)
        assert torch.equal(expected[1], x[1]) and not torch.equal(expected, x)
        for form in (block, optimized(block)):
            for execution in ("sparse", "dense", "auto"):
                form.execution = execution
                torch.testing.assert_close(form(x), expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)
                assert torch.equal(form(x)[1], x[1]) and torch.equal(form(x[1:2]), x[1:2])

    def test_masks_are_in_the_order_in_which_blocks_run(self):
        model, order = tiny(num_blocks=2), []
        for name, block in model.named_modules():
            if isinstance(block, SparseBranch):
                block.masker.register_forward_hook(lambda *_, name=name: order.append(name))
        model(image())
        names = [name for name, block in model.named_modules() if isinstance(block, SparseBranch)]
        assert order == names and [block.number for block in model.masked_blocks()] == [*range(1, 58)]
        assert [block.closes for block in model.masked_blocks()].count(True) == 3

    @pytest.mark.parametrize("size", [(96, 64), (64, 100), (63, 64)])
    def test_other_sizes_are_refused(self, size):
        with pytest.raises(ValueError, match=f"sides that are multiples of 64, got {size[0]} x {size[1]}"):
            tiny().eval()(image(*size))


def recorded(model, x):
    with timm_dynamic.record(model) as masks:
        model(x)
    return masks


class TestSize:
    @pytest.mark.parametrize(
        ("kwargs", "parameters", "macs"),
        [
            ({}, 6_885_433, 747_419_584 + 6_157_430_784),
            ({"budget": -1}, 6_879_904, 6_899_691_520),
            ({"num_features": 12}, 158_587, 27_643_072 + 126_365_184),
            ({"num_features": 24, "budget": -1}, 516_256, 509_049_856),
            ({"num_features": 48, "budget": -1}, 1_834_960, 1_828_550_656),
            ({"num_stacks": 2}, 3_527_101, 566_390_000 + 3_315_820_000),
        ],
    )
    def test_parameters_and_macs(self, kwargs, parameters, macs):
        model = timm.create_model("dynconv_hourglass", device="meta", **kwargs)
        assert sum(p.numel() for p in model.parameters()) == parameters
        counted = timm_dynamic.count_macs(model, torch.empty(1, 3, 256, 256, device="meta"))
        assert counted == (macs, macs, 0) or kwargs == {"num_stacks": 2} and counted.static == pytest.approx(macs, 1e-5)

    def test_an_optimized_one_counts_the_same(self):
        model, x = tiny().eval(), image()
        assert timm_dynamic.count_macs(timm_dynamic.optimize(model, x), x) == timm_dynamic.count_macs(model, x)


class TestTraining:
    def test_every_parameter_and_recomputing(self):
        model, x, gradients = tiny(gumbel_noise=False).double(), image().double(), []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            maps = model(x)
            assert [one.shape for one in maps] == [(2, 5, 16, 16)] * 2
            sum(one.square().mean() for one in maps).backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            gradients.append([p.grad for p in model.parameters()])
            model.zero_grad()
        torch.testing.assert_close(*gradients)

    def test_noise_and_weight(self):
        """No noise from epoch 80 of 100 on; the loss has a hundredth of its weight, not ten times it."""
        model, x = tiny(aux_scale=0.0), image()
        noisy = {}
        for epoch in (79, 80):
            timm_dynamic.set_progress(model, epoch, 100)
            first, second = (model.train()(x)[-1] for _ in range(2))
            noisy[epoch] = not torch.equal(first, second)
        assert noisy == {79: True, 80: False}
        terms = {}
        for weight in (0.01, 1.0):
            other = tiny(budget_weight=weight, gumbel_noise=False)
            other.load_state_dict(model.state_dict())
            other.train()(x)
            terms[weight] = sum(timm_dynamic.auxiliary_loss(other).values()).item()
        assert terms[0.01] == pytest.approx(0.01 * terms[1.0], rel=1e-5) and terms[1.0] > 0


class TestContract:
    @pytest.mark.parametrize("name", MODELS)
    def test_registration(self, name):
        assert name in sys.modules[model_entrypoint(name).__module__].__all__
        for tag in timm.list_models(name, include_tags=True):
            assert timm.get_pretrained_cfg(tag).hf_hub_id == f"timm-dynamic/{tag}"
        model = timm.create_model(name, device="meta")
        cfg, state = model.default_cfg, model.state_dict()
        assert cfg["num_classes"] == model.num_classes == 16 and f"{cfg['first_conv']}.weight" in state
        assert all(f"{part}.weight" in state for part in cfg["classifier"]) and len(cfg["classifier"]) == 7

    def test_card(self):
        card = model_card(tiny(num_stacks=1), "someone/pose", tag="base_mpii")
        assert "pipeline_tag: keypoint-detection" in card and "softmax" not in card

    @torch.no_grad()
    def test_heads(self):
        model, x = tiny(num_joints=7).eval(), image()
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 16, 16) and model(x).shape == (2, 7, 16, 16)
        assert torch.equal(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True) is features
        model.reset_classifier(3)
        assert model(x).shape == (2, 3, 16, 16) and model.num_classes == model.get_classifier().out_channels == 3
        assert tiny(num_joints=None, num_classes=6)(x)[0].shape[1] == 6
        assert tiny(in_chans=1).eval()(x[:, :1]).isfinite().all() and model(x[:0]).shape == (0, 3, 16, 16)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"features_only": True}, "dynconv_hourglass has no features_only"),
            ({"num_joints": 5, "num_classes": 6}, "num_joints is 5 and num_classes, which is the same here, 6"),
            ({"num_joints": 0}, "num_joints must be at least 1, got 0"),
            ({"num_features": 3}, "num_features must be an integer and at least 4, got 3"),
            ({"num_stacks": 0}, "num_stacks must be at least 1, got 0"),
            ({"budget": 2}, "budget must be between 0 and 1, or -1"),
            ({"budget_weight": -1}, "budget_weight must be a finite number and not negative, got -1"),
            ({"aux_scale": float("inf")}, "aux_scale must be a finite number and not negative, got inf"),
        ],
    )
    def test_bad_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            tiny(**kwargs)

    def test_weights_without_some_blocks(self, tmp_path):
        """No such network can be made: the missing keys are named."""
        model = tiny()
        torch.save({key: v for key, v in model.state_dict().items() if ".res." not in key}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match="keys missing .stacks.0.res.0"):
            load_checkpoint(model, tmp_path / "weights.pth")

    def test_weights_of_another_network(self, tmp_path):
        """An error that says which; other joints are a new head."""
        torch.save(authors_state(16, 1, 2, 5, True), tmp_path / "weights.pth")
        message = "create it with num_features=16 num_stacks=1 num_blocks=2"
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tiny(), tmp_path / "weights.pth")
        model = tiny(num_features=16, num_stacks=1, num_blocks=2)
        convert(tmp_path / "weights.pth", tmp_path / "weights.safetensors", model)
        with pytest.raises(ValueError, match="create the model with num_classes=5"):
            load_checkpoint(tiny(num_features=16, num_stacks=1, num_blocks=2, num_joints=4), tmp_path / "weights.pth")

    @pytest.mark.parametrize("strange", ["hg.0.hg.4.0.", "hg.0.hg.0.4."])
    def test_weights_of_a_deeper_hourglass(self, tmp_path, strange):
        """None of them is taken for another one."""
        state = authors_state(12, 1, 1, 5, True)
        extra = {strange + key[12:]: value for key, value in state.items() if key.startswith("hg.0.hg.3.0.")}
        torch.save({**state, **extra}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=f"20 keys unexpected .{strange}0.conv_pw.weight"):
            load_checkpoint(tiny(num_stacks=1), tmp_path / "weights.pth")

    def test_pretrained_with_other_joints(self, tmp_path):
        saved = tiny(num_joints=16).state_dict()
        save_file(saved, tmp_path / "model.safetensors")
        overlay = {"file": str(tmp_path / "model.safetensors")}
        model = tiny(pretrained=True, pretrained_cfg_overlay=overlay, num_joints=3)
        other = [key for key, value in model.state_dict().items() if not torch.equal(value, saved.get(key, value))]
        assert {key.split(".")[2] for key in other} == {"score", "merge_scores"}

    @torch.no_grad()
    def test_uses(self):
        """Copying, TorchScript, tracing for export, torch.compile."""
        model, x = tiny().eval(), image()
        expected = model(x)
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(copy.deepcopy(model)(x), expected)
        torch.testing.assert_close(torch.jit.script(model)(x), expected, **close)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(x[:1]), model(x[:1]), **close)
