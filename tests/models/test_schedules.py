"""Schedules are the state of a model and of its checkpoints, in every family that has one."""

import copy
import io
import pickle
import threading

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from timm_dynamic import auxiliary_loss, dynamize, set_progress
from timm_dynamic.layers import MaskUnit, ODConv2d
from timm_dynamic.layers.progress import KEY, Progress

FAMILIES = {
    "dy": ("test_dy_resnet", "anneal_steps", {}),
    "kw": ("test_kw_resnet", "anneal_steps", {}),
    "dynconv": ("dynconv_resnet8", "total_steps", {"temperature": (5.0, 2.5, 1.0)}),
}
STEM = {"dy": "conv1.0", "kw": "conv1.0", "dynconv": "conv1"}
every_family = pytest.mark.parametrize("family", FAMILIES)
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(family, steps=None, **kwargs):
    torch.manual_seed(0)
    name, count, options = FAMILIES[family]
    return timm.create_model(name, num_classes=10, **options, **({count: steps} if steps else {}), **kwargs).train()


def progress(model):
    (found,) = {module for module in model.modules() if isinstance(module, Progress)}
    return found


def output(model, training=True):
    """With the same noise; in training too, where DynConv's masks depend on the schedule."""
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(1)
    return model(X)


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@every_family
class TestCheckpoints:
    @pytest.mark.parametrize("epoch", [0, 3, 40])
    def test_set_progress(self, family, epoch):
        model = build(family)
        set_progress(model, epoch, 40)
        other = build(family)
        other.load_state_dict(saved(model))
        for training in (True, False):
            assert torch.equal(output(other, training), output(model, training))
        assert list(model.state_dict())[-1] == KEY and sum("progress" in key for key in model.state_dict()) == 1

    @pytest.mark.parametrize("steps", [None, 4])
    def test_steps(self, family, steps):
        """Also in a plain model, which does not count."""
        model, other = build(family, 4), build(family, steps)
        for _ in range(6):
            other.load_state_dict(saved(model))
            assert progress(other)() == progress(model)()
            assert torch.equal(output(other, False), output(model, False))
            if steps:
                assert torch.equal(output(other), output(model))
            model(X)

    def test_without_state_it_is_over(self, family):
        model = build(family)
        set_progress(model, 1, 40)
        state = {key: value for key, value in model.state_dict().items() if key != KEY}
        model.load_state_dict(state)
        assert progress(model)() == 1
        if family == "dynconv":
            state = torch.get_rng_state()
            for block in model.masked_blocks():
                assert torch.equal(*(block.masker(torch.ones(1, block.masker.in_channels, 8, 8)) for _ in range(2)))
            torch.set_rng_state(state)

    def test_loading_does_not_begin_it(self, family):
        model = build(family, 4)
        other = build(family)
        set_progress(other, 40, 40)
        model.load_state_dict(other.state_dict())
        model(X)
        assert progress(model)() == progress(model)(training=True) == 1

    def test_averaged_checkpoints(self, family):
        """As timm's script averages: in float64, saved in float32."""
        states = []
        for epoch in (2, 4):
            model = build(family)
            set_progress(model, epoch, 40)
            states.append(model.state_dict())
        mean = {key: ((states[0][key].double() + states[1][key].double()) / 2).float() for key in states[0]}
        model.load_state_dict(mean)
        other = build(family)
        set_progress(other, 3, 40)
        assert progress(model)().item() == pytest.approx(progress(other)().item(), rel=1e-6)

    def test_bad_state(self, family):
        model = build(family)
        set_progress(model, 1, 40)
        for value in (torch.tensor(float("nan")), torch.tensor(-1), torch.zeros(2)):
            with pytest.raises(RuntimeError, match="progress must be one number"):
                model.load_state_dict({**model.state_dict(), KEY: value})

    def test_features(self, family):
        model = build(family, features_only=True)
        set_progress(model, 3, 40)
        assert list(model.state_dict())[-1] == KEY
        other = build(family, features_only=True)
        other.load_state_dict(saved(model))
        assert all(torch.equal(a, b) for a, b in zip(output(other), output(model), strict=True))


