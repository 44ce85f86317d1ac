"""Chooses how a dynamic layer runs: a row of its table of faster ways, or its formula."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from timm_dynamic.ops import kernels
from timm_dynamic.ops.implementation import Implementation, Situation, situation_of
from timm_dynamic.ops.kernels import FORMULA, KERNEL
from timm_dynamic.ops.precision import is_autocast

__all__ = ["Implementation", "Situation", "changed_part", "choose", "explain", "has_hooks", "use"]

GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
# Called with every layer, its input and what runs, by `explain`.
_Observer = Callable[[nn.Module, Tensor, Implementation | None], None]
observer: ContextVar[_Observer | None] = ContextVar("observer", default=None)


def choose(layer: nn.Module, x: Tensor) -> Implementation | None:
    """The row of `layer.implementations` that runs this call; None: the layer's formula.

    It is the first one without a reason against it. Whatever is unusual about the layer or its input goes to the
    formula, and so does every call that is recorded, compiled, traced or exported, but for rows for ONNX graphs.

    Args:
        layer: With `family`, `implementations` and `parts` (see `timm_dynamic.layers.base.DynamicLayer`).
        x: Its input.

    Raises:
        ValueError: If `use` names a row that cannot run this call.
    """
    if (torch.compiler.is_compiling() and not kernels.exports_to_onnx()) or torch.jit.is_tracing():
        return None
    row = _choose(layer, x)
    observe = observer.get()
    if observe is not None:
        observe(layer, x, row)
    return row


def _choose(layer: nn.Module, x: Tensor) -> Implementation | None:
    wanted = kernels.choice(layer.family)
    if wanted == FORMULA:
        return None
    reason = _unusual(layer, x)
    if wanted not in (None, KERNEL):
        return None if kernels.exports_to_onnx() else _forced(layer, x, wanted, reason)
    if reason is not None:
        return None
    situation = situation_of(x)
    for row in layer.implementations:
        if (
            situation.device in row.devices
            and situation.exported == row.exported
            and (situation.gradients == row.gradients or row.exported)
            and row.reason_against(layer, x, situation) is None
            and _not_worth_it(layer, x, row, situation) is None
        ):
            return row
    return None


def _forced(layer: nn.Module, x: Tensor, wanted: str, reason: str | None) -> Implementation | None:
    row = next((row for row in layer.implementations if row.name == wanted), None)
    if row is None:
        names = ", ".join([FORMULA, *(row.name for row in layer.implementations)])
        raise ValueError(f"{layer.family} has no implementation {wanted!r}: it has {names}")
    reason = reason or row.reason_against(layer, x, situation_of(x))
    if reason is not None:
        raise ValueError(f"{wanted!r} of {layer.family} cannot run: {reason}")
    return row


def _not_worth_it(layer: nn.Module, x: Tensor, row: Implementation, situation: Situation) -> str | None:
    """Why the formula is to be preferred where a row could run, in words, or None."""
    return None if row.name == layer.preferred else row.pays(layer, x) or _unmeasured(layer, row, situation)


def _unmeasured(layer: nn.Module, row: Implementation, situation: Situation) -> str | None:
    """Rule of GPUs: nothing runs there by default that no record shows as right and faster."""
    device = situation.device
    if device == "cpu" or kernels.choice(layer.family) == KERNEL or kernels.is_measured(device, name_of(layer, row)):
        return None
    return f"not measured as faster on this {device} device: `timm-dynamic check --device {device}` does it"


def name_of(layer: nn.Module, row: Implementation) -> str:
    """The name under which a row's measurements are recorded."""
    return f"{layer.family}: {row.name}"


def _unusual(layer: nn.Module, x: Tensor) -> str | None:
    """Why the parts of a layer must be called, not read, or its operations be PyTorch's; in words, or None."""
    if kernels.exports_to_onnx():
        return changed_part(layer)
    watched = "a dispatch mode looks at the operations" if kernels.is_watched() else None
    return kernels.unusual(x) or watched or changed_part(layer, x)


