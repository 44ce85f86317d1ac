"""Auxiliary terms as a part of the task's loss."""

import contextlib
import copy

import pytest
import timm
import torch
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from torch import nn

from timm_dynamic.families import FAMILIES
from timm_dynamic.layers.auxiliary import _warn_once
from timm_dynamic.training import DynamicTask, add_terms, auxiliary_loss

OPTIONS = {"zero_init_last": False}  # a branch that ends in zeros would hide what is before
TWO_STAGES = {"layers": (1, 1, 0, 0), "channels": (16, 24, 24, 24)}
WITH_TERMS = {name: family for name, family in FAMILIES.items() if family.terms}
BATCHES = torch.randn(4, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(6)


def build(kind, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    options = {"num_classes": 10, **OPTIONS, **kwargs}
    return timm.create_model(FAMILIES[kind].tiny, **options).to(dtype).train()


def plain(model, batches, dtype=None):
    """Gradients of a loop that knows nothing of the terms."""
    torch.manual_seed(1)
    for x in batches:
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(model(x), TARGET)
        (loss / len(batches)).backward()
    return gradients(model)


def with_task(task, batches, dtype=None, scaler=None, factor=1.0):
    torch.manual_seed(1)
    for x in batches:
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            loss = task(x, TARGET)["loss"]
        loss = factor * loss / len(batches)
        (scaler.scale(loss) if scaler else loss).backward()
    return gradients(task.get_trainable_module())


def gradients(model):
    model = getattr(model, "_orig_mod", model)
    return {name: p.grad for name, p in model.named_parameters()}


every_kind = pytest.mark.parametrize("kind", WITH_TERMS)


@every_kind
class TestGradients:
    """They are those of the attached form, however the model is run."""

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_same_as_attached(self, kind, dtype):
        model = build(kind)
        task = DynamicTask(copy.deepcopy(model), nn.CrossEntropyLoss(), verbose=False)
        expected = plain(model, BATCHES[:1], dtype)
        torch.testing.assert_close(with_task(task, BATCHES[:1], dtype), expected, rtol=0, atol=0)

    def test_accumulation(self, kind):
        """`aux_scale` by hand and the task agree; what the model's own says no longer counts."""
        model = build(kind, aux_scale=1 / 4)
        task = DynamicTask(copy.deepcopy(model), nn.CrossEntropyLoss(), verbose=False)
        torch.testing.assert_close(with_task(task, BATCHES), plain(model, BATCHES))

    def test_any_factor(self, kind):
        model = build(kind, torch.float64)
        task = DynamicTask(copy.deepcopy(model), nn.CrossEntropyLoss(), verbose=False)
        x = BATCHES[:1].double()
        tripled = {name: grad / 3.7 for name, grad in with_task(task, x, factor=3.7).items()}
        torch.testing.assert_close(tripled, plain(model, x), rtol=1e-9, atol=1e-12)

    def check_factors(self, model, task):
        for factor in (1.0, 4096.0, 1 / 3):
            model.zero_grad()
            task.zero_grad()
            found = {name: grad / factor for name, grad in with_task(task, BATCHES[:1], factor=factor).items()}
            torch.testing.assert_close(found, plain(model, BATCHES[:1]), rtol=1e-3, atol=1e-5)

    def test_checkpointing(self, kind):
        model = build(kind)
        other = copy.deepcopy(model)
        other.set_grad_checkpointing()
        self.check_factors(model, DynamicTask(other, nn.CrossEntropyLoss(), verbose=False))

    def test_compiling(self, kind):
        """Without compiling again for another factor, which has its value only when the backward pass begins."""
        torch._dynamo.reset()
        model = build(kind, **FAMILIES[kind].exact, **(TWO_STAGES if kind == "ped" else {}))
        other = copy.deepcopy(model)
        if kind == "ped":  # Dynamo cannot checkpoint DynConv's blocks: they hand out their costs
            other.set_grad_checkpointing()
        task = DynamicTask(other, nn.CrossEntropyLoss(), verbose=False)
        task.compile(backend="aot_eager", fullgraph=True)
        with_task(task, BATCHES[:1])
        with torch._dynamo.config.patch(error_on_recompile=True):
            self.check_factors(model, task)

    def test_float16(self, kind):
        """Scaled and unscaled again, the terms have the gradients of float32; in a plain loop they are lost."""

        def nothing(output, target):
            return 0 * output.float().sum()

        model = build(kind, **FAMILIES[kind].exact)
        nothing(model(BATCHES[0]), TARGET).backward()
        task = DynamicTask(build(kind, **FAMILIES[kind].exact), nothing, verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        optimizer = torch.optim.SGD(task.parameters(), 1.0)
        with_task(task, BATCHES[:1], torch.float16, scaler)
        scaler.unscale_(optimizer)
        found, expected = (
            torch.cat([g.flatten() for g in gradients(m).values()]) for m in (task.trainable_module, model)
        )
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_float16_is_exact():
    """PED's decoders learn from the terms alone, in float32: scaling by a power of two changes no bit."""
    model = build("ped")
    found = []
    for scale in (1.0, 2.0**12):
        task = DynamicTask(copy.deepcopy(model), nn.CrossEntropyLoss(), verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with_task(task, BATCHES[:2], torch.float16, scaler)
        scaler.unscale_(torch.optim.SGD(task.parameters(), 1.0))
        found.append({k: g for k, g in gradients(task.get_trainable_module()).items() if ".decoder." in k})
    assert any(grad.any() for grad in found[0].values())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@every_kind
def test_warning(kind, recwarn):
    """In float16, of a plain loop, and once; it names the ways out."""
    _warn_once.cache_clear()
    model = build(kind)
    task = DynamicTask(copy.deepcopy(model), nn.CrossEntropyLoss(), verbose=False)
    with_task(task, BATCHES[:1], torch.float16)
    assert not [w for w in recwarn if "timm_dynamic" in str(w.message)]
    for _ in range(2):
        plain(model, BATCHES[:1], torch.float16)
    (message,) = [str(w.message) for w in recwarn if "timm_dynamic" in str(w.message)]
    assert "timm_dynamic.training.DynamicTask" in message and "bfloat16" in message


@every_kind
def test_result(kind):
    model = build(kind)
    task = DynamicTask(model, nn.CrossEntropyLoss(), verbose=False)
    result = task(BATCHES[0], TARGET)
    names = FAMILIES[kind].terms
    assert result.keys() == {"loss", "base_loss", "output", *names}
    torch.testing.assert_close(result["base_loss"], nn.functional.cross_entropy(result["output"], TARGET))
    torch.testing.assert_close(sum(result[name] for name in names), sum(auxiliary_loss(model).values()))
    torch.testing.assert_close(result["loss"], result["base_loss"] + sum(result[name] for name in names))
    assert all(result[name] > 0 and not result[name].requires_grad for name in names)
    with torch.no_grad():
        assert not task(BATCHES[0], TARGET)["loss"].requires_grad
    model.eval()  # nothing is trained, and the terms are of another batch
    result = task(BATCHES[0], TARGET)
    assert result.keys() == {"loss", "base_loss", "output"} and torch.equal(result["loss"], result["base_loss"])


def test_a_model_without_terms():
    model = timm.create_model("test_resnet", num_classes=10)
    assert DynamicTask(model, verbose=False)(BATCHES[0], TARGET).keys() == {"loss", "output"}


def test_a_backward_pass_twice():
    model = build("ped")
    task = DynamicTask(model, nn.CrossEntropyLoss(), verbose=False)
    loss = task(BATCHES[0], TARGET)["loss"]
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in gradients(model).items()}
    loss.backward()
    torch.testing.assert_close(gradients(model), {name: 2 * grad for name, grad in once.items()})


@every_kind
def test_averaged_weights(kind):
    """The average is a copy of the model, made before or after the first step, and saved without what the task adds."""
    model = build(kind)
    before = model.state_dict().keys()
    task = DynamicTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    task(BATCHES[0], TARGET)["loss"].backward()
    task.setup_ema(decay=0.5)
    optimizer.step()
    task.update_ema(step=5)
    state = task.get_checkpoint_state(ema=True)["state_dict_ema"]
    assert state.keys() == before == model.state_dict().keys()
    assert all(value.isfinite().all() for value in state.values())
    assert not torch.equal(state["fc.weight"], model.state_dict()["fc.weight"])


@pytest.mark.parametrize("form", [LogitDistillationTask, FeatureDistillationTask])
def test_distillation(form):
    """Of the terms beside the task's and the teacher's, under a factor."""
    teacher = timm.create_model("test_ddf_resnet", num_classes=10)
    model = build("ped", torch.float32)
    torch.manual_seed(3)
    tasks = [form(copy.deepcopy(model), teacher, nn.CrossEntropyLoss(), verbose=False) for _ in range(2)]
    if form is FeatureDistillationTask and tasks[0].trainable_module.projection is not None:
        projections = [task.trainable_module.projection for task in tasks]
        projections[1].load_state_dict(projections[0].state_dict())
    torch.manual_seed(1)
    tasks[0](BATCHES[0], TARGET)["loss"].backward()
    expected = gradients(tasks[0].get_trainable_module())
    result = add_terms(tasks[1])
    torch.manual_seed(1)
    result = tasks[1](BATCHES[0], TARGET)
    assert {"loss", "base_loss", "output", "task_loss", "kd_loss", "reconstruction"} == result.keys()
    (1024 * result["loss"]).backward()
    found = {name: grad / 1024 for name, grad in gradients(tasks[1].get_trainable_module()).items()}
    torch.testing.assert_close(found, expected)


@every_kind
def test_the_terms_fall_in_a_plain_loop(kind):
    """As in timm's own script, which knows nothing of them; and they would not by themselves."""
    last = []
    for aux_scale in (1.0, 0.0):
        model = build(kind, aux_scale=aux_scale, **({} if kind == "ped" else {"total_steps": 40}))
        task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
        seen = []
        for step in range(25):
            optimizer.zero_grad()
            task(BATCHES[step % 4], TARGET)["loss"].backward()
            optimizer.step()
            seen.append(sum(auxiliary_loss(model).values()).item())
        last.append(sum(seen[-4:]) / sum(seen[:4]))
    assert last[0] < 0.95 and last[0] < 0.95 * last[1], last


TWO_PROCESSES = """
import timm, torch
from torch import nn
import timm_dynamic
from timm_dynamic.training import DynamicTask

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
found = {}
for case, (name, options, ddp_options, unused) in torch.load("cases.pt").items():
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).train()
    model.load_state_dict(torch.load(f"{name}.pt"))
    if unused:
        model.unused = nn.Parameter(torch.zeros(3))
    task = DynamicTask(model, nn.CrossEntropyLoss(), verbose=False)
    task.prepare_distributed(**ddp_options)
    batches = torch.load("batches.pt")[2 * rank : 2 * rank + 2]
    for step, x in enumerate(batches):  # accumulated, and the optimizer's step scaled
        with task.no_sync() if step == 0 and "static_graph" not in ddp_options else torch.enable_grad():
            (256 * task(x, torch.arange(6))["loss"] / 2).backward()
    found[case] = {name: p.grad / 256 for name, p in model.named_parameters() if p.grad is not None}
if rank == 0:
    torch.save(found, "found.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes(tmp_path, processes):
    """Their mean gradients are those of one process that sees the four batches."""
    cases, expected = {}, {}
    for kind, family in WITH_TERMS.items():
        name = family.tiny
        model = build(kind, **FAMILIES[kind].exact, aux_scale=1 / 4)
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
        for ddp, unused in (({}, False), ({"static_graph": True}, False), ({"find_unused_parameters": True}, True)):
            case = f"{kind} {ddp}"
            cases[case] = (name, {**OPTIONS, **family.exact}, ddp, unused)
            expected[case] = model
        plain(model, BATCHES)
    torch.save(cases, tmp_path / "cases.pt")
    torch.save(BATCHES, tmp_path / "batches.pt")
    logs = processes.ranks(folder=tmp_path, code=TWO_PROCESSES)
    assert [status for status, _ in logs] == [0, 0], logs
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == expected.keys()
    for case, model in expected.items():
        torch.testing.assert_close(
            found[case], gradients(model), rtol=1e-3, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}"
        )
