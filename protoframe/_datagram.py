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
from protoframe.core.datagram.packets import Accept, Data, Plain
from protoframe.core.datagram.packets import Kind as PacketKind
from protoframe.core.datagram.recovery import MAX_ACK_DELAY
from protoframe.core.frames import Flag, Frame, Kind
from protoframe.core.limits import Limits
from protoframe.errors import RemoteProtocolError

__all__ = ["DatagramCarrier", "lose_datagram"]

#: Octets that wait to be sent: above the one it takes no more, below the other it does again.
_HIGH = 48 * 1024
_LOW = 16 * 1024
#: Probes in vain after which a client tries from another socket: its address may have changed under it.
_ROAM_AFTER = 6
_ACCEPT = int(PacketKind.ACCEPT)


class DatagramCarrier:
    """Carries one conversation over an association.

    :param connect: makes the connection that this carries, given the carrier and the peer's address.
    :param limits: what this end takes.
    :param reactor: for the time, and for what is to happen later.
    :ivar connection: what is carried, from `begin` on.
    :ivar association: what carries it.
    :ivar transmit: sends a datagram; whether it is too large for this machine.
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
        # What was queued when it said last that it takes no more.
        self._queued = 0
        self._is_receiving = False
        self._is_over = False
        self._has_roamed = False
        self.transmit: Callable[[bytes, Address], bool] = lose_datagram
        self._forget: Callable[[], Any] = _nothing
        self._roam: Callable[[], Any] = _nothing

    def begin(
        self,
        association: Association,
        address: Any,
        transmit: Callable[[bytes, Address], bool],
        forget: Callable[[], None],
        roam: Callable[[], None] | None = None,
    ) -> None:
        """Makes the connection, and greets the peer.

        :param address: the peer's, as Twisted has it.
        :param transmit: sends a datagram; whether it is too large for this machine.
        :param forget: called when nothing more is sent or taken.
        :param roam: called when the peer was asked several times for a sign of life, and gave none.
        """
        self.association = association
        self.transmit = transmit
        self._forget = forget
        if roam is not None:
            self._roam = roam
        self.connection = self._connect(self, address)
        self.connection.start()
        self.flush(self._clock())

    def awaits(self) -> bool:
        """Whether calls of this end are not answered yet."""
        return self.connection.pending > 0

    def confirm(self, total: int) -> None:
        """A large message has come."""
        self.connection.outbox.confirm(total)

    # What comes.

    def plain_received(self, plain: Plain, datagram: bytes, address: Address) -> bool:
        """Takes a datagram of the association in which `read_plain` found frames and nothing else, where it is next.

        :return: whether it was; otherwise it is for `datagram_received`.
        """
        clock, association = self._clock, self.association
        now = clock()
        if not association.handle_plain(plain, address, now):
            return False
        frames = plain[3]
        self._is_receiving = True
        try:
            self.connection.frames_received(frames, now)
        finally:
            self._is_receiving = False
            association.handled_plain(plain, datagram, now)
        self._received(frames, now)
        return True

    def datagram_received(self, datagram: bytes, kind: int, address: Address) -> None:
        """Takes a datagram of the association: one TO_SERVER, TO_CLIENT or ACCEPT.

        :raises Malformed: it does not keep to the layout.
        """
        if self._is_over:
            return
        now = self._clock()
        packet = Data.parse(datagram) if kind != _ACCEPT else Accept.parse(datagram)
        connection = self.connection
        try:
            frames = self.association.handle_datagram(datagram, packet, address, now)
        except RemoteProtocolError as error:
            connection.violated(error)
            self.flush(now)
            return
        self._is_receiving = True
        try:
            if frames or connection.outbox:
                connection.frames_received(frames, now)
            else:
                connection.heard(now)
        finally:
            self._is_receiving = False
        self._received(frames, now)

    def _received(self, frames: list[Frame], now: float) -> None:
        """What came is dealt with, and answered as far as that could be done at once."""
        association = self.association
        self._has_roamed = False
        if frames and association.outflow.lanes:
            self._end_lanes(frames)
        if self._is_paused or association.wants_poll(now):
            self.flush(now)
        elif self.connection.timer_due > now + MAX_ACK_DELAY:
            # Nothing else is due earlier: what is sent and what comes only puts off what was due before.
            self.connection.wake_at(association.next_timer())

    def _end_lanes(self, frames: list[Frame]) -> None:
        """Calls of this end that are answered send nothing more.

        An END of a call of the peer's is no answer: it says that no more comes with it, and its own answer goes on.
        """
        outflow, parity = self.association.outflow, self.association.parity
        for kind, flags, call_id, _ in frames:
            if kind in _ANSWERS and call_id & 1 == parity and not flags & _MORE:
                outflow.end_lane(call_id)

    def knocked(self) -> None:
        """The client asks again to be let in."""
        now = self._clock()
        self.association.nudge(now)
        self.flush(now)

    # Carrier

    def send(self, frames: list[bytes]) -> None:
        """Sends frames, as far as the network is known to take them."""
        association = self.association
        datagram = association.send_plain(frames)
        if datagram is not None:
            transmit, clock = self.transmit, self._clock
            is_too_large = transmit(datagram, association.path.address)
            now = clock()
            if is_too_large:
                self._too_large(len(datagram), now)
            association.sent_plain(datagram, now)
            if not self._is_receiving:
                self.connection.wake_at(association.next_timer())
            return
        if self._is_over:
            return
        now = self._clock()
        association.send(frames)
        if self._is_receiving:
            # The rest, timers and all, can wait until what came is dealt with.
            self._send(now)
        else:
            self.flush(now)

    def flush(self, now: float) -> None:
        """Sends what may be sent."""
        if self._is_over:
            return
        self._send(now)
        association = self.association
        if association.is_closed:
            self._end(ConnectionDone())
            return
        if self._is_paused and association.outflow.queued < _LOW:
            self._is_paused = False
            self.connection.resume()
        self.connection.wake_at(association.next_timer())

    def _send(self, now: float) -> None:
        """Sends what may be sent, and says when too much may not."""
        association = self.association
        for datagram, address in association.poll(now):
            if self.transmit(datagram, address):
                self._too_large(len(datagram), now)
        queued = association.outflow.queued
        if queued < self._queued if self._is_paused else queued > _HIGH:
            # Said again as long as it goes on at all: a slow network is not a peer that does not read.
            self._is_paused = True
            self._queued = queued
            self.connection.pause()

    def _too_large(self, size: int, now: float) -> None:
        self.association.handle_too_large(size, now)

    def close(self) -> None:
        """Closes, once what was sent has come."""
        self.association.close()
        self.flush(self._clock())

    def abort(self) -> None:
        """Closes at once."""
        if not self._is_over:
            for datagram, address in self.association.abort():
                self.transmit(datagram, address)
            self._end(ConnectionAborted())

    def lose(self, reason: Exception) -> None:
        """The peer is gone, and nothing is to be sent to it."""
        self.association.lose()
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
            if self.association.recovery.probes >= _ROAM_AFTER and not self._has_roamed:
                self._has_roamed = True
                self._roam()
            self.flush(now)


#: What the last frame of an answer may be.
_ANSWERS = frozenset((int(Kind.RESPONSE), int(Kind.ERROR), int(Kind.END)))
_MORE = int(Flag.MORE)


def lose_datagram(_: bytes, __: Address) -> bool:
    """Sends a datagram where there is no socket: it is lost, as a network may lose it."""
    return False


def _nothing() -> None:
    """What is called where there is no association yet."""
