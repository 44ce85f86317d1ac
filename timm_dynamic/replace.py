"""Putting a dynamic layer into any timm model."""

import inspect
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from timm_dynamic import families
from timm_dynamic.layers import MaskUnit
from timm_dynamic.layers.base import DropInConv2d
from timm_dynamic.layers.progress import share_progress
from timm_dynamic.layers.warehouse import save_warehouses_once
from timm_dynamic.suggest import did_you_mean

# How timm's models name the modules on a shortcut, and a module that looks at the whole map to weigh it.
_SHORTCUTS = {"downsample", "shortcut", "skip", "project", "c1x1_w_s1", "c1x1_w_s2"}
_ATTENTION = {"attn", "self_attn", "se"}
_ATTENTION_CLASS = re.compile("Attn|Attention|SEModule|EseModule|Excite|LiteMLA|SHMA|SHSA")
_SHOWN = 3  # convolutions named in an error

Where = Callable[[str, nn.Conv2d], bool] | str | Iterable[str] | None  # which convolutions to replace: see `dynamize`


def dynamize(
    model: nn.Module,
    layer: str | type[DropInConv2d],
    where: Where = None,
    **layer_kwargs,
) -> nn.Module:
    """Replace convolutions of a model by dynamic ones, each made from what it replaces (`layer.from_conv`).

    The output in eval mode stays as it was, so that a pretrained network still classifies: how nearly, and which layers
    take over biases only, `timm_dynamic.families` says (`keeps`). Parameters that come from a frozen convolution stay
    frozen.

    By default all `nn.Conv2d` are replaced but the stem (cfg `first_conv`), 1x1 shortcuts, those inside attention and
    squeeze-and-excitation modules or at or after the global pool, the classifier, and those that the layer cannot stand
    in for: of another kind than `nn.Conv2d` (`Conv2dSame`, `StdConv2d`, ...), with hooks, or with other arguments than
    its class supports.

    Args:
        model: Any timm CNN; changed in place. Load static weights before, and dynamic ones after.
        layer: Name of a family that has one (`timm_dynamic.families.layers()`), or a layer class with `from_conv`.
        where: Which convolutions to replace, instead of the default: a predicate of name and convolution, or glob
            patterns of names (`"layer3.*.conv2"`; `*` also matches dots). Those inside of dynamic layers never count.
        **layer_kwargs: The layer's own keyword arguments.

    Returns:
        `model`.

    Raises:
        ValueError: If the layer is unknown, a pattern matches nothing, a convolution that `where` names cannot be
            replaced, or none can. The model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"dynamize changes a model, got {model!r}: for a name, timm.create_model makes the model")
    cls = layer_class(layer)
    _check_options(cls, layer_kwargs)
    convs = _convolutions(model)
    if where is None:
        names = _default_names(model, convs)
    elif callable(where):
        names = [name for name, conv in convs.items() if where(name, conv)]
    else:
        names = _matching_names([where] if isinstance(where, str) else where, convs)
    if not names:
        choice = "by default, none" if where is None else "where chooses none"
        hint = ": name some with `where=` (--where)" if where is None else ""
        if dynamic := sum(isinstance(module, DropInConv2d) for module in model.modules()):
            hint = f": {dynamic} dynamic layers are in it already, which stay as they are"
        raise ValueError(f"{choice} of the {len(convs)} convolutions of {_kind(model)} is replaced{hint}")

    replacements, reasons = {}, {}
    for name in names:
        conv = convs[name]
        try:
            replacements[conv] = replacements.get(conv) or _replacement(conv, cls, layer_kwargs)
        except ValueError as error:
            reasons.setdefault(str(error), []).append(name)
    if reasons and (where is not None or not replacements):
        shown = [f"{_some(refused)}: {reason}" for reason, refused in list(reasons.items())[:_SHOWN]]
        more = f"; and {len(reasons) - _SHOWN} more reasons" if len(reasons) > _SHOWN else ""
        raise ValueError(f"{cls.__name__} cannot replace {'; '.join(shown)}{more}")
    pairs = {conv: name for name, conv in reversed(list(convs.items())) if conv in replacements}
    with torch.no_grad():
        named = {name: (conv, replacements[conv]) for conv, name in reversed(list(pairs.items()))}
        cls.unite(named, layer_kwargs.get("from_scratch", False))
    for name in names:
        if convs[name] in replacements:
            # In the mode of the module around it: a static convolution's own can be anything.
            parent = model.get_submodule(name.rpartition(".")[0])
            model.set_submodule(name, replacements[convs[name]].train(parent.training))
            _forbid_merging(model, name)
    share_progress(model)
    save_warehouses_once(model)
    return model


def layer_class(layer: str | type[DropInConv2d]) -> type[DropInConv2d]:
    """The class of a layer that can replace convolutions, by the name of its family or as it is.

    Raises:
        ValueError: If there is none.
    """
    layers = families.layers()
    cls = layers.get(layer) if isinstance(layer, str) else layer
    if isinstance(cls, type) and issubclass(cls, DropInConv2d):
        return cls
    hint = did_you_mean(families.name_of(layer), layers) if isinstance(layer, str) else ""
    raise ValueError(
        f"layer must be one of {', '.join(map(repr, layers))} or a dynamic layer's class, got {layer!r}"
        + (f"; {hint}" if hint else "")
    )


def layer_options(cls: type[DropInConv2d]) -> list[str]:
    """The keyword arguments of a layer beyond those of a convolution."""
    functions = (cls.__init__, cls.from_conv, DropInConv2d.from_conv)
    parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
    names = dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return [name for name in names if name not in ("device", "dtype")]


def _check_options(cls: type[DropInConv2d], given: dict) -> None:
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls.__init__).parameters.values())
    options = layer_options(cls)
    for name in given if not takes_any else ():
        if name not in options:
            known = did_you_mean(name, options, f"it takes {', '.join(options) or 'none'}")
            raise ValueError(f"{cls.__name__} has no argument {name!r}; {known}")


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The static ones, by name; one that is used in several places has several names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    dynamic = tuple(f"{name}." for name, module in modules.items() if isinstance(module, (DropInConv2d, MaskUnit)))
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and not name.startswith(dynamic)
    }


def _replacement(conv: nn.Conv2d, cls: type[DropInConv2d], layer_kwargs: dict) -> DropInConv2d:
    if conv._forward_hooks or conv._forward_pre_hooks:
        raise ValueError("it has hooks, which would be lost")
    return cls.from_conv(conv, **layer_kwargs)


def _forbid_merging(model: nn.Module, name: str) -> None:
    """Stop timm's `reparameterize_model` from merging blocks around a layer, as if `weight` were all there is."""
    while name := name.rpartition(".")[0]:
        block = model.get_submodule(name)
        for method in ("fuse", "reparameterize", "switch_to_deploy"):
            if hasattr(block, method):
                setattr(block, method, _refuse_to_merge)


