"""DynConv networks: the authors' numbers, and what is theirs beyond what every model can do."""

import copy
import gc
import warnings
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_dynamic import auxiliary_loss, set_progress
from timm_dynamic.convert import convert, load_checkpoint
from timm_dynamic.layers import CountingConv2d, MaskUnit, SparseStage
from timm_dynamic.models import static_twin
from timm_dynamic.models.dynconv_mobilenetv2 import SparseInvertedResidual
from timm_dynamic.models.dynconv_resnet import SparseBottleneck, checkpoint_filter_fn

# Small networks of every kind of block: model, its arguments, size of its images.
SMALL = {
    "basic": ("dynconv_resnet8", {}, 32),
    "bottleneck": ("dynconv_resnet50", {"layers": (1, 2, 1, 1), "channels": (8, 12, 16, 24), "num_classes": 10}, 64),
    "inverted": ("dynconv_mobilenetv2_050", {"num_classes": 10}, 64),
}
every_kind = pytest.mark.parametrize("kind", SMALL)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def image(kind="basic", batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, SMALL[kind][2], SMALL[kind][2], dtype=dtype)


def build(kind="basic", **kwargs):
    """In float64 and in eval mode, its norms not as new."""
    name, options, _ = SMALL[kind]
    model = timm.create_model(name, **{**options, **kwargs}).double()
    with torch.no_grad():
        for _ in range(3):
            model(image(kind, 4))
    for module in model.modules():
        if isinstance(module, CountingConv2d):
            module.step.zero_()
    return model.eval()


@torch.no_grad()
def run(model, x, execution):
    model.execution = execution
    return model(x)


def assert_same_in_all_executions(model, x, **close):
    before, expected = x.clone(), run(model, x, "dense")
    for execution in ("sparse", "auto"):
        torch.testing.assert_close(run(model, x, execution), expected, **close)
    assert torch.equal(x, before)
    return expected


def observe(model):
    """For every block of a forward to come, in the order of execution: active positions of both masks, by sample."""
    counts = []
    for block in model.masked_blocks():
        block.masker.register_forward_hook(
            lambda _, args, mask, block=block: counts.append(
                [m.detach().sum((1, 2, 3)).int().tolist() for m in (mask, block.dilated(mask, *args))]
            )
        )
    return counts


@pytest.fixture(scope="module", params=["dynconv_resnet32", "dynconv_resnet101"])
def case(request, golden):
    return golden(request.param)


@pytest.fixture(scope="module")
def converted(case, tmp_path_factory):
    """From a file as the authors' scripts write it."""
    folder = tmp_path_factory.mktemp("authors")
    saved = {"state_dict": case.state(), "optimizer": {}, "epoch": 1, "best_prec1": 70.0}
    torch.save(saved, folder / "checkpoint.pth")
    model = timm.create_model(case.case["case"])
    convert(folder / "checkpoint.pth", folder / "ours.safetensors", model)
    return folder / "ours.safetensors"


