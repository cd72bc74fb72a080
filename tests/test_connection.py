"""A connection bound to Twisted, in virtual time and on transports made of strings."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from protoframe import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Factory,
    InvalidResponse,
    Limits,
    Protocol,
    _calling,
    request,
)
from protoframe._context import Scope, scope
from protoframe._endpoints import _ClientFactory
from protoframe.core.frames import Hello, Kind, serialize_frame, serialize_preface

HELLO = serialize_preface() + serialize_frame(
    Kind.HELLO,
    0,
    0,
    Hello(max_frame=65536, max_message=4 << 20, max_unfinished=1 << 30, max_calls=10).serialize(),
)


def request_frame(call_id: int, method: bytes, milliseconds: int = 5000, **arguments: Any) -> bytes:
    message = struct.pack("!IHH", milliseconds, len(method), 0) + method + msgspec.msgpack.encode(arguments)
    return serialize_frame(Kind.REQUEST, 0, call_id, message)


def frames(octets: bytes, at: int = 0) -> list[tuple[int, int, int, bytes]]:
    found = []
    while at + 12 <= len(octets):
        length, kind, flags, call_id = struct.unpack_from("!HBBQ", octets, at)
        found.append((kind, flags, call_id, octets[at + 12 : at + 12 + length]))
        at += 12 + length
    return found


class Worker(Protocol):
    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.waiting: list[Deferred[Any]] = []

    @request
    def note(self, text: str) -> str:
        self.ran.append(text)
        return text

    @request
    def big(self, size: int) -> str:
        self.ran.append(size)
        return "x" * size

    @request
    async def wait(self) -> str:
        waiting: Deferred[Any] = Deferred()
        self.waiting.append(waiting)
        try:
            return str(await waiting)
        except CancelledError:
            self.ran.append("cancelled")
            raise

    @request
    async def stubborn(self) -> str:
        self.waiting.append(Deferred())
        try:
            await self.waiting[-1]
        except CancelledError:
            self.waiting.append(Deferred())
            await self.waiting[-1]
        return "in the end"

    @request
    def hang_up(self) -> str:
        for connection in self.factory.connections:
            connection.close()
        return "bye"


class ServerSide(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = Factory(Worker, reactor=self.clock, limits=Limits(max_calls=400))
        self.transport = StringTransport(peerAddress=IPv4Address("TCP", "127.0.0.1", 1))
        built = self.factory.buildProtocol(self.transport.getPeer())
        assert built is not None
        self.carrier = built
        self.carrier.makeConnection(self.transport)
        (self.connection,) = self.factory._connections
        self.worker: Any = self.connection.protocols[0]

    def greet(self) -> None:
        self.carrier.dataReceived(HELLO)
        self.transport.clear()

    def said(self) -> list[tuple[int, int, int, bytes]]:
        octets = self.transport.value()
        self.transport.clear()
        return frames(octets)

    def test_greets_at_once_and_gives_up_on_a_peer_that_does_not(self) -> None:
        self.assertTrue(self.transport.value().startswith(serialize_preface()))
        self.clock.advance(9.9)
        self.assertFalse(self.transport.disconnecting)
        self.clock.advance(0.2)
        self.assertTrue(self.transport.disconnecting)
        self.assertIn(b"no HELLO within 10 s", self.transport.value())

    def test_a_peer_that_does_not_let_go_is_cut_off(self) -> None:
        self.carrier.dataReceived(b"GET / HTTP/1.1")
        self.assertTrue(self.transport.disconnecting)
        aborted: list[bool] = []
        self.transport.abortConnection = lambda: aborted.append(True)  # type: ignore[method-assign]
        self.clock.advance(5.1)
        self.assertEqual(aborted, [True])

    def test_half_a_frame_is_waited_for_only_so_long(self) -> None:
        self.greet()
        self.carrier.dataReceived(request_frame(1, b"Worker.note", text="a")[:-1])
        self.clock.advance(29)
        self.assertFalse(self.transport.disconnecting)
        self.clock.advance(1.1)
        self.assertTrue(self.transport.disconnecting)
        self.assertIn(b"a frame did not come whole within 30 s", self.transport.value())

    def test_what_comes_before_a_fault_in_the_same_octets_is_read_and_what_comes_after_is_not(self) -> None:
        self.greet()
        self.carrier.dataReceived(request_frame(1, b"Worker.note", text="a") + b"\xff" * 12)
        self.carrier.dataReceived(request_frame(3, b"Worker.note", text="b"))
        self.assertEqual(self.worker.ran, ["a"])
        self.assertEqual([kind for kind, *_ in self.said()], [Kind.RESPONSE, Kind.GOAWAY])
        self.assertTrue(self.transport.disconnecting)

    def test_a_request_beside_one_that_breaks_the_rules_harms_nothing(self) -> None:
        self.greet()
        self.carrier.dataReceived(request_frame(1, b"Worker.note", text="a") + serialize_frame(0x55, 0, 0, b""))
        self.assertEqual([kind for kind, *_ in self.said()], [Kind.GOAWAY])
        self.assertTrue(self.transport.disconnecting)

    def test_a_handler_may_close_its_own_connection(self) -> None:
        self.greet()
        self.carrier.dataReceived(request_frame(1, b"Worker.hang_up"))
        self.assertTrue(self.transport.disconnecting)
        self.assertEqual([kind for kind, *_ in self.said()], [Kind.GOAWAY])

    def test_requests_wait_while_answers_are_not_read_and_go_on_after(self) -> None:
        self.greet()
        self.carrier.pauseProducing()
        self.carrier.dataReceived(b"".join(request_frame(2 * n + 1, b"Worker.big", size=500_000) for n in range(300)))
        self.assertLess(len(self.worker.ran), 5)
        self.assertEqual(self.said(), [])
        self.assertEqual(self.transport.producerState, "paused")
        self.carrier.resumeProducing()
        self.assertEqual(self.transport.producerState, "producing")
        self.assertEqual(len(self.worker.ran), 300)
        answers = self.said()
        whole = [call_id for kind, flags, call_id, _ in answers if kind == Kind.CHUNK and not flags & 1]
        self.assertEqual(sorted(whole), [2 * n + 1 for n in range(300)])

    def test_a_request_that_waits_can_be_cancelled_and_expires(self) -> None:
        self.greet()
        self.carrier.pauseProducing()
        self.carrier.dataReceived(
            b"".join(request_frame(2 * n + 1, b"Worker.big", size=500_000) for n in range(4))
            + request_frame(101, b"Worker.note", text="cancelled")
            + request_frame(103, b"Worker.note", milliseconds=1000, text="late")
            + request_frame(105, b"Worker.note", text="fine")
            + serialize_frame(Kind.CANCEL, 0, 101, b""),
        )
        self.clock.advance(1.5)
        self.carrier.resumeProducing()
        self.assertEqual([text for text in self.worker.ran if isinstance(text, str)], ["fine"])
        errors = {call_id: (flags, payload[:2]) for kind, flags, call_id, payload in self.said() if kind == Kind.ERROR}
        self.assertEqual(errors, {101: (2, b"\x00\x01"), 103: (2, b"\x00\x04")})

    def test_the_deadline_of_a_request_cancels_its_handler(self) -> None:
        self.greet()
        self.carrier.dataReceived(request_frame(1, b"Worker.wait", milliseconds=1000))
        self.clock.advance(0.9)
        self.assertEqual(self.worker.ran, [])
        self.clock.advance(0.2)
        self.assertEqual(self.worker.ran, ["cancelled"])
        ((kind, flags, call_id, payload),) = self.said()
        self.assertEqual((kind, flags, call_id, payload[:2]), (Kind.ERROR, 0, 1, b"\x00\x04"))

    def test_a_slot_is_free_when_the_handler_ends_not_when_it_is_cancelled(self) -> None:
        self.greet()
        self.carrier.dataReceived(request_frame(1, b"Worker.stubborn") + serialize_frame(Kind.CANCEL, 0, 1, b""))
        self.assertEqual(self.said(), [])
        self.assertEqual(self.connection._conversation.running, 1)
        self.worker.waiting[-1].callback(None)
        self.clock.advance(0)
        self.assertEqual(self.connection._conversation.running, 0)
        ((kind, _, _, payload),) = self.said()
        self.assertEqual((kind, payload[:2]), (Kind.ERROR, b"\x00\x01"))

    def test_a_lost_connection_cancels_what_runs_and_leaves_no_timer(self) -> None:
        self.greet()
        self.carrier.dataReceived(request_frame(1, b"Worker.wait"))
        self.carrier.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.worker.ran, ["cancelled"])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.factory.connections, frozenset())

    def test_more_pings_than_anybody_needs_end_the_conversation(self) -> None:
        self.greet()
        ping = serialize_frame(Kind.PING, 0, 0, bytes(8))
        self.carrier.dataReceived(ping * 100)
        self.assertEqual([kind for kind, *_ in self.said()], [Kind.PONG] * 100)
        self.carrier.dataReceived(ping * 2)
        self.assertEqual([kind for kind, *_ in self.said()][-1], Kind.GOAWAY)
        self.assertTrue(self.transport.disconnecting)


class Timers(SynchronousTestCase):
    """What a server's connections are woken by."""

    def greeted_by(self, factory: Factory, clock: Clock) -> Any:
        factory.reactor = clock  # type: ignore[assignment]
        carrier: Any = factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 4000))
        carrier.makeConnection(StringTransport())
        carrier.dataReceived(HELLO)
        return carrier

    def test_each_goes_by_the_reactor_that_the_factory_has_when_it_comes(self) -> None:
        factory = Factory(Worker, limits=Limits(keepalive_idle=5.0, keepalive_timeout=5.0))
        for _ in range(2):
            clock = Clock()
            carrier = self.greeted_by(factory, clock)
            self.assertTrue(carrier.connection.is_open)
            clock.advance(6.0)
            clock.advance(5.0)
            self.assertFalse(carrier.connection.is_open)

    def test_a_fault_at_a_timer_ends_the_conversation_and_is_logged(self) -> None:
        clock = Clock()
        carrier = self.greeted_by(Factory(Worker, limits=Limits(keepalive_idle=5.0)), clock)
        self.patch(type(carrier.connection._conversation), "handle_timer", lambda *_: 1 // 0)
        clock.advance(5.0)
        self.assertFalse(carrier.connection.is_open)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class ClientSide(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.transport = StringTransport(peerAddress=IPv4Address("TCP", "127.0.0.1", 1))
        self.carrier = _ClientFactory(self.clock, Limits(), []).buildProtocol(None)
        self.carrier.makeConnection(self.transport)
        self.carrier.dataReceived(HELLO)
        self.transport.clear()
        self.worker: Any = self.carrier.connection.proxy(Worker)

    def test_calls_made_in_one_turn_are_written_at_once(self) -> None:
        writes: list[bytes] = []
        self.transport.write = writes.append  # type: ignore[method-assign, assignment]
        calls = [self.worker.note(str(number)) for number in range(5)]
        self.assertEqual(writes, [])
        self.clock.advance(0)
        self.assertEqual([call_id for _, _, call_id, _ in frames(b"".join(writes))], [1, 3, 5, 7, 9])
        self.assertEqual(len(writes), 1)
        self.carrier.connectionLost(Failure(ConnectionDone()))
        for call in calls:
            self.failureResultOf(call, ConnectionLost)

    def test_a_call_expires_at_its_deadline_and_not_before(self) -> None:
        call = self.worker.note("a")
        self.clock.advance(9.9)
        self.assertNoResult(call)
        self.clock.advance(0.2)
        self.failureResultOf(call, DeadlineExceeded)
        self.assertEqual([kind for kind, *_ in frames(self.transport.value())], [Kind.REQUEST, Kind.CANCEL])

    def test_a_deadline_goes_by_the_clock_that_it_was_made_with(self) -> None:
        elsewhere = Clock()
        token = scope.set(Scope(clock=elsewhere.seconds, deadline=2.0))
        try:
            elsewhere.advance(1.5)
            call = self.worker.note("a")
        finally:
            scope.reset(token)
        self.clock.advance(0.4)
        self.assertNoResult(call)
        self.clock.advance(0.2)
        self.failureResultOf(call, DeadlineExceeded)

    def test_a_cancelled_call_has_fired_when_cancel_returns(self) -> None:
        call = self.worker.note("a")
        call.cancel()
        self.failureResultOf(call, Cancelled)

    def test_an_answer_after_the_deadline_is_dropped(self) -> None:
        call = self.worker.note("a")
        self.clock.advance(11)
        self.failureResultOf(call, DeadlineExceeded)
        self.carrier.dataReceived(serialize_frame(Kind.RESPONSE, 0, 1, b"\xa1a"))
        self.assertFalse(self.transport.disconnecting)
        self.assertEqual(self.carrier.connection._conversation.pending, 0)

    def test_every_call_fires_once_wherever_the_answers_are_cut(self) -> None:
        answers = b"".join(
            [
                serialize_frame(Kind.RESPONSE, 0, 1, b"\xa1a"),
                serialize_frame(Kind.ERROR, 0, 3, struct.pack("!HBH", 13, 8, 0) + b"Internal"),
                serialize_frame(Kind.RESPONSE, 0, 5, b"\xa1c"),
            ],
        )
        for at in range(len(answers) + 1):
            self.setUp()
            fired: list[int] = []
            for number in range(3):
                self.worker.note(str(number)).addBoth(lambda _, number=number, fired=fired: fired.append(number))
            self.clock.advance(0)
            self.carrier.dataReceived(answers[:at])
            self.carrier.connectionLost(Failure(ConnectionDone()))
            self.assertEqual(sorted(fired), [0, 1, 2], at)
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_ping_tells_the_round_trip_and_fails_in_time(self) -> None:
        ping = self.carrier.connection.ping()
        self.clock.advance(0)
        ((_, _, _, payload),) = frames(self.transport.value())
        self.clock.advance(0.25)
        self.carrier.dataReceived(serialize_frame(Kind.PONG, 0, 0, payload))
        self.assertAlmostEqual(self.successResultOf(ping), 0.25)
        late = self.carrier.connection.ping()
        self.clock.advance(10)
        self.failureResultOf(late, DeadlineExceeded)
        lost = self.carrier.connection.ping()
        self.carrier.connectionLost(Failure(ConnectionDone()))
        self.failureResultOf(lost, ConnectionLost)
        self.failureResultOf(self.carrier.connection.ping(), ConnectionLost)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_carrier_that_is_lost_while_it_sends_leaves_nobody_waiting(self) -> None:
        calls = [self.worker.note("a")]

        def lose(_: list[bytes]) -> None:
            self.carrier.connectionLost(Failure(ConnectionDone()))

        self.carrier.send = lose  # type: ignore[method-assign]
        self.clock.advance(0)
        self.failureResultOf(calls[0], ConnectionLost)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_fault_of_the_framework_itself_leaves_nobody_waiting(self) -> None:
        first, second = self.worker.note("a"), self.worker.note("b")
        self.clock.advance(0)

        def broken(*_: Any) -> None:
            raise ZeroDivisionError

        self.patch(_calling, "read_error", broken)
        self.carrier.dataReceived(serialize_frame(Kind.ERROR, 0, 1, struct.pack("!HBH", 13, 0, 0)))
        self.failureResultOf(first, InvalidResponse)
        self.failureResultOf(second, ConnectionLost)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertTrue(self.transport.disconnecting)


class SocketSide(SynchronousTestCase):
    """What is written past the transport's buffer keeps its order with what goes through it."""

    def test_what_the_kernel_does_not_take_follows_in_order(self) -> None:
        class Socket(FileDescriptor):
            TLS = False

            def __init__(self) -> None:
                super().__init__(reactor=Clock())
                self.connected = 1
                self.taken = bytearray()
                self.room = 5

            def getHandle(self) -> Any:
                return self

            def send(self, data: bytes) -> int:
                part = data[: self.room]
                if not part:
                    raise BlockingIOError
                self.taken += part
                self.room -= len(part)
                return len(part)

            writeSomeData = send

            def startWriting(self) -> None:
                pass

            def stopWriting(self) -> None:
                pass

            def getPeer(self) -> None:
                return None

        socket = Socket()
        carrier = _ClientFactory(Clock(), Limits(), []).buildProtocol(None)
        carrier.makeConnection(socket)
        carrier.send([b"first"])
        carrier.send([b"second", b"third"])
        self.assertEqual(
            bytes(socket.taken), b"", "the preface went through the transport, and what follows waits behind it"
        )
        socket.room = 10_000
        socket.doWrite()
        carrier.send([b"fourth"])
        self.assertTrue(bytes(socket.taken).startswith(serialize_preface()))
        self.assertTrue(bytes(socket.taken).endswith(b"firstsecondthirdfourth"))
        socket.room = 3
        carrier.send([b"fifth"])
        self.assertTrue(bytes(socket.taken).endswith(b"fourthfif"))
        socket.room = 100
        socket.doWrite()
        self.assertTrue(bytes(socket.taken).endswith(b"fourthfifth"))

    def test_an_error_of_the_socket_is_left_to_the_transport(self) -> None:
        class Broken:
            def send(self, data: bytes) -> int:
                raise BrokenPipeError

        carrier = _ClientFactory(Clock(), Limits(), []).buildProtocol(None)
        transport: Any = StringTransport()
        carrier.makeConnection(transport)
        transport.dataBuffer, transport._tempDataBuffer, transport.TLS = b"", [], False
        carrier._socket = Broken()
        transport.clear()
        carrier.send([b"all of it"])
        self.assertEqual(transport.value(), b"all of it")
