"""Every golden case: parameters, outputs, loss and every gradient of the authors' code."""

import copy

import pytest
import timm
import torch
from golden import CASES, NO_MODELS, Golden, check_logits, set_schedule

import timm_dynamic
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
    families = {family_of(Golden(case).model).name for case in CASES if case not in NO_MODELS}
    families |= {layer.family for make in NO_MODELS.values() if hasattr(layer := make(), "family")}
    assert families == set(FAMILIES) and set(NO_MODELS) <= set(CASES)


def test_parameters(case, loaded):
    """Their number; the file has loaded strictly, so that names and shapes are right."""
    assert sum(p.numel() for p in loaded.parameters()) == case.case["num_params"]
    if case.name not in NO_MODELS:
        assert timm.is_model(case.model) and case.model in family_of(case.model).models


PRECISIONS = (
    (torch.float32, 1e-4, torch.channels_last),  # in which kernels run
    (torch.float64, 1e-7, torch.contiguous_format),
)


@torch.no_grad()
def test_evaluation(case, loaded):
    """Of an image alone, too; with masks, executed in every way. Large networks have float64 in training alone."""
    for dtype, tolerance, layout in PRECISIONS[: 1 if case.case["num_params"] > 5e6 else 2]:
        x = case.input().to(dtype, memory_format=layout)
        for setting, expected in case.parts("eval").items():
            model = copy.deepcopy(loaded).to(dtype, memory_format=layout).eval()
            set_schedule(model, setting, expected)
            for execution in ("sparse", "dense", "auto") if hasattr(model, "execution") else (None,):
                if execution:
                    model.execution = execution
                outputs = [case.output(model, x)]
                if execution in ("sparse", None):
                    outputs.append(joined(others(outputs[0]), case.output(model, x[-1:])))
                for output in outputs:
                    check_logits(output, expected, tolerance)


@torch.no_grad()
def test_more_of_evaluation(case, model):
    """Features, images of another size, and the model with its norms folded, where the authors' numbers are there."""
    model, x, features = model.double().eval(), case.input().double(), {}
    modules = {info["reduction"]: info["module"] for info in getattr(model, "feature_info", ())}
    wanted = {modules[feature["reduction"]]: feature for feature in case.case.get("features", ())}
    handles = [model.get_submodule(name).register_forward_hook(keep(features, name)) for name in wanted]
    if wanted:
        model(x)
    for name, feature in wanted.items():
        assert list(features[name].shape) == feature["shape"]
        close = {"rtol": 0, "atol": 1e-7 * feature["std"]}
        numbers = torch.tensor([*feature["first8"], feature["mean"], feature["std"]], dtype=torch.float64)
        seen = torch.cat([features[name][0].flatten()[:8], features[name].mean()[None], features[name].std()[None]])
        torch.testing.assert_close(seen, numbers, **close)
    for handle in handles:
        handle.remove()
    if "eval_other_size" in case.case:
        check_logits(model(case.input("eval_other_size").double()), case.case["eval_other_size"], 1e-7)
    if "fused" in case.case:
        fused, tables = case.case["fused"], sum(kind == "offset_index" for _, kind in case.rows.values())
        fast = timm_dynamic.optimize(model, x, memory_format=torch.contiguous_format)
        assert sum(p.numel() for p in fast.parameters()) == fused["num_params"]
        assert len(fast.state_dict()) + tables == fused["num_keys"]
        check_logits(fast(x), case.case["eval"], 1e-7)


def others(output):
    """That of all images but the last."""
    return [one[:-1] for one in output] if isinstance(output, list) else output[:-1]


def joined(*outputs):
    return [*map(torch.cat, zip(*outputs, strict=True))] if isinstance(outputs[0], list) else torch.cat(outputs)


def keep(features, name):
    def hook(module, args, y):
        features[name] = y.clone()

    return hook


def test_training(case, loaded):
    """Large networks are at one point of the schedule, which their family's small ones are at every point of."""
    settings = list(case.parts("train").items())
    for setting, part in settings[-1:] if case.case["num_params"] > 12e6 else settings:
        x = case.input("train", setting).double()
        model = copy.deepcopy(loaded).double().train()
        set_schedule(model, setting, part)
        if "output_head_dist" in part:
            model.set_distilled_training()
        x.requires_grad_("input_grad_norm" in part)
        output = case.output(model, x)
        outputs = output if isinstance(output, tuple) else (output,)
        for key, one in zip(("output_head", "output_head_dist"), outputs, strict=False):
            if key in part:
                check_logits(one, {"logits": part[key], "std": one.std().item()}, 1e-7)
        if "output" in part:
            check_logits(output, part["output"], 1e-7)
        task_loss, terms = case.task_loss(output, part), auxiliary_loss(model)
        terms_of_loss = part["loss_terms"] or {}
        if "im_loss_per_layer" in terms_of_loss:  # of PED: each layer's
            per_layer = terms_of_loss["im_loss_per_layer"].items()
            per_layer = {name.replace(".attn", ".reconstruction"): value for name, value in per_layer}
            assert {name: 1000 * term.item() for name, term in terms.items()} == pytest.approx(per_layer, rel=1e-6)
        assert not any(term.requires_grad for term in terms.values())  # nobody can add them a second time
        terms = sum(terms.values())
        if "task_weight" not in terms_of_loss:
            assert task_loss.item() == pytest.approx(terms_of_loss.get("task", part["loss"]), rel=1e-6)
        assert (task_loss + terms).item() == pytest.approx(part["loss"], rel=1e-6)
        task_loss.backward()  # the terms' gradients are attached inside the model
        if x.requires_grad:
            assert x.grad.norm().item() == pytest.approx(part["input_grad_norm"], rel=1e-6)
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        wanted = case.grad_norms(model, part)
        assert norms.keys() == wanted.keys()
        zero = 1e-9 * max(wanted.values())
        for name, norm in wanted.items():
            assert norms[name] == pytest.approx(norm, rel=1e-6, abs=zero if norm == 0 else 0), name
