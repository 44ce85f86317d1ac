"""Every golden case: parameters, outputs, loss and every gradient of the authors' code."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import CASES, NO_MODELS, check_logits, set_schedule

from timm_dynamic import auxiliary_loss
from timm_dynamic.families import FAMILIES, family_of


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    return golden(request.param)


@pytest.fixture(scope="module")
def loaded(case, tmp_path_factory):
    torch.manual_seed(0)
    return case.network(tmp_path_factory.mktemp("authors"))


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


def test_every_family_has_a_case():
    cases = {family for family in FAMILIES for case in CASES if case.startswith(f"{family}_")}
    assert cases == set(FAMILIES) and set(NO_MODELS) <= set(CASES)


def test_parameters(case, model):
    """Their number; the file has loaded strictly, so that names and shapes are right."""
    assert sum(p.numel() for p in model.parameters()) == case.case["num_params"]
    if case.name not in NO_MODELS:
        assert timm.is_model(case.model) and case.model in family_of(case.model).models


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-4)], ids=str)
@torch.no_grad()
def test_evaluation(case, model, dtype, tolerance, layout):
    """One by one, too; with masks, executed in every way."""
    model, x = model.to(dtype, memory_format=layout).eval(), case.input().to(dtype, memory_format=layout)
    for setting, expected in case.parts("eval").items():
        set_schedule(model, setting, expected)
        for execution in ("sparse", "dense", "auto") if hasattr(model, "execution") else (None,):
            if execution:
                model.execution = execution
            for output in (case.output(model, x), torch.cat([case.output(model, one) for one in x.split(1)])):
                check_logits(output, expected, tolerance)
                assert output.double().std().item() == pytest.approx(expected["std"], rel=10 * tolerance)


def test_training(case, loaded):
    x = case.input("train").double()
    for setting, part in case.parts("train").items():
        model = copy.deepcopy(loaded).double().train()
        set_schedule(model, setting, part)
        output = case.output(model, x)
        if "output_head" in part:
            head = torch.tensor(part["output_head"], dtype=torch.float64)
            torch.testing.assert_close(output[:, : head.shape[1]], head, rtol=0, atol=1e-7 * output.std().item())
        task_loss, terms = F.cross_entropy(output, torch.tensor(part["targets"])), sum(auxiliary_loss(model).values())
        assert task_loss.item() == pytest.approx((part["loss_terms"] or {}).get("task", part["loss"]), rel=1e-6)
        assert (task_loss + terms).item() == pytest.approx(part["loss"], rel=1e-6)
        task_loss.backward()  # the terms' gradients are attached inside the model
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        wanted = case.grad_norms(model, part)
        assert norms.keys() == wanted.keys()
        zero = 1e-9 * max(wanted.values())
        for name, norm in wanted.items():
            assert norms[name] == pytest.approx(norm, rel=1e-6, abs=zero if norm == 0 else 0), name
