"""Dynamic layers of optimized models keep how they run, as long as nobody looks at them or changes them."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic
from timm_dynamic.families import FAMILIES
from timm_dynamic.layers import DCDConv2d, DynamicConv2d, ODConv2d, PEDConv2d, base

pytestmark = pytest.mark.skipif(timm_dynamic.backend_info()["cpu"] != "loaded", reason="there are no CPU kernels here")

NAMES = sorted(f.tiny for f in FAMILIES.values() if f.layer is not None and f.layer.implementations)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def settled_layers(model):
    return [layer for layer in model.modules() if getattr(layer, "settled", None)]


@pytest.mark.parametrize("copied", [lambda fast: fast, copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
@pytest.mark.parametrize("name", NAMES)
def test_does_not_choose_again(name, copied, monkeypatch):
    model = timm.create_model(name).eval()
    fast = copied(timm_dynamic.optimize(model, X))
    layers = settled_layers(fast)
    assert len(layers) >= 4 and not settled_layers(model)
    explained = timm_dynamic.explain(fast, X)  # which makes them choose
    assert all(f": {layer.settled.row.name}" in explained for layer in layers)
    chosen = []
    monkeypatch.setattr(base, "choose", lambda layer, x: chosen.append(layer))
    y = fast(X)
    assert not set(chosen) & set(layers)
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(y, model(X), rtol=1e-4, atol=1e-4)


class Adapted(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) + 1


def hook_on_a_part(layer):
    layer.q.register_forward_hook(lambda part, args, y: y + 1)


def hook_before_a_part(layer):
    layer.fc[0].register_forward_pre_hook(lambda part, args: (args[0] + 1,))


def another_part(layer):
    layer.q = Adapted(layer.q)


def another_part_within(layer):
    layer.fc[1] = Adapted(layer.fc[1])


def forward_of_a_part(layer):
    layer.p.forward = lambda v: nn.Conv2d.forward(layer.p, v) + 1


def formula_of_the_layer(layer):
    layer.formula = lambda x: type(layer).formula(layer, x) + 1


class Doubled(torch.Tensor):
    """As quantised weights are: of another class."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args = [one.as_subclass(torch.Tensor) * 2 if isinstance(one, cls) else one for one in args]
        return function(*args, **(kwargs or {}))


def another_kind_of_weight(layer):
    layer.fc_scale._parameters["weight"] = layer.fc_scale.weight.detach().as_subclass(Doubled)


def norm_in_training(layer):
    layer.bn1.train()


@pytest.mark.parametrize(
    "change",
    [
        *(hook_on_a_part, hook_before_a_part, another_part, another_part_within, forward_of_a_part),
        *(formula_of_the_layer, another_kind_of_weight, norm_in_training),
    ],
)
def test_changed_parts_are_called(change):
    """The layer then gives what its formula gives."""
    layer = DCDConv2d(8, 12, 3, padding=1).eval()
    (fast,) = timm_dynamic.optimize(nn.Sequential(layer).eval(), torch.randn(2, 8, 9, 9))
    x = torch.randn(3, 8, 9, 9)
    with torch.no_grad():
        before = fast(x)
        assert fast.settled.holds(fast, x)
        change(fast)
        assert not fast.settled.holds(fast, x)
        y = fast(x)
        torch.testing.assert_close(y, fast.formula(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(y, before, atol=1e-2)


@torch.no_grad()
def test_calls_that_are_unlike_the_example():
    layer = DCDConv2d(8, 12, 3, padding=1).eval()
    (fast,) = timm_dynamic.optimize(nn.Sequential(layer).eval(), torch.randn(2, 8, 9, 9))
    x = torch.randn(3, 8, 9, 9)
    assert fast.settled.holds(fast, x) and fast.settled.holds(fast, x.contiguous(memory_format=torch.channels_last))
    for other in (x.double(), x[:0], x[..., ::2], x.as_subclass(nn.Buffer)):
        assert not fast.settled.holds(fast, other)
    contexts = (
        timm_dynamic.use(dcd="formula"), torch.enable_grad(), torch.autocast("cpu"), FlopCounterMode(display=False)
    )  # fmt: skip
    for context in contexts:
        with context:
            assert not fast.settled.holds(fast, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert not fast.settled.holds(fast, x)
    handle.remove()
    assert fast.settled.holds(fast, x) and not torch.vmap(lambda x: x * fast.settled.holds(fast, x[None]))(x).any()


def another_weight(fast):
    part, name = (fast.q, "weight") if isinstance(fast, DCDConv2d) else (fast, "bias")
    setattr(part, name, nn.Parameter(torch.randn_like(getattr(part, name))))


def weights_in_place(fast):
    fast.load_state_dict({name: value * 1.5 for name, value in fast.state_dict().items()})


def other_tensors_for_weights(fast):
    fast.load_state_dict({name: value * 1.5 for name, value in fast.state_dict().items()}, assign=True)


def other_data_of_weights(fast):
    fast.double()
    for value in fast.parameters():
        value.mul_(1.5)
    fast.float()


def other_data_of_the_same_weights(fast):
    for value in fast.parameters():
        value.data = value.data * 1.5


_CHANGES = [another_weight, weights_in_place, other_tensors_for_weights, other_data_of_weights]


@pytest.mark.parametrize("change", [*_CHANGES, other_data_of_the_same_weights])
@pytest.mark.parametrize("kind", [DCDConv2d, PEDConv2d, DynamicConv2d, ODConv2d])
@torch.no_grad()
def test_other_weights_are_read(kind, change):
    """And the layer need not choose again."""
    layer = nn.Sequential(kind(8, 12, 3, padding=1), nn.BatchNorm2d(12)).eval()
    (fast, _) = timm_dynamic.optimize(layer, torch.randn(2, 8, 9, 9))
    x = torch.randn(3, 8, 9, 9)
    before, read = fast(x), fast.settled.run
    fast(x)
    assert fast.settled.run is read  # once
    change(fast)
    y = fast(x)
    assert fast.settled.holds(fast, x) and not torch.allclose(y, before, atol=1e-2)
    assert fast.settled.run is read or change is not weights_in_place
    torch.testing.assert_close(y, fast.formula(x), rtol=1e-4, atol=1e-4)


def test_only_where_it_can_hold():
    model = nn.Sequential(DCDConv2d(8, 12, 3, padding=1)).double().eval()
    fast = timm_dynamic.optimize(model, torch.randn(2, 8, 9, 9).double())
    assert fast[0].settled is None and not any("fixed implementation" in line for line in fast.report)
