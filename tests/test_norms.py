"""Norms of any kind in the place of a network's and its layers', in every family."""

import copy

import pytest
import torch
from module_cases import NETWORKS, close, images, make_network, randomise, run, settle
from torch import nn

import timm_dynamic

EVERY_NETWORK = pytest.mark.parametrize("family", NETWORKS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def dtype_of(family):
    return torch.float64 if family == "lsnet" else None  # its last norm amplifies rounding


class TestNorms:
    """Any norm in the place of a layer's or network's."""

    @pytest.mark.parametrize("kwargs", [{"affine": False, "momentum": None}, {"momentum": 0.5, "eps": 0.1}], ids=str)
    @EVERY_NETWORK
    def test_batch_norms_of_other_arguments(self, family, kwargs):
        dtype = dtype_of(family)
        model, x = make_network(family, dtype), images(4, dtype=dtype)
        for name, part in list(model.named_modules()):
            if type(part) in (nn.BatchNorm2d, nn.BatchNorm1d):
                model.set_submodule(name, type(part)(part.num_features, dtype=dtype, **kwargs))
        settle(randomise(model), x)
        self.check(model, x)

    def check(self, model, x):
        for training in (False, True):
            one, other = copy.deepcopy(model), copy.deepcopy(model)
            with timm_dynamic.use("formula"):
                expected = run(one, x, training)
            close(run(other, x, training), expected)
            if training:
                close(*(torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (other, one)))
            for (name, p), q in zip(one.named_buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(q, p, msg=name, rtol=1e-4, atol=1e-4)

    @EVERY_NETWORK
    def test_without_running_statistics(self, family):
        dtype = dtype_of(family)
        model, x = make_network(family, dtype), images(4, dtype=dtype)
        torch.func.replace_all_batch_norm_modules_(model)
        self.check(model, x)

    @EVERY_NETWORK
    def test_synchronised(self, family):
        model, x = make_network(family), images(4)
        expected = run(model, x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        close(run(converted, x), expected)
        close(run(nn.SyncBatchNorm.convert_sync_batchnorm(model), x), expected)

    @EVERY_NETWORK
    def test_group_norms(self, family):
        model = make_network(family)
        for name, part in list(model.named_modules()):
            if type(part) in (nn.BatchNorm2d, nn.BatchNorm1d):
                model.set_submodule(name, nn.GroupNorm(1, part.num_features))
        self.check(model, images(4))

    @EVERY_NETWORK
    def test_frozen(self, family):
        model, x = make_network(family).train(), images(4)
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase):
                part.eval().requires_grad_(False)
        before = {
            name: value.clone() for name, value in model.named_buffers() if "running" in name or "tracked" in name
        }
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
        model(x).square().mean().backward()
        optimizer.step()
        after = dict(model.named_buffers())
        assert all(torch.equal(after[name], value) for name, value in before.items())
