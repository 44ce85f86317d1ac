"""DynConv networks: what is theirs beyond what every model can do, in inference."""

import copy
import gc
import warnings
import weakref

import pytest
import timm
import torch
from dynconv_networks import assert_same_in_all_executions, build, every_kind, image, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from timm_dynamic import auxiliary_loss
from timm_dynamic.families import static_twin
from timm_dynamic.layers import MaskUnit, SparseStage
from timm_dynamic.layers.progress import KEY
from timm_dynamic.models.dynconv_mobilenetv2 import SparseInvertedResidual
from timm_dynamic.models.dynconv_resnet import SparseBottleneck, checkpoint_filter_fn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("mesh") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_an_image_without_a_batch_is_an_error_of_pytorch():
    with torch.inference_mode(), pytest.raises(ValueError, match="expected 4D input"):
        timm.create_model("dynconv_resnet8").eval()(torch.randn(3, 32, 32))


class TestArchitecture:
    @pytest.mark.parametrize("name", timm.list_models("dynconv_*", exclude_filters="*hourglass*"))
    def test_parameters_are_the_static_networks_and_the_mask_units(self, name):
        model, static = (timm.create_model(name, device="meta", budget=budget) for budget in (0.5, -1))
        state, static_state = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, static))
        assert {key: v for key, v in state.items() if ".masker." not in key} == {**static_state, KEY: torch.Size([])}
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
            ({"aux_scale": -1}, "aux_scale must be a finite number and not negative, got -1"),
            ({"budget_weight": -1}, "budget_weight must be a finite number and not negative, got -1"),
            ({"aux_scale": float("nan")}, "aux_scale must be a finite number and not negative, got nan"),
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
    @pytest.mark.parametrize(("wrapper", "prefix"), [(None, "module."), ("state_dict", "")])
    def test_weights_go_both_ways(self, kind, wrapper, prefix):
        masked, static = build(kind), build(kind, budget=-1)

        def load(source, target):
            saved = {prefix + key: value for key, value in source.state_dict().items()}
            own = {key: value.clone() for key, value in target.state_dict().items()}
            state = checkpoint_filter_fn({wrapper: saved, "epoch": 3} if wrapper else saved, target)
            target.load_state_dict(state)
            return own

        units = {key for key in masked.state_dict() if ".masker." in key or key == KEY}
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
    @pytest.mark.parametrize("how", ["whole", "blocks", "leaves"])
    def test_fully_sharded(self, kind, how, mesh):
        model, x = build(kind), image(kind)
        expected = run(model, x, "dense")
        parts = {
            "whole": (),
            "blocks": model.masked_blocks(),
            "leaves": [m for m in model.modules() if isinstance(m, nn.Conv2d)],
        }
        for part in parts[how]:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for execution in ("sparse", "auto", "dense"):
            torch.testing.assert_close(run(model, x, execution), expected)
        model.train()(x).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())

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
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        assert_same_in_all_executions(model, x)
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


@torch.no_grad()
def test_compile():
    """Whole graphs, of dense execution."""
    model, x = build(), image()
    expected = run(model, x, "dense")
    for execution in ("auto", "sparse"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
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
