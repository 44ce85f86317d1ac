"""Training: the auxiliary losses that models carry."""

import warnings
from collections import defaultdict
from os.path import commonprefix

import torch
from timm.task import ClassificationTask
from timm.task.task import TrainingTask
from torch import Tensor, nn

from timm_dynamic.layers.auxiliary import attach_loss
from timm_dynamic.layers.budget import budget_loss
from timm_dynamic.layers.shared_part import all_names

__all__ = ["DynamicTask", "add_terms", "attach_loss", "auxiliary_loss", "budget_loss", "set_progress"]


def auxiliary_loss(model: nn.Module) -> dict[str, Tensor]:
    """The auxiliary loss terms of the last training forward, weighted, by `<layer>.<term>`.

    These are values, to be logged or added to a loss that is reported. Their gradients are attached inside the model
    already (see `attach_loss`): adding the terms to the loss before `backward()` is allowed and changes no gradient.

    Args:
        model: Any model. The terms are 0 before its first training forward.
    """
    places = defaultdict(list)
    for name, module in (("", model), *all_names(model)):
        if getattr(module, "auxiliary_terms", ()):
            places[module].append(name.split(".") if name else [])
    return {
        ".".join([*_owner(model, paths), term]): getattr(module, term).clone()
        for module, paths in places.items()
        for term in module.auxiliary_terms
    }


def _owner(model: nn.Module, paths: list[list[str]]) -> list[str]:
    """The path of a module: what is shared belongs to the network around all its places."""
    path = commonprefix(paths)
    while len(paths) > 1 and path and isinstance(model.get_submodule(".".join(path)), (nn.Sequential, nn.ModuleDict)):
        path.pop()
    return path


def set_progress(model: nn.Module, epoch: float, epochs: float) -> None:
    """Tell the layers with a schedule of their own how far training is; call it before every epoch, or more often.

    A checkpoint of the model holds it. Averaged copies take it over with the buffers (timm's and PyTorch's do); call it
    on others too, if they are evaluated.

    Args:
        model: Any model, wrapped or not.
        epoch: Epochs done, from 0; may be fractional. It may exceed `epochs`, as in epochs to cool down: what follows
            the share of the training that is done then stays as at the end.
        epochs: In the whole training.

    Raises:
        ValueError: If `epoch` is negative or `epochs` not positive.
    """
    if epoch < 0 or epochs <= 0:
        raise ValueError(f"epoch must not be negative and epochs must be positive, got {epoch} and {epochs}")
    if epoch >= 2 * epochs:
        warnings.warn(
            f"set_progress(model, {epoch}, {epochs}): epoch {epoch} of {epochs}, or the other way?", stacklevel=2
        )
    for module in model.modules():
        if hasattr(module, "set_progress"):
            module.set_progress(epoch, epochs)


def add_terms(task: TrainingTask) -> TrainingTask:
    """Make the auxiliary terms of the model that a task trains a part of the task's loss.

    The result of `task(input, target)` then holds, beside what it held,

    - `"loss"`: with the weighted terms added,
    - `"base_loss"`: without them,
    - `"reconstruction"`, `"network_budget"`, ...: each weighted term, those of one name added up over the layers.

    The gradients are those of that `"loss"`, whatever it is multiplied by: a `GradScaler`'s factor, one over the number
    of accumulated batches. The models' `aux_scale` no longer counts.

    How: the terms' gradients stay attached inside the model, so that gradient checkpointing, torch.compile and
    DistributedDataParallel (with unused parameters, too) work as before. All attaching layers share one number on the
    model's device as their `aux_scale`. When the backward pass reaches the loss, it stores there the gradient of the
    loss, which is that factor, before it reaches any layer. Hence two limits: the losses of two forwards may be added
    up before `backward()` only if they have the same factor, and from now on the model is to be trained through this
    task (or another one).

    Args:
        task: Of timm, such as a distillation task; it is changed. Call this before `compile` and
            `prepare_distributed`.

    Returns:
        The task.
    """
    model = task.get_trainable_module()
    layers = [module for module in model.modules() if getattr(module, "auxiliary_terms", ())]
    if not layers:
        return task
    parameter = next(model.parameters())
    scale = torch.ones((), dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device)
    for layer in layers:
        layer.aux_scale = scale

    def remember(gradient: Tensor) -> None:
        scale.data.copy_(gradient)  # `.data`: autograd need not know, it compares versions of what it keeps

    def add(_: nn.Module, args: tuple, result: dict[str, Tensor]) -> dict[str, Tensor]:
        terms = defaultdict(list)
        for layer in layers:
            for term in layer.auxiliary_terms if layer.training else ():
                terms[term].append(getattr(layer, term).detach())
        loss = result["loss"]
        sums = {term: torch.stack(values).sum(dtype=loss.dtype) for term, values in terms.items()}
        total = loss + sum(sums.values())
        if total.requires_grad:
            total.register_hook(remember)
        return {**result, "loss": total, "base_loss": loss, **sums}

    task.register_forward_hook(add)
    return task


class DynamicTask(ClassificationTask):
    """timm's `ClassificationTask` for a model with auxiliary terms, which it makes a part of the loss.

    See `add_terms`, which does the same for timm's other tasks. Arguments are those of `ClassificationTask`.

    ```python
    task = DynamicTask(model, nn.CrossEntropyLoss())
    result = task(images, target)
    scaler.scale(result["loss"] / batches).backward()
    ```
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        add_terms(self)
