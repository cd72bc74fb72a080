"""Both ends of a conversation, for tests that look inside: over real sockets, or joined by octets in virtual time.

Knows what an idle connection looks like; what is said over it is the tests'.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from protoframe import Factory, Limits, Protocol, connect
from protoframe._connection import Connection
from protoframe._endpoints import _ClientFactory
from protoframe.core.state import State
from tests.test_calls import served

#: Seconds after which what should come to hold, and does not, fails a test.
PATIENCE = 8.0


async def until(holds: Callable[[], object]) -> None:
    """Gives the reactor its turns until something holds."""
    give_up = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < give_up, "it does not come to hold"
        await deferLater(reactor, 0)


class Notes(list[Any]):
    """What handlers note, for a test to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[tuple[Any, int, Deferred[None]]] = []

    def add(self, note: Any) -> None:
        self.append(note)
        for waiting in list(self._waiting):
            if self.count(waiting[0]) >= waiting[1]:
                self._waiting.remove(waiting)
                # Not now: whoever adds the note is in the midst of something.
                reactor.callLater(0, _fire, waiting[2])  # type: ignore[attr-defined]

    def has(self, note: Any, times: int = 1) -> Deferred[None]:
        """Fires when it was noted so often."""
        done: Deferred[None] = Deferred()
        if self.count(note) >= times:
            done.callback(None)
        else:
            self._waiting.append((note, times, done))
            done.addTimeout(PATIENCE, reactor)  # type: ignore[arg-type]
        return done


def _fire(waiting: Deferred[None]) -> None:
    if not waiting.called:
        waiting.callback(None)


def leftovers(connection: Connection) -> list[Any]:
    """What a connection still holds of calls and streams: nothing, when none is open."""
    conversation = connection._conversation
    held = {
        "outgoing": conversation._outgoing.pending,
        "waiting": conversation._outgoing.waiting,
        "incoming": conversation._incoming.running,
        "suspended": conversation._incoming.suspended,
        "oneway": conversation._incoming._oneway,
        "streaming": conversation._incoming.streaming,
        "credit": conversation.traffic.credit.streams,
        "granted": conversation.traffic.granted.streams,
        "messages": conversation.traffic.assembler.messages,
        "held octets": conversation.traffic.assembler._octets,
        "cut": conversation.outbox.cut,
        "outbox": bool(conversation.outbox) and conversation.state is not State.CLOSED,
        "octets": conversation.outbox.octets if conversation.state is not State.CLOSED else 0,
        "events": conversation.traffic.events,
        "running": connection._server._running,
        "sent": connection._server._streaming,
        "verdicts": connection._server._verdicts,
        "held": connection._server.held,
        "senders": connection.calls._senders,
        "unsent": connection.calls.oneway,
        "inlets": connection.inlets._inlets,
        "left": connection.inlets.left,
        "ready": connection.outlets.ready,
        "without credit": connection.outlets._without_credit,
        "pings": connection._pings.waiting,
    }
    return [(name, what) for name, what in held.items() if what]


def missing_credit(one: Connection, other: Connection) -> list[int]:
    """What is missing of the credit of either end, as the other counts it: 0 and 0, when no stream is open."""
    missing = []
    for receiver, sender in ((one, other), (other, one)):
        window = receiver._conversation.traffic.granted._connection
        missing.append(receiver._limits.connection_credit - window.left - window.returned)
        missing.append(window.left - sender._conversation.traffic.credit.connection)
    return missing


def is_idle(one: Connection, other: Connection) -> bool:
    """Whether nothing is left of any call or stream at either end, and both windows are whole."""
    return not leftovers(one) and not leftovers(other) and not any(missing_credit(one, other))


async def becomes_idle(one: Connection, other: Connection) -> None:
    """Waits for `is_idle`; says what is left where it does not come to that."""
    try:
        await until(lambda: is_idle(one, other))
    except AssertionError:
        raise AssertionError((leftovers(one), leftovers(other), missing_credit(one, other))) from None