def changed_part(layer: nn.Module, x: Tensor | None = None) -> str | None:
    """Which part of a layer is not as the layer made it, so that it must be called and not read; in words, or None.

    With an input, also parts whose parameters are on another device, or of another dtype without autocast.
    """
    if any(GLOBAL_HOOKS):
        return "global hooks"
    if layer.overridden or "formula" in vars(layer):
        return f"{', '.join(layer.overridden) or 'formula'} is not the family's"
    for kind, name in layer.parts:
        part = _part(layer, name)
        if type(part) is not kind:
            return f"{name} is a {type(part).__name__}, not the layer's {kind.__name__}"
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return f"hooks on {name}"
        if "forward" in part.__dict__ or "_conv_forward" in part.__dict__:
            return f"{name} has another forward"
        for parameter in part._parameters.values():
            reason = parameter is not None and _unusual_parameter(parameter, x)
            if reason:
                return f"{name} has {reason}"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what a module takes and gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks or any(GLOBAL_HOOKS))


def _unusual_parameter(parameter: Tensor, x: Tensor | None) -> str | None:
    if type(parameter) not in (Tensor, nn.Parameter) and not kernels.exports_to_onnx():  # which uses fake tensors
        return f"a {type(parameter).__name__}"
    if x is not None and (parameter.device != x.device or (parameter.dtype != x.dtype and not is_autocast(x))):
        return f"parameters of {parameter.dtype} on {parameter.device}, the input is {x.dtype} on {x.device}"
    channels_last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return None if channels_last or parameter.is_contiguous() else "parameters that are not contiguous"


def _part(layer: nn.Module, name: str) -> nn.Module | None:
    part = layer
    for key in name.split("."):
        part = part._modules.get(key)
        if part is None:
            return None
    return part


def use(everything: str | None = None, /, **choices: str) -> AbstractContextManager[None]:
    """Within this context, layers of a family, or an operator, run as named; other threads do not notice.

    ```python
    with timm_dynamic.use(dcd="formula"):
        y = model(x)
    ```

    Gradient checkpointing runs layers again in the backward pass, which has to choose alike: call `backward()` in the
    context too, and on a GPU, where autograd has threads, under `torch.autograd.set_multithreading_enabled(False)`.

    Args:
        everything: For all layers and operators; `"formula"`: plain PyTorch; `"kernel"`: as usual, but with what nobody
            has measured on this device too.
        **choices: Family (`dcd`, ...) or operator (`mixed_conv2d`, `dynamic_filter`, ...) to one of these, or a family
            to the name of an implementation that `timm_dynamic.explain` prints.

    Raises:
        ValueError: From a layer called in the context: if it has no implementation of this name, or that one cannot run
            its call.
    """
    if everything not in (None, FORMULA, KERNEL):
        raise ValueError(f"everything is {FORMULA!r} or {KERNEL!r}, got {everything!r}: name a family, as in dcd=...")
    return kernels.choose_in_context(({kernels.EVERYTHING: everything} if everything else {}) | choices)


class Explanation(str):
    """Text that a notebook or a console shows as it is."""

    __repr__ = str.__str__


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """How every dynamic layer of a model runs for an input, and why not otherwise.

    Args:
        model: Any model; it is called once with `x`, without gradients unless it is in training mode.
        x: Its input.

    Returns:
        One paragraph a layer: its name, what runs, and the reason against every other implementation.
    """
    if model.training:
        model = copy.deepcopy(model)  # whose running statistics may change
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    lines: list[str] = []
    token = observer.set(lambda layer, x, row: lines.extend(_lines(names.get(layer, "?"), layer, x, row)))
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(model.training):
            model(x)
    finally:
        observer.reset(token)
    return Explanation("\n".join(lines) or "no layer of this model chooses between implementations")


def _lines(name: str, layer: nn.Module, x: Tensor, chosen: Implementation | None) -> list[str]:
    unusual, situation = _unusual(layer, x), situation_of(x)
    lines = [f"{name} ({type(layer).__name__}): {chosen.name if chosen else FORMULA}"]
    for row in layer.implementations:
        if row is not chosen:
            reason = unusual or row.reason_against(layer, x, situation) or _not_worth_it(layer, x, row, situation)
            lines.append(f"    not {row.name}: {reason or 'another one comes first'}")
    return lines
