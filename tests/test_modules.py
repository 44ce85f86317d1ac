"""Parts of layers are modules: what people do with a module of PyTorch is seen and trained, in every family."""

import copy

import pytest
import torch
from module_cases import (
    LAYERS,
    NETWORKS,
    close,
    images,
    leaves,
    leaves_of_layers,
    make_layer,
    make_network,
    run,
    settle,
)
from pairs import in_turns
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

import timm_dynamic

EVERY_NETWORK = pytest.mark.parametrize("family", NETWORKS)
EVERY_LAYER = pytest.mark.parametrize("family", LAYERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def steps(model, x, count=2):
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for _ in range(count):
        optimizer.zero_grad()
        run(model, x, training=True)
        optimizer.step()


def in_eval(part):
    """Whether a part takes part in evaluation."""
    return "decoder" not in part


class TestHooks:
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @EVERY_NETWORK
    def test_of_every_kind_on_every_part(self, family, training):
        model, seen = make_network(family), {}
        for part in model.modules():
            if hasattr(part, "inplace"):
                part.inplace = False  # torch forbids it behind a full backward hook, in timm's networks as here
        parts = leaves_of_layers(model)
        if family == "dynconv":  # what is behind its norms writes into their output, which PyTorch refuses then
            parts = {name: part for name, part in parts.items() if not isinstance(part, nn.BatchNorm2d)}
        for name, part in leaves(model).items():
            note = lambda *args, name=name: seen.setdefault(name, set()).add(len(args))  # noqa: E731
            part.register_forward_pre_hook(lambda m, a, note=note: note(1))
            part.register_forward_hook(lambda m, a, o, note=note: note(1, 2))
            if training and name in parts:
                part.register_full_backward_pre_hook(lambda m, g, note=note: note(1, 2, 3))
                part.register_full_backward_hook(lambda m, g, h, note=note: note(1, 2, 3, 4))
        run(model, images(), training)
        wanted = {name for name in leaves(model) if training or in_eval(name)}
        assert seen == {name: {1, 2, 3, 4} if training and name in parts else {1, 2} for name in wanted}

    @EVERY_NETWORK
    def test_on_one_part_alone_in_training(self, family):
        model, x = make_network(family), images()
        for name, part in leaves_of_layers(model, 1).items():
            calls = []
            handle = part.register_forward_hook(lambda *args, calls=calls: calls.append(1))
            run(model, x, training=True)
            handle.remove()
            assert calls, name

    @EVERY_NETWORK
    def test_a_hook_that_changes_the_output_counts(self, family):
        model, x = make_network(family), images()
        for name, part in leaves_of_layers(model, 1).items():
            if in_eval(name):
                before = run(model, x)
                handle = part.register_forward_hook(
                    lambda m, a, y: y + torch.linspace(1, 5, y.shape[1]).view(-1, *[1] * (y.ndim - 2))
                )
                changed = run(model, x)
                handle.remove()
                assert not torch.allclose(changed, before, rtol=1e-4), name
                assert torch.equal(run(model, x), before), name

    @EVERY_NETWORK
    def test_global(self, family):
        model, seen = make_network(family), set()
        handle = torch_module.register_module_forward_hook(lambda m, a, o: seen.add(m))
        try:
            run(model, images())
        finally:
            handle.remove()
        assert {part for name, part in leaves(model).items() if in_eval(name)} <= seen

    @EVERY_NETWORK
    def test_moved_from_one_part_to_another(self, family):
        model, calls = make_network(family), []
        parts = [part for name, part in leaves(model).items() if in_eval(name)]
        for part in (parts[1], parts[-2], parts[len(parts) // 2]):
            calls.clear()
            handle = part.register_forward_hook(lambda *args: calls.append(1))
            run(model, images())
            handle.remove()
            assert calls


class TestPruning:
    @pytest.mark.parametrize(
        ("family", "method"), in_turns(NETWORKS, (prune.random_unstructured, prune.l1_unstructured))
    )
    def test_two_steps(self, family, method):
        model, x = make_network(family), images(4)
        for part in leaves(model).values():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                method(part, "weight", 0.5)
        steps(model, x)
        zeros = [
            (part.weight == 0).float().mean()
            for part in leaves(model).values()
            if isinstance(part, (nn.Conv2d, nn.Linear))
        ]
        assert min(zeros) > 0.4
        pruned = run(model, x)
        for part in leaves(model).values():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                prune.remove(part, "weight")
        close(run(model, x), pruned)

    @EVERY_LAYER
    def test_of_a_layers_parameters(self, family):
        layer, x = make_layer(family), images(channels=8, size=8)
        names = [name for name, value in layer.named_parameters(recurse=False) if value.ndim > 1]
        for name in names:
            prune.random_unstructured(layer, name, 0.5)
        expected = run(layer, x)
        with timm_dynamic.use("formula"):
            close(expected, run(layer, x))
        steps(layer, x)


class Scaled(nn.Module):
    def forward(self, w):
        return 1.2 * w


def scaled(part):
    parametrize.register_parametrization(part, "weight", Scaled())


PARAMETRIZE = [parametrizations.weight_norm, parametrizations.spectral_norm, scaled, torch.nn.utils.spectral_norm]


class TestParametrizations:
    @pytest.mark.parametrize(
        ("make", "family"),
        [(make, family) for i, make in enumerate(PARAMETRIZE) for family in NETWORKS[i % 2 :: 2]],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_on_every_part(self, family, make):
        model, x = make_network(family), images(4)
        for part in leaves(model).values():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                make(part)
        settle(model, x)
        with timm_dynamic.use("formula"):
            expected = run(model, x)
        close(run(model, x), expected)
        steps(model, x)
        missing = [name for name, value in model.named_parameters() if value.grad is None]
        assert not missing

    @EVERY_LAYER
    def test_of_one_part_means_the_weight_that_it_gives(self, family):
        layer, x = make_layer(family), images(channels=8, size=8)
        for name, part in leaves(layer).items():
            if in_eval(name) and isinstance(part, (nn.Conv2d, nn.Linear)):
                other, changed = copy.deepcopy(layer), copy.deepcopy(layer)
                other.get_submodule(name).weight.data.mul_(1.2)
                parametrize.register_parametrization(changed.get_submodule(name), "weight", Scaled())
                close(run(changed, x), run(other, x))

    @EVERY_LAYER
    def test_of_a_layers_parameters(self, family):
        layer, x = make_layer(family), images(channels=8, size=8)
        for name in [name for name, value in layer.named_parameters(recurse=False)]:
            other, changed = copy.deepcopy(layer), copy.deepcopy(layer)
            other.get_parameter(name).data.mul_(1.2)
            parametrize.register_parametrization(changed, name, Scaled())
            close(run(changed, x), run(other, x))
            steps(changed, x)


class Adapted(nn.Module):
    """LoRA of rank 2."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.weight[0].numel()).to(base.weight) * 0.1)
        self.up = nn.Parameter(torch.randn(len(base.weight), 2).to(base.weight) * 0.1)

    def delta(self):
        return (self.up @ self.down).view_as(self.base.weight)

    def forward(self, x):
        base = self.base
        if isinstance(base, nn.Linear):
            return base(x) + nn.functional.linear(x, self.delta())
        return base(x) + nn.functional.conv2d(
            x, self.delta(), None, base.stride, base.padding, base.dilation, base.groups
        )


class TestAdapters:
    @EVERY_NETWORK
    def test_around_every_convolution_and_linear_layer(self, family):
        model, x = make_network(family, torch.float64).requires_grad_(False), images(4, dtype=torch.float64)
        merged = copy.deepcopy(model).requires_grad_()
        names = [name for name, part in model.named_modules() if type(part) in (nn.Conv2d, nn.Linear)]
        for name in names:
            adapter = Adapted(model.get_submodule(name))
            model.set_submodule(name, adapter)
            merged.get_submodule(name).weight.data.add_(adapter.delta().detach())
        close(run(model, x), run(merged, x))
        for one in (model, merged):
            run(one, x, training=True)
        for name in names:
            adapter, grad = model.get_submodule(name), merged.get_submodule(name).weight.grad.flatten(1)
            close(adapter.up.grad, grad @ adapter.down.detach().T)
            close(adapter.down.grad, adapter.up.detach().T @ grad)


class TestReplacedParts:
    @pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
    @EVERY_NETWORK
    def test_quantized_linear_layers(self, family):
        model, x = make_network(family), images(4)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        assert any("quantized" in type(part).__module__ for part in quantized.modules())
        expected = run(model, x)
        assert (run(quantized, x) - expected).abs().max() < 0.2 * expected.std()

    @EVERY_NETWORK
    def test_another_class_or_forward(self, family):
        class Conv2d(nn.Conv2d):
            def forward(self, x):
                return 2 * super().forward(x)

        for name, part in leaves_of_layers(make_network(family), 1).items():
            if type(part) is nn.Conv2d and in_eval(name):
                one, other, third = (make_network(family) for _ in range(3))
                one.get_submodule(name).__class__ = Conv2d
                changed = other.get_submodule(name)
                changed.forward = lambda x, changed=changed: 2 * nn.Conv2d.forward(changed, x)
                third.get_submodule(name).weight.data.mul_(2)
                if part.bias is not None:
                    third.get_submodule(name).bias.data.mul_(2)
                expected = run(third, images())
                close(run(one, images()), expected)
                close(run(other, images()), expected)

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @EVERY_LAYER
    def test_with_and_without_a_bias(self, family, training):
        """Of the same class, but not as the layer makes it."""
        layer, x = make_layer(family), images(channels=8, size=8)
        for name, part in leaves(layer).items():
            if type(part) in (nn.Conv2d, nn.Linear):
                changed = copy.deepcopy(layer).train(training)
                bias = nn.Parameter(torch.randn(len(part.weight))) if part.bias is None else None
                changed.get_submodule(name).bias = bias
                expected = copy.deepcopy(changed).formula(x)
                with torch.set_grad_enabled(training):
                    close(changed(x), expected)

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize(
        "change",
        [
            {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1, 1, 1]},
            {"stride": (2, 2)},
            {"stride": (1, 1), "dilation": (2, 2), "padding": (2, 2)},
            {"groups": 2},
        ],
        ids=["padding mode", "stride", "dilation", "groups"],
    )
    @EVERY_LAYER
    def test_with_other_arguments(self, family, change, training):
        layer, x = make_layer(family), images(channels=8, size=8)
        for name, part in leaves(layer).items():
            if type(part) is nn.Conv2d and (
                part.kernel_size != (1, 1) or "stride" in change and "dilation" not in change
            ):
                changed = copy.deepcopy(layer).train(training)
                conv = changed.get_submodule(name)
                for key, value in change.items():
                    setattr(conv, key, value)
                if "groups" in change:
                    conv.weight = nn.Parameter(conv.weight[:, :4].clone())
                if "stride" in change and "dilation" not in change:
                    for other in changed.modules():
                        if (
                            type(other) is nn.Conv2d
                            and other.stride == (1, 1)
                            and other.in_channels == conv.in_channels
                        ):
                            other.stride = (2, 2)
                try:
                    expected = copy.deepcopy(changed).formula(x)
                except (RuntimeError, ValueError):
                    with pytest.raises((RuntimeError, ValueError)):
                        changed(x)
                else:
                    torch.testing.assert_close(changed(x), expected, msg=name)

    @EVERY_LAYER
    def test_of_another_precision(self, family):
        """Right, or the error of the formula; no other numbers."""
        layer, x = make_layer(family), images(channels=8, size=8)
        for training in (False, True):
            for name in leaves(layer):
                for dtype in (torch.float64, torch.bfloat16):
                    changed = copy.deepcopy(layer).train(training)
                    changed.get_submodule(name).to(dtype)
                    try:
                        expected = copy.deepcopy(changed).formula(x)
                    except (RuntimeError, ValueError):
                        with pytest.raises((RuntimeError, ValueError)), torch.set_grad_enabled(training):
                            changed(x)
                    else:
                        with torch.set_grad_enabled(training):
                            torch.testing.assert_close(changed(x), expected, msg=f"{name} {dtype}", check_dtype=False)

    @EVERY_LAYER
    def test_in_another_layout(self, family):
        layer, x = make_layer(family), images(channels=8, size=8)
        for training in (False, True):
            for name, value in layer.named_parameters():
                changed = copy.deepcopy(layer).train(training)
                strided = torch.randn(*value.shape, 2)[..., 0].copy_(value.detach())
                changed.get_parameter(name).data = strided
                expected = copy.deepcopy(changed).formula(x)
                with torch.set_grad_enabled(training):
                    close(changed(x), expected)
