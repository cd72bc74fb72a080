"""What other people's code does to a connection: it fails alone, and the conversation goes on."""

from __future__ import annotations

import dataclasses
import pathlib
import struct
import sys
from typing import Any, Generic, TypeVar

import msgspec
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.defer import TimeoutError as TwistedTimeoutError
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from protoframe import (
    Cancelled,
    ConnectFailed,
    Error,
    Factory,
    Internal,
    InvalidResponse,
    Limits,
    NotFound,
    Protocol,
    connect,
    current_call,
    listen,
    metadata,
    request,
    timeout,
)
from protoframe._endpoints import _ClientFactory
from protoframe.core.frames import Kind, serialize_frame
from protoframe.reflection import Reflection
from tests.test_calls import served
from tests.test_connection import HELLO, ServerSide, Worker, request_frame


class Odd(msgspec.Struct):
    name: str

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise KeyError(self.name)
        if self.name == "refused":
            raise NotFound(self.name)


@dataclasses.dataclass
class Unset:
    x: int | msgspec.UnsetType = msgspec.UNSET


class Same(Error):
    here: int


class Trouble(Protocol):
    @request(raises=[NotFound])
    async def find(self, path: str) -> str:
        raise NotFound(pathlib.Path(path))  # type: ignore[arg-type]

    @request
    async def odd(self, odd: Odd) -> str:
        return odd.name

    @request
    async def gives_refused(self) -> Odd:
        return {"name": "refused"}  # type: ignore[return-value]

    @request
    async def gives_odd(self) -> Odd:
        return {"name": "bad"}  # type: ignore[return-value]

    @request
    async def unhashable(self, them: frozenset[tuple[int, list[int]]]) -> int:
        return len(them)

    @request
    async def unset(self, x: int | msgspec.UnsetType = msgspec.UNSET) -> bool:
        return x is msgspec.UNSET

    @request(raises=[Same])
    async def Same(self) -> None:
        raise Same(here=1)

    @request
    async def never(self) -> None:
        await Deferred()

    @request
    async def tenant(self) -> dict[str, str]:
        return dict(current_call().metadata)

    @request
    async def documented(self) -> None:
        """Does nothing, and says so."""


class OtherSame(Error):
    there: str


OtherSame.__name__ = "Same"


class More(Protocol):
    @request(raises=[OtherSame])
    async def other(self) -> None:
        raise OtherSame(there="x")


@pytest_twisted.ensureDeferred
async def test_a_type_or_an_error_that_fails_in_a_way_of_its_own_fails_its_call_alone() -> None:
    async with served(Trouble) as where, connect(reactor, where, Trouble) as trouble:
        pending: Any = trouble.never()
        with pytest.raises(NotFound, match="/x"):
            await trouble.find("/x")
        with pytest.raises(Internal):
            await trouble.odd({"name": "bad"})  # type: ignore[arg-type]
        with pytest.raises(InvalidResponse, match="KeyError"):
            await trouble.gives_odd()
        # Nor is an error of this package's, raised by a type of the caller's own, an answer of the other end's.
        with pytest.raises(InvalidResponse, match="NotFound"):
            await trouble.gives_refused()
        with pytest.raises(Internal):
            await trouble.unhashable([[1, [2]]])  # type: ignore[arg-type]
        assert await trouble.odd(Odd("fine")) == "fine"
        assert await trouble.unset() is True
        assert await trouble.documented() is None
        assert not pending.called


@pytest_twisted.ensureDeferred
async def test_everything_that_is_served_can_be_described() -> None:
    class Shop(Trouble, name="Shop"):
        @request
        async def mine(self) -> int:
            return 1

    class Again(Shop, name="Shop"):
        """The server of a contract may have its name."""

    async with served(Again, More) as where, connect(reactor, where, Reflection) as reflection:
        assert await reflection.protocols() == ["More", "Shop", "Trouble"]
        trouble = await reflection.describe("Trouble")
        shop = await reflection.describe("Shop")
        assert len({method.name for method in trouble.methods}) == len(trouble.methods) == 10
        names = [method.name for method in shop.methods]
        assert len(names) == len(set(names)) == 11
        (same,) = [method for method in trouble.methods if method.name == "Same"]
        assert same.errors[0].schema["properties"] == {"here": {"type": "integer"}}
        (unset,) = [method for method in trouble.methods if method.name == "unset"]
        assert unset.parameters[0].required is False


