"""Arguments of another type than a constructor's annotations say: one line instead of a failure deep inside."""

import inspect
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    NoneType: "None",
    Sequence: "a list",
}
_KINDS = {int: Integral, float: Real}


def check_types(maker: Callable, arguments: dict[str, Any]) -> None:
    """Raise a ValueError that names the first argument of another type than its annotation says.

    Args:
        maker: A function, or a class, whose constructor and those of its bases have the annotations. Only those are
            looked at that are made of numbers, truth values, texts, None, and sequences, not at what the latter hold.
        arguments: By name.
    """
    annotations = {}
    for one in reversed(maker.__mro__[:-1] if isinstance(maker, type) else [maker]):
        function = vars(one).get("__init__") if isinstance(one, type) else one
        annotations |= inspect.get_annotations(function) if function else {}
    for name, value in arguments.items():
        annotation = annotations.get(name)
        parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        kinds = [Sequence if get_origin(part) in (tuple, list, Sequence) else part for part in parts]
        if set(kinds) <= set(_WORDS) and not any(_is(value, kind) for kind in kinds):
            raise ValueError(f"{name} must be {' or '.join(_WORDS[kind] for kind in kinds)}, got {value!r}")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, _KINDS.get(kind, kind)) and not (kind is Sequence and isinstance(value, str))
