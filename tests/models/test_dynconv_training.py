"""DynConv networks in training: budget, schedules, steps, compiled."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dynconv_networks import build, create, every_kind, image

from timm_dynamic import auxiliary_loss, set_progress
from timm_dynamic.layers.budget import Budget
from timm_dynamic.models.dynconv_resnet import checkpoint_filter_fn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def budget_of(model):
    return next(module for module in model.modules() if isinstance(module, Budget))


def progress_of(model):
    return model.masked_blocks()[0].masker.progress


def gradients(model, x, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(x)
    output.square().mean().backward()
    own = getattr(model, "_orig_mod", model)
    return {name: p.grad.clone() for name, p in own.named_parameters()}, auxiliary_loss(own)


@every_kind
class TestTraining:
    def test_budget_loss_is_attached(self, kind):
        """Against the loss written out, with the costs that the blocks report."""
        model, x = build(kind, budget=0.3, gumbel_noise=False).train(), image(kind)
        set_progress(model, 0.11, 1)  # a third of the annealing: q = cos(pi/6)^2 = 3/4
        own, terms = gradients(model, x)
        costs, budget_of(model).aux_scale = [], 0.0
        for block in model.masked_blocks():
            block.masker.register_forward_hook(lambda _, args, mask, block=block: costs.append(block.cost(mask, *args)))
        model.zero_grad()
        task_loss = model(x).square().mean()
        executed, total = (torch.stack(column) for column in zip(*costs, strict=True))
        network = 10 * (executed.sum() / total.sum() - 0.3) ** 2
        p, upper, lower = executed / total, 1 - 0.75 * 0.7, 0.75 * 0.3
        blocks = 10 * (F.relu(p - upper) ** 2 + F.relu(lower - p) ** 2).mean()
        torch.testing.assert_close(terms, {"network_budget": network.detach(), "block_budget": blocks.detach()})
        (task_loss + network + blocks).backward()
        torch.testing.assert_close(own, {name: param.grad for name, param in model.named_parameters()})

    def test_aux_scale(self, kind):
        models = [build(kind, gumbel_noise=False, aux_scale=scale).train() for scale in (0.0, 0.5, 1.0)]
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())
        (none, half, whole), x = models, image(kind)
        none, half, whole = (gradients(model, x)[0] for model in models)
        torch.testing.assert_close(
            {name: whole[name] - none[name] for name in whole}, {name: 2 * (half[name] - none[name]) for name in whole}
        )
        stem = "conv_stem.weight" if kind == "inverted" else "conv1.weight"
        assert not torch.allclose(whole[stem], none[stem])

    def test_weight_of_the_budget(self, kind):
        usual, other = (build(kind, gumbel_noise=False, **kwargs).train() for kwargs in ({}, {"budget_weight": 20.0}))
        other.load_state_dict(usual.state_dict())
        x = image(kind)
        (_, terms), (_, twice) = (gradients(model, x) for model in (usual, other))
        torch.testing.assert_close({key: 2 * value for key, value in terms.items()}, twice)

    def test_checkpointing_changes_nothing(self, kind):
        """The noise in recomputation and the gradient of the budget included."""
        model, x = build(kind).train(), image(kind)
        other = copy.deepcopy(model)
        other.set_grad_checkpointing()
        torch.testing.assert_close(gradients(other, x), gradients(model, x))

    def test_terms(self, kind):
        model, x = create(kind), image(kind)
        zero = {"network_budget": torch.tensor(0.0).double(), "block_budget": torch.tensor(0.0).double()}
        torch.testing.assert_close(auxiliary_loss(model), zero)
        model.eval()(x)
        torch.testing.assert_close(auxiliary_loss(model), zero)
        output = model.train()(x)
        terms = auxiliary_loss(model)
        assert all(term > 0 and not term.requires_grad for term in terms.values())
        other = copy.deepcopy(model)  # before the backward pass
        torch.testing.assert_close(auxiliary_loss(other), terms)
        assert not terms.keys() & model.state_dict().keys()
        output.sum().backward()

    def test_features_train_with_a_budget(self, kind):
        model = create(kind, features_only=True, out_indices=(1, 2))
        for _ in range(2):
            sum(feature.square().mean() for feature in model(image(kind))).backward()
        assert all(p.grad is not None for p in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.filterwarnings("ignore:timm_dynamic. in float16")
    def test_autocast(self, kind, dtype):
        model = build(kind).float().train()
        with torch.autocast("cpu", dtype):
            loss = model(10 * image(kind, 4).float()).float().logsumexp(1).mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert all(term.isfinite() for term in auxiliary_loss(model).values())


@pytest.mark.parametrize("kind", ["basic", "inverted"])
class TestSteps:
    def test_count_training_forwards(self, kind):
        model, x = build(kind, total_steps=10).train(), image(kind)
        progress = progress_of(model)
        for step in range(12):
            assert progress() == pytest.approx(min(step / 10, 1))
            model(x)
            assert progress(training=True) == pytest.approx(min(step / 10, 1))
        model.eval()(x)
        assert progress() == 1

    def test_drive_temperature_and_noise(self, kind):
        model = build(kind, total_steps=100, temperature=(5.0, 2.5, 1.0)).train()
        unit, seen = model.masked_blocks()[0].masker, {}
        for step in (0, 29, 30, 59, 60, 80, 81, 99):
            unit.progress.done.fill_(unit.progress.step * (step + 1))  # as it is during the forward of this step
            unit.progress.counts = False
            x = torch.zeros(1, unit.in_channels, 9, 9, dtype=torch.float64, requires_grad=True)
            unit.gumbel_noise = False
            mask, soft = unit(x), torch.sigmoid(unit.maskconv(x) / (5.0 if step < 30 else 2.5 if step < 60 else 1.0))
            expected = torch.autograd.grad(soft.sum(), x)
            torch.testing.assert_close(torch.autograd.grad(mask.sum(), x), expected)
            unit.gumbel_noise = True
            seen[step] = not torch.equal(unit(x), unit(x))
        assert seen == {step: step <= 80 for step in seen}

    def test_resume(self, kind):
        model, x = build(kind, total_steps=10).train(), image(kind)
        for _ in range(4):
            model(x)
        other = build(kind, total_steps=10).train()
        other.load_state_dict(checkpoint_filter_fn({"state_dict": model.state_dict()}, other))
        assert progress_of(other)() == progress_of(model)() == pytest.approx(0.4)
        torch.testing.assert_close(gradients(other, x), gradients(model, x))
        plain = build(kind, budget=-1)  # has no schedule, and does not mind that of others
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".masker." not in k})

    def test_set_progress_goes_first(self, kind):
        model = build(kind, total_steps=10).train()
        for _ in range(2):
            model(image(kind))
            set_progress(model, 3, 4)
            assert progress_of(model)() == 0.75


class TestCompiledTraining:
    def test_gradients(self):
        """The budget loss' among them."""
        model, x = build(gumbel_noise=False).train(), image()
        set_progress(model, 1, 10)
        other = copy.deepcopy(model)
        torch._dynamo.reset()
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradients(compiled, x), gradients(model, x))

    def test_schedules_do_not_compile_again(self):
        model, x = build(total_steps=10).train(), image()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for epoch in (None, None, 4, 9):
                if epoch:
                    set_progress(model, epoch, 10)
                compiled(x).sum().backward()
        assert progress_of(model)() == pytest.approx(0.9)