@pytest_twisted.ensureDeferred
async def test_an_error_without_the_fields_that_this_end_expects_is_an_invalid_response() -> None:
    class Plain(Error):
        pass

    class Server(Protocol, name="Skew"):
        @request(raises=[Plain])
        async def fail(self) -> None:
            raise Plain("sorry")

    class WithField(Error):
        limit: int

    WithField.__name__ = "Plain"

    class Client(Protocol, name="Skew"):
        @request(raises=[WithField])
        async def fail(self) -> None:
            raise NotImplementedError

    async with served(Server) as where, connect(reactor, where, Client) as client:
        for _ in range(2):
            with pytest.raises(InvalidResponse, match=r"\$\.limit: missing"):
                await client.fail()


@pytest_twisted.ensureDeferred
async def test_cancelling_is_what_twisted_expects_of_any_deferred() -> None:
    async with served(Trouble) as where, connect(reactor, where, Trouble) as trouble:
        for expected in (Cancelled, CancelledError):
            call: Any = trouble.never()
            call.cancel()
            with pytest.raises(expected):
                await call
        timed: Any = trouble.never()
        timed.addTimeout(0.01, reactor)
        with pytest.raises(TwistedTimeoutError):
            await timed


@pytest_twisted.ensureDeferred
async def test_a_cancelled_connect_is_cancelled_and_a_second_one_meanwhile_is_refused() -> None:
    async with served(Trouble) as where:
        connecting = connect(reactor, where, Trouble)
        first = Deferred.fromCoroutine(connecting._open())
        with pytest.raises(ConnectFailed, match="connected already"):
            await connecting
        first.cancel()
        with pytest.raises(CancelledError):
            await first
        assert await (await connecting).unset() is True
        await connecting.close()


class Ask(Protocol["Told"]):
    @request
    async def ask(self) -> str:
        return await self.peer.told()


class Told(Protocol[Ask]):
    @request
    async def told(self) -> str:
        return "told"


@pytest_twisted.ensureDeferred
async def test_what_has_served_one_conversation_can_serve_another() -> None:
    me = Told()
    async with served(Ask) as where:
        for _ in range(2):
            async with connect(reactor, where, Ask, serving=me) as ask:
                assert await ask.ask() == "told"
                assert me.peer is me.peer
                assert await me.peer.ask() == "told"


@pytest_twisted.ensureDeferred
async def test_the_surroundings_of_a_call_reach_its_own_callbacks_and_no_others() -> None:
    async with served(Trouble) as where, connect(reactor, where, Trouble) as trouble:
        seen: list[Any] = []
        first: Any = trouble.tenant()
        first.addCallback(lambda _: trouble.tenant()).addCallback(seen.append)
        with timeout(5), metadata(secret="s"):
            # Cancelling acts at once, inside these surroundings, on whatever has happened.
            call: Any = trouble.never()
            call.addErrback(lambda _: trouble.tenant()).addCallback(seen.append)
            call.cancel()
        await gatherResults([first, call])
        assert seen == [{"secret": "s"}, {}]


@pytest_twisted.ensureDeferred
async def test_what_is_no_factory_no_place_and_no_protocol_is_refused_in_words() -> None:
    for wrong in (
        lambda: listen(reactor, "tcp:0", Trouble),
        lambda: listen(reactor, 3, Factory(Trouble)),  # type: ignore[arg-type]
        lambda: connect(reactor, 3, Trouble),  # type: ignore[arg-type]
        lambda: connect(reactor, "tcp:localhost:1", Trouble, serving=3),  # type: ignore[arg-type]
        lambda: request(raises=NotFound),  # type: ignore[call-overload]
    ):
        with pytest.raises(TypeError, match=r"expected|listen serves a Factory"):
            wrong()
    long = "unix:/" + "x" * 200
    with pytest.raises(ValueError, match="107 bytes at most"):
        connect(reactor, long, Trouble)
    with pytest.raises(ValueError, match="107 bytes at most"):
        await listen(reactor, long, Factory(Trouble))


T = TypeVar("T")


def test_what_cannot_be_a_request_is_refused_when_it_is_served() -> None:
    async def method(self: Any) -> None:
        return None

    for name in ("peer", "factory", "connectionMade", "connectionLost", "_private"):
        with pytest.raises(TypeError, match=f"{name}: a request cannot have this name"):
            Factory(type("P", (Protocol,), {name: request(method)}))
    with pytest.raises(TypeError, match="a request is a plain method"):
        Factory(type("P", (Protocol,), {"m": classmethod(request(method))}))
    with pytest.raises(TypeError, match="plain methods"):
        request(staticmethod(method))

    class Open(Protocol, Generic[T]):
        @request
        async def get(self, x: T) -> None: ...

    with pytest.raises(TypeError, match="leaves a type open"):
        Factory(Open)


