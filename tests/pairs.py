"""Fewer cases than all combinations of several lists."""

from collections.abc import Collection
from itertools import product
from typing import Any


def in_turns(*lists: Collection[Any]) -> list[tuple]:
    """All combinations of all lists but the last, whose values take turns, so that they meet all of the others."""
    *others, last = map(list, lists)
    all_places = product(*(range(len(one)) for one in others))
    return [(*(o[i] for o, i in zip(others, p, strict=True)), last[sum(p) % len(last)]) for p in all_places]
