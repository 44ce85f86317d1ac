"""Whole models against numbers that the authors' code gave: parameters, outputs, loss and every gradient."""

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_dynamic  # noqa: F401 (registers the models)

CASES = ["ddf_mul_resnet50", "ddf_add_resnet50"]


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    return golden(request.param)


def build(case, dtype):
    model = timm.create_model(case.case["constructor"]["factory"])
    model.load_state_dict(case.state())
    return model.to(dtype)


def check_logits(output, expected, tolerance):
    std = expected["std"]
    for sample, numbers in zip(output.double(), expected["logits"], strict=True):
        numbers = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(sample[: len(numbers)], numbers, rtol=0, atol=tolerance * std)
    assert output.double().std().item() == pytest.approx(std, rel=10 * tolerance)


def test_parameters_and_their_names(case):
    model = timm.create_model(case.case["constructor"]["factory"])
    assert sum(p.numel() for p in model.parameters()) == case.case["num_params"]
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == [
        [key, shape] for key, (shape, _) in case.rows.items()
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-4)], ids=str)
@torch.no_grad()
def test_evaluation(case, dtype, tolerance):
    model = build(case, dtype).eval()
    check_logits(model(case.input().to(dtype)), case.case["eval"], tolerance)


def test_training(case):
    train = case.case["train"]
    model = build(case, torch.float64).train()
    output = model(case.input("train").double())
    head = torch.tensor(train["output_head"], dtype=torch.float64)
    torch.testing.assert_close(output[:, : head.shape[1]], head, rtol=0, atol=1e-7 * output.std().item())
    loss = F.cross_entropy(output, torch.tensor(train["targets"]))
    assert loss.item() == pytest.approx(train["loss"], rel=1e-6)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms.keys() == train["grad_norms"].keys()
    zero = 1e-9 * max(train["grad_norms"].values())
    for name, expected in train["grad_norms"].items():
        assert norms[name] == pytest.approx(expected, rel=1e-6, abs=zero if expected == 0 else 0), name