class TestGolden:
    """Parameters, masks, outputs, loss terms and every gradient of the authors' code."""

    @pytest.fixture
    def model(self, case, converted):
        model = timm.create_model(case.case["case"], gumbel_noise=False)
        load_checkpoint(model, converted)
        return model

    def test_parameters_and_their_names(self, case, model):
        assert sum(p.numel() for p in model.parameters()) == case.case["num_params"]
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == {
            key: shape for key, (shape, _) in case.rows.items()
        }

    @pytest.mark.parametrize("execution", ["dense", "sparse", "auto"])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-4)], ids=str)
    def test_evaluation(self, case, model, dtype, tolerance, execution):
        model, x, expected = model.to(dtype).eval(), case.input().to(dtype), case.case["eval"]
        counts = observe(model)
        output = run(model, x, execution).double()
        for sample, numbers in zip(output, expected["logits"], strict=True):
            numbers = torch.tensor(numbers, dtype=torch.float64)
            close = {"rtol": 0, "atol": tolerance * expected["std"]}
            torch.testing.assert_close(sample[: len(numbers)], numbers, **close)
        assert counts == [[masks["hard_active"], masks["dilated_active"]] for masks in expected["masks"]]

    def test_training(self, case, model):
        train = case.case["train"]
        schedule, terms = train["dynconv"], train["loss_terms"]
        set_progress(model.double().train(), schedule["epoch"], schedule["num_epochs"])
        counts = observe(model)
        output = model(case.input("train").double())
        assert counts == [[masks["hard_active"], masks["dilated_active"]] for masks in train["masks"]]
        task_loss = F.cross_entropy(output, torch.tensor(train["targets"]))
        assert task_loss.item() == pytest.approx(terms["task"], rel=1e-6)
        weight = terms["sparsity_weight"]
        assert {name: term.item() for name, term in auxiliary_loss(model).items()} == {
            "network_budget": pytest.approx(weight * terms["loss_sp_network"], rel=1e-6),
            "block_budget": pytest.approx(weight * terms["loss_sp_block"], rel=1e-6),
        }
        task_loss.backward()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        assert norms.keys() == train["grad_norms"].keys()
        zero = 1e-9 * max(train["grad_norms"].values())
        for name, expected in train["grad_norms"].items():
            assert norms[name] == pytest.approx(expected, rel=1e-6, abs=zero if expected == 0 else 0), name

    def test_macs_per_position(self, case, model):
        ours = [list(block.macs_per_position()) for block in model.masked_blocks()]
        masks = [mask["flops_per_position"] for mask in case.case["eval"]["masks"]]
        assert ours == [[mask["dilated"], mask["hard"]] for mask in masks]


