"""Networks of every family in torch's ways to train on several devices, in one process."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from module_cases import NETWORKS, close, images, leaves, make_network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from timm_dynamic.families import FAMILIES
from timm_dynamic.layers import Warehouse
from timm_dynamic.layers.base import DynamicLayer


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    store = dist.FileStore(os.fspath(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model, how):
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("all",))
    for part in model.modules() if how in ("blocks", "layers") else ():
        if isinstance(part, Warehouse):  # what several of them have is sharded by itself, before them
            fully_shard(part, mesh=mesh)
    if how == "blocks":
        for name in ("layer1", "layer2", "layer3"):
            for block in getattr(model, name, ()):
                fully_shard(block, mesh=mesh)
    elif how == "layers":
        for layer in [one for one in model.modules() if isinstance(one, DynamicLayer)][::-1]:
            fully_shard(layer, mesh=mesh)
    elif how == "leaves":
        for part in leaves(model).values():
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    ("family", "how"),
    [(f, how) for i, f in enumerate(NETWORKS) for how in ("leaves", ("layers", "blocks", "root")[i % 3])],
)
def test_fully_sharded(family, how):
    # In float32 a rounding may be the other side of a ReLU.
    model, x = make_network(family, torch.float64), images(4, dtype=torch.float64)
    sharded = shard(copy.deepcopy(model), how)
    optimizers = [torch.optim.SGD(one.parameters(), 1e-4) for one in (model, sharded)]
    for _ in range(2):
        with torch.no_grad():
            close(sharded.eval()(x), model.eval()(x))
        torch.manual_seed(0)
        model.train()(x).square().mean().backward()
        torch.manual_seed(0)
        sharded.train()(x).square().mean().backward()
        close(*(torch.cat([full(p.grad).flatten() for p in one.parameters()]) for one in (sharded, model)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize(
    ("family", "static_graph"),
    [(f, static) for f in NETWORKS for static in ((False, True) if FAMILIES[f].terms else (False,))],
)
def test_distributed_data_parallel(family, static_graph):
    model, x = make_network(family).train(), images(4)
    wrapped = DistributedDataParallel(copy.deepcopy(model), static_graph=static_graph)
    for _ in range(2):
        for one in (model, wrapped):
            one.zero_grad()
            one(x).square().mean().backward()
        close(*(torch.cat([p.grad.flatten() for p in one.parameters()]) for one in (wrapped, model)))
    with torch.no_grad():
        close(wrapped.eval()(x), model.eval()(x))
