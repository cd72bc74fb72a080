"""How large a packet a path takes: packetization layer path MTU discovery after RFC 8899.

Knows sizes and how probes of them ended; not what a probe looks like.  It begins at the size that every path is taken
to carry, goes up a ladder of sizes that networks have, and falls back to the first where larger packets vanish.
"""

from __future__ import annotations

import math

from protoframe.core.datagram.packets import BASE_SIZE

__all__ = ["PathMTU"]

#: Octets of UDP payload: an Ethernet's less a tunnel, less IPv6, less IPv4 headers; then larger frames, and loopback.
LADDER = (BASE_SIZE, 1400, 1452, 1472, 4052, 8952, 16_332)
#: Probes of one size that may be lost; RFC 8899, section 5.1.2 (MAX_PROBES).
MOST_PROBES = 3
#: Seconds until a larger size is tried again; RFC 8899, section 5.1.1 (PMTU_RAISE_TIMER).
RAISE_AFTER = 600.0
#: Large packets that vanish in a row, nothing large having come, until smaller ones are sent; RFC 8899, section 4.3.
BLACK_HOLE = 6
#: Full packets that were sent before anything larger is tried: a short conversation has no use for it.
WARM_UP = 8


class PathMTU:
    """The size of packets of one path.

    :ivar size: octets that a packet may have.
    :ivar nearly: what a packet has at least that is nearly full.
    :ivar probing: the size that a probe of which is on the way; 0 where none is.
    """

    __slots__ = ("_failures", "_full", "_next_at", "_rung", "_vanished", "nearly", "probing", "size")

    def __init__(self) -> None:
        self._set(BASE_SIZE)
        self.probing = 0
        self._rung = 0
        self._failures = 0
        self._full = 0
        self._vanished = 0
        self._next_at = -math.inf

    def filled(self) -> None:
        """A packet was sent that is nearly full."""
        self._full += 1

    def probe(self, now: float) -> int:
        """The size of the probe to send now; 0 for none."""
        if self.probing or self._full < WARM_UP or now < self._next_at or self._rung + 1 == len(LADDER):
            return 0
        self.probing = LADDER[self._rung + 1]
        return self.probing

    def probe_came(self, size: int) -> None:
        """A probe got through."""
        if size == self.probing:
            self.probing = 0
            self._failures = 0
            self._rung += 1
            self._set(max(self.size, size))

    def probe_lost(self, size: int, now: float) -> None:
        """A probe was lost; that it is large is one reason why it may be."""
        if size != self.probing:
            return
        self.probing = 0
        self._failures += 1
        if self._failures >= MOST_PROBES:
            self._failures = 0
            self._next_at = now + RAISE_AFTER

    def too_large(self, size: int, now: float) -> None:
        """The machine itself has no way for a packet of this size."""
        if size > self.size:
            self.probing = 0
            self._failures = 0
            self._next_at = now + RAISE_AFTER
        else:
            self.fall_back(now)

    def came(self, size: int) -> None:
        """A packet got through."""
        if size > BASE_SIZE:
            self._vanished = 0

    def vanished(self, size: int, now: float) -> None:
        """A packet was lost."""
        if size > BASE_SIZE and self.size > BASE_SIZE:
            self._vanished += 1
            if self._vanished >= BLACK_HOLE:
                self.fall_back(now)

    def fall_back(self, now: float) -> None:
        """Sends small packets only, for some time."""
        self._set(BASE_SIZE)
        self.probing = 0
        self._rung = 0
        self._failures = 0
        self._vanished = 0
        self._next_at = now + RAISE_AFTER

    def _set(self, size: int) -> None:
        self.size = size
        self.nearly = size - size // 8