class TestArchitecture:
    @pytest.mark.parametrize("name", timm.list_models("dynconv_*"))
    def test_parameters_are_the_static_networks_and_the_mask_units(self, name):
        model, static = (timm.create_model(name, device="meta", budget=budget) for budget in (0.5, -1))
        state, static_state = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, static))
        assert {key: shape for key, shape in state.items() if ".masker." not in key} == static_state
        units = sum(10 * block.masker.in_channels + 2 for block in model.masked_blocks())
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in static.parameters()) + units
        if model.default_cfg["input_size"][1] == 32:
            depth = (int(name.removeprefix("dynconv_resnet")) - 2) // 6
            expected = 464 + depth * 4672 + 14528 + (depth - 1) * 18560 + 57728 + (depth - 1) * 73984 + 650
            assert sum(p.numel() for p in static.parameters()) == expected
        else:
            twin = timm.create_model(static_twin(name), device="meta").state_dict()
            assert static_state == {key: value.shape for key, value in twin.items()}

    def test_which_blocks_have_masks(self):
        model = timm.create_model("dynconv_resnet50", device="meta")
        assert [type(block) for block in model.masked_blocks()] == [SparseBottleneck] * 16
        assert [block.masker.stride for block in model.masked_blocks()] == [1] * 3 + [2, 1, 1, 1] + [2] + [1] * 5 + [
            2,
            1,
            1,
        ]
        model = timm.create_model("dynconv_mobilenetv2", device="meta")
        shortcuts = [name for name, block in model.named_modules() if getattr(block, "has_skip", False)]
        masked = [name for name, block in model.named_modules() if isinstance(block, SparseInvertedResidual)]
        assert masked == shortcuts and len(masked) == 10

    def test_initialisation(self):
        """He's by fan-out, none zero; of mask units, PyTorch's."""
        model = timm.create_model("dynconv_resnet32")
        block = model.layer3[2]
        assert block.conv2.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
        assert model.conv1.weight.std().item() == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.15)
        assert (block.bn2.weight == 1).all()
        for masked in model.masked_blocks():
            for layer, inputs in ((masked.masker.maskconv.conv, 9), (masked.masker.maskconv.fc, 1)):
                bound = (inputs * masked.masker.in_channels) ** -0.5
                assert 0.7 * bound < layer.weight.abs().max() <= bound

    def test_temperatures(self):
        for name, temperatures in (("dynconv_resnet8", (1.0,)), ("dynconv_resnet18", (5.0, 2.5, 1.0))):
            for block in timm.create_model(name, device="meta").masked_blocks():
                assert block.masker.temperatures == temperatures

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"small_stem": True},
            {"stem_type": "deep", "stem_width": 8},
            {"avg_down": True},
            {"output_stride": 8},
            {"block_reduce_first": 2},
            {"drop_path_rate": 0.2, "drop_block_rate": 0.1},
            {"act_layer": "silu"},
            {"down_kernel_size": 3},
            {"block_args": {"temperature": 2.0}, "total_steps": 7},
        ],
        ids=lambda kwargs: next(iter(kwargs)),
    )
    def test_options_of_timms_resnet(self, kwargs):
        model, x = build("bottleneck", **kwargs), image("bottleneck")
        assert_same_in_all_executions(model, x)
        model.train()(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    @pytest.mark.parametrize("name", ["dynconv_resnet8", "dynconv_resnet18", "dynconv_mobilenetv2"])
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"budget": 1.5}, "budget must be between 0 and 1, or -1 .*, got 1.5"),
            ({"budget": -0.5}, "budget must be between 0 and 1"),
            ({"budget": float("nan")}, "budget must be between 0 and 1"),
            ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
            ({"aux_scale": -1}, "aux_scale must be a number and not negative, got -1"),
            ({"aux_scale": float("nan")}, "aux_scale must be a number and not negative, got nan"),
            ({"temperature": 0}, "temperature must be positive"),
            ({"temperature": (1.0, 2.0)}, "temperature must be positive, one number or three"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_bad_arguments(self, name, kwargs, message):
        with pytest.raises(ValueError, match=message):
            timm.create_model(name, device="meta", **kwargs)

    @pytest.mark.parametrize(
        ("name", "kwargs", "message"),
        [
            ("dynconv_resnet18", {"cardinality": 2}, "cardinality 1 and base_width 64, got 2 and 64"),
            ("dynconv_resnet50", {"cardinality": 32}, "cardinality must be 1, got 32"),
            ("dynconv_resnet50", {"block_args": {"attn_layer": "se"}}, "takes no attn_layer, got"),
            ("dynconv_resnet18", {"aa_layer": nn.AvgPool2d}, "takes no aa_layer, got"),
        ],
    )
    def test_what_blocks_cannot_be(self, name, kwargs, message):
        with pytest.raises(ValueError, match=message):
            timm.create_model(name, device="meta", **kwargs)


class TestStatic:
    @every_kind
    def test_no_masks(self, kind):
        model, x = build(kind, budget=-1), image(kind)
        assert not any(isinstance(module, (MaskUnit, SparseStage)) for module in model.modules())
        assert auxiliary_loss(model) == {} and model.masked_blocks() == []
        assert_same_in_all_executions(model, x)
        model.train()(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    @every_kind
    @pytest.mark.parametrize("wrapper", [None, "state_dict"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_weights_go_both_ways(self, kind, wrapper, prefix):
        masked, static = build(kind), build(kind, budget=-1)

        def load(source, target):
            saved = {prefix + key: value for key, value in source.state_dict().items()}
            own = {key: value.clone() for key, value in target.state_dict().items()}
            state = checkpoint_filter_fn({wrapper: saved, "epoch": 3} if wrapper else saved, target)
            target.load_state_dict(state)
            return own

        units = {key for key in masked.state_dict() if ".masker." in key}
        own = load(static, masked)
        state, static_state = masked.state_dict(), static.state_dict()
        assert all(torch.equal(state[key], own[key] if key in units else static_state[key]) for key in state)

        other = build(kind)
        load(other, static)
        other, static = other.state_dict(), static.state_dict()
        assert all(torch.equal(static[key], other[key]) for key in static) and other.keys() - static.keys() == units

    def test_some_mask_units_are_not_enough(self):
        model = build()
        state = model.state_dict()
        del state["layer2.0.masker.maskconv.fc.bias"]
        with pytest.raises(RuntimeError, match="layer2.0.masker.maskconv.fc.bias"):
            model.load_state_dict(checkpoint_filter_fn(state, model))

    def test_native_keys_return_at_once(self):
        for kwargs in ({}, {"budget": -1}, {"total_steps": 5}):
            model = build(**kwargs)
            state = model.state_dict()
            assert checkpoint_filter_fn(state, model) is state


@every_kind
class TestExecution:
    def test_results_are_the_same(self, kind):
        model, x = build(kind), image(kind, 3)
        y = assert_same_in_all_executions(model, x)
        for other in (x[..., 5:, 3:], x[:0], x.to(memory_format=torch.channels_last), x[..., :1, :1]):
            assert_same_in_all_executions(model, other)
        torch.testing.assert_close(torch.cat([run(model, one, "sparse") for one in x.split(1)]), y)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(assert_same_in_all_executions(model, x), y)
        assert_same_in_all_executions(model.float(), x.float(), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("bias", [-1e9, 1e9])
    def test_nothing_or_everything_is_active(self, kind, bias):
        model = build(kind)
        for block in model.masked_blocks():
            nn.init.constant_(block.masker.maskconv.conv.bias, bias)
        assert_same_in_all_executions(model, image(kind))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @torch.no_grad()
    def test_half_precision(self, kind, dtype):
        model, x = build(kind).float(), image(kind).float()
        for execution in ("dense", "sparse"):
            with torch.autocast("cpu", dtype):
                assert run(model, x, execution).isfinite().all()
        output = run(model.to(dtype), x.to(dtype), "sparse")
        assert output.dtype == dtype and output.isfinite().all()

    def test_what_happens_to_the_model_is_seen(self, kind):
        model, x = build(kind), image(kind)
        run(model, x, "sparse")
        model.reset_classifier(5)
        model.double()
        assert assert_same_in_all_executions(model, x).shape == (2, 5)
        head = model.get_classifier()
        head.weight = nn.Parameter(2 * head.weight.detach())
        assert_same_in_all_executions(model, x)
        model.bn1.train()
        assert_same_in_all_executions(model, x)
        model.bn1.eval()
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
        assert_same_in_all_executions(model, x)
        model.load_state_dict(build(kind, num_classes=5).state_dict())
        assert_same_in_all_executions(model, x)
        model.train()(x).square().mean().backward()
        torch.optim.SGD(model.parameters(), 0.01).step()
        assert_same_in_all_executions(model.eval(), x)

    def test_hooks_are_called(self, kind):
        model, x, calls = build(kind), image(kind), []
        run(model, x, "sparse")
        block, features = model.masked_blocks()[1], model.blocks if kind == "inverted" else model.layer2
        for module in (features, features[0], model.bn1, model.get_classifier(), block, block.masker, block.bn2):
            module.register_forward_hook(lambda module, *args: calls.append(module))
        for execution in ("dense", "sparse", "auto"):
            calls.clear()
            run(model, x, execution)
            assert len(calls) == 7

    def test_features(self, kind):
        model, x = build(kind), image(kind)
        with torch.no_grad():
            expected = model.forward_intermediates(x, intermediates_only=True)
            model.execution = "dense"
            torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True), expected)

    def test_copies(self, kind):
        model, x = build(kind), image(kind)
        expected = run(model, x, "sparse")
        other = copy.deepcopy(model)
        assert other.execution == "sparse" and torch.equal(run(other, x, "sparse"), expected)
        nn.init.normal_(other.masked_blocks()[0].steps()[0][0].weight)
        assert not torch.allclose(run(other, x, "sparse"), expected)
        assert torch.equal(run(model, x, "sparse"), expected)
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None

    def test_setting(self, kind):
        model = build(kind)
        assert model.execution == "auto"
        for value in ("fast", "", None, "SPARSE"):
            with pytest.raises(ValueError, match="execution must be one of auto, sparse, dense, got"):
                model.execution = value
        assert {block.execution for block in model.masked_blocks()} == {"auto"}


def gradients(model, x, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(x)
    output.square().mean().backward()
    own = getattr(model, "_orig_mod", model)
    return {name: p.grad.clone() for name, p in own.named_parameters()}, auxiliary_loss(own)


@every_kind
class TestTraining:
    def test_budget_loss_is_attached(self, kind):
        """Against the loss written out, with the costs that the blocks report."""
        model, x = build(kind, budget=0.3, gumbel_noise=False).train(), image(kind)
        set_progress(model, 0.11, 1)  # a third of the annealing: q = cos(pi/6)^2 = 3/4
        own, terms = gradients(model, x)
        costs, model.aux_scale = [], 0.0
        for block in model.masked_blocks():
            block.masker.register_forward_hook(lambda _, args, mask, block=block: costs.append(block.cost(mask, *args)))
        model.zero_grad()
        task_loss = model(x).square().mean()
        executed, total = (torch.stack(column) for column in zip(*costs, strict=True))
        network = 10 * (executed.sum() / total.sum() - 0.3) ** 2
        p, upper, lower = executed / total, 1 - 0.75 * 0.7, 0.75 * 0.3
        blocks = 10 * (F.relu(p - upper) ** 2 + F.relu(lower - p) ** 2).mean()
        torch.testing.assert_close(terms, {"network_budget": network.detach(), "block_budget": blocks.detach()})
        (task_loss + network + blocks).backward()
        torch.testing.assert_close(own, {name: param.grad for name, param in model.named_parameters()})

    def test_aux_scale(self, kind):
        models = [build(kind, gumbel_noise=False, aux_scale=scale).train() for scale in (0.0, 0.5, 1.0)]
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())
        (none, half, whole), x = models, image(kind)
        none, half, whole = (gradients(model, x)[0] for model in models)
        torch.testing.assert_close(
            {name: whole[name] - none[name] for name in whole}, {name: 2 * (half[name] - none[name]) for name in whole}
        )
        stem = "conv_stem.weight" if kind == "inverted" else "conv1.weight"
        assert not torch.allclose(whole[stem], none[stem])

    def test_checkpointing_changes_nothing(self, kind):
        """The noise in recomputation and the gradient of the budget included."""
        model, x = build(kind).train(), image(kind)
        other = copy.deepcopy(model)
        other.set_grad_checkpointing()
        torch.testing.assert_close(gradients(other, x), gradients(model, x))

    def test_terms(self, kind):
        model, x = timm.create_model(SMALL[kind][0], **SMALL[kind][1]).double(), image(kind)
        zero = {"network_budget": torch.tensor(0.0).double(), "block_budget": torch.tensor(0.0).double()}
        torch.testing.assert_close(auxiliary_loss(model), zero)
        model.eval()(x)
        torch.testing.assert_close(auxiliary_loss(model), zero)
        output = model.train()(x)
        terms = auxiliary_loss(model)
        assert all(term > 0 and not term.requires_grad for term in terms.values())
        other = copy.deepcopy(model)  # before the backward pass
        torch.testing.assert_close(auxiliary_loss(other), terms)
        assert not terms.keys() & model.state_dict().keys()
        output.sum().backward()

    def test_features_train_without_a_budget(self, kind):
        name, options, _ = SMALL[kind]
        model = timm.create_model(name, **options, features_only=True, out_indices=(1, 2)).double()
        for _ in range(2):
            sum(feature.square().mean() for feature in model(image(kind))).backward()
        assert all(p.grad is not None for p in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.filterwarnings("ignore:timm_dynamic. in float16")
    def test_autocast(self, kind, dtype):
        model = build(kind).float().train()
        with torch.autocast("cpu", dtype):
            loss = model(10 * image(kind, 4).float()).float().logsumexp(1).mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert all(term.isfinite() for term in auxiliary_loss(model).values())


@pytest.mark.parametrize("kind", ["basic", "inverted"])
class TestSteps:
    def test_count_training_forwards(self, kind):
        model, x = build(kind, total_steps=10).train(), image(kind)
        counter = model.get_submodule(model.default_cfg["first_conv"])
        for step in range(12):
            assert counter.step == step
            model(x)
            assert model.progress().item() == pytest.approx(min(step / 10, 1))
        model.eval()(x)
        assert counter.step == 12 and model.progress() == 1

    def test_drive_temperature_and_noise(self, kind):
        model = build(kind, total_steps=100, temperature=(5.0, 2.5, 1.0)).train()
        counter, seen = model.get_submodule(model.default_cfg["first_conv"]), {}
        unit = model.masked_blocks()[0].masker
        for step in (0, 29, 30, 59, 60, 80, 81, 99):
            counter.step.fill_(step + 1)  # as it is during the forward of this step
            x = torch.zeros(1, unit.in_channels, 9, 9, dtype=torch.float64, requires_grad=True)
            unit.gumbel_noise = False
            mask, soft = unit(x), torch.sigmoid(unit.maskconv(x) / (5.0 if step < 30 else 2.5 if step < 60 else 1.0))
            expected = torch.autograd.grad(soft.sum(), x)
            torch.testing.assert_close(torch.autograd.grad(mask.sum(), x), expected)
            unit.gumbel_noise = True
            seen[step] = not torch.equal(unit(x), unit(x))
        assert seen == {step: step <= 80 for step in seen}

    def test_resume(self, kind):
        model, x = build(kind, total_steps=10).train(), image(kind)
        for _ in range(4):
            model(x)
        other = build(kind, total_steps=10).train()
        other.load_state_dict(checkpoint_filter_fn({"state_dict": model.state_dict()}, other))
        assert other.progress() == model.progress() == 0.3
        torch.testing.assert_close(gradients(other, x), gradients(model, x))
        plain = build(kind)  # has no counter
        other.load_state_dict(checkpoint_filter_fn(plain.state_dict(), other))
        assert other.progress() == pytest.approx(0.4)
        # Nor does it mind that of others: with our filter, and in scripts that do not know it.
        assert checkpoint_filter_fn(model.state_dict(), plain).keys() == plain.state_dict().keys()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(x), model.eval()(x))

    def test_set_progress_goes_first(self, kind):
        model = build(kind, total_steps=10).train()
        model(image(kind))
        set_progress(model, 3, 4)
        assert model.progress() == 0.75


class TestCompiledTraining:
    def test_gradients(self):
        """The budget loss' among them."""
        model, x = build(gumbel_noise=False).train(), image()
        set_progress(model, 1, 10)
        other = copy.deepcopy(model)
        torch._dynamo.reset()
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradients(compiled, x), gradients(model, x))

    def test_schedules_do_not_compile_again(self):
        model, x = build(total_steps=10).train(), image()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for epoch in (None, None, 4, 9):
                if epoch:
                    set_progress(model, epoch, 10)
                compiled(x).sum().backward()
        assert model.conv1.step == 5


@torch.no_grad()
def test_compile():
    """Whole graphs, but for explicitly sparse execution."""
    model, x = build(), image()
    expected = run(model, x, "dense")
    for execution in ("auto", "sparse"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=execution != "sparse")
        model.execution = execution
        torch.testing.assert_close(compiled(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("execution", ["auto", "sparse"])
def test_export_with_a_dynamic_batch(execution):
    model, shapes = build(), {"x": {0: torch.export.Dim("batch")}}
    model.execution = execution
    program = torch.export.export(model, (image(),), dynamic_shapes=shapes)
    for batch in (1, 3):
        x = image(batch=batch)
        torch.testing.assert_close(program.module()(x), model(x))


@torch.no_grad()
@every_kind
def test_script_and_trace(kind):
    model, x = build(kind), image(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        for graph in (torch.jit.script(model), torch.jit.trace(model, x)):
            torch.testing.assert_close(graph(x), model(x))
