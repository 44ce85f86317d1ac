"""Subclasses of layers that compute something else, and forwards of single instances: never as the family computes."""

import copy

import pytest
import torch
from module_cases import LAYERS, NETWORKS, close, images, make_layer, make_network, run, settle
from torch import nn

import timm_dynamic
from timm_dynamic.families import FAMILIES
from timm_dynamic.layers import ODConv2d
from timm_dynamic.models.dynconv_resnet import SparseBasicBlock

X = images(3, channels=8, size=9)


def doubled(cls, method):
    def run(self, *args):
        return 2 * getattr(super(kind, self), method)(*args)

    kind = type("Doubled", (cls,), {method: run})
    return kind


def with_norm(layer):
    return settle(nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU6(inplace=True)), X)


@pytest.mark.parametrize("method", ["formula", "forward"])
@pytest.mark.parametrize("family", LAYERS)
def test_of_a_layer(family, method):
    layer = make_layer(family)
    expected = 2 * run(layer, X)
    layer.__class__ = doubled(type(layer), method)
    close(run(layer, X), expected)
    for model in (with_norm(layer), nn.Sequential(layer, nn.ReLU6()).eval()):
        close(run(timm_dynamic.optimize(model, X), X), run(copy.deepcopy(model).double(), X.double()))
    if method == "formula" and layer.implementations:
        assert "formula is not the family's" in timm_dynamic.explain(layer, X)


@pytest.mark.parametrize("family", LAYERS)
def test_of_one_instance(family):
    layer = make_layer(family)
    expected, formula = 2 * run(layer, X), layer.formula
    layer.formula = lambda x: 2 * formula(x)
    close(run(layer, X), expected)


@pytest.mark.parametrize("family", LAYERS)
def test_that_computes_the_same_runs_as_the_family(family):
    layer = make_layer(family)
    expected = timm_dynamic.explain(layer, X)
    methods = {"reset_parameters": lambda self: None, "extra_repr": lambda self: ""}
    layer.__class__ = type("Same", (type(layer),), methods)
    assert timm_dynamic.explain(layer, X).replace("Same", FAMILIES[family].layer.__name__) == expected


def test_of_a_part_of_the_formula():
    """Also where it is further up, or in a mixin; a subclass that has rows of its own vouches for them."""

    class Gates:
        def gate(self, scores):
            return 1.5 + torch.tanh(scores)

    class Gated(Gates, ODConv2d):
        pass

    class Further(Gated):
        pass

    class Vouched(Further):
        implementations = ODConv2d.implementations

    assert Gated.overridden == Further.overridden == ["gate"] and Vouched.overridden == []
    layer = make_layer("od")
    layer.__class__ = Further
    with timm_dynamic.use("formula"):
        expected = run(layer, X)
    close(run(layer, X), expected)


@pytest.mark.parametrize("method", ["forward", "branch", "mask"])
def test_of_a_block(method):
    model, x = make_network("dynconv"), images()
    for block in model.modules():
        if type(block) is SparseBasicBlock:
            block.__class__ = doubled(SparseBasicBlock, method)
    with timm_dynamic.use("formula"):
        expected = run(model, x)
    for one in (model, timm_dynamic.optimize(model, x)):
        close(run(one, x), expected)


@pytest.mark.parametrize("part", ["layer1.0", "layer1.0.conv1", "layer1.0.bn2"])
@pytest.mark.parametrize("family", [family for family in NETWORKS if family in ("dynconv", "od")])
def test_forwards_of_instances_in_optimized_models(family, part):
    model, x = make_network(family), images()
    module = model.get_submodule(part)
    forward = module.forward
    module.forward = lambda *args: 1.5 * forward(*args)
    with timm_dynamic.use("formula"):
        expected = run(model, x)
    close(run(timm_dynamic.optimize(model, x), x), expected)