class Talk:
    """A conversation over a real socket.

    :ivar proxy: calls the server.
    :ivar client: the client's connection.
    :ivar server: the server's.
    :ivar served: the instance that serves.
    """

    def __init__(self, proxy: Any, client: Connection, server: Connection, factory: Factory) -> None:
        self.proxy = proxy
        self.client = client
        self.server = server
        self.factory = factory
        self.served: Any = server.protocols[0]


@asynccontextmanager
async def talk(
    protocol: type[Protocol[Any]],
    *,
    limits: Limits | None = None,
    server_limits: Limits | None = None,
    serving: Any = None,
    interceptors: Any = (),
    idle: bool = True,
) -> AsyncIterator[Talk]:
    """Both ends of a conversation; when the block is done nothing may be left of it, unless ``idle`` is false."""
    factory = Factory(protocol, limits=server_limits)
    async with served(factory=factory) as where:
        connecting = connect(reactor, where, protocol, limits=limits, serving=serving, interceptors=interceptors)
        async with connecting as proxy:
            await until(lambda: any(connection.is_open for connection in factory.connections))
            (server,) = factory.connections
            yield Talk(proxy, connecting.connection, server, factory)
            if idle:
                await becomes_idle(connecting.connection, server)


class Ends:
    """A client and a server in virtual time, on transports made of strings; `turn` carries what they say.

    :ivar to_client: all octets that the client got; ``to_server`` likewise.
    """

    def __init__(
        self,
        protocol: type[Protocol[Any]],
        *,
        limits: Limits | None = None,
        server_limits: Limits | None = None,
        serving: Protocol[Any] | None = None,
    ) -> None:
        self.clock = Clock()
        self.factory = Factory(protocol, reactor=self.clock, limits=server_limits)  # type: ignore[arg-type]
        address = IPv4Address("TCP", "127.0.0.1", 1)
        self.server_transport = StringTransport(peerAddress=address)
        self.client_transport = StringTransport(peerAddress=address)
        self.server_carrier: Any = self.factory.buildProtocol(address)
        served_here = [serving] if serving is not None else []
        self.client_carrier: Any = _ClientFactory(
            self.clock,  # type: ignore[arg-type]
            limits if limits is not None else Limits(),
            served_here,
        ).buildProtocol(None)
        self.to_client = bytearray()
        self.to_server = bytearray()
        self.is_lost = False
        self.server_carrier.makeConnection(self.server_transport)
        self.client_carrier.makeConnection(self.client_transport)
        self.server: Connection = self.server_carrier.connection
        self.client: Connection = self.client_carrier.connection
        self.served: Any = self.server.protocols[0]
        self.proxy: Any = self.client.proxy(protocol)
        self.turn()

    def turn(self, seconds: float = 0.0) -> None:
        """Lets time pass, and everything that follows happen."""
        self.clock.advance(seconds)
        for _ in range(10_000):
            moved = self.carry_to_server() + self.carry_to_client()
            due = [call for call in self.clock.getDelayedCalls() if call.getTime() <= self.clock.seconds()]
            if not moved and not due:
                break
            self.clock.advance(0)
        else:
            raise AssertionError("they never come to rest")
        if (self.server_transport.disconnecting or self.client_transport.disconnecting) and not self.is_lost:
            self.lose()

    def carry_to_server(self, most: int | None = None) -> int:
        """Carries octets; how many."""
        return self._carry(self.client_transport, self.server_carrier, self.to_server, most)

    def carry_to_client(self, most: int | None = None) -> int:
        """The same, the other way."""
        return self._carry(self.server_transport, self.client_carrier, self.to_client, most)

    def _carry(self, transport: StringTransport, carrier: Any, record: bytearray, most: int | None) -> int:
        if self.is_lost:
            return 0
        octets = transport.value()
        transport.clear()
        if most is not None:
            octets, rest = octets[:most], octets[most:]
            transport.write(rest)
        if octets:
            record += octets
            carrier.dataReceived(octets)
        return len(octets)

    def lose(self) -> None:
        """The connection is lost."""
        self.is_lost = True
        self.client_carrier.connectionLost(Failure(ConnectionDone()))
        self.server_carrier.connectionLost(Failure(ConnectionDone()))
        self.clock.advance(0)
