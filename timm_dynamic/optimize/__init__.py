"""The inference copy of a model, any model: `fast = timm_dynamic.optimize(model)`.

What it does, on a deep copy in eval mode, by what one forward on an example shows:

- Convolutions take over the batch norm that runs behind them, and on a CPU in float32 the activation behind that; their
  weights are packed once for oneDNN (`PackedConv2d`).
- A layer with `absorb(scale, shift)`, as this package's dynamic layers have it, is replaced by what that returns: a new
  layer with the output `scale[c] * y + shift[c]`. If it has an attribute `limits`, a clamp behind it (ReLU, ReLU6) goes
  there as `(low, high)`.
- A module with `optimized()` is asked first, outermost modules before what they contain. It returns the module that
  runs in its place, made of its weights as they are now, or None, if it has no faster form; then its submodules are
  treated as others are. The new module gives the same output in eval mode, can be copied and pickled, and nothing in it
  is touched.
- The memory format is what was faster on the example.
- Dynamic layers keep the implementation that they choose for the example (`timm_dynamic.explain`).

An output that anything else reads, modules that run twice, modules with hooks, subclasses that nobody knows here: all
of them are left as they are. `print(fast.report)` says what was done and what was left.
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from timm_dynamic.dispatch import has_hooks
from timm_dynamic.layers.cond import RoutedConv2d
from timm_dynamic.ops.sparse import capacity
from timm_dynamic.optimize.fold import Folding
from timm_dynamic.optimize.graph import CudaGraph
from timm_dynamic.optimize.layout import choose_format
from timm_dynamic.optimize.packed_conv import FORMATS, PackedConv2d
from timm_dynamic.optimize.report import Report, counted, listed
from timm_dynamic.optimize.settled import settle
from timm_dynamic.optimize.trace import Trace

__all__ = ["PackedConv2d", "optimize"]


def optimize(
    model: nn.Module,
    example_inputs: Tensor | tuple | None = None,
    *,
    memory_format: str | torch.memory_format = "auto",
    cuda_graph: bool = False,
    share: float | None = None,
    compile: bool | dict[str, Any] = False,
) -> nn.Module:
    """A copy of a model for inference: the same numbers up to rounding, sooner.

    It is of the model's class, with its attributes, and of its weights as they are now. It runs without gradients, for
    inputs of any size that the model takes, and composes with `torch.compile`, `torch.export` and `torch.onnx.export`.
    `copy.deepcopy`, `torch.save` and its state dict work; its weights change by `load_state_dict` only.

    Args:
        model: Any model in eval mode; it is left as it is.
        example_inputs: The forward's argument, or a tuple of its arguments, like those to come; None: one image of the
            size that the model's `default_cfg` names.
        memory_format: `torch.contiguous_format`, `torch.channels_last`, or `"auto"`: what is faster on the example.
        cuda_graph: Capture the forward as a CUDA graph, for inputs of the example's shape and dtype only.
        share: Of a CUDA graph: room for this share of the positions in masked blocks, 0 to 1; None: what was needed so
            far, and some more.
        compile: Call `torch.compile`, with these arguments if it is a dict; it compiles at the first call.

    Returns:
        The copy. `fast.report` is a list of lines that say what was done; `fast.cuda_graph` the graph, if any, whose
        `overflows` is the number of calls for which it had too little room.

    Raises:
        ValueError: If an argument is not like that, the model is in training mode, or it does not run on the example.
    """
    _check(model, memory_format, compile)
    if share is not None and not cuda_graph:
        raise ValueError("share is for cuda_graph=True")
    graph = CudaGraph(share) if cuda_graph else None
    with torch.inference_mode(False), torch.no_grad():
        inputs = _inputs(model, example_inputs)
        fast, report = _copy(model).eval().requires_grad_(False), Report()
        adopted = RoutedConv2d.adopt(fast)
        if adopted:
            report.append(f"{counted(adopted, 'convolution')} of timm with routed experts in our form")
        fast, special = _ask(fast, report)
        opaque = {*special, *(one for one in fast.modules() if callable(getattr(one, "absorb", None)))}
        try:
            trace = Trace(fast, inputs, opaque)
        except Exception as error:
            shapes = [list(one.shape) if isinstance(one, Tensor) else one for one in inputs]
            hint = "; give example_inputs" if example_inputs is None else ""
            raise ValueError(f"the model does not run on {shapes}: {' '.join(str(error).split())}{hint}") from error
        Folding(fast, trace, opaque).run(report)
        fast.__class__ = inference_class(type(fast))
        fast.report, fast.cuda_graph, fast._memory_format = report, None, "contiguous"
        choose_format(fast, inputs, memory_format, report)
        settled = settle(fast, inputs)
        if settled:
            report.append(f"{counted(settled, 'dynamic layer')} with a fixed implementation")
        if compile:
            fast.compile(**(compile if isinstance(compile, dict) else {}))
            report.append("compiled at the first call")
        if graph is not None:
            fast.cuda_graph = graph
            fast(*inputs)
            report.append(f"a CUDA graph for inputs {list(inputs[0].shape)}")
    return fast


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also if the model has put results of its last forward somewhere, which cannot be copied."""
    results = (one for module in model.modules() for one in vars(module).values() if isinstance(one, Tensor))
    return copy.deepcopy(model, {id(one): one.detach().clone() for one in results if not one.is_leaf})