@every_family
class TestCounting:
    def check(self, run, model, steps=3):
        for _ in range(steps):
            run(model)
        assert progress(model)().item() == pytest.approx(steps / 8)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_ways_in(self, family, checkpointing):
        ways = (
            lambda m: m(X),
            lambda m: m.forward_head(m.forward_features(X)),
            lambda m: m.forward_intermediates(X)[0],
            lambda m: nn.Sequential(*list(m.children())[:-2])(X),
        )
        for way in ways:
            model = build(family, 8)
            model.set_grad_checkpointing(checkpointing)
            self.check(lambda m, way=way: way(m).square().mean().backward(), model)

    @pytest.mark.parametrize("feature_cls", ["list", "getter"])
    def test_feature_extractors(self, family, feature_cls):
        model = build(family, 8, features_only=True, feature_cls=feature_cls)
        self.check(lambda m: sum(y.square().mean() for y in m(X)).backward(), model)

    def test_any_stem(self, family):
        model = build(family, 8)
        stem = model.get_submodule(STEM[family])
        model.set_submodule(STEM[family], nn.Conv2d(1, stem.out_channels, 3, stem.stride, 1))
        self.check(lambda m: m(X[:, :1]), model)
        model = build(family, 8)
        model.conv1.eval()
        self.check(lambda m: m(X), model)
        model = build(family, 8)
        model.layer1.eval()
        self.check(lambda m: m(X), model)
        assert 1 <= (1 + 29 * (1 - progress(model)())) <= 30

    def test_evaluation_does_not_count(self, family):
        model = build(family, 8).eval()
        model(X)
        assert progress(model)() == 0


def test_compiled_with_checkpointing():
    """The blocks, which count, run twice."""
    model = build("dy", 8, layers=(1, 1, 0, 0), channels=(16, 24, 24, 24))
    model.set_grad_checkpointing()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(X).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(X).sum().backward()
    assert progress(model)() == 2 / 8


