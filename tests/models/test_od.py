"""What only the networks with ODConv have."""

import pytest
import timm
import torch

import timm_dynamic
from timm_dynamic.families import FAMILIES
from timm_dynamic.layers import ODConv2d

# Counted from the authors' code.
PARAMETERS = {
    "od_resnet18": 11_943_944,
    "od_resnet18_4x": 44_901_640,
    "od_resnet34": 22_290_168,
    "od_resnet34_4x": 85_551_288,
    "od_resnet50": 28_635_112,
    "od_resnet50_4x": 90_670_888,
    "od_resnet101": 50_818_769,
    "od_resnet101_2x": 90_441_623,
    "od_mobilenetv2": 4_940_185,
    "od_mobilenetv2_4x": 11_512_149,
    "od_mobilenetv2_075": 3_507_113,
    "od_mobilenetv2_075_4x": 7_496_013,
    "od_mobilenetv2_050": 2_425_537,
    "od_mobilenetv2_050_4x": 4_435_501,
}


def test_parameters():
    counts = {
        name: sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
        for name in FAMILIES["od"].models
        if not name.startswith("test_")
    }
    assert counts == PARAMETERS


def test_what_is_dynamic():
    for name, count in (("od_resnet18", 16), ("od_resnet50", 48), ("od_mobilenetv2", 51)):
        layers = [one for one in timm.create_model(name, device="meta").modules() if isinstance(one, ODConv2d)]
        assert len(layers) == count


def test_temperature_is_annealed_once_for_all_layers():
    model, x = timm.create_model("test_od_resnet", anneal_steps=4).train(), torch.randn(2, 3, 32, 32)
    layers = [one for one in model.modules() if isinstance(one, ODConv2d)]
    for expected in (22.75, 15.5, 8.25, 1.0, 1.0):
        model(x)
        assert {layer.temperature().item() for layer in layers} == {expected}
    timm_dynamic.set_progress(model, 5, 100)
    assert {layer.temperature().item() for layer in layers} == {15.5}
    with pytest.raises(ValueError, match="anneal_steps"):
        timm.create_model("test_od_resnet", anneal_steps=0)


def test_one_image_in_training():
    model = timm.create_model("test_od_resnet").train()
    model(torch.randn(1, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
