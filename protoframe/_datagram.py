"""UDP as a carrier: one conversation over an association.

Knows Connections and associations; not sockets (`protoframe._datagram_sockets`), nor what is in a datagram, which is
`protoframe.core.datagram`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.python.failure import Failure

from protoframe._clock import clock_of
from protoframe._connection import Connection
from protoframe.core.datagram.association import Address, Association
from protoframe.core.datagram.packets import Accept, Data, Malformed
from protoframe.core.frames import Flag, Frame, Kind
from protoframe.core.limits import Limits
from protoframe.errors import RemoteProtocolError

__all__ = ["DatagramCarrier"]

#: Octets that wait to be sent: above the one it takes no more, below the other it does again.
_HIGH = 48 * 1024
_LOW = 16 * 1024


class DatagramCarrier:
    """Carries one conversation over an association.

    :param connect: makes the connection that this carries, given the carrier and the peer's address.
    :param limits: what this end takes.
    :param reactor: for the time, and for what is to happen later.
    :ivar connection: what is carried, from `begin` on.
    :ivar association: what carries it.
    :ivar has_roamed: whether this end has tried another socket since something came last.
    """

    allowance = 32 * 1024
    # What is sent later may come earlier.
    is_confirming = True
    connection: Connection
    association: Association
    transport: Any = None

    def __init__(self, connect: Callable[[DatagramCarrier, Any], Connection], limits: Limits, reactor: Any) -> None:
        self.limits = limits
        self._connect = connect
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._is_paused = False
        self._is_over = False
        self.has_roamed = False
        self._transmit: Callable[[bytes, Address], None] = _drop
        self._forget: Callable[[], None] = lambda: None

    def begin(
        self,
        association: Association,
        address: Any,
        transmit: Callable[[bytes, Address], None],
        forget: Callable[[], None],
    ) -> None:
        """Makes the connection, and greets the peer.

        :param address: the peer's, as Twisted has it.
        :param transmit: sends a datagram.
        :param forget: called when nothing more is sent or taken.
        """
        self.association = association
        self._transmit = transmit
        self._forget = forget
        self.connection = self._connect(self, address)
        self.connection.start()
        self.flush(self._clock())

    def confirm(self, total: int) -> None:
        """A large message has come."""
        self.connection.outbox.confirm(total)

    # What comes.

    def datagram_received(self, datagram: bytes, packet: Data | Accept, address: Address) -> None:
        """Takes a datagram of the association."""
        if self._is_over:
            return
        now = self._clock()
        association = self.association
        try:
            frames: list[Frame] = association.handle_datagram(datagram, packet, address, now)
        except Malformed:
            return
        except RemoteProtocolError as error:
            self.connection.violated(error)
            self.flush(now)
            return
        self.has_roamed = False
        connection = self.connection
        if frames or connection.outbox:
            connection.frames_received(frames, now)
        else:
            connection.heard(now)
        if frames and association.outflow.has_lanes:
            self._end_lanes(frames)
        self.flush(now)

    def _end_lanes(self, frames: list[Frame]) -> None:
        """Calls of this end that are answered send nothing more."""
        outflow = self.association.outflow
        for kind, flags, call_id, _ in frames:
            if kind in _ANSWERS and not flags & _MORE:
                outflow.end_lane(call_id)

    def knocked(self) -> None:
        """The client asks again to be let in."""
        now = self._clock()
        self.association.nudge(now)
        self.flush(now)

    # Carrier

    def send(self, frames: list[bytes]) -> None:
        """Sends frames, as far as the network is known to take them."""
        self.association.send(frames)
        self.flush(self._clock())

    def flush(self, now: float) -> None:
        """Sends what may be sent."""
        if self._is_over:
            return
        association = self.association
        for datagram, address in association.poll(now):
            self._transmit(datagram, address)
        if association.is_closed:
            self._end(ConnectionDone())
            return
        queued = association.outflow.queued
        if self._is_paused:
            if queued < _LOW:
                self._is_paused = False
                self.connection.resume()
        elif queued > _HIGH:
            self._is_paused = True
            self.connection.pause()
        self.connection.wake_at(association.next_timer())

    def too_large(self, size: int) -> None:
        """The machine itself did not take a datagram of this size."""
        self.association.handle_too_large(size, self._clock())

    def close(self) -> None:
        """Closes, once what was sent has come."""
        self.association.close()
        self.flush(self._clock())

    def abort(self) -> None:
        """Closes at once."""
        if not self._is_over:
            for datagram, address in self.association.abort():
                self._transmit(datagram, address)
            self._end(ConnectionAborted())

    def lose(self, reason: Exception) -> None:
        """The peer is gone, and nothing is to be sent to it."""
        self.association.is_closed = True
        self._end(reason)

    def _end(self, reason: Exception) -> None:
        if not self._is_over:
            self._is_over = True
            self._forget()
            # Not from within whatever it is that led here.
            self._reactor.callLater(0, self.connection.lost, Failure(reason))

    def certificate(self) -> None:
        """There is none: what goes over plain UDP is not encrypted."""

    def next_timer(self) -> float:
        """When the association wants `handle_timer`."""
        return math.inf if self._is_over else self.association.next_timer()

    def handle_timer(self, now: float) -> None:
        """Sends again what is lost, and what is due."""
        if not self._is_over:
            self.association.handle_timer(now)
            self.flush(now)


#: What the last frame of an answer may be.
_ANSWERS = frozenset((int(Kind.RESPONSE), int(Kind.ERROR), int(Kind.END)))
_MORE = int(Flag.MORE)


def _drop(datagram: bytes, address: Address) -> None:
    """Sends nothing: there is no association yet."""
