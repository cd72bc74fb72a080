"""How often something happens, in the last minute.

Knows counts and the time.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Rate"]

#: Seconds that a rate is of.
_WINDOW = 60


class Rate:
    """Counts what happens.

    :param clock: gives the time, in seconds.
    """

    __slots__ = ("_began", "_clock", "_counts", "_second")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts = [0] * _WINDOW
        self._began = clock()
        self._second = int(self._began)

    def add(self, count: int) -> None:
        """So many happened now."""
        second = int(self._clock())
        if second != self._second:
            self._turn(second)
        self._counts[second % _WINDOW] += count

    def per_second(self) -> float:
        """How many have happened a second; of less than a minute, if there was less yet."""
        now = self._clock()
        self._turn(int(now))
        return sum(self._counts) / min(max(now - self._began, 1.0), _WINDOW)

    def _turn(self, second: int) -> None:
        for passed in range(self._second + 1, min(second, self._second + _WINDOW) + 1):
            self._counts[passed % _WINDOW] = 0
        self._second = max(second, self._second)
