"""TCP in the simulated network: a small one, but real: NewReno over packets that may get lost.

Knows segments, and Twisted's stream transports; how packets travel is the network's.  What is lost holds up what was
sent after it, and a flow shares a bottleneck as one of a kernel does.  It has what matters for that of RFC 9293 (the
protocol), RFC 5681 and RFC 6582 (congestion control) and RFC 6298 (retransmission); there are no SACK, no timestamps,
no simultaneous opening.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from twisted.internet.error import (
    ConnectionAborted,
    ConnectionDone,
    ConnectionLost,
    TCPTimedOutError,
)
from twisted.internet.error import (
    ConnectionRefusedError as TwistedConnectionRefusedError,
)
from twisted.internet.interfaces import IConsumer, IHalfCloseableProtocol, ITCPTransport
from twisted.internet.main import CONNECTION_DONE
from twisted.python.failure import Failure
from zope.interface import implementer

from protoframe.testing._timeline import Call

if TYPE_CHECKING:
    from protoframe.testing._host import Host

__all__ = ["Segment", "StreamConnection"]

#: Octets of the headers of IP and TCP.
HEADERS_4, HEADERS_6 = 40, 60
#: Octets of data in one segment, and what a receiver keeps that is not read.
MSS = 1400
RECEIVE_WINDOW = 256 * 1024
#: Octets that wait to be sent before a producer is paused.
SEND_BUFFER = 64 * 1024
#: Seconds; RFC 6298, with the least that Linux has.
FIRST_RTO, LEAST_RTO, LONGEST_RTO = 1.0, 0.2, 60.0
#: How often one segment is sent again in vain, and how often the first one.
MOST_RETRIES, MOST_KNOCKS = 15, 6
DUPLICATES = 3


@dataclasses.dataclass(slots=True)
class Segment:
    """A segment of TCP."""

    sequence: int
    acknowledged: int
    data: bytes = b""
    window: int = RECEIVE_WINDOW
    syn: bool = False
    fin: bool = False
    rst: bool = False

    @property
    def length(self) -> int:
        """The numbers that it takes."""
        return len(self.data) + self.syn + self.fin


def half_closeable(protocol: Any) -> bool:
    """Whether a protocol wants to know when one direction is closed, and go on with the other."""
    provided: Any = IHalfCloseableProtocol
    return bool(provided.providedBy(protocol))


@implementer(ITCPTransport, IConsumer)
class StreamConnection:
    """One end of a TCP connection, and the transport of its protocol.

    :param host: whose it is.
    :param local: this end's port.
    :param remote: the other end's address and port.
    :param protocol: what talks; of a client's, `factory` gives it when the connection is there.
    """

    disconnecting = False
    protocol: Any = None

    def __init__(self, host: Host, local: int, remote: tuple[str, int], *, is_ipv6: bool) -> None:
        self.host = host
        self.local = local
        self.remote = remote
        self.is_ipv6 = is_ipv6
        self.state = "new"
        self.on_open: Any = None
        self.on_fail: Any = None
        self.on_lost: Any = None
        self._buffer = bytearray()  # sent and not acknowledged, and not sent
        self._una = 0
        self._next = 0  # the SYN takes number 0
        self._most = 0
        self._fin_at = -1
        self._window = MSS
        self._cwnd = 10 * MSS
        self._ssthresh = 1 << 30
        self._duplicates = 0
        self._recover = -1
        self._rto = FIRST_RTO
        self._srtt = 0.0
        self._rttvar = 0.0
        self._timed: tuple[int, float] | None = None
        self._retries = 0
        self._timer: Call | None = None
        self._received = 0
        self._early: dict[int, Segment] = {}
        self._unread = bytearray()
        self._is_reading = True
        self._remote_fin = False
        self._producer: Any = None
        self._is_streaming = True
        self._producer_paused = False
        self._own_fin_came = False
        # Whether the protocol was told that no more comes, and may still send.
        self._is_half_closed = False

    # Opening.

    def connect(self) -> None:
        """Knocks."""
        self.state = "knocking"
        self._next = 1
        self._emit(Segment(0, 0, syn=True))
        self._arm()

    def accept(self) -> None:
        """Answers one that knocked."""
        self.state = "answering"
        self._received = 1
        self._next = 1
        self._emit(Segment(0, 1, syn=True))
        self._arm()

    def _opened(self) -> None:
        self.state = "open"
        self._una = max(self._una, 1)
        self._retries = 0
        self._disarm()
        if self.on_open is not None:
            self.on_open(self)
        self._push()

    # Packets.

    def _emit(self, segment: Segment) -> None:
        self._most = max(self._most, segment.sequence + segment.length)
        segment.acknowledged = self._received
        segment.window = max(0, RECEIVE_WINDOW - len(self._unread))
        size = len(segment.data) + (HEADERS_6 if self.is_ipv6 else HEADERS_4)
        self.host.send("tcp", self.local, self.remote, size, segment, is_ipv6=self.is_ipv6)

    def arrived(self, segment: Segment) -> None:
        """A segment came."""
        if segment.rst:
            if self.state == "knocking":
                self._fail(TwistedConnectionRefusedError())
            else:
                self._lost(ConnectionLost())
            return
        if self.state == "knocking":
            if segment.syn and segment.acknowledged == 1:
                self._received = 1
                self._una = 1
                self._window = segment.window
                self._emit(Segment(self._next, 1))
                self._opened()
            return
        if segment.syn:
            # The other end has not heard that it is answered.
            self._emit(Segment(0, 1, syn=True) if self.state == "answering" else Segment(self._next, 0))
            return
        self._window = segment.window
        if self.state == "answering" and segment.acknowledged >= 1:
            self._opened()
        if self.state == "gone":
            return
        self._acknowledged(segment)
        if self.state != "gone" and segment.length:
            self._take(segment)

    # Receiving.

    def _take(self, segment: Segment) -> None:
        if segment.sequence > self._received:
            self._early.setdefault(segment.sequence, segment)
        else:
            self._in_order(segment)
            while self._early and (first := min(self._early)) <= self._received:
                self._in_order(self._early.pop(first))
        self._emit(Segment(self._next, 0))
        self._deliver()

    def _in_order(self, segment: Segment) -> None:
        after = segment.sequence + segment.length
        if after <= self._received:
            return
        data = segment.data[self._received - segment.sequence :]
        if not self.disconnecting:
            self._unread += data
        self._received = after
        self._remote_fin = self._remote_fin or segment.fin

    def _deliver(self) -> None:
        if self.state not in ("open", "closing") or not self._is_reading or self.protocol is None:
            return
        if self._unread:
            was_full = len(self._unread) > RECEIVE_WINDOW - MSS
            data, self._unread = bytes(self._unread), bytearray()
            if was_full:
                self._emit(Segment(self._next, 0))
            self.protocol.dataReceived(data)
        if self._remote_fin and not self._unread and self.state != "gone" and self.protocol is not None:
            self._read_all()

    def _read_all(self) -> None:
        """The other end sends no more, and what it sent is read."""
        if self._is_half_closed:
            if self._own_fin_came:
                self._lost(ConnectionDone())
        elif self._fin_at < 0 and half_closeable(self.protocol):
            self._is_half_closed = True
            self.host.callLater(0, self.protocol.readConnectionLost)
        else:
            # As Twisted: a protocol that is not for half-closed connections has its own closed.  It is told at once,
            # and the machine goes on until the other end knows.
            self._end_sending()
            self._tell(ConnectionDone())
            self.disconnecting = True
            if self._own_fin_came:
                self.vanish()

    # Sending.

    def write(self, data: bytes) -> None:
        """Sends octets."""
        if self.state == "gone" or self.disconnecting:
            return
        self._buffer += data
        self._push()
        if len(self._buffer) > SEND_BUFFER and self._producer is not None and not self._producer_paused:
            self._producer_paused = True
            self._producer.pauseProducing()

    def writeSequence(self, data: Any) -> None:
        """Sends octets in parts."""
        self.write(b"".join(data))

    def _push(self) -> None:
        """Sends what may be sent."""
        if self.state not in ("open", "closing"):
            return
        end = self._una + len(self._buffer)
        limit = self._una + min(self._cwnd, self._window)
        while self._next < min(end, limit):
            size = min(MSS, end - self._next, limit - self._next)
            if size < MSS and self._next + size < end and self._next > self._una:
                break
            self._send_at(self._next, size)
            self._next += size
        if self._fin_at >= 0 and self._next == end == self._fin_at:
            self._emit(Segment(self._next, 0, fin=True))
            self._next += 1
        if self._next > self._una or end > self._una:
            self._arm_if_idle()

    def _send_at(self, sequence: int, size: int) -> None:
        start = sequence - self._una
        if self._timed is None:
            self._timed = (sequence + size, self.host.seconds())
        self._emit(Segment(sequence, 0, bytes(self._buffer[start : start + size])))

    def _acknowledged(self, segment: Segment) -> None:
        number = segment.acknowledged
        if number > self._most:
            return
        if number > self._una:
            self._moved_on(number)
        elif number == self._una and self._next > self._una and not segment.length:
            self._duplicates += 1
            if self._duplicates == DUPLICATES and number > self._recover:
                flight = self._next - self._una
                self._ssthresh = max(flight // 2, 2 * MSS)
                self._cwnd = self._ssthresh + DUPLICATES * MSS
                self._recover = self._next
                self._again()
            elif self._duplicates > DUPLICATES:
                self._cwnd += MSS
        self._push()

    def _moved_on(self, number: int) -> None:
        came = number - self._una
        data = min(came, len(self._buffer))
        del self._buffer[:data]
        self._una = number
        # After a timeout it went back; what the other end had already need not be sent again.
        self._next = max(self._next, number)
        self._retries = 0
        if self._timed is not None and number >= self._timed[0]:
            self._measure(self.host.seconds() - self._timed[1])
            self._timed = None
        if self._recover >= number and self._duplicates >= DUPLICATES:
            # RFC 6582: there was another hole.
            self._cwnd = max(self._cwnd - came + MSS, MSS)
            self._again()
        else:
            if self._duplicates >= DUPLICATES:
                self._cwnd = self._ssthresh
            elif self._cwnd < self._ssthresh:
                self._cwnd += min(came, MSS)
            else:
                self._cwnd += max(1, MSS * MSS // self._cwnd)
            self._duplicates = 0
        self._disarm()
        if self._fin_at >= 0 and number > self._fin_at:
            self._own_fin_came = True
            if self.disconnecting or self._remote_fin:
                self._lost(ConnectionDone())
            elif half_closeable(self.protocol):
                self.host.callLater(0, self.protocol.writeConnectionLost)
            return
        if self._next > self._una:
            self._arm()
        if self._producer is not None and self._producer_paused and len(self._buffer) <= SEND_BUFFER // 2:
            self._producer_paused = False
            self._producer.resumeProducing()
        elif self._producer is not None and not self._is_streaming and not self._buffer:
            self._producer.resumeProducing()

    def _again(self) -> None:
        """Sends the oldest segment again; of what is sent twice no time is taken (Karn's algorithm)."""
        self._timed = None
        if self._una == self._fin_at:
            self._emit(Segment(self._una, 0, fin=True))
        elif self._buffer:
            self._emit(Segment(self._una, 0, bytes(self._buffer[:MSS])))

    def _measure(self, seconds: float) -> None:
        if not self._srtt:
            self._srtt, self._rttvar = seconds, seconds / 2
        else:
            self._rttvar = 0.75 * self._rttvar + 0.25 * abs(self._srtt - seconds)
            self._srtt = 0.875 * self._srtt + 0.125 * seconds
        self._rto = min(max(self._srtt + 4 * self._rttvar, LEAST_RTO), LONGEST_RTO)

    # The timer.

    def _arm_if_idle(self) -> None:
        if self._timer is None:
            self._arm()

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.host.timeline_call(min(self._rto * 2.0**self._retries, LONGEST_RTO), self._expired)

    def _disarm(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

    def _expired(self) -> None:
        self._timer = None
        self._retries += 1
        if self.state in ("knocking", "answering"):
            if self._retries > MOST_KNOCKS:
                self._fail(TCPTimedOutError())
                return
            self._emit(Segment(0, self._received, syn=True))
            self._arm()
            return
        if self._retries > MOST_RETRIES:
            self._lost(TCPTimedOutError())
            return
        if self._next > self._una or self._buffer:
            self._ssthresh = max((self._next - self._una) // 2, 2 * MSS)
            self._cwnd = MSS
            self._duplicates = 0
            self._recover = self._next
            self._timed = None
            # From the oldest on, as the window allows; one octet where the other end takes none (RFC 9293, 3.8.6.1).
            if self._una == self._fin_at:
                self._emit(Segment(self._una, 0, fin=True))
            else:
                size = min(MSS, len(self._buffer)) if self._window else min(1, len(self._buffer))
                self._emit(Segment(self._una, 0, bytes(self._buffer[:size])))
                self._next = self._una + size
            self._arm()

    # Ending.

    def loseConnection(self) -> None:
        """Closes, when all is sent."""
        if self.state == "gone" or self.disconnecting:
            return
        if self.state in ("knocking", "new"):
            self._fail(ConnectionAborted())
            return
        self.disconnecting = True
        self._end_sending()

    def loseWriteConnection(self) -> None:
        """Sends no more, and reads on."""
        self._end_sending()

    def _end_sending(self) -> None:
        if self._fin_at < 0:
            self.state = "closing"
            self._fin_at = self._una + len(self._buffer)
            self._push()

    def abortConnection(self) -> None:
        """Closes at once; the other end is told."""
        if self.state == "gone":
            return
        self._emit(Segment(self._next, 0, rst=True))
        if self.state in ("knocking", "new"):
            self._fail(ConnectionAborted())
        else:
            self._lost(ConnectionAborted())

    def vanish(self) -> None:
        """It is gone without a word, and its protocol with it."""
        self.state = "gone"
        self._disarm()
        self.host.free_stream(self)

    def _fail(self, error: Exception) -> None:
        self.vanish()
        if self.on_fail is not None:
            self.host.callLater(0, self.on_fail, Failure(error))

    def _lost(self, error: Exception) -> None:
        if self.state == "gone":
            return
        was_open = self.state in ("open", "closing")
        self.vanish()
        if was_open:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        """Tells the protocol that the connection is lost, once."""
        protocol, self.protocol = self.protocol, None
        self._producer = None
        if protocol is None:
            return
        failure = Failure(CONNECTION_DONE if isinstance(error, ConnectionDone) else error)

        def tell() -> None:
            protocol.connectionLost(failure)
            if self.on_lost is not None:
                self.on_lost(failure)

        self.host.callLater(0, tell)

    # ITCPTransport and IConsumer.

    def getPeer(self) -> Any:
        """The other end's address."""
        return self.host.make_address("TCP", *self.remote)

    def getHost(self) -> Any:
        """The address of this end."""
        return self.host.address_of("TCP", self.local, is_ipv6=self.is_ipv6)

    def getTcpNoDelay(self) -> bool:
        """There is no delay."""
        return True

    def setTcpNoDelay(self, enabled: bool) -> None:
        """There is none in any case."""

    def getTcpKeepAlive(self) -> bool:
        """There is none."""
        return False

    def setTcpKeepAlive(self, enabled: bool) -> None:
        """There is none in any case."""

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Has a producer paused while much waits to be sent."""
        if self._producer is not None:
            raise RuntimeError("a producer is registered already")
        self._producer = producer
        self._is_streaming = streaming
        if self.state == "gone":
            producer.stopProducing()
        elif not streaming:
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        """No more."""
        self._producer = None
        self._producer_paused = False

    def pauseProducing(self) -> None:
        """Reads no more."""
        self._is_reading = False

    def resumeProducing(self) -> None:
        """Reads on."""
        if not self._is_reading:
            self._is_reading = True
            self.host.timeline_call(0, self._deliver)

    def stopProducing(self) -> None:
        """Closes."""
        self.loseConnection()
