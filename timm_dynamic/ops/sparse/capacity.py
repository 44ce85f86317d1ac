"""Sparse execution without waiting for masks: tables with room for so many positions, whatever the mask.

How many positions a mask leaves active is known on the GPU only. A host that wants to know waits, at every block, and
the GPU has nothing to do meanwhile. So tables get the size that was enough lately and some more; what there really was
is read once, after the network, and where there was too little room its output is thrown away.
"""

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from timm_dynamic.ops.sparse import definition

_HEAD_ROOM = 1.25  # times the most that was seen
_MULTIPLE = 128  # rows that a GPU's matrix product computes together
_RECENT = 64  # runs after which what was seen begins to be forgotten
_MAX_SHAPES = 64  # of inputs for which a block remembers what it saw

Counts = tuple[int, int]  # of active and of needed positions

_running = threading.local()


class Recent:
    """The most positions that a block had in its last runs, `_RECENT` to twice as many."""

    def __init__(self):
        self._runs, self._now, self._before = 0, (), ()

    def add(self, counts: Counts) -> None:
        self._now = tuple(map(max, self._now or counts, counts))

    def most(self) -> Counts | None:
        """Asked for a run; None: that many runs came without `add`."""
        self._runs += 1
        if self._runs > _RECENT:
            self._runs, self._now, self._before = 1, (), self._now
        return tuple(map(max, self._now or self._before, self._before or self._now)) or None


Seen = dict[tuple, Recent]  # by device and shape of the input


def current() -> "Capacities | None":
    """Those that the blocks of this thread are to run with; None: each asks how many positions it has."""
    return getattr(_running, "current", None)


class Capacities:
    """In this context blocks with masks run with tables of fixed sizes, and their true counts are kept on the device.

    Args:
        share: Room for this share of all positions; None: for what each block has seen, and some more. A block that has
            seen nothing asks how many there are.
        exact: All blocks ask, and remember the answer.
    """

    def __init__(self, share: float | None = None, exact: bool = False):
        self.share, self.exact = share, exact
        self._runs: list[tuple[Seen, tuple, Counts]] = []
        self._counts: list[Tensor] = []

    def __enter__(self) -> "Capacities":
        self._before, _running.current = current(), self
        return self

    def __exit__(self, *error) -> None:
        _running.current = self._before

    def expected(self, seen: Seen, key: tuple, totals: Counts) -> Counts | None:
        """How many positions a block will have; None: it has to ask."""
        if self.exact:
            return None
        if self.share is not None:
            return tuple(math.ceil(self.share * total) for total in totals)
        recent = seen.get(key)
        return recent and recent.most()

    def room(self, expected: Counts, totals: Counts) -> Counts:
        """For that many."""
        if self.share is not None:
            return expected
        rounded = (math.ceil(_HEAD_ROOM * max(count, 1) / _MULTIPLE) * _MULTIPLE for count in expected)
        return tuple(map(min, rounded, totals))

    def take(self, seen: Seen, key: tuple, room: Counts, counts: Tensor) -> None:
        """A block has run with that room; `counts`, `[2]` on the device, is what it would have needed."""
        self._runs.append((seen, key, room))
        self._counts.append(counts)

    def counts(self) -> Tensor | None:
        """What all blocks would have needed, `[blocks, 2]` on the device; None if none ran with fixed tables."""
        return torch.stack([one.to(self._counts[0].device) for one in self._counts]) if self._counts else None

    def suffice(self, counts: Tensor | None) -> bool:
        """Whether there was room for all; waits for the device."""
        if counts is None:
            return True
        for (seen, key, room), (active, needed) in zip(self._runs, _read(counts), strict=True):
            remember(seen, key, (active, needed))
            if active > room[0] or needed > room[1]:
                return False  # what followed had a wrong input
        return True


def remember(seen: Seen, key: tuple, counts: Counts) -> None:
    if key not in seen and len(seen) >= _MAX_SHAPES:
        seen.clear()
    seen.setdefault(key, Recent()).add(counts)


def _read(counts: Tensor) -> list[list[int]]:
    """The one place where the host waits."""
    return counts.tolist()


def run_without_waiting(forward: Callable[[], Tensor]) -> Tensor:
    """The output of `forward`, the network; it may have to run twice, so nobody may look into it."""
    if current() is not None:
        return forward()
    with Capacities() as capacities:
        y = forward()
    if not capacities.suffice(capacities.counts()):
        with Capacities(exact=True):
            y = forward()
    return y


def has_kernels(x: Tensor) -> bool:
    """Whether there is something to wait for, and kernels that do not."""
    return x.device.type == "cuda" and x.is_floating_point() and definition.runs_kernel("neighbour_table", x)
