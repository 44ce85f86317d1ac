"""DynConv networks: masks and loss terms of the authors. Outputs and gradients are in tests/test_golden.py."""

import copy

import pytest
import torch
from dynconv_networks import run
from golden import set_schedule

from timm_dynamic import auxiliary_loss, count_macs, optimize
from timm_dynamic.cost import count_active


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


@pytest.fixture(scope="module", params=["dynconv_resnet32", "dynconv_resnet101", "dynconv_hourglass_s0125"])
def case(request, golden):
    return golden(request.param)


@pytest.fixture(scope="module")
def loaded(case, tmp_path_factory):
    return case.network(tmp_path_factory.mktemp("authors"))


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@pytest.mark.parametrize(
    ("dtype", "optimized"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)], ids=str
)
def test_masks_in_evaluation(case, model, dtype, optimized):
    model, x = model.to(dtype).eval(), case.input().to(dtype)
    if optimized:
        model = optimize(model, x, memory_format=torch.channels_last)
    counts = observe(model)
    for execution in ("dense", "sparse", "auto"):
        counts.clear()
        run(model, x, execution)
        wanted = [[masks["hard_active"], masks["dilated_active"]] for masks in case.case["eval"]["masks"]]
        assert counts == wanted, execution


def test_masks_and_terms_in_training(case, model):
    train = case.case["train"]
    terms, weight = train["loss_terms"], train["loss_terms"]["sparsity_weight"]
    set_schedule(model.double().train(), "", train)
    counts = observe(model)
    model(case.input("train").double())
    assert counts == [[masks["hard_active"], masks["dilated_active"]] for masks in train["masks"]]
    assert {name: term.item() for name, term in auxiliary_loss(model).items()} == {
        "network_budget": pytest.approx(weight * terms["loss_sp_network"], rel=1e-6),
        "block_budget": pytest.approx(weight * terms["loss_sp_block"], rel=1e-6),
    }


def test_macs(case, model):
    """Of an image, and the mean of a batch; and the positions that they are counted from."""
    x, expected = case.input(), case.case["eval"]["macs"]
    assert count_macs(model, x[-1:]).executed == expected["per_image"][-1]
    counted = count_macs(model, x)
    assert counted.executed == expected["batch_average"] < counted.static
    with torch.no_grad(), count_active(model.eval()) as active:
        model(x)
    for block, masks in zip(active.blocks.values(), case.case["eval"]["masks"], strict=True):
        assert block.active == sum(masks["hard_active"])
        assert block.dilated_active == sum(masks["dilated_active"])


def test_macs_per_position(case, model):
    ours = [list(block.macs_per_position()) for block in model.masked_blocks()]
    masks = [mask["flops_per_position"] for mask in case.case["eval"]["masks"]]
    assert ours == [[mask["dilated"], mask["hard"]] for mask in masks]
