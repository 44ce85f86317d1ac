"""Fewer cases than all combinations of several lists."""

from collections.abc import Collection, Iterator
from itertools import product
from typing import Any


def in_turns(*lists: Collection[Any]) -> Iterator[tuple]:
    """All combinations of all lists but the last, whose values take turns, so that they meet all of the others."""
    *others, last = map(list, lists)
    for places in product(*(range(len(one)) for one in others)):
        yield *(one[i] for one, i in zip(others, places, strict=True)), last[sum(places) % len(last)]
