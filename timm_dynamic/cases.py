"""The calls that `timm-dynamic check` compares with the formula, derived from models.

A model is run once to see which layers it has and what they read. Each row of a layer's table that takes such a call is
a case, and so is each call of an operator with a kernel that is made on the way.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import timm_dynamic  # noqa: F401 registers our models
from timm_dynamic.dispatch import name_of, use
from timm_dynamic.layers.base import DynamicLayer
from timm_dynamic.ops import kernels
from timm_dynamic.ops.implementation import Implementation, situation_of
from timm_dynamic.ops.kernels import FORMULA, KERNEL, NAMESPACE
from timm_dynamic.ops.registration import OPERATORS

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Setting:
    """In what way a layer is called.

    Attributes:
        training: In training mode, with gradients.
        layout: A key of `LAYOUTS`, of the maps and the weights.
    """

    device: str
    dtype: torch.dtype
    layout: str
    training: bool


@dataclass(frozen=True)
class Case:
    """One call to check.

    Attributes:
        name: `"FAMILY: ROW"`, or that of an operator.
        model, layer, shape: The layer, "" for the model itself, and the shape of what it reads.
        setting: How it is called.
        source: What is called: a row of the layer's table or its formula.
        number: Which one of the operator's calls it is, of those made by that; None for the row itself.
        about: Shapes, in words.
    """

    name: str
    model: str
    layer: str
    shape: tuple[int, ...]
    setting: Setting
    source: str
    number: int | None
    about: str


class Calls(TorchDispatchMode):
    """Lists calls of registered operators, which run without their kernels: what is wrong with one is seen later.

    Args:
        wanted: Name and number of the call at which to stop, with `Found`.
    """

    def __init__(self, wanted: tuple[str, int] | None = None):
        super().__init__()
        self.wanted, self.counts, self.found = wanted, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix(f"{NAMESPACE}::")
        if func.namespace != NAMESPACE or name not in OPERATORS:
            return func(*args, **kwargs)
        number = self.counts[name] = self.counts.get(name, -1) + 1
        if self.wanted == (name, number):
            raise Found(tree_map(_detached, (args, kwargs)))
        self.found.append((name, number, _shapes(args)))
        return (OPERATORS[name].implementation or OPERATORS[name].definition)(*args, **kwargs)


class Found(Exception):
    """A call that was looked for; `args[0]` has its arguments."""


def build(name: str) -> nn.Module:
    """A model with random weights, none of which are all the same: what is multiplied by zero hides errors."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[:1]).all():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def operators_of(device: str) -> set[str]:
    """The operators that do not run as they are defined on this type of device: they have a kernel, or other code."""
    other = {name for name, operator in OPERATORS.items() if operator.implementation is not None}
    return other | (OPERATORS.keys() & set(kernels.operators_with_kernel(device)))


def plan(name: str, device: str, dtypes: Sequence[torch.dtype], batches: Sequence[int], count: int) -> list[Case]:
    """The cases that a model gives.

    Args:
        name: Of the model.
        device: Type of it.
        dtypes: In which operators are called; a row is called in all that it declares.
        batches: Numbers of samples.
        count: Of different shapes for each of layers, and calls of an operator in each setting.
    """
    model = build(name)
    operators = operators_of(device)
    cases: list[Case] = []
    seen: dict[tuple, set[str]] = {}  # shapes of an operator's calls in a setting
    for path, shape in _places(model, operators, count):
        layer = model.get_submodule(path)
        for setting, batch in _settings(layer, device, dtypes, batches):
            formula = Case("", name, path, (batch, *shape[1:]), setting, FORMULA, None, _text((batch, *shape[1:])))
            try:
                calls = _calls(model, formula)
            except (RuntimeError, NotImplementedError, ValueError):
                continue  # the formula itself does not take such a call
            found = [(formula, call) for call in calls]
            for row in _rows(model, formula):
                case = replace(formula, name=name_of(layer, row), source=row.name)
                cases.append(case)
                with suppress(Exception):  # which is found when the case is run
                    found += [(case, call) for call in _calls(model, case)]
            for case, (operator, number, about) in found:
                shapes = seen.setdefault((operator, setting, batch), set())
                if operator in operators and setting.dtype in dtypes and about not in shapes and len(shapes) < count:
                    shapes.add(about)
                    cases.append(replace(case, name=operator, number=number, about=about))
    return cases


def _settings(layer: nn.Module, device: str, dtypes, batches) -> Iterator[tuple[Setting, int]]:
    """In which ways a layer is called, and with how many samples."""
    rows = getattr(layer, "implementations", ())
    declared = {dtype for row in rows if device in row.devices for dtype in row.dtypes}
    modes = (False, True) if isinstance(layer, DynamicLayer) else (False,)  # sparse execution is for inference
    for dtype in sorted({*dtypes, *declared}, key=str):
        for layout, training in ((layout, training) for layout in LAYOUTS for training in modes):
            for batch in batches[:1] if dtype == torch.float64 else batches:
                yield Setting(device, dtype, layout, training), batch


