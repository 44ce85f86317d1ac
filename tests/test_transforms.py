"""Derivatives of every kind and order, in every family: torch.func, and graphs of gradients."""

import copy

import pytest
import torch
from module_cases import LAYERS, NETWORKS, close, images, make_layer, make_network
from timm.optim import Adahessian
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import timm_dynamic

EVERY_NETWORK = pytest.mark.parametrize("family", NETWORKS)
EVERY_LAYER = pytest.mark.parametrize("family", LAYERS)
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[False, True], ids=["eval", "train"])
def training(request):
    return request.param


def subject(family, training=False):
    """A layer in float64, and its input."""
    return make_layer(family, dtype=DOUBLE).train(training), images(3, 8, 6, DOUBLE)


def loss_of(model, x):
    return model(x).pow(3).mean()


def of(model):
    return {name: value.detach() for name, value in model.named_parameters()}


def gradients(loss, wanted, **options):
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True, **options)


def joined(tensors):
    return torch.cat([t.flatten() for t in tensors])


class TestFunc:
    @EVERY_LAYER
    def test_grad_and_reverse_modes_of_a_layer(self, family, training):
        layer, x = subject(family, training)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        again = x.clone().requires_grad_()
        expected = gradients(loss_of(layer, again), [again, *layer.parameters()])
        layer.load_state_dict(state)

        def loss(params, x):
            return functional_call(layer, (params, copy.deepcopy(dict(layer.named_buffers()))), (x,)).pow(3).mean()

        params = of(layer)
        for dx in (
            grad(loss, 1)(params, x),
            jacrev(loss, 1)(params, x),
            vjp(lambda x: loss(params, x), x)[1](1.0 + 0 * x.sum())[0],
        ):
            close(dx, expected[0], 1e-9)
        for found in (
            grad(loss)(params, x),
            jacrev(loss)(params, x),
            vjp(lambda p: loss(p, x), params)[1](1.0 + 0 * x.sum())[0],
        ):
            close(joined(found.values()), joined(expected[1:]), 1e-9)

    @EVERY_LAYER
    def test_forward_modes_of_a_layer(self, family, training):
        layer, x = subject(family, training)
        layer.aux_scale = 0.0  # of PED: what is attached to gradients is not in the loss
        x = x[:, :, :4, :4].contiguous()  # jacfwd pushes as many directions as it has elements
        again, direction = x.clone().requires_grad_(), torch.randn_like(x)
        buffers = copy.deepcopy(dict(layer.named_buffers()))
        expected = (gradients(loss_of(layer, again), again)[0] * direction).sum()

        def loss(x):
            return functional_call(layer, copy.deepcopy(buffers), (x,)).pow(3).mean()

        close(jvp(loss, (x,), (direction,))[1], expected, 1e-9)
        close((jacfwd(loss)(x) * direction).sum(), expected, 1e-9)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, direction))).tangent
        close(tangent, expected, 1e-9)

    @EVERY_LAYER
    def test_the_hessian_of_a_layer(self, family):
        layer, x = subject(family)
        x = x[:1, :, :2, :2].contiguous()
        again = x.clone().requires_grad_()
        expected = torch.autograd.functional.hessian(lambda x: loss_of(layer, x), again)
        close(hessian(lambda x: loss_of(layer, x))(x), expected, 1e-9)

    @EVERY_NETWORK
    def test_gradients_of_every_sample(self, family):
        model, x = make_network(family, DOUBLE), images(3, dtype=DOUBLE)
        buffers = dict(model.named_buffers())

        def loss(params, one):
            return functional_call(model, (params, buffers), (one[None],)).pow(2).mean()

        found = vmap(grad(loss), (None, 0), randomness="different")(of(model), x)
        for i in range(len(x)):
            expected = gradients(model(x[i : i + 1]).pow(2).mean(), list(model.parameters()))
            close(joined(value[i] for value in found.values()), joined(expected), 1e-9)

    @pytest.mark.parametrize("randomness", ["same", "different"])
    @EVERY_LAYER
    def test_gradients_of_every_sample_in_training(self, family, randomness):
        layer, x = subject(family, training=True)
        for part in layer.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase):
                part.eval()
        if hasattr(layer, "progress"):
            layer.progress.begin(100)
        buffers = dict(layer.named_buffers())

        def loss(params, one):
            return functional_call(layer, (params, buffers), (one[None],)).pow(2).mean()

        found = vmap(grad(loss), (None, 0), randomness=randomness)(of(layer), x)
        if hasattr(layer, "progress"):
            layer.progress.begin(None)
        for i in range(len(x)):
            expected = gradients(layer(x[i : i + 1]).pow(2).mean(), list(layer.parameters()))
            close(joined(value[i] for value in found.values()), joined(expected), 1e-2)

    @EVERY_LAYER
    def test_an_ensemble(self, family):
        layers, x = [make_layer(family, dtype=DOUBLE) for _ in range(2)], images(3, 8, 6, DOUBLE)
        for value in layers[1].parameters():
            value.data.mul_(1.1)
        params, buffers = stack_module_state(layers)
        one = copy.deepcopy(layers[0]).to("meta")
        for inputs, dim in ((x, None), (torch.stack([x, x]), 0)):
            y = vmap(lambda p, b, x: functional_call(one, (p, b), (x,)), (0, 0, dim))(params, buffers, inputs)
            for found, layer in zip(y, layers, strict=True):
                close(found, layer(x), 1e-9)

    @EVERY_NETWORK
    def test_of_a_network(self, family):
        model, x = make_network(family, DOUBLE), images(dtype=DOUBLE)
        params, buffers = of(model), dict(model.named_buffers())
        expected = gradients(model(x).pow(2).mean(), list(model.parameters()))

        def loss(params):
            return functional_call(model, (params, buffers), (x,)).pow(2).mean()

        close(joined(grad(loss)(params).values()), joined(expected), 1e-9)
        close(joined(vjp(loss, params)[1](torch.ones((), dtype=DOUBLE))[0].values()), joined(expected), 1e-9)
        directions = {name: torch.randn_like(value) for name, value in params.items()}
        slope = sum((g * d).sum() for g, d in zip(expected, directions.values(), strict=True))
        if family != "dynconv":  # whose mask is straight through backwards, and a step forwards
            close(jvp(loss, (params,), (directions,))[1], slope, 1e-9)

    @EVERY_NETWORK
    def test_functional_call_takes_the_given_numbers(self, family):
        model, x = make_network(family), images()
        other = {name: 1.01 * value for name, value in of(model).items()}
        changed = copy.deepcopy(model)
        changed.load_state_dict(other, strict=False)
        with torch.no_grad():
            before = model(x)
            close(functional_call(model, other, (x,)), changed(x))
            assert torch.equal(model(x), before)

    @EVERY_NETWORK
    def test_an_ensemble_of_networks_leaves_the_first_as_it_was(self, family):
        """Also what several layers have: the cells of a warehouse, the step of a schedule."""
        models, x = [make_network(family) for _ in range(2)], images()
        for value in models[1].parameters():
            value.data.mul_(1.01)
        with torch.no_grad():
            before = [model(x) for model in models]
            stacked = [{name: v.detach() for name, v in part.items()} for part in stack_module_state(models)]
            y = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(*stacked)
            for found, expected, model in zip(y, before, models, strict=True):
                close(found, expected, 1e-4)
                assert torch.equal(model(x), expected)
        state, tensors = models[0].state_dict(), [*models[0].parameters(), *models[0].buffers()]
        assert all(type(t) in (torch.Tensor, nn.Parameter) for t in (*state.values(), *tensors))
        models[0].train()(x).sum().backward()