def test_a_wrapper_serves_whatever_the_function_in_it_says() -> None:
    import functools

    def answering(function: Any) -> Any:
        @functools.wraps(function)
        async def wrapper(self: Any) -> str:
            return "wrapped"

        return wrapper

    class Wrapped(Protocol):
        @request
        @answering
        async def get(self) -> str: ...

    assert [method.name for method in Factory(Wrapped).methods] == ["get"]


class Bindings(ServerSide):
    """More of what a connection meets, in virtual time."""

    def test_closing_while_requests_wait_logs_no_fault(self) -> None:
        self.greet()
        self.carrier.pauseProducing()
        self.carrier.dataReceived(
            b"".join(request_frame(2 * n + 1, b"Worker.big", size=500_000) for n in range(4))
            + request_frame(101, b"Worker.note", text="waits"),
        )
        self.connection.close()
        self.clock.advance(0)
        self.assertEqual(self.flushLoggedErrors(), [])
        self.assertNotIn("waits", self.worker.ran)

    def test_the_time_of_a_frame_stands_still_while_the_server_does_not_read(self) -> None:
        self.greet()
        self.carrier.dataReceived(request_frame(1, b"Worker.note", text="a")[:-1])
        self.clock.advance(20)
        self.carrier.pauseProducing()
        self.clock.advance(25)
        self.assertFalse(self.transport.disconnecting)
        self.carrier.resumeProducing()
        self.clock.advance(29)
        self.assertFalse(self.transport.disconnecting)
        self.clock.advance(1.5)
        self.assertTrue(self.transport.disconnecting)

    def test_metadata_that_is_none_is_refused_before_anything_runs(self) -> None:
        self.greet()
        method = b"Worker.note"
        message = struct.pack("!IHH", 5000, len(method), 1) + method + b"\xff" + msgspec.msgpack.encode({"text": "a"})
        self.carrier.dataReceived(serialize_frame(Kind.REQUEST, 0, 1, message))
        ((kind, flags, _, payload),) = self.said()
        self.assertEqual((kind, flags, payload[:2]), (Kind.ERROR, 2, b"\x00\x03"))
        self.assertEqual(self.worker.ran, [])

    def test_chunks_of_two_octets_take_no_more_memory_than_one_large_one(self) -> None:
        self.greet()
        chunks = 20_000
        method = b"Worker.note"
        head = struct.pack("!IHH", 5000, len(method), 0) + method
        total = len(head) + 2 * chunks + 2
        self.carrier.dataReceived(serialize_frame(Kind.REQUEST, 1, 1, struct.pack("!I", total) + head))
        self.carrier.dataReceived(serialize_frame(Kind.CHUNK, 1, 1, b"ab") * chunks)
        (message,) = self.connection._conversation.traffic.assembler.messages.values()
        self.assertLess(sys.getsizeof(message.room), 4 * total)

    def test_pings_that_cancel_each_other_when_the_connection_is_lost(self) -> None:
        self.greet()
        first, second = self.connection.ping(), self.connection.ping()
        for one, other in ((first, second), (second, first)):
            one.addErrback(lambda _, other=other: other.cancel())
            one.addErrback(lambda _: None)
        closed: list[Any] = []
        self.connection.close().addCallback(closed.append)
        self.carrier.connectionLost()
        self.assertEqual(closed, [None])


class Creation(SynchronousTestCase):
    def test_a_factory_that_cannot_make_its_protocol_closes_the_connection_and_says_so_once(self) -> None:
        class Failing(Factory):
            def create(self, protocol: Any) -> Any:
                raise ZeroDivisionError

        factory = Failing(Worker, reactor=Clock())
        transport = StringTransport(peerAddress=IPv4Address("TCP", "127.0.0.1", 1))
        carrier: Any = factory.buildProtocol(transport.getPeer())
        carrier.makeConnection(transport)
        carrier.dataReceived(HELLO)
        carrier.connectionLost()
        self.assertTrue(transport.disconnecting or transport.disconnected)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_a_transport_that_speaks_tls_by_now_is_never_written_past(self) -> None:
        carrier = _ClientFactory(Clock(), Limits(), []).buildProtocol(None)
        transport: Any = StringTransport()
        carrier.makeConnection(transport)
        transport.clear()

        class Plain:
            def send(self, data: bytes) -> int:
                raise AssertionError("in the clear")

        carrier._socket = Plain()
        transport.dataBuffer, transport._tempDataBuffer, transport.TLS = b"", [], True
        carrier.send([b"secret"])
        self.assertEqual(transport.value(), b"secret")


del ServerSide