@every_family
class TestCopiesAndDevices:
    @pytest.mark.parametrize("early", [True, False])
    def test_averaged_weights(self, family, early):
        """Made before or after the schedule began."""
        model = build(family, 8 if early else None)
        ema = ModelEmaV3(model, decay=0.5)
        if not early:
            set_progress(model, 3, 40)
            set_progress(ema, 3, 40)
        model(X)
        ema.update(model)
        assert progress(ema.module)() == progress(model)()
        assert progress(ema.module) is not progress(model)

    def test_copies_from_before_it_began(self, family):
        """They follow it, through buffers or through state dicts side by side, and so does what loads what they save.

        Also where the weights came without it.
        """
        model = build(family)
        model.load_state_dict({key: value for key, value in model.state_dict().items() if key != KEY})
        ema, averaged = ModelEmaV3(model, decay=0.0), AveragedModel(model)
        set_progress(model, 3, 40)
        ema.update(model), averaged.update_parameters(model)
        expected = output(model, False)
        for one in (ema.module, averaged.module):
            other = build(family)
            other.load_state_dict(saved(one))
            assert list(one.state_dict()) == list(model.state_dict())
            assert torch.equal(output(one, False), expected) and torch.equal(output(other, False), expected)

    def test_copies(self, family):
        model = build(family, 8)
        model(X)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(other), output(model))
            other(X)
            assert (progress(other)().item(), progress(model)().item()) == (2 / 8, 1 / 8)
            other.load_state_dict(model.state_dict())
            assert progress(other)() == 1 / 8

    def test_casts(self, family):
        model = build(family)
        set_progress(model, 3, 28)
        expected = progress(model)().item()
        for other in (model.bfloat16().float(), model.half().double()):
            assert progress(other)() == expected

    def test_to_empty(self, family):
        model = build(family)
        set_progress(model, 3, 40)
        expected = progress(model)()
        assert progress(model.to_empty(device="cpu"))() == expected

    @pytest.mark.parametrize("known", [True, False])
    def test_assigned_to_meta(self, family, known):
        model = build(family)
        set_progress(model, 3, 40)
        state = {key: value for key, value in model.state_dict().items() if known or key != KEY}
        model.load_state_dict(state)
        other = build(family, device="meta")
        other.load_state_dict(state, assign=True)
        assert not any(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
        assert torch.equal(output(other), output(model))

    def test_inference_mode(self, family):
        model = build(family)
        with torch.inference_mode():
            set_progress(model, 3, 40)
            model.eval()(X)
        model.train()(X).sum().backward()
        with torch.inference_mode():
            set_progress(model, 4, 40)
        model(X).sum().backward()


@pytest.mark.parametrize("layer", [lambda: MaskUnit(8), lambda: ODConv2d(8, 8, 3)])
@pytest.mark.parametrize("epoch", [None, 3])
def test_a_layer_by_itself(layer, epoch):
    """Whether the schedule has begun or not."""
    x, outputs, layer, other = torch.randn(2, 8, 6, 6), [], layer(), layer()
    if epoch is not None:
        set_progress(layer, epoch, 40)
    other.load_state_dict(saved(layer))
    for one in (layer, other):
        torch.manual_seed(0)
        outputs.append(one(x))
    assert torch.equal(*outputs)


def test_dynamized_network():
    def build():
        return dynamize(timm.create_model("test_resnet", num_classes=10), "dy")

    model, other = build(), build()
    ema = ModelEmaV3(model, decay=0.5)
    set_progress(model, 2, 40)
    ema.update(model)
    assert list(model.state_dict())[-1] == KEY
    other.load_state_dict(saved(model))
    assert torch.equal(output(other, False), output(model, False))


@pytest.mark.parametrize("layers", [("dy", "dy"), ("dy", "od"), ("od", "kw")])
def test_layers_of_two_kinds(layers):
    """Each kind has its schedule."""

    def build():
        model = timm.create_model("test_resnet", num_classes=10)
        return dynamize(dynamize(model, layers[0], "layer1.*.conv?"), layers[1], "layer3.*.conv?")

    def shares(model):
        return [module().item() for module in model.modules() if isinstance(module, Progress)]

    model, other = build(), build()
    set_progress(model, 2, 40)
    other.load_state_dict(saved(model))
    assert shares(other) == shares(model) and len({*shares(model)} - {1.0}) > 0
    assert len(shares(model)) == sum("progress" in key for key in model.state_dict()) == 2
    assert torch.equal(output(other, False), output(model, False))
    model.load_state_dict({key: value for key, value in model.state_dict().items() if "progress" not in key})
    assert shares(model) == [1, 1]


class TestBudget:
    """The gradient of DynConv's budget loss."""

    def gradients(self, model, way):
        model.zero_grad()
        torch.manual_seed(1)
        (0 * way(model).sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if ".masker." in name}

    def test_any_way_in(self):
        model = build("dynconv", gumbel_noise=False).double()
        x = X.double()
        expected = self.gradients(model, lambda m: m(x))
        assert all(grad.any() for grad in expected.values())
        ways = (
            lambda m: m.forward_head(m.forward_features(x)),
            lambda m: m.forward_intermediates(x)[0],
            lambda m: m.forward_intermediates(x, intermediates_only=True)[-1],
            lambda m: nn.Sequential(*list(m.children())[:-2])(x),
        )
        terms = auxiliary_loss(model)
        for way in ways:
            torch.testing.assert_close(self.gradients(model, way), expected)
            torch.testing.assert_close(auxiliary_loss(model), terms)
        model.set_grad_checkpointing()
        torch.testing.assert_close(self.gradients(model, lambda m: m(x)), expected)
        features = build("dynconv", gumbel_noise=False, features_only=True).double()
        features.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(self.gradients(features, lambda m: m(x)[-1]), expected)

    def test_stages_that_ran(self):
        """Those of an extractor that stops early have the loss over their blocks."""
        x, found = X.double(), []
        for layers in ((1, 1, 1), (1, 1)):
            model = build("dynconv", gumbel_noise=False, layers=(1, 1, 1)).double()
            if len(layers) == 3:
                model.forward_intermediates(x, [2], stop_early=True, intermediates_only=True)[0].sum().mul(0).backward()
                found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            else:
                model.layer3 = nn.Sequential()
                model.layer2(model.layer1(model.act1(model.bn1(model.conv1(x))))).sum().mul(0).backward()
                found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(found[0], found[1])
        assert found[0]["layer2.0.masker.maskconv.conv.weight"].any()

    def test_two_forwards_before_a_backward(self):
        model, (a, b) = build("dynconv", gumbel_noise=False).double(), X.double().split(1)
        model.set_grad_checkpointing()
        one, two = (self.gradients(copy.deepcopy(model), lambda m, x=x: m(x)) for x in (a, b))
        both = self.gradients(model, lambda m: m(a) + m(b))
        torch.testing.assert_close(both, {name: one[name] + two[name] for name in one})

    @pytest.mark.parametrize("shared", [True, False])
    def test_threads(self, shared):
        model = build("dynconv", gumbel_noise=False).double().requires_grad_(True)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        expected = [self.gradients(copy.deepcopy(model), lambda m, x=x: m(x)) for x in X.double().split(1)]
        names, found = list(expected[0]), [[], []]

        def train(index, model):
            x = X[index : index + 1].double()
            parameters = dict(model.named_parameters())
            for _ in range(10):
                loss = 0 * model(x).sum()
                found[index].append(torch.autograd.grad(loss, [parameters[name] for name in names]))

        threads = [
            threading.Thread(target=train, args=(i, model if shared else copy.deepcopy(model))) for i in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in range(2):
            assert len(found[index]) == 10
            for grads in found[index]:
                torch.testing.assert_close(dict(zip(names, grads, strict=True)), expected[index])


@pytest.mark.parametrize("name", ["dynconv_resnet50", "dynconv_resnet8", "test_dy_resnet", "dynconv_mobilenetv2_050"])
def test_order_of_children(name):
    """Networks are cut with `children()`."""
    model = timm.create_model(name).eval()
    names = [child for child, _ in model.named_children()]
    assert names[-2:] in (["global_pool", "fc"], ["global_pool", "classifier"])
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        cut = nn.Sequential(*list(model.children())[:-2])(x)
        torch.testing.assert_close(cut, model.forward_features(x), rtol=1e-3, atol=1e-4)
        assert name != "dynconv_resnet50" or list(cut.shape) == [1, 2048, 2, 2]
