"""How often a peer may do what costs this end more than it costs the peer.

Knows counts and times; what is counted, and what follows, is the owner's.
"""

from __future__ import annotations

__all__ = ["Allowance"]


class Allowance:
    """A token bucket: so many at once, and so many a second in the long run.

    :param burst: how many it holds, and begins with.
    :param rate: how many a second come back.
    :param now: the time.
    """

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, burst: int, rate: float, now: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = float(burst)
        self._at = now

    def take(self, now: float) -> bool:
        """Takes one; ``False`` where none is left."""
        self._left = min(float(self._burst), self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def is_full(self, now: float) -> bool:
        """Whether nothing was taken that has not come back."""
        return self._left + (now - self._at) * self._rate >= self._burst