def _places(model: nn.Module, operators: set[str], count: int) -> list[tuple[str, tuple[int, ...]]]:
    """Layers and the shapes that they read, different ones, from small to large; and the model, if it calls more."""
    found: dict[tuple, tuple[str, tuple[int, ...], int]] = {}
    depth = 0

    def enter(path, layer, args):
        nonlocal depth
        depth += 1
        sizes = tuple(tuple(p.shape) for p in layer.parameters())
        shape = tuple(args[0].shape)
        work = math.prod(shape[2:]) * sum(map(math.prod, sizes))
        found.setdefault((type(layer), sizes, shape), (path, shape, work))

    def leave(layer, args, output):
        nonlocal depth
        depth -= 1

    class Outside(Calls):
        names: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == NAMESPACE and depth == 0:
                self.names.add(func._schema.name.removeprefix(f"{NAMESPACE}::"))
            return super().__torch_dispatch__(func, types, args, kwargs)

    shape = (1, *timm.data.resolve_model_data_config(model)["input_size"])
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, DynamicLayer)]
    hooks = [layer.register_forward_pre_hook(partial(enter, path)) for path, layer in layers]
    hooks += [layer.register_forward_hook(leave) for _, layer in layers]
    with torch.no_grad(), use(KERNEL), Outside() as outside:
        model.eval()(torch.randn(shape))
    for hook in hooks:
        hook.remove()
    of_type: dict[type, list] = {}
    for (kind, *_), place in sorted(found.items(), key=lambda item: item[1][2]):
        of_type.setdefault(kind, []).append(place[:2])
    chosen = [place for places in of_type.values() for place in _spread(places, count)]
    return chosen + [("", shape)] * bool(outside.names & operators)


def _spread(places: list, count: int) -> list:
    """So many of a list, the last one always."""
    last = len(places) - 1
    numbers = {last - round(i * last / max(count - 1, 1)) for i in range(count)}
    return [places[i] for i in sorted(numbers)]


class Subject:
    """A layer as a case calls it, and its input; every one from the same numbers."""

    def __init__(self, model: nn.Module, case: Case, dtype: torch.dtype | None = None):
        setting = case.setting
        dtype = dtype or setting.dtype
        layer = copy.deepcopy(model.get_submodule(case.layer)).to(setting.device, setting.dtype).to(dtype)
        self.layer = layer.to(memory_format=LAYOUTS[setting.layout]).train(setting.training)
        numbers = torch.Generator().manual_seed(0)
        x = torch.randn(case.shape, generator=numbers).to(setting.device, setting.dtype).to(dtype)
        if x.ndim == 4:
            x = x.contiguous(memory_format=LAYOUTS[setting.layout])
        self.x = x.requires_grad_(setting.training)

    def call(self, source: str) -> Callable[[], Tensor]:
        layer, x = self.layer, self.x
        if source != FORMULA:
            return partial(_row(layer, source).run, layer, x)
        formula = layer.formula if isinstance(layer, DynamicLayer) else layer
        return partial(formula, x)

    def wanted(self) -> list[Tensor]:
        """Of which gradients are."""
        return [self.x, *self.layer.parameters()] if self.x.requires_grad else []


def _row(layer: nn.Module, name: str):
    return next(row for row in layer.implementations if row.name == name)


def _rows(model: nn.Module, case: Case) -> list[Implementation]:
    """The rows of the layer's table that take the call."""
    subject = Subject(model, case)
    layer, x = subject.layer, subject.x
    with torch.set_grad_enabled(x.requires_grad), use(KERNEL):
        situation, rows = situation_of(x), getattr(layer, "implementations", ())
        return [row for row in rows if row.reason_against(layer, x, situation) is None and row.pays(layer, x) is None]


def _calls(model: nn.Module, case: Case) -> list[tuple[str, int, str]]:
    """The calls of operators that are made: names, numbers and shapes."""
    subject, calls = Subject(model, case), Calls()
    with use(KERNEL), calls:
        values(subject.call(case.source), subject.wanted())
    return calls.found


def arguments_of(model: nn.Module, case: Case) -> tuple[tuple, dict]:
    subject = Subject(model, case)
    try:
        with use(KERNEL), Calls((case.name, case.number)):
            values(subject.call(case.source), subject.wanted())
    except Found as found:
        return found.args[0]
    raise RuntimeError(f"{case.source} of {case.layer} made fewer calls of {case.name} than before")


def values(function: Callable[[], Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    """The results of a call, and the gradients of the first one."""
    with torch.enable_grad() if wanted else torch.no_grad():
        out = [t for t in tree_leaves(function()) if isinstance(t, Tensor)]
        if not wanted:
            return out
        numbers = torch.Generator().manual_seed(1)
        cotangent = torch.randn(out[0].shape, generator=numbers).to(out[0])
        with torch.autograd.set_multithreading_enabled(False):  # what `use` says is not known to autograd's threads
            grads = torch.autograd.grad(out[0], wanted, cotangent, allow_unused=True)
    return out + [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]


def _detached(value):
    return value.detach().clone() if isinstance(value, Tensor) else value


def _shapes(args) -> str:
    return " ".join(_text(t.shape) for t in tree_leaves(args) if isinstance(t, Tensor))


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "-"
