"""Sets of whole numbers that come mostly in order, kept as ranges: packets and channels that were seen.

Knows numbers; not what they count.
"""

from __future__ import annotations

from bisect import bisect_right

__all__ = ["RangeSet"]


class RangeSet:
    """A set of whole numbers from 0 on.

    Two sorted lists hold where the ranges start and where they end (the end not included).  Where the last one ends is
    `end`, so that to add the number after it, as is to be done almost always, is to set that.

    :ivar floor: what is below it counts as in the set, and is not kept.
    :ivar end: the number after the largest in the set, or the floor.  To raise it adds the numbers up to there.
    """

    __slots__ = ("_ends", "_starts", "end", "floor")

    def __init__(self) -> None:
        self.floor = 0
        self.end = 0
        # There is always a range, if only an empty one at the floor.
        self._starts = [0]
        self._ends = [0]

    def __len__(self) -> int:
        """How many ranges there are above the floor."""
        return len(self._starts) - (self._starts[-1] == self.end)

    def __contains__(self, number: int) -> bool:
        if number < self.floor:
            return True
        if number >= self.end:
            return False
        self._ends[-1] = self.end
        at = bisect_right(self._starts, number) - 1
        return at >= 0 and number < self._ends[at]

    @property
    def prefix(self) -> int:
        """The smallest number that is not in the set."""
        self._ends[-1] = self.end
        return self._ends[0] if self._starts[0] <= self.floor else self.floor

    def misses(self, start: int, end: int) -> bool:
        """Whether none of the numbers from ``start`` to before ``end`` is in the set."""
        if start < self.floor:
            return False
        if start >= self.end:
            return True
        self._ends[-1] = self.end
        at = bisect_right(self._starts, start) - 1
        if at >= 0 and start < self._ends[at]:
            return False
        return self._starts[at + 1] >= end

    def add(self, start: int, end: int) -> None:
        """Adds the numbers from ``start`` to before ``end``."""
        start = max(start, self.floor)
        if start >= end:
            return
        if start == self.end:
            self.end = end
            return
        starts, ends = self._starts, self._ends
        ends[-1] = self.end
        if start > self.end:
            if starts[-1] == self.end:
                # The empty one.
                starts[-1] = start
            else:
                starts.append(start)
                ends.append(end)
            self.end = end
            return
        # The ranges that touch it become one with it.
        first = bisect_right(ends, start - 1)
        last = bisect_right(starts, end)
        if first < last:
            start = min(start, starts[first])
            end = max(end, ends[last - 1])
        starts[first:last] = [start]
        ends[first:last] = [end]
        self.end = ends[-1]

    def drop_below(self, number: int) -> None:
        """Raises the floor: what is below ``number`` counts as in the set from now on."""
        if number <= self.floor:
            return
        self.floor = number
        if number >= self.end:
            self.end = number
            self._starts, self._ends = [number], [number]
            return
        self._ends[-1] = self.end
        gone = bisect_right(self._ends, number)
        del self._starts[:gone], self._ends[:gone]
        if self._starts[0] < number:
            self._starts[0] = number

    def keep(self, most: int) -> None:
        """Keeps the last ``most`` ranges, and raises the floor to where they start."""
        if len(self._starts) > most:
            self.drop_below(self._starts[-most])

    def newest_first(self, most: int) -> list[tuple[int, int]]:
        """The last ``most`` ranges, as the first and the last number of each, the newest first."""
        if not len(self):
            return []
        self._ends[-1] = self.end
        starts, ends = self._starts[-most:], self._ends[-most:]
        return [(start, end - 1) for start, end in zip(reversed(starts), reversed(ends), strict=True)]