def _refuse_to_merge(*args, **kwargs) -> None:
    raise ValueError("a block with a dynamic convolution cannot be merged: reparameterize the model before `dynamize`")


def _matching_names(patterns: Iterable[str], convs: dict[str, nn.Conv2d]) -> list[str]:
    patterns = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"where must be a function, a pattern of names, or several, got {patterns}")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in convs):
            raise ValueError(f"where={pattern!r} matches no convolution of {_some(list(convs))}")
    return [name for name in convs if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _default_names(model: nn.Module, convs: dict[str, nn.Conv2d]) -> list[str]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    # A feature extractor has underscores for the dots.
    stem = {name.replace(".", "_") for name in _names(cfg.get("first_conv"))}
    stem = {name for name in convs if name.replace(".", "_") in stem} or set(list(convs)[:1])
    head = tuple(f"{name}." for name in ("pre_logits", *_names(cfg.get("classifier"))))

    modules = dict(model.named_modules(remove_duplicate=False))
    attention = tuple(
        f"{name}."
        for name, module in modules.items()
        if name.rpartition(".")[2] in _ATTENTION
        or (name and _ATTENTION_CLASS.search(type(module).__name__) and "Block" not in type(module).__name__)
    )
    # Modules are registered in the order in which they run.
    order = {name: i for i, name in enumerate(modules)}
    pools = [(name.removesuffix("global_pool"), order[name]) for name in order if name.split(".")[-1] == "global_pool"]

    def is_shortcut(name: str) -> bool:
        return convs[name].kernel_size == (1, 1) and not _SHORTCUTS.isdisjoint(name.split("."))

    def is_pooled(name: str) -> bool:
        return any(name.startswith(parent) and order[name] >= pool for parent, pool in pools)

    return [
        name
        for name in convs
        if not (name in stem or f"{name}.".startswith(head + attention) or is_shortcut(name) or is_pooled(name))
    ]


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else "")


def _kind(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
