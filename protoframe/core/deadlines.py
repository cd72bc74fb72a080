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

    An id that nobody waits for any more is not taken out: that would cost every call.  It is skipped when it is due,
    and swept when most entries are like it, so that the heap stays in proportion to what is alive.

    :param is_alive: whether somebody still waits for an id.
    """

    def __init__(self, is_alive: Callable[[int], bool]) -> None:
        self._is_alive = is_alive
        self._heap: list[tuple[float, int]] = []
        self._sweep_at = _SLACK

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, identifier: int, due: float) -> None:
        """Makes an id due at a time."""
        heap = self._heap
        heapq.heappush(heap, (due, identifier))
        if len(heap) > self._sweep_at:
            heap[:] = [entry for entry in heap if self._is_alive(entry[1])]
            heapq.heapify(heap)
            self._sweep_at = 2 * len(heap) + _SLACK

    def clear(self) -> None:
        """Takes all out."""
        self._heap.clear()

    def earliest(self) -> float:
        """A time before which nothing is due; infinity where nothing ever is."""
        return self._heap[0][0] if self._heap else math.inf

    def pop_due(self, now: float) -> list[int]:
        """Takes out the ids that are due by now, the earliest first, and those in front that nobody waits for."""
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
        return passed
