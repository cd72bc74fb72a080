"""Many deadlines behind one timer.

Knows times and ids; what happens when one passes is the caller's.
"""

from __future__ import annotations

import heapq

__all__ = ["Deadlines"]

_SLACK = 64


class Deadlines:
    """A set of ids, each with the time at which it is due.

    Ids that are discarded leave a stale entry behind; when most entries are stale they are swept, so that the heap stays
    in proportion to what is alive and each call pays a constant share.
    """

    def __init__(self) -> None:
        self._due: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._due)

    def add(self, identifier: int, due: float) -> None:
        """Makes an id due at a time; an id that is there already gets the new time."""
        self._due[identifier] = due
        heap = self._heap
        heapq.heappush(heap, (due, identifier))
        if len(heap) > 2 * len(self._due) + _SLACK:
            heap[:] = [(due, identifier) for identifier, due in self._due.items()]
            heapq.heapify(heap)

    def discard(self, identifier: int) -> None:
        """Takes an id out, if it is there."""
        self._due.pop(identifier, None)

    def clear(self) -> None:
        """Takes all out."""
        self._due.clear()
        self._heap.clear()

    def next_due(self) -> float | None:
        """The earliest time at which an id is due, or ``None``."""
        heap = self._heap
        while heap:
            due, identifier = heap[0]
            if self._due.get(identifier) == due:
                return due
            heapq.heappop(heap)
        return None

    def pop_due(self, now: float) -> list[int]:
        """Takes out the ids that are due by now, the earliest first."""
        passed = []
        while (due := self.next_due()) is not None and due <= now:
            _, identifier = heapq.heappop(self._heap)
            del self._due[identifier]
            passed.append(identifier)
        return passed
