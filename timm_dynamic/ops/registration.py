"""The one way in which an operator is registered with PyTorch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from timm_dynamic.ops.kernels import NAMESPACE

_TAGS = (torch.Tag.pt2_compliant_tag,)
Gradient = Callable[..., Sequence[Tensor | None]]


class Operator(NamedTuple):
    """What a registered operator is checked against."""

    definition: Callable
    differentiable: bool
    implementation: Callable | None = None


OPERATORS: dict[str, Operator] = {}


def register(
    name: str,
    schema: str,
    definition: Callable,
    fake: Callable,
    *,
    implementation: Callable | None = None,
    gradient: Gradient | None = None,
    flops: Callable[..., int] | None = None,
    differentiable: bool = True,
) -> None:
    """Define `torch.ops.timm_dynamic.<name>` on every device, by its definition in plain PyTorch.

    Kernels of the binaries replace the definition on their device. The operator has gradients of any order, works
    under autocast (floating point tensors are cast as for a convolution) and `torch.vmap`, and is counted by
    `torch.utils.flop_counter.FlopCounterMode`.

    Args:
        name: Without the namespace.
        schema: `(Tensor x, ...) -> Tensor`. Tensors come before all other arguments.
        definition: Differentiable, in plain PyTorch.
        fake: Shapes, dtypes and strides of the outputs, for torch.compile.
        implementation: What the operator runs instead of its definition, on every device.
        gradient: `gradient(grad, inputs, outputs, options, needs)` gives the gradients of the tensors among the
            inputs; `grad` is that of the first output, the only one that may be differentiated. Without it the
            definition is differentiated.
        flops: From the shapes of the tensors and the other arguments, as `register_flop_formula` wants it.
        differentiable: False for an operator that writes into its input, or is private to a kernel's inference.
    """
    qualified = f"{NAMESPACE}::{name}"
    OPERATORS[name] = Operator(definition, differentiable, implementation)
    torch.library.define(qualified, schema, tags=_TAGS)
    torch.library.impl(qualified, "CompositeExplicitAutograd")(implementation or definition)
    torch.library.register_fake(qualified)(fake)
    operator = getattr(torch.ops.timm_dynamic, name)
    if flops is not None:
        register_flop_formula(operator)(flops)
    if not differentiable:
        return
    for device_type in ("cpu", "cuda"):
        torch.library.impl(qualified, f"Autocast{device_type.upper()}")(_autocast(operator, device_type))
    torch.library.register_vmap(qualified)(_vmap(operator))
    _register_autograd(qualified, definition, gradient)


def _register_autograd(qualified: str, definition: Callable, gradient: Gradient | None) -> None:
    def setup_context(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.count = sum(isinstance(value, Tensor) or value is None for value in inputs)
        ctx.save_for_backward(*inputs[: ctx.count], *outputs[1:])
        ctx.options = inputs[ctx.count :]
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, *_):
        nothing = (None,) * (ctx.count + len(ctx.options))
        if grad is None:
            return nothing
        saved = ctx.saved_tensors  # once: checkpointing forbids more
        inputs, outputs = saved[: ctx.count], saved[ctx.count :]
        needs = [bool(need) for need in ctx.needs_input_grad[: ctx.count]]
        if gradient is None or torch.is_grad_enabled():  # create_graph
            grads = differentiate(lambda *tensors: definition(*tensors, *ctx.options), grad, inputs, needs)
        else:
            grads = gradient(grad, inputs, outputs, ctx.options, needs)
        grads = (g if need else None for g, need in zip(grads, needs, strict=True))
        return *grads, *(None,) * len(ctx.options)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context)


def differentiate(
    function: Callable, grad: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of a function, which can be differentiated again.

    Saved inputs still hang in the graph that they came from: differentiating at them would follow that graph from one
    input into another. So the function is evaluated at aliases of theirs.

    Args:
        function: Gives a tensor, or a tuple of which the first one counts.
        grad: Of its result.
        inputs, needs: Of which the gradients are wanted.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if again:
            aliases = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        else:
            aliases = [t.detach().requires_grad_() if need else t for t, need in zip(inputs, needs, strict=True)]
        out = function(*aliases)
        out = out[0] if isinstance(out, tuple) else out
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=again, allow_unused=True))
    return [next(grads) if need else None for need in needs]


def _autocast(operator, device_type: str) -> Callable:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def run(*args):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*(_cast(value, dtype) for value in args))

    return run


def _cast(value, dtype: torch.dtype):
    if isinstance(value, (list, tuple)):
        return [_cast(one, dtype) for one in value]
    wide = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if wide else value


def _vmap(operator) -> Callable:
    """One call for every slice: right, and for the rare caller of the operator itself, not of its function."""

    def run(info, in_dims, *args):
        def slice_of(value, dim, i):
            if isinstance(value, (list, tuple)):
                return [slice_of(one, d, i) for one, d in zip(value, dim, strict=True)] if dim is not None else value
            return value if dim is None else value.select(dim, i)

        results = [
            operator(*(slice_of(value, dim, i) for value, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], tuple):
            columns = tuple(torch.stack(column) for column in zip(*results, strict=True))
            return columns, (0,) * len(columns)
        return torch.stack(results), 0

    return run
