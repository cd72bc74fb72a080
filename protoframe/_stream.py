"""Twisted stream transports as a carrier: TCP, TLS, UNIX sockets, and whatever else an endpoint connects.

Knows `ITransport` and where bytes go; what they mean is `protoframe.core.stream`'s and the connection's.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from protoframe._clock import Timer, call_later
from protoframe._connection import Connection
from protoframe._tls import certificate_of
from protoframe.core.frames import GoAway, Kind, serialize_frame, serialize_preface
from protoframe.core.limits import Limits
from protoframe.core.stream import FrameReader
from protoframe.errors import Error, RemoteProtocolError, VersionMismatch

__all__ = ["StreamCarrier", "TurnedAway"]

_log = Logger(namespace="protoframe.stream")


#: Octets from which on something is not copied once more to be sent together with others; and how many of these.
_LARGE = 8 * 1024
_MOST_PIECES = 128
#: Octets that a Twisted transport reads at a time, and as many as it is let where that is not enough.
_READ = FileDescriptor.bufferSize
_MOST_READ = 8 * _READ
#: Octets that are sent at a time; and when so often in a row the kernel had room for all of them.
_ALLOWANCE = 128 * 1024
_MOST_ALLOWANCE = 4 * _ALLOWANCE
_OFTEN = 16


@implementer(IPushProducer)
class StreamCarrier(TwistedProtocol):
    """The `IProtocol` of one stream connection.

    :param connect: makes the connection that this carries, given the carrier and the peer's address.
    :param limits: what this end takes.
    :param clock: gives the time.
    :param pauses_peer: whether to read no more while the peer does not read.
    :ivar connection: what is carried, from `connectionMade` on.
    """

    __slots__ = (
        "_clock",
        "_connect",
        "_is_direct",
        "_is_over",
        "_pauses_peer",
        "_peer_is_paused",
        "_reader",
        "_reads_more",
        "_socket",
        "_times_taken",
        "connection",
        "factory",
        "transport",
    )

    allowance = _ALLOWANCE
    # What is sent later comes later.
    is_confirming = False
    connection: Connection
    transport: Any

    def __init__(
        self,
        connect: Callable[[StreamCarrier, Any], Connection],
        limits: Limits,
        clock: Callable[[], float],
        *,
        pauses_peer: bool,
    ) -> None:
        self._connect: Callable[[StreamCarrier, Any], Connection] | None = connect
        self._clock = clock
        self._pauses_peer = pauses_peer
        self._peer_is_paused = False
        self._is_over = False
        self._socket: Any = None
        self._is_direct = False
        self._times_taken = 0
        self._reads_more = False
        self._reader = FrameReader(limits.max_frame, limits.frame_timeout)

    # IProtocol

    def connectionMade(self) -> None:
        """Greets the peer."""
        transport = self.transport
        set_no_delay = getattr(transport, "setTcpNoDelay", None)
        if set_no_delay is not None:
            # Frames are gathered before they are written; Nagle's algorithm could only hold them up.
            set_no_delay(True)
        if (
            isinstance(transport, FileDescriptor)
            and hasattr(transport, "_tempDataBuffer")
            and hasattr(transport, "TLS")
        ):
            self._socket = self.transport.getHandle()
        connect, self._connect = typing.cast("Callable[[StreamCarrier, Any], Connection]", self._connect), None
        try:
            self.connection = connect(self, transport.getPeer())
        except Exception:
            _log.failure("what should serve {peer} could not be made", peer=transport.getPeer())
            self._is_over = True
            self.abort()
            return
        transport.registerProducer(self, True)
        if self._pauses_peer:
            # With the first frame, in one segment.
            self.connection.outbox.frames.insert(0, serialize_preface())
        else:
            # In the reactor's next turn: what a server of another kind has said by then is read first.  If it has
            # closed already, to send to it would make the kernel throw that away.
            transport.write(serialize_preface())
        self.connection.start()

    def dataReceived(self, data: bytes) -> None:
        """Takes what came."""
        reader = self._reader
        if self._is_over:
            return
        try:
            clock = self._clock
            now = clock()
            frames = reader.feed(data, now)
        except (RemoteProtocolError, VersionMismatch) as error:
            self.connection.violated(error)
            return
        if frames:
            self.connection.frames_received(frames, now)
        else:
            self.connection.heard(now)
        if len(data) >= _READ:
            self._read_more()
        elif self._reads_more and len(data) < _READ // 2:
            self._read_less()
        if reader.fault is not None:
            self.connection.violated(reader.fault)
        if reader.unfinished:
            self.connection.wake_at(reader.next_timer())

    def _read_more(self) -> None:
        """As much has come as is read at a time: more is read at a time."""
        if self._socket is not None and not self._reads_more:
            self._reads_more = True
            self.transport.bufferSize = _MOST_READ

    def _read_less(self) -> None:
        """Little has come: to set aside room for more would cost more than it brings."""
        self._reads_more = False
        self.transport.bufferSize = _READ

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tells the connection."""
        self._socket = None
        self._is_over = True
        connection = getattr(self, "connection", None)
        if connection is not None:
            connection.lost(reason)

    # IPushProducer: the transport says when it has enough to send.

    def pauseProducing(self) -> None:
        """The peer reads slower than this end writes.

        A server reads no more requests until its answers are read; a client goes on reading answers in any case, so
        that two ends never wait for each other.  Nor does a server stop before the peer's HELLO: a TLS transport pauses
        its producer until the handshake is done, which takes reading.
        """
        self.connection.pause()
        if self._pauses_peer and self.connection.is_open:
            self._peer_is_paused = True
            self._reader.stop_clock()
            self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """The peer has caught up."""
        if self._peer_is_paused:
            self._peer_is_paused = False
            self._reader.start_clock(self._clock())
            self.transport.resumeProducing()
            self.connection.wake_at(self._reader.next_timer())
        self.connection.resume()

    def stopProducing(self) -> None:
        """The transport is gone; `connectionLost` follows."""

    # Carrier

    def send(self, frames: list[bytes]) -> None:
        """Writes frames, all at once.

        `ITransport.write` would leave them for the reactor's next turn, and have it watch the socket meanwhile, which
        costs a caller that waits for one answer at a time a quarter of its time.  Where the transport is a socket
        that has nothing else to write, it is given to the kernel now; what the kernel does not take, and any error,
        is left to `write`.
        """
        if len(frames) == 1:
            data = frames[0]
        elif (len(frames[1]) >= _LARGE or len(frames[-1]) >= _LARGE) and self._send_large(frames):
            return
        else:
            data = b"".join(frames)
        if self._socket is not None and (self._is_direct or self._may_be_direct()):
            try:
                sent = self._socket.send(data)
            except OSError:
                # It is full, or broken: the reactor finds out.
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        self._is_direct = False
        self.transport.write(data)

    def _send_large(self, frames: list[bytes]) -> bool:
        """Gives frames to the kernel without joining them, where it takes any; what it does not take is left behind.

        :return: whether it took some.
        """
        if self._socket is None or not (self._is_direct or self._may_be_direct()) or len(frames) > _MOST_PIECES:
            return False
        try:
            sent = self._socket.sendmsg(frames)
        except OSError:
            self._is_slow()
            return False
        for number, frame in enumerate(frames):
            if sent < len(frame):
                self._is_direct = False
                self._is_slow()
                rest = [frame[sent:], *frames[number + 1 :]]
                self.transport.write(b"".join(rest))
                break
            sent -= len(frame)
        else:
            self._times_taken += 1
            if self._times_taken == _OFTEN:
                self.connection.allowance = _MOST_ALLOWANCE
        return True

    def _is_slow(self) -> None:
        """The peer reads slower than this end sends: it must not have to read much before it is seen to read at all."""
        self._times_taken = 0
        self.connection.allowance = _ALLOWANCE

    def _may_be_direct(self) -> bool:
        """Whether the transport has nothing to write that was given to it before."""
        transport = self.transport
        self._is_direct = not (transport.dataBuffer or transport._tempDataBuffer or transport.TLS)
        return self._is_direct

    def close(self) -> None:
        """Closes when all is written.  What the peer still sends is thrown away.

        To close a socket that has something unread in it would make the kernel throw away what the peer has not got yet
        (RFC 1122, section 4.2.2.13): so this end says that it sends no more, and reads on until the peer closes.
        """
        self._is_over = True
        transport = self.transport
        transport.unregisterProducer()
        if self._peer_is_paused:
            transport.resumeProducing()
        if self._socket is not None and not transport.TLS:
            transport.loseWriteConnection()
        else:
            transport.loseConnection()
        self._socket = None

    def abort(self) -> None:
        """Closes at once."""
        abort = getattr(self.transport, "abortConnection", None)
        if abort is not None:
            abort()
        else:
            self.transport.loseConnection()

    def certificate(self) -> Any:
        """The certificate that the peer has shown, and that was verified; ``None`` where there is none."""
        return certificate_of(self.transport)

    def next_timer(self) -> float:
        """When a frame that is on the way has taken too long."""
        return math.inf if self._is_over else self._reader.next_timer()

    def handle_timer(self, now: float) -> None:
        """
        :raises RemoteProtocolError: a frame has taken too long.
        """
        self._reader.handle_timer(now)


class TurnedAway(TwistedProtocol):
    """The `IProtocol` of a connection that is not wanted: it says why, and closes.

    :param error: why.
    :param reactor: for the time.
    :param patience: seconds for which the other end may take to be told.
    :ivar reason: the payload of the GOAWAY that says why.
    """

    transport: Any

    def __init__(self, error: Error, reactor: IReactorTime, patience: float) -> None:
        self.reason = GoAway(error.status, 0, f"{error.type_name}: {error.message}").serialize()
        self._reactor = reactor
        self._patience = patience
        self._timer: Timer | None = None

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It is gone."""
        if self._timer is not None:
            self._timer.cancel()

    def connectionMade(self) -> None:
        """Says why, and closes."""
        # One that says nothing would hold up the handshake of TLS, and so its end, for ever.
        self._timer = call_later(self._reactor, self._patience, self.transport.abortConnection)
        self.transport.write(serialize_preface() + serialize_frame(Kind.GOAWAY, 0, 0, self.reason))
        self.transport.loseConnection()
