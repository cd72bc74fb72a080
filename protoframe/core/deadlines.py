"""Many deadlines behind one timer.

Knows times and ids; what happens when one passes, and whether anybody still waits for it, is the owner's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

__all__ = ["Deadlines"]

_SLACK = 64


class Deadlines:
    """A set of ids, each with the time at which it is due.

    An id that nobody waits for any more is not taken out: that would cost every call.  Most calls are over long before
    their deadlines, so new ones are only noted, and those of which somebody still waits when many have come are put in
    order, by `earliest`.  What is not waited for later is skipped when it is due, and swept when most entries are like
    it, so that what is kept stays in proportion to what is alive.

    :param is_alive: whether somebody still waits for an id.
    """

    __slots__ = ("_earliest", "_heap", "_is_alive", "_new", "_sweep_at")

    def __init__(self, is_alive: Callable[[int], bool]) -> None:
        self._is_alive = is_alive
        self._new: list[tuple[float, int]] = []
        self._heap: list[tuple[float, int]] = []
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
        if len(self._new) > _SLACK:
            self._sort()
        return self._earliest

    def _sort(self) -> None:
        """Puts what is new, and waited for, in order."""
        heap, is_alive = self._heap, self._is_alive
        for entry in self._new:
            if is_alive(entry[1]):
                heapq.heappush(heap, entry)
        self._new.clear()
        if len(heap) > self._sweep_at:
            heap[:] = [entry for entry in heap if is_alive(entry[1])]
            heapq.heapify(heap)
            self._sweep_at = 2 * len(heap) + _SLACK
        self._earliest = heap[0][0] if heap else math.inf

    def pop_due(self, now: float) -> list[int]:
        """Takes out the ids that are due by now, the earliest first, and those in front that nobody waits for."""
        self._sort()
        heap = self._heap
        passed = []
        while heap:
            due, identifier = heap[0]
            alive = self._is_alive(identifier)
            if alive and due > now:
                break
            heapq.heappop(heap)
            if alive:
                passed.append(identifier)
        self._earliest = heap[0][0] if heap else math.inf
        return passed