def _check(model: nn.Module, memory_format: Any, compile: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"optimize takes a model, got {type(model).__name__}")
    if isinstance(model, _Inference):
        raise ValueError("the model is optimized already")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted or traced model cannot be changed: optimize the model that it was made of")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError("the model is compiled: optimize the model within, with compile=True")
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, nn.modules.batchnorm._NormBase)):
            which = f"{name} of the model" if name else "the model"
            raise ValueError(f"{which} is in training mode: call model.eval() first")
    if any(one.is_meta for one in (*model.parameters(), *model.buffers())):
        raise ValueError("the model has no weights yet: some are on the meta device")
    if memory_format not in ("auto", torch.contiguous_format, torch.channels_last):
        choices = '"auto", torch.contiguous_format or torch.channels_last'
        raise ValueError(f"memory_format must be {choices}, got {memory_format!r}")
    if not isinstance(compile, (bool, dict)):
        raise ValueError(f"compile must be True, False or the arguments of torch.compile, got {compile!r}")


def _inputs(model: nn.Module, example: Any) -> tuple:
    if example is not None:
        inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
        return tree_map_only(Tensor, lambda one: one.detach(), inputs)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is None:
        raise ValueError("the model has no default_cfg that names its input_size: give example_inputs")
    like = next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0))
    first = config.get("first_conv")
    try:
        channels = model.get_submodule(first).in_channels  # another number than the cfg's, if it was made so
    except (AttributeError, TypeError):
        channels = size[0]
    image = torch.randn(1, channels, *size[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (image.to(like.device, like.dtype),)


def _ask(model: nn.Module, report: Report) -> tuple[nn.Module, list[nn.Module]]:
    """Let modules with a form of their own for inference take it, in place; the model, and those forms."""
    forms: dict[nn.Module, nn.Module] = {}
    names, left = [], {}

    def visit(module: nn.Module, name: str) -> nn.Module:
        if module in forms:
            return forms[module]
        if callable(getattr(module, "optimized", None)):
            parts = list(module.modules())
            if any(map(has_hooks, parts)):
                left[name] = "there are hooks within"
            elif any("forward" in vars(part) for part in parts):
                left[name] = "there is a forward of an instance within"
            else:
                form = module.optimized()
                if form is not None:
                    names.append(name)
                    forms[module] = form.eval().requires_grad_(False)
                    return forms[module]
        for key, child in module._modules.items():
            if child is not None:
                module._modules[key] = visit(child, f"{name}.{key}" if name else key)
        return module

    model = visit(model, "")
    if names:
        report.append(f"{counted(len(names), 'block')} in their form for inference: {listed(names)}")
    report.add_left(left)
    return model, list(forms.values())


class _Inference(nn.Module):
    """Mixin of optimized models."""

    # Of a part that is cut out: `fast[1:]`.
    cuda_graph = None
    _memory_format = "contiguous"

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().__call__(*self._formatted(args), **kwargs)
        if torch.is_grad_enabled():
            inputs = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
            if any(one.requires_grad for one in (*inputs, *self.parameters())):
                raise ValueError(
                    "an optimized model is for inference: it gives no gradients, and its input or a parameter requires "
                    "one (call it under torch.no_grad(), or differentiate the model that it was made of)"
                )
        with torch.no_grad():
            if self.cuda_graph is not None:
                if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
                    raise ValueError("a CUDA graph takes one tensor")
                return self.cuda_graph.run(super().__call__, self, *self._formatted(args))
            forward = functools.partial(super().__call__, *self._formatted(args), **kwargs)
            first = args[0] if args and isinstance(args[0], Tensor) else None
            if first is None or not capacity.has_kernels(first) or any(map(has_hooks, self.modules())):
                return forward()
            return capacity.run_without_waiting(forward)  # which hooks would see run again

    def _formatted(self, args: tuple) -> tuple:
        if self._memory_format == "contiguous" or torch._C._functorch.peek_interpreter_stack() is not None:
            return args  # vmap knows no other format
        form = FORMATS[self._memory_format]
        are_images = [isinstance(one, Tensor) and one.dim() == 4 for one in args]
        return tuple(
            one.contiguous(memory_format=form) if is_image else one
            for one, is_image in zip(args, are_images, strict=True)
        )

    def train(self, mode: bool = True):
        if mode:
            raise ValueError("an optimized model is for inference only: train the model that it was made of")
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            raise ValueError("an optimized model gives no gradients: train the model that it was made of")
        return super().requires_grad_(requires_grad)

    def _apply(self, *args, **kwargs):
        if self.cuda_graph is not None:
            self.cuda_graph.drop()
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        if self.cuda_graph is not None:
            self.cuda_graph.drop()
        return super().load_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _restore, (type(self).__mro__[2],), self.__getstate__()


@functools.cache
def inference_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of models, but for inference."""
    return type(kind.__name__, (_Inference, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _restore(kind: type[nn.Module]) -> nn.Module:
    """An empty one, whose state follows."""
    kind = inference_class(kind)
    return kind.__new__(kind)
