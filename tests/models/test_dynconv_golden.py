"""DynConv networks: the authors' numbers."""

import pytest
import timm
import torch
import torch.nn.functional as F
from dynconv_networks import run

from timm_dynamic import auxiliary_loss, set_progress
from timm_dynamic.convert import convert, load_checkpoint


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


@pytest.fixture(scope="module", params=["dynconv_resnet32", "dynconv_resnet101"])
def case(request, golden):
    return golden(request.param)


@pytest.fixture(scope="module")
def converted(case, tmp_path_factory):
    """From a file as the authors' scripts write it."""
    folder = tmp_path_factory.mktemp("authors")
    saved = {"state_dict": case.state(), "optimizer": {}, "epoch": 1, "best_prec1": 70.0}
    torch.save(saved, folder / "checkpoint.pth")
    model = timm.create_model(case.case["case"])
    convert(folder / "checkpoint.pth", folder / "ours.safetensors", model)
    return folder / "ours.safetensors"


class TestGolden:
    """Parameters, masks, outputs, loss terms and every gradient of the authors' code."""

    @pytest.fixture
    def model(self, case, converted):
        model = timm.create_model(case.case["case"], gumbel_noise=False)
        load_checkpoint(model, converted)
        return model

    def test_parameters_and_their_names(self, case, model):
        assert sum(p.numel() for p in model.parameters()) == case.case["num_params"]
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == {
            key: shape for key, (shape, _) in case.rows.items()
        }

    @pytest.mark.parametrize("execution", ["dense", "sparse", "auto"])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-4)], ids=str)
    def test_evaluation(self, case, model, dtype, tolerance, execution):
        model, x, expected = model.to(dtype).eval(), case.input().to(dtype), case.case["eval"]
        counts = observe(model)
        output = run(model, x, execution).double()
        for sample, numbers in zip(output, expected["logits"], strict=True):
            numbers = torch.tensor(numbers, dtype=torch.float64)
            close = {"rtol": 0, "atol": tolerance * expected["std"]}
            torch.testing.assert_close(sample[: len(numbers)], numbers, **close)
        assert counts == [[masks["hard_active"], masks["dilated_active"]] for masks in expected["masks"]]

    def test_training(self, case, model):
        train = case.case["train"]
        schedule, terms = train["dynconv"], train["loss_terms"]
        set_progress(model.double().train(), schedule["epoch"], schedule["num_epochs"])
        counts = observe(model)
        output = model(case.input("train").double())
        assert counts == [[masks["hard_active"], masks["dilated_active"]] for masks in train["masks"]]
        task_loss = F.cross_entropy(output, torch.tensor(train["targets"]))
        assert task_loss.item() == pytest.approx(terms["task"], rel=1e-6)
        weight = terms["sparsity_weight"]
        assert {name: term.item() for name, term in auxiliary_loss(model).items()} == {
            "network_budget": pytest.approx(weight * terms["loss_sp_network"], rel=1e-6),
            "block_budget": pytest.approx(weight * terms["loss_sp_block"], rel=1e-6),
        }
        task_loss.backward()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        assert norms.keys() == train["grad_norms"].keys()
        zero = 1e-9 * max(train["grad_norms"].values())
        for name, expected in train["grad_norms"].items():
            assert norms[name] == pytest.approx(expected, rel=1e-6, abs=zero if expected == 0 else 0), name

    def test_macs_per_position(self, case, model):
        ours = [list(block.macs_per_position()) for block in model.masked_blocks()]
        masks = [mask["flops_per_position"] for mask in case.case["eval"]["masks"]]
        assert ours == [[mask["dilated"], mask["hard"]] for mask in masks]
