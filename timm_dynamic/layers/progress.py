"""How far a schedule is, such as that of a temperature: one `Progress` for a model, which its layers share.

Every layer has it as its submodule `progress`. So it goes wherever layers go: into feature extractors, copies, other
devices. A state dict has it once, as `progress.done`, last (see `share_progress`). What depends on it is computed from
that tensor in every forward: whoever copies or averages tensors copies the schedule.

It can count training forwards by itself. No one place sees each of them once: users replace and freeze stems, feature
extractors call no method of the model, checkpointing runs blocks twice. So all layers count: the first one that runs
for a second time begins the next forward.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from timm_dynamic.layers.shared_part import SharedPart, all_names

KEY = "progress.done"
_END = 2**52  # integers: casts of the model leave them alone. And every one up to here is a float64.


class State(nn.Module):
    """A module whose non-persistent buffers keep their values after `to_empty` too, and are on no meta device."""

    def _apply(self, fn, recurse: bool = True):
        order = list(self._buffers)
        states = {name: self._buffers.pop(name) for name in order if name in self._non_persistent_buffers_set}
        super()._apply(fn, recurse)
        for name, buffer in states.items():
            moved = fn(buffer)
            self._buffers[name] = buffer if moved.is_meta else buffer.to(moved)
        for name in order:  # averages go through the buffers of a model and of its copy side by side
            self._buffers[name] = self._buffers.pop(name)
        return self

    def register_state(self, name: str, value: Tensor, device=None) -> None:
        """Register a buffer that state dicts leave out."""
        if device is None or torch.device(device).type == "meta":
            device = "cpu"
        self.register_buffer(name, value.to(device), persistent=False)


def share_of_training(epoch: float, epochs: float) -> float:
    """The share of a training that is done."""
    return epoch / epochs


class Progress(SharedPart, State):
    """The share of a schedule that is done, from 0 to 1, as a tensor, so that torch.compile need not compile again.

    It is what `timm_dynamic.set_progress` makes it, or grows with every training forward. Loading a state dict without
    it means that the schedule is over.

    Args:
        over: Whether the schedule is over until somebody begins it.
        share: The share that is done, from `epoch` and `epochs` of `timm_dynamic.set_progress`.
    """

    def __init__(self, over: bool = False, share: Callable[[float, float], float] = share_of_training, device=None):
        super().__init__()
        self.share, self.shared, self.counts = share, False, False
        self.end = _END  # for TorchScript
        self.register_state("done", torch.tensor(_END if over else 0, device="cpu"), device)
        self.register_state("step", torch.tensor(0, device="cpu"), device)  # of each training forward
        # The number of forwards, and that of each layer's last one.
        self.register_state("forwards", torch.zeros(2, dtype=torch.int64, device="cpu"), device)

    def begin(self, steps: int | None = None) -> None:
        """Begin the schedule, of so many training forwards, or to be set."""
        self._set(0)
        self.counts = steps is not None
        self.step.fill_(round(_END / steps) if self.counts else 0)

    def set_progress(self, epoch: float, epochs: float) -> None:
        """See `timm_dynamic.set_progress`. From now on it does not count."""
        self._set(min(self.share(epoch, epochs), 1.0) * _END)
        self.step.zero_()

    def _set(self, done: float) -> None:
        self.done.fill_(round(done))  # in place: a tensor made in inference mode is none for autograd

    @torch.jit.unused
    def count(self, layer: int) -> None:
        """Called by every layer in a training forward, before it asks for the share.

        Args:
            layer: Its number, from 1.
        """
        if not self.counts or recomputing() or not may_be_changed(self.forwards):
            return
        again = self.forwards[layer] == self.forwards[0]
        self.forwards[0].add_(again)
        self.forwards[layer].copy_(self.forwards[0])
        self.done.add_(self.step * again).clamp_(max=2 * _END)

    def forward(self, training: bool = False) -> Tensor:
        """The share, float64. In training, the forward of now has been counted already, and is not done."""
        return self.between(0.0, 1.0, training)

    def between(self, first: float, last: float, training: bool = False) -> Tensor:
        """A number that goes from `first` to `last` in proportion to the share, of few operations: every layer asks."""
        done = self.done - self.step if training else self.done
        return torch.rsub(done.clamp(0, self.end).double(), first, alpha=(first - last) / self.end)

    @torch.jit.unused
    def value(self, first: float, last: float) -> float:
        """`between`, in evaluation on a CPU: a fifth of its time, which is 27 us a layer (AMD EPYC, November 2026)."""
        return first - min(max(self.done.item(), 0), self.end) * ((first - last) / self.end)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination[f"{prefix}done"] = self.done.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        done = state_dict.get(f"{prefix}done")
        if done is None:
            self._set(_END)
            return
        try:
            check_done(done)
        except ValueError as error:
            errors.append(f"{prefix}done: {error}")
            return
        if not done.is_meta:
            if local_metadata.get("assign_to_params_buffers"):
                self.to(done.device)
            self._set(done.item())  # a float where checkpoints were averaged


def check_done(done: Tensor) -> None:
    """Raise a `ValueError` if no checkpoint's progress can be that."""
    if done.numel() != 1 or not (done.is_meta or 0 <= done.item() <= 2 * _END):
        raise ValueError(f"progress must be one number from 0 to {2 * _END}, got {done}")


def recomputing() -> bool:
    """Whether the backward pass runs a layer again, for gradient checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_changed(buffer: Tensor) -> bool:
    """Whether `torch.func` lets a call change a buffer: one that the transformed function has been given."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(buffer)


def share_progress(model: nn.Module) -> Progress | None:
    """Let all layers of a model that have a `progress`, and share it with none yet, have one together.

    State dicts of the model have it as `KEY`, last.

    Args:
        model: Changed.

    Returns:
        That of the first such layer; None if there is none.
    """
    layers = [module for module in model.modules() if isinstance(module._modules.get("progress"), Progress)]
    layers = [layer for layer in layers if not layer.progress.shared]
    if not layers:
        return None
    progress, layers[0].progress.shared = layers[0].progress, True
    for layer in layers[1:]:
        join(layer, progress)
    save_once(model, progress)
    return progress


def join(layer: nn.Module, progress: Progress) -> None:
    """Let one more layer share a progress."""
    layer.progress, layer.number = progress, len(progress.forwards)
    progress.forwards = progress.forwards.new_zeros(layer.number + 1)


def save_once(model: nn.Module, progress: Progress) -> None:
    """Let state dicts of `model` have the progress that its layers share once, also if they come from another model.

    Its key is `KEY`, or for any more of them, of networks with layers of several kinds, their first name.
    """
    hooks = model._state_dict_hooks.values()
    key = None if any(getattr(hook, "func", None) is _save for hook in hooks) else KEY
    model.register_state_dict_post_hook(partial(_save, progress, key))
    model.register_load_state_dict_pre_hook(partial(_load, progress, key))


def _keys(model: nn.Module, progress: Progress, prefix: str) -> list[str]:
    return [f"{prefix}{name}.done" for name, module in all_names(model) if module is progress]


def _save(progress: Progress, key: str | None, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, _) -> None:
    keys = _keys(model, progress, prefix)
    found = [state_dict.pop(name) for name in keys if name in state_dict]
    if found:
        state_dict[prefix + key if key else keys[0]] = found[0]


def _load(
    progress: Progress, key: str | None, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_
) -> None:
    keys = _keys(model, progress, prefix)
    done = state_dict.pop(prefix + key if key else keys[0], None) if keys else None
    if done is not None:
        state_dict.update(dict.fromkeys(keys, done))
