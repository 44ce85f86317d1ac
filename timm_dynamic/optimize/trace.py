"""What runs in a model's forward: who gives what, and who reads it."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from timm_dynamic.dispatch import has_hooks

# Methods that read a tensor's memory past all operators.
_MEMORY_READERS = {"numpy", "__array__", "tolist", "data_ptr", "untyped_storage", "__dlpack__", "share_memory_"}


class _Value:
    """What a module has given; whatever shares its memory is the same value."""

    def __init__(self, module: nn.Module, tensor: Tensor):
        self.module, self.tensor = module, TensorWeakRef(tensor)
        self.readers: dict[nn.Module | None, None] = {}  # None: what runs outside all modules


class Trace:
    """One forward of a model, watched.

    A reader is the innermost module in which an operator takes a value, or whose hooks see it. Asking for a tensor's
    shape is no reading.

    Args:
        model: In eval mode; left as it was.
        inputs: The arguments of its forward.
        opaque: Modules of which nothing within is looked at.

    Attributes:
        calls: How often each module ran.
        input_sizes: The shape of each module's first input, of its first run.
        sources: The modules whose values other modules took as first input.
        read_elsewhere: Modules whose parameters or buffers something else has read.
    """

    def __init__(self, model: nn.Module, inputs: tuple, opaque: Iterable[nn.Module] = ()):
        self.calls: Counter[nn.Module] = Counter()
        self.input_sizes: dict[nn.Module, list[int]] = {}
        self.sources: dict[nn.Module, nn.Module] = {}
        self.read_elsewhere: set[nn.Module] = set()
        self._given: dict[nn.Module, _Value] = {}
        self._by_memory: dict[int, _Value] = {}
        self._running: list[nn.Module] = []
        hidden = {part for module in opaque for part in module.modules() if part is not module}
        modules = [m for m in model.modules() if m not in hidden and not isinstance(m, torch.jit.ScriptModule)]
        self._hooked = {module for module in modules if has_hooks(module)}
        self._owners: dict[int | None, set[nn.Module]] = {}
        for module in modules:
            for part in module.modules() if module in opaque else (module,):
                for tensor in (*part._parameters.values(), *part._buffers.values()):
                    if tensor is not None:
                        self._owners.setdefault(_memory(tensor), set()).add(module)
        self._owners.pop(None, None)
        handles = []
        for module in modules:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            with ExitStack() as stack:
                stack.enter_context(_MemoryReads(self.read))
                stack.enter_context(_Reads(self.read))
                output = model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        for value in self._given.values():
            if value.tensor() is not None:  # part of the output, or somebody has put it somewhere
                value.readers[None] = None
        del output

    def only_reader(self, module: nn.Module) -> nn.Module | None:
        """The module that alone reads what a module gave; None: there are others, or none."""
        readers = self.readers(module)
        return readers[0] if len(readers) == 1 else None

    def readers(self, module: nn.Module) -> list[nn.Module | None]:
        value = self._given.get(module)
        return [] if value is None else list(value.readers)

    def read(self, tensor: Tensor) -> None:
        """Something that runs now reads this."""
        memory = _memory(tensor)
        reader = self._running[-1] if self._running else None
        value = self._value(memory)
        if value is not None:
            value.readers[reader] = None
        owners = self._owners.get(memory)
        if owners is not None and reader not in owners:
            self.read_elsewhere |= owners

    def _value(self, memory: int | None) -> _Value | None:
        value = self._by_memory.get(memory)
        # Freed memory is soon another tensor's.
        return value if value is not None and value.tensor() is not None else None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module in self._hooked:
            self._seen_by_hooks(module, (args, kwargs))
        self.calls[module] += 1
        first = next((one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)), None)
        if first is not None:
            self.input_sizes.setdefault(module, list(first.shape))
            value = self._value(_memory(first))
            if value is not None:
                self.sources.setdefault(module, value.module)
        self._running.append(module)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._running.pop()
        if module in self._hooked:
            self._seen_by_hooks(module, output)
        # A container gives what something in it gave.
        if isinstance(output, Tensor) and not isinstance(module, nn.Identity) and not _contains_modules(module):
            memory = _memory(output)
            if memory is not None:
                self._given[module] = self._by_memory[memory] = _Value(module, output)

    def _seen_by_hooks(self, module: nn.Module, items: Any) -> None:
        for one in tree_leaves(items):
            if isinstance(one, Tensor):
                value = self._value(_memory(one))
                if value is not None:
                    value.readers[module] = None


def _contains_modules(module: nn.Module) -> bool:
    """Whether it is a container; not a norm with an activation within, nor a dynamic layer."""
    return any(module.children()) and not hasattr(module, "running_var") and not hasattr(module, "absorb")


def _memory(tensor: Tensor) -> int | None:
    try:
        with torch._C.DisableTorchFunction():  # `_MemoryReads` is for others
            return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a tensor without one
        return None


class _Reads(TorchDispatchMode):
    """Calls back for every tensor that an operator takes."""

    def __init__(self, read: Callable[[Tensor], None]):
        super().__init__()
        self._read = read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self._read(one)
        return func(*args, **(kwargs or {}))


class _MemoryReads(TorchFunctionMode):
    """Calls back for every tensor whose memory is asked for."""

    def __init__(self, read: Callable[[Tensor], None]):
        super().__init__()
        self._read = read

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _MEMORY_READERS and args and isinstance(args[0], Tensor):
            self._read(args[0])
        return func(*args, **(kwargs or {}))
