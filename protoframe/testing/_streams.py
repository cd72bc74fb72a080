"""TCP ports and connectors of a simulated host: what `listenTCP` and `connectTCP` give.

Knows Twisted's factories; a connection itself is `protoframe.testing._tcp`'s.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import DNSLookupError, UserError
from twisted.internet.error import TimeoutError as TwistedTimeoutError
from twisted.internet.interfaces import IConnector, IListeningPort
from twisted.python.failure import Failure
from zope.interface import implementer

from protoframe.testing._tcp import StreamConnection
from protoframe.testing._timeline import Call

if TYPE_CHECKING:
    from protoframe.testing._host import Host

__all__ = ["StreamConnector", "StreamPort"]


@implementer(IListeningPort)
class StreamPort:
    """A TCP port at which a host listens.

    :ivar interface: the address that it takes connections at; all of the host's where that is empty.
    """

    def __init__(self, host: Host, port: int, factory: Any, *, is_ipv6: bool, interface: str = "") -> None:
        self.interface = interface
        self._host = host
        self._port = port
        self._factory = factory
        self._is_ipv6 = is_ipv6

    def startListening(self) -> None:
        """Tells the factory."""
        self._factory.doStart()

    def opened(self, stream: StreamConnection) -> None:
        """A connection is there."""
        protocol = self._factory.buildProtocol(stream.getPeer())
        if protocol is None:
            stream.abortConnection()
            return
        stream.protocol = protocol
        protocol.makeConnection(stream)

    def stopListening(self) -> Deferred[None]:
        """Listens no more; connections go on."""
        self.vanish()
        self._factory.doStop()
        return succeed(None)

    def vanish(self) -> None:
        """It is gone, and nobody is told."""
        self._host.free("tcp", self._port, self)

    def getHost(self) -> Any:
        """The address."""
        return self._host.address_of("TCP", self._port, is_ipv6=self._is_ipv6)


@implementer(IConnector)
class StreamConnector:
    """A client's connection, and what it was asked for."""

    def __init__(self, host: Host, to: str, port: int, factory: Any, timeout: float) -> None:
        self._host = host
        self._to = to
        self._port = port
        self._factory = factory
        self._timeout = timeout
        self._stream: StreamConnection | None = None
        self._timer: Call | None = None

    def connect(self) -> None:
        """Connects."""
        self._factory.doStart()
        self._factory.startedConnecting(self)
        address = self._to
        try:
            ipaddress.ip_address(address)
        except ValueError:
            found = self._host.resolve(address)
            if not found:
                error = DNSLookupError(f"no host {address}")
                self._host.callLater(0, self._failed, Failure(error))
                return
            address = found[0]
        is_ipv6 = ":" in address
        port = self._host.take_ephemeral(is_ipv6=is_ipv6)
        stream = self._stream = self._host.open_stream(port, (address, self._port), is_ipv6=is_ipv6)
        stream.on_open = self._opened
        stream.on_fail = self._failed
        stream.on_lost = self._lost
        if self._timeout:
            self._timer = self._host.callLater(self._timeout, self._expired)
        stream.connect()

    def _opened(self, stream: StreamConnection) -> None:
        self._stop_timer()
        protocol = self._factory.buildProtocol(stream.getPeer())
        if protocol is None:
            stream.abortConnection()
            return
        stream.protocol = protocol
        protocol.makeConnection(stream)

    def _expired(self) -> None:
        self._timer = None
        if self._stream is not None:
            self._stream.on_fail = None
            self._stream.abortConnection()
        self._failed(Failure(TwistedTimeoutError()))

    def _failed(self, failure: Failure) -> None:
        self._stop_timer()
        self._factory.clientConnectionFailed(self, failure)
        self._factory.doStop()

    def _lost(self, failure: Failure) -> None:
        self._stream = None
        self._factory.clientConnectionLost(self, failure)
        self._factory.doStop()

    def _stop_timer(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()

    def stopConnecting(self) -> None:
        """Gives up."""
        if self._stream is not None:
            self._stream.on_fail = None
            self._stream.abortConnection()
        self._failed(Failure(UserError()))

    def disconnect(self) -> None:
        """Closes."""
        if self._stream is not None:
            self._stream.loseConnection()

    def getDestination(self) -> Any:
        """Where to."""
        return self._host.make_address("TCP", self._to, self._port)