class TestGraphsOfGradients:
    """`create_graph=True`."""

    @EVERY_LAYER
    def test_of_a_layer(self, family, training):
        """Also where all inputs depend on one tensor, and each other."""
        layer, x = subject(family, training)
        layer.aux_scale = 0.0  # of PED: what is attached to gradients is not in the loss
        params = of(layer)
        factor = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)

        def loss(t, source):
            y = x * t + t.sin()
            for _ in range(2):  # the second input is made by the layer itself
                values = {name: value * t for name, value in params.items()}
                y = functional_call(copy.deepcopy(source), (values, copy.deepcopy(dict(layer.named_buffers()))), (y,))
            return y.tanh().sum()

        once = gradients(loss(factor, layer), factor)[0]
        (first,) = gradients(loss(factor, layer), factor, create_graph=True)
        (second,) = gradients(first, factor)
        close(first.detach(), once, 1e-9)
        with timm_dynamic.use("formula"):
            (plain,) = gradients(loss(factor, layer), factor, create_graph=True)
            close(first.detach(), plain.detach(), 1e-9)
            close(second, gradients(plain, factor)[0], 1e-9)
        step = 1e-5
        values = [loss((factor + k * step).detach(), layer) for k in (-1, 0, 1)]
        close(first.detach(), (values[2] - values[0]) / (2 * step), 1e-5)
        slopes = [
            gradients(loss(t, layer), t)[0] for k in (-1, 1) for t in [(factor + k * step).detach().requires_grad_()]
        ]
        close(second, (slopes[1] - slopes[0]) / (2 * step), 1e-4)

    @EVERY_NETWORK
    def test_of_a_network(self, family, training):
        model, x = make_network(family, DOUBLE).train(training), images(dtype=DOUBLE)
        state = copy.deepcopy(model.state_dict())
        params = list(model.parameters())

        def first(create_graph):
            model.load_state_dict(state)
            return gradients(model(x).tanh().sum(), params, create_graph=create_graph)

        once, graph = first(False), first(True)
        close(joined(graph).detach(), joined(once), 1e-8)
        vectors = [torch.randn_like(p) for p in params]
        product = joined(gradients(sum((g * v).sum() for g, v in zip(graph, vectors, strict=True)), params))
        with timm_dynamic.use("formula"):
            plain = first(True)
            expected = gradients(sum((g * v).sum() for g, v in zip(plain, vectors, strict=True)), params)
        close(product, joined(expected), 1e-7)
        assert product.abs().max() > 0

    @EVERY_NETWORK
    def test_adahessian(self, family):
        model, x = make_network(family).train(), images()
        optimizer, before = Adahessian(model.parameters(), 1e-3), joined(model.parameters()).detach()
        model(x).square().mean().backward(create_graph=True)
        optimizer.step()
        curved = [p for p in model.parameters() if torch.is_tensor(p.hess) and p.hess.abs().max() > 0]
        assert len(curved) > 0.5 * len(list(model.parameters()))
        assert not torch.equal(joined(model.parameters()), before) and joined(model.parameters()).isfinite().all()

    @EVERY_LAYER
    def test_third_order(self, family):
        layer, x = subject(family)
        factor = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
        results = []
        for way in ("formula", None):
            with timm_dynamic.use(way):
                value = layer(x * factor).tanh().sum()
                for _ in range(3):
                    (value,) = gradients(value, factor, create_graph=True)
                results.append(value.detach())
        close(results[1], results[0], 1e-8)
