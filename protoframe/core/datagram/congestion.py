"""How much may be on the way: NewReno after RFC 9002, section 7, and a pacer after its section 7.7.

Knows octets and times; not which packets they are of.
"""

from __future__ import annotations

import math

__all__ = ["NewReno", "Pacer"]

#: Packets that may be on the way at first, and the fewest that may be at any time; RFC 9002, section 7.2.
INITIAL_PACKETS = 10
LEAST_PACKETS = 2
#: What is left of the window where something was lost; RFC 9002, appendix B.1.
REDUCTION = 0.5
#: Octets that may be on the way at most: what a receiver's socket can be asked to hold while its process is busy.
LARGEST_WINDOW = 4 * 1024 * 1024
#: Packets that may leave at once before they are spaced out, and how much faster than the window turns over they do.
BURST = 16
PACE = 1.25


class NewReno:
    """A congestion window.

    :param size: octets of a full packet.
    :ivar window: octets that may be on the way.
    :ivar in_flight: octets that are.
    :ivar is_full: whether the window kept something from being sent: only then may it grow.
    """

    __slots__ = ("_recovering_since", "_size", "in_flight", "is_full", "threshold", "window")

    def __init__(self, size: int) -> None:
        self._size = size
        self.window = INITIAL_PACKETS * size
        self.threshold = math.inf
        self.in_flight = 0
        self.is_full = False
        self._recovering_since = -math.inf

    @property
    def size(self) -> int:
        """Octets of a full packet."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        # The window is of as many packets as before, only where they are smaller now: RFC 8899, section 3, has a larger
        # packet not count as more of them.
        if size < self._size:
            self.window = max(self.window * size // self._size, LEAST_PACKETS * size)
        self._size = size
        self.window = max(self.window, LEAST_PACKETS * size)

    def acknowledged(self, octets: int, sent: float) -> None:
        """A packet has come, that was sent then."""
        self.in_flight -= octets
        if not self.is_full or sent <= self._recovering_since:
            return
        if self.window < self.threshold:
            self.window += octets
        else:
            self.window += self._size * octets // self.window or 1
        self.window = min(self.window, LARGEST_WINDOW)

    def lost(self, octets: int) -> None:
        """A packet is lost; `congested` says what that means."""
        self.in_flight -= octets

    def congested(self, sent: float, now: float) -> None:
        """Something that was sent then is lost: once a round trip, the window is halved."""
        if sent <= self._recovering_since:
            return
        self._recovering_since = now
        self.window = max(int(self.window * REDUCTION), LEAST_PACKETS * self._size)
        self.threshold = self.window

    def collapsed(self) -> None:
        """All that was sent for a long time is lost; RFC 9002, section 7.6."""
        self.window = LEAST_PACKETS * self._size
        self._recovering_since = -math.inf


class Pacer:
    """Spaces packets out once more of them have left than a network should get at once.

    A token bucket of `BURST` packets, that fills `PACE` times as fast as the window turns over.

    :ivar left: octets in it; whoever sends takes them out, and may overdraw it.
    """

    __slots__ = ("_at", "left")

    def __init__(self, now: float) -> None:
        self._at = now
        self.left = math.inf

    def allows(self, now: float, window: int, size: int, round_trip: float) -> float:
        """When the next packet may leave; ``now`` or earlier for at once."""
        rate = PACE * window / round_trip
        left = min(self.left + (now - self._at) * rate, float(BURST * size))
        self.left = left
        self._at = now
        return now if left >= 0 else now - left / rate
