"""Many deadlines behind one timer.

Knows times and ids; what happens when one passes, and whether anybody still waits for it, is the owner's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

__all__ = ["Deadlines", "Entry"]

_SLACK = 64


#: When an id is due, and the id.
Entry = tuple[float, int]


class Deadlines:
    """A set of ids, each with the time at which it is due.

    An id that nobody waits for any more is not taken out: that would cost every call.  Most calls are over long before
    their deadlines, so new ones are only noted, and those of which somebody still waits when many have come are put in
    order, by `earliest`.  What is not waited for later is skipped when it is due, and swept when most entries are like
    it, so that what is kept stays in proportion to what is alive.

    :param alive: picks out of entries those whose ids somebody still waits for.
    """

    __slots__ = ("_alive", "_earliest", "_heap", "_new", "_sort_at", "_sweep_at")

    def __init__(self, alive: Callable[[list[Entry]], list[Entry]]) -> None:
        self._alive = alive
        self._new: list[Entry] = []
        self._heap: list[Entry] = []
        self._sort_at = _SLACK
        self._sweep_at = _SLACK
        self._earliest = math.inf

    def __len__(self) -> int:
        return len(self._new) + len(self._heap)

    def add(self, identifier: int, due: float) -> None:
        """Makes an id due at a time."""
        self._new.append((due, identifier))
        if due < self._earliest:
            self._earliest = due

    def clear(self) -> None:
        """Takes all out."""
        self._new.clear()
        self._heap.clear()
        self._earliest = math.inf

    def earliest(self) -> float:
        """A time before which nothing is due; infinity where nothing ever is."""
        if len(self._new) > self._sort_at:
            self._sort()
        return self._earliest

    def _sort(self) -> None:
        """Puts what is new, and waited for, in order."""
        heap = self._heap
        new = self._alive(self._new)
        self._new.clear()
        # Where many are waited for, more are let come before the next time: most of these will be over by then.
        self._sort_at = 3 * len(new) + _SLACK
        for entry in new:
            heapq.heappush(heap, entry)
        if len(heap) > self._sweep_at:
            heap[:] = self._alive(heap)
            heapq.heapify(heap)
            self._sweep_at = 2 * len(heap) + _SLACK
        self._earliest = heap[0][0] if heap else math.inf

    def pop_due(self, now: float) -> list[int]:
        """Takes out the ids that are due by now, the earliest first, and those in front that nobody waits for."""
        self._sort()
        heap = self._heap
        passed = []
        while heap:
            alive = self._alive(heap[:1])
            if alive and heap[0][0] > now:
                break
            _, identifier = heapq.heappop(heap)
            if alive:
                passed.append(identifier)
        self._earliest = heap[0][0] if heap else math.inf
        return passed
