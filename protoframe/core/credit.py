"""Credit: what bounds the items of streams that are on the way or wait to be taken, at both ends.

Knows sizes and call ids; not what an item is, nor who takes it.  A receiver grants credit by bytes, for each stream
and for all of them together, as a window of HTTP/2 does (RFC 9113, section 5.2).  A sender may send while both are
above 0, and what it sends may overdraw them once: so an item larger than a window still passes, and what is held is
bounded by the window and one message.
"""

from __future__ import annotations

from protoframe.core.frames import ITEM_OVERHEAD
from protoframe.core.limits import Limits
from protoframe.errors import CreditExceeded, RemoteProtocolError

__all__ = ["Granted", "Received", "cost_of"]

_MOST = (1 << 31) - 1


def cost_of(octets: int, count: int) -> int:
    """What an ITEM costs of the credit."""
    return octets + ITEM_OVERHEAD * count


class Received:
    """The credit that the peer granted: what this end may send.

    :ivar connection: of all streams together.
    :ivar streams: of each stream that this end sends, by call id.
    :param stream: what the peer's HELLO grants of each.
    :param connection: of all.
    """

    __slots__ = ("_initial", "connection", "streams")

    def __init__(self, stream: int, connection: int) -> None:
        self.connection = connection
        self.streams: dict[int, int] = {}
        self._initial = stream

    def open(self, call_id: int) -> None:
        """A stream begins."""
        self.streams[call_id] = self._initial

    def close(self, call_id: int) -> None:
        """A stream is over."""
        self.streams.pop(call_id, None)

    def left(self, call_id: int) -> int:
        """What may be sent of a stream now; 0 or less where nothing may."""
        return min(self.connection, self.streams.get(call_id, 0))

    def spend(self, call_id: int, cost: int) -> None:
        """Something is sent."""
        self.streams[call_id] -= cost
        self.connection -= cost

    def refund(self, call_id: int, cost: int) -> bool:
        """What was spent is not sent after all; whether that lets something go on."""
        if call_id in self.streams:
            self.streams[call_id] += cost
        before = self.connection
        self.connection += cost
        return before <= 0 < self.connection

    def add(self, call_id: int, octets: int) -> bool:
        """The peer grants more, for a stream or (call id 0) for all; whether that lets something go on.

        :raises RemoteProtocolError: it grants more than anybody can count.
        """
        before = self.streams.get(call_id) if call_id else self.connection
        if before is None:
            # That of a stream which has ended here.
            return False
        after = before + octets
        if after > _MOST:
            raise RemoteProtocolError(f"CREDIT: {after} octets are more than {_MOST}")
        if call_id:
            self.streams[call_id] = after
        else:
            self.connection = after
        return before <= 0 < after


class _Window:
    """What one stream, or the connection, may hold of what the peer sends."""

    __slots__ = ("left", "returned", "used")

    def __init__(self, size: int) -> None:
        self.used = False
        self.left = size
        self.returned = 0

    def due(self) -> int:
        """What to grant now: 0 until it is worth a frame.

        That is when it is no less than what is left: half of the window where all of it is taken in time, and less
        where part of it is held up by streams that nobody takes, for the others must go on.
        """
        if not self.returned or self.returned < self.left:
            return 0
        granted, self.returned = self.returned, 0
        self.left += granted
        return granted


class Granted:
    """The credit that this end granted: what the peer may send.

    That of a stream comes back when its items are taken.  That of the connection comes back when they arrive, for else
    a few streams that nobody takes just now would hold up all others; but when more than `Limits.max_unread` waits to
    be taken, it too comes back only when that is.

    :param limits: how much is granted, of each stream and of all together.
    :ivar streams: the windows of those of which more is wanted, by call id.
    """

    __slots__ = ("_connection", "_kept", "_most", "_stream", "_unread", "streams")

    def __init__(self, limits: Limits) -> None:
        self._stream = limits.stream_credit
        self._most = limits.max_unread
        self._connection = _Window(limits.connection_credit)
        # What came and was not taken, and how much of its credit was not given back for that.
        self._unread = 0
        self._kept = 0
        self.streams: dict[int, _Window] = {}

    def open(self, call_id: int) -> None:
        """A stream begins."""
        self.streams[call_id] = _Window(self._stream)

    def close(self, call_id: int) -> None:
        """Nothing more of a stream is wanted, or comes."""
        self.streams.pop(call_id, None)

    def is_open(self, call_id: int) -> bool:
        """Whether something of a stream is still wanted."""
        return call_id in self.streams

    def is_used(self, call_id: int) -> bool:
        """Whether it is, and something of it came."""
        window = self.streams.get(call_id)
        return window is not None and window.used

    def spend(self, call_id: int, cost: int) -> None:
        """Something came, of a stream that is open or of one that is not wanted any more.

        :raises CreditExceeded: the peer had no credit left.
        """
        window = self.streams.get(call_id)
        if self._connection.left <= 0 or (window is not None and window.left <= 0):
            raise CreditExceeded(f"ITEM: call {call_id} has no credit left")
        self._connection.left -= cost
        self._unread += cost
        if self._unread > self._most:
            self._kept += cost
        else:
            self._connection.returned += cost
        if window is not None:
            window.left -= cost
            window.used = True

    def give_back(self, call_id: int, cost: int) -> None:
        """What came was taken, or nobody wants it."""
        window = self.streams.get(call_id)
        if window is not None:
            window.returned += cost
        self._unread -= cost
        given = min(self._kept, cost)
        self._kept -= given
        self._connection.returned += given

    def grants(self, call_id: int) -> list[tuple[int, int]]:
        """The credit to grant now, of a stream and of all, as call ids (0 for all) and octets."""
        grants = []
        window = self.streams.get(call_id)
        if window is not None and (octets := window.due()):
            grants.append((call_id, octets))
        if octets := self._connection.due():
            grants.append((0, octets))
        return grants
