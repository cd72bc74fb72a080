"""Peers that fall silent, do not read, or are too many; and connections that end in order: nobody waits for ever, and
what was answered arrives."""

from __future__ import annotations

import contextlib  # `suppress` would mean something to trial, in the module of a test case
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint
from twisted.internet.protocol import Factory as TwistedFactory
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.task import deferLater
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from protoframe import (
    Cancelled,
    ConnectFailed,
    ConnectionLost,
    Factory,
    GoingAway,
    KeepaliveTimeout,
    Limits,
    Protocol,
    connect,
    request,
    timeout,
)
from protoframe.core.frames import Kind
from protoframe.core.messages import Outbox
from tests.ends import Ends, Notes, Talk, leftovers, talk, until
from tests.test_calls import served
from tests.test_connection import HELLO, frames, request_frame


class Work(Protocol):
    def __init__(self) -> None:
        self.notes = Notes()
        self.gates: list[Deferred[None]] = []
        self.ran = 0

    @request
    async def plus_one(self, number: int) -> int:
        return number + 1

    @request
    async def big(self, size: int) -> bytes:
        self.ran += 1
        return bytes(size)

    @request
    async def big_later(self, size: int) -> bytes:
        await self.gate()
        return bytes(size)

    @request
    async def wait(self, number: int = 1) -> int:
        gate = self.gate()
        self.notes.add("began")
        try:
            await gate
        except CancelledError:
            self.notes.add("cancelled")
            raise
        return number

    @request
    async def counts(self, number: int) -> AsyncIterator[int]:
        try:
            for each in range(number):
                yield each
        finally:
            self.notes.add("ended")

    @request
    async def counts_slowly(self, number: int) -> AsyncIterator[int]:
        try:
            for each in range(number):
                yield each
                await self.gate()
        finally:
            self.notes.add("ended")

    @request
    async def total(self, numbers: AsyncIterator[int]) -> int:
        total = 0
        async for number in numbers:
            total += number
        return total

    @request(oneway=True)
    async def tell(self) -> None:
        self.notes.add("told")

    def gate(self) -> Deferred[None]:
        self.gates.append(Deferred())
        return self.gates[-1]

    def open_gates(self) -> None:
        gates, self.gates = self.gates, []
        for gate in gates:
            if not gate.called:
                gate.callback(None)


@contextmanager
def told() -> Iterator[list[str]]:
    """The classes of errors that connections name in the log."""
    kinds: list[str] = []

    def observe(event: Any) -> None:
        if event.get("kind") is not None:
            kinds.append(event["kind"])

    globalLogPublisher.addObserver(observe)
    try:
        yield kinds
    finally:
        globalLogPublisher.removeObserver(observe)


def kinds_in(transport: Any) -> list[int]:
    return [kind for kind, *_ in frames(transport.value())]


# Silence.


class Silence(SynchronousTestCase):
    """One end hears nothing of the other any more, in virtual time."""

    def setUp(self) -> None:
        self.ends = Ends(Work)
        self.aborted: list[str] = []
        for name, transport in (("server", self.ends.server_transport), ("client", self.ends.client_transport)):
            transport.abortConnection = lambda name=name: self.aborted.append(name)  # type: ignore[method-assign]

    def test_a_silent_peer_is_asked_after_thirty_seconds_and_given_up_after_ten_more(self) -> None:
        ends = self.ends
        with timeout(3600):
            call, stream = ends.proxy.wait(), Deferred.fromCoroutine(anext(ends.proxy.counts_slowly(0)))
        sending = ends.proxy.total(_never())
        ends.turn()
        self.failureResultOf(stream, StopAsyncIteration)
        with timeout(3600):
            stream = Deferred.fromCoroutine(_read(ends.proxy.counts_slowly(3)))
        ends.turn()
        with told() as kinds:
            # From here on nothing passes.
            ends.clock.advance(29.9)
            self.assertEqual(kinds_in(ends.client_transport) + kinds_in(ends.server_transport), [])
            ends.clock.advance(0.2)
            self.assertEqual(kinds_in(ends.client_transport), [Kind.PING])
            self.assertEqual(kinds_in(ends.server_transport), [Kind.PING])
            ends.clock.advance(9.7)
            self.assertEqual(self.aborted, [])
            self.assertNoResult(call)
            ends.clock.advance(0.3)
        self.assertEqual(sorted(self.aborted), ["client", "server"])
        self.assertEqual(kinds, ["KeepaliveTimeout"] * 2)
        for outcome in (call, stream, sending):
            error = self.failureResultOf(outcome, KeepaliveTimeout).value
            self.assertIsInstance(error, ConnectionLost)
            self.assertIs(error.may_have_run, True)
        self.assertEqual(ends.served.notes, ["began", "ended", "cancelled", "ended"])
        ends.lose()
        self.assertEqual(ends.clock.getDelayedCalls(), [])
        self.assertEqual(leftovers(ends.client) + leftovers(ends.server), [])

    def test_a_peer_that_answers_is_kept_for_ever(self) -> None:
        call = None
        for _ in range(400):
            self.ends.turn(10.0)
        self.assertEqual(self.aborted, [])
        call = self.ends.proxy.plus_one(1)
        self.ends.turn()
        self.assertEqual(self.successResultOf(call), 2)
        # About one PING in thirty seconds, from each end.
        self.assertLess(len(frames(bytes(self.ends.to_client), 8)), 400)

    def test_whatever_a_peer_says_is_a_sign_of_life(self) -> None:
        ends = self.ends
        for _ in range(10):
            ends.turn(20.0)
            ends.proxy.plus_one(1)
            ends.turn()
        self.assertNotIn(Kind.PING, [kind for kind, *_ in frames(bytes(ends.to_server), 8)])
        self.assertNotIn(Kind.PING, [kind for kind, *_ in frames(bytes(ends.to_client), 8)])

    def test_an_end_that_does_not_read_gives_nobody_up_for_silence(self) -> None:
        ends = Ends(Work, server_limits=Limits(write_timeout=1000))
        ends.server_carrier.pauseProducing()
        for _ in range(20):
            ends.clock.advance(10)
        self.assertFalse(ends.server_transport.disconnecting)
        ends.server_carrier.resumeProducing()
        ends.clock.advance(29)
        self.assertFalse(ends.server_transport.disconnecting)


async def _read(stream: Any) -> list[Any]:
    return [item async for item in stream]


async def _never() -> AsyncIterator[int]:
    yield 1
    await Deferred()


class Relay(TwistedProtocol):
    """Passes on what it gets, until it swallows it."""

    other: Relay | None = None

    def __init__(self, swallowed: list[int]) -> None:
        self.swallowed = swallowed
        self.early: list[bytes] = []

    def dataReceived(self, data: bytes) -> None:
        if self.swallowed:
            self.swallowed[0] += len(data)
        elif self.other is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connectionLost(self, reason: Any = None) -> None:
        if self.other is not None and not self.swallowed:
            self.other.transport.loseConnection()


@asynccontextmanager
async def relay(where: str) -> AsyncIterator[tuple[str, list[int]]]:
    """Another way to a server; and a list, which gets a number in it for the relay to swallow everything."""
    swallowed: list[int] = []
    relays: list[Relay] = []

    class Relays(TwistedFactory):
        noisy = False

        def buildProtocol(self, addr: Any) -> Relay:
            here = Relay(swallowed)
            there = Relay(swallowed)
            relays.extend([here, there])

            def connected(_: Any) -> None:
                here.other, there.other = there, here
                for data in here.early:
                    there.transport.write(data)

            inner = TwistedFactory.forProtocol(lambda: there)
            inner.noisy = False
            endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", int(where.rsplit(":", 1)[1]))
            endpoint.connect(inner).addCallback(connected)
            return here

    port = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(Relays())
    try:
        yield f"tcp:127.0.0.1:{port.getHost().port}", swallowed
    finally:
        await port.stopListening()
        for each in relays:
            if each.transport is not None:
                each.transport.abortConnection()
        await until(lambda: not any(each.transport is not None and each.transport.connected for each in relays))


IMPATIENT = Limits(keepalive_idle=0.1, keepalive_timeout=0.1)


@pytest_twisted.ensureDeferred
async def test_a_client_gives_up_a_connection_that_swallows_everything() -> None:
    async with (
        served(Work) as where,
        relay(where) as (other, swallowed),
        connect(reactor, other, Work, limits=IMPATIENT) as work,
    ):
        with timeout(60):
            call = work.wait()
            stream = work.counts_slowly(2)
        assert await anext(stream) == 0
        swallowed.append(0)
        with pytest.raises(KeepaliveTimeout):
            await call
        with pytest.raises(KeepaliveTimeout):
            await anext(stream)
        assert swallowed[0] > 0
        with pytest.raises(ConnectionLost) as late:
            await work.plus_one(1)
        assert late.value.may_have_run is False


@pytest_twisted.ensureDeferred
async def test_a_server_gives_up_a_client_that_is_gone_without_a_word() -> None:
    factory = Factory(Work, limits=IMPATIENT)
    async with served(factory=factory) as where, relay(where) as (other, swallowed):
        connecting = connect(reactor, other, Work)
        work = await connecting
        with timeout(60):
            call = work.wait()
        await until(lambda: factory.connections)
        (connection,) = factory.connections
        notes: Notes = connection.protocols[0].notes  # type: ignore[attr-defined]
        await notes.has("began")
        with told() as kinds:
            swallowed.append(0)
            await notes.has("cancelled")
            await until(lambda: not factory.connections)
        assert kinds == ["KeepaliveTimeout"]
        connecting.connection._carrier.abort()
        with pytest.raises(ConnectionLost):
            await call


@pytest_twisted.ensureDeferred
async def test_two_ends_that_hear_each_other_ask_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    async with talk(Work, limits=IMPATIENT, server_limits=IMPATIENT) as ends:
        asked: list[bytes] = []
        outbox = ends.client._conversation.outbox
        put_control = Outbox.put_control

        def put(self: Outbox, kind: int, call_id: int, payload: bytes = b"") -> None:
            if kind == Kind.PING and self is outbox:
                asked.append(payload)
            put_control(self, kind, call_id, payload)

        monkeypatch.setattr(Outbox, "put_control", put)
        await until(lambda: len(asked) >= 3)
        assert await ends.proxy.plus_one(1) == 2


# A peer that does not read.


@contextmanager
def deaf_peer(where: str, octets: bytes) -> Iterator[socket.socket]:
    """A client that says something and reads nothing."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(("127.0.0.1", int(where.rsplit(":", 1)[1])))
    try:
        peer.setblocking(False)
        peer.send(octets)
        yield peer
    finally:
        peer.close()


@pytest_twisted.ensureDeferred
async def test_a_server_reads_no_more_of_a_peer_that_does_not_read_and_drops_it_in_time() -> None:
    factory = Factory(Work, limits=Limits(write_timeout=0.3))
    asked = 40
    calls = b"".join(request_frame(2 * number + 1, b"Work.big", size=1_000_000) for number in range(asked))
    async with served(factory=factory) as where, connect(reactor, where, Work) as other:
        with told() as kinds, deaf_peer(where, HELLO + calls):
            await until(lambda: len(factory.connections) == 2)
            (connection,) = [each for each in factory.connections if each.address.port != _port_of(other)]
            work: Any = connection.protocols[0]
            await until(lambda: connection._paused)
            # It reads no more of it, serves no more than it can say, and others all the same.
            assert connection._carrier.transport not in reactor.getReaders()  # type: ignore[attr-defined]
            assert 0 < work.ran < 20
            assert await other.plus_one(1) == 2
            assert connection._conversation.outbox.octets < 20_000_000
            assert connection.is_open
            await connection.closed
        assert kinds == ["WriteTimeout"]
        assert leftovers(connection) == []
        assert await other.plus_one(2) == 3


def _port_of(proxy: Any) -> int:
    transport = proxy._calls._wake.__self__._carrier.transport
    return int(transport.getHost().port)


class Deaf(SynchronousTestCase):
    """The same in virtual time."""

    def make(self, **limits: Any) -> None:
        self.ends = Ends(Work, server_limits=Limits(**limits))
        self.aborted: list[bool] = []
        self.ends.server_transport.abortConnection = lambda: self.aborted.append(True)  # type: ignore[method-assign]

    def test_the_time_to_read_begins_anew_each_time_that_the_peer_reads(self) -> None:
        self.make()
        for _ in range(5):
            self.ends.server_carrier.pauseProducing()
            self.ends.clock.advance(25)
            self.assertEqual(self.aborted, [])
            self.ends.server_carrier.resumeProducing()
            self.ends.turn()
        self.ends.server_carrier.pauseProducing()
        call = self.ends.proxy.wait()
        self.ends.clock.advance(29.9)
        self.assertEqual(self.aborted, [])
        with told() as kinds:
            self.ends.clock.advance(0.2)
        self.assertEqual((self.aborted, kinds), ([True], ["WriteTimeout"]))
        call.addErrback(lambda _: None)
        self.ends.lose()
        self.assertEqual(self.ends.clock.getDelayedCalls(), [])

    def test_answers_above_max_unsent_drop_the_peer_that_does_not_read_them(self) -> None:
        self.make(max_unsent=4 * 1024 * 1024)
        calls = [self.ends.proxy.big_later(1_000_000) for _ in range(10)]
        self.ends.turn()
        self.ends.server_carrier.pauseProducing()
        with told() as kinds:
            for gate in list(self.ends.served.gates)[:4]:
                gate.callback(None)
                self.ends.clock.advance(0)
            self.assertEqual(self.aborted, [])
            self.ends.served.open_gates()
            self.ends.clock.advance(0)
        self.assertEqual((self.aborted, kinds), ([True], ["TooMuchUnsent"]))
        self.ends.lose()
        for call in calls:
            self.failureResultOf(call, ConnectionLost)
        self.assertEqual(leftovers(self.ends.server), [])
        self.assertEqual(self.ends.clock.getDelayedCalls(), [])

    def test_a_stream_to_a_peer_that_does_not_read_stops_and_goes_on_with_it(self) -> None:
        self.make()
        reading = Deferred.fromCoroutine(_read(self.ends.proxy.counts(100_000)))
        self.ends.clock.advance(0)
        self.ends.carry_to_server()
        self.ends.server_carrier.pauseProducing()
        self.ends.clock.advance(1)
        held = self.ends.server._conversation.outbox.octets
        self.assertLess(held, 1_000_000)
        self.ends.server_carrier.resumeProducing()
        self.ends.turn()
        self.assertEqual(self.successResultOf(reading), list(range(100_000)))


# Too many.


@pytest_twisted.ensureDeferred
async def test_a_connection_too_many_is_told_so_and_the_others_go_on() -> None:
    factory = Factory(Work, limits=Limits(max_connections=2))
    async with served(factory=factory) as where, connect(reactor, where, Work) as one:
        async with connect(reactor, where, Work) as two:
            assert await one.plus_one(1) == await two.plus_one(1) == 2
            with told() as kinds:
                for _ in range(20):
                    with pytest.raises(ConnectFailed, match="TooManyConnections: 2 connections are open") as caught:
                        await connect(reactor, where, Work)
                    assert caught.value.may_have_run is False
            # The first, the second, the fourth, the eighth and the sixteenth: a flood of them is no flood of lines.
            assert kinds == ["TooManyConnections"] * 5
            assert await one.plus_one(2) == await two.plus_one(2) == 3
        await until(lambda: len(factory.connections) == 1)
        async with connect(reactor, where, Work) as again:
            assert await again.plus_one(3) == 4


# The end in order.


@asynccontextmanager
async def draining(**options: Any) -> AsyncIterator[Talk]:
    async with talk(Work, idle=False, **options) as ends:
        yield ends
        await until(lambda: not ends.factory.connections)
        assert leftovers(ends.client) == leftovers(ends.server) == []


@pytest_twisted.ensureDeferred
async def test_a_server_that_drains_finishes_what_runs_and_takes_nothing_new() -> None:
    async with draining() as ends:
        call, stream = ends.proxy.wait(5), ends.proxy.counts_slowly(3)
        gate: Deferred[None] = Deferred()
        sending = ends.proxy.total(_numbers(gate))
        assert await anext(stream) == 0
        await ends.served.notes.has("began")
        drained = ends.factory.drain()
        await until(lambda: not ends.client._conversation._outgoing.is_open)
        with pytest.raises(GoingAway) as caught:
            await ends.proxy.plus_one(1)
        assert caught.value.may_have_run is False
        with pytest.raises(GoingAway) as streamed:
            await anext(ends.proxy.counts(1))
        assert streamed.value.may_have_run is False
        with pytest.raises(GoingAway):
            await ends.proxy.tell()
        assert not drained.called
        ends.served.open_gates()
        assert await call == 5
        assert await anext(stream) == 1
        gate.callback(None)
        assert await sending == 3
        assert not drained.called
        ends.served.open_gates()
        assert await anext(stream) == 2
        ends.served.open_gates()
        assert await anext(stream, "over") == "over"
        await drained
        with pytest.raises(ConnectionLost):
            await ends.proxy.plus_one(1)
        assert ends.served.notes.count("cancelled") == 0


async def _numbers(gate: Deferred[None]) -> AsyncIterator[int]:
    yield 1
    await gate
    yield 2


@pytest_twisted.ensureDeferred
async def test_a_long_stream_goes_on_to_its_end_while_its_server_drains() -> None:
    async with draining() as ends:
        stream = ends.proxy.counts(50_000)
        got = [await anext(stream)]
        drained = ends.factory.drain()
        async for number in stream:
            got.append(number)
        assert got == list(range(50_000))
        await drained


@pytest_twisted.ensureDeferred
async def test_a_client_may_drain_too() -> None:
    async with draining() as ends:
        call = ends.proxy.wait(5)
        await ends.served.notes.has("began")
        drained = ends.client.drain()
        with pytest.raises(GoingAway):
            # It takes none any more.
            await ends.server.proxy(Work).plus_one(1)
        ends.served.open_gates()
        assert await call == 5
        await drained


@pytest_twisted.ensureDeferred
async def test_what_still_runs_after_the_time_is_cancelled() -> None:
    async with draining() as ends:
        call, stream = ends.proxy.wait(), ends.proxy.counts_slowly(2)
        assert await anext(stream) == 0
        await ends.served.notes.has("began")
        await ends.factory.drain(0.05)
        with pytest.raises((ConnectionLost, Cancelled)) as caught:
            await call
        assert caught.value.may_have_run is True
        with pytest.raises((ConnectionLost, Cancelled)):
            await anext(stream)
        await ends.served.notes.has("cancelled")
        await ends.served.notes.has("ended")


@pytest_twisted.ensureDeferred
async def test_a_factory_without_connections_is_drained_at_once_and_may_drain_again() -> None:
    factory = Factory(Work)
    await factory.drain()
    async with served(factory=factory) as where, connect(reactor, where, Work) as work:
        assert await work.plus_one(1) == 2
        first, second = factory.drain(), factory.drain()
        await first
        await second
    await factory.drain()


@pytest.mark.parametrize("size", [10, 60_000, 3_000_000])
@pytest_twisted.ensureDeferred
async def test_the_last_answer_of_a_server_that_drains_arrives_whatever_its_size(size: int) -> None:
    async with draining() as ends:
        calls = [ends.proxy.big_later(size) for _ in range(5)]
        await until(lambda: len(ends.served.gates) == 5)
        drained = ends.factory.drain()
        await until(lambda: not ends.client._conversation._outgoing.is_open)
        ends.served.open_gates()
        assert [len(await call) for call in calls] == [size] * 5
        await drained


@pytest_twisted.ensureDeferred
async def test_answers_are_not_lost_when_the_peer_has_sent_what_is_not_read_any_more() -> None:
    # A socket that is closed with something unread in it throws away what the peer has not read (RFC 1122, 4.2.2.13).
    factory = Factory(Work)
    async with served(factory=factory) as where:
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", int(where.rsplit(":", 1)[1])))
        peer.setblocking(False)
        count, size = 6, 60_000
        calls = (request_frame(2 * number + 1, b"Work.big_later", size=size) for number in range(count))
        peer.send(HELLO + b"".join(calls))
        await until(lambda: factory.connections)
        (connection,) = factory.connections
        work: Any = connection.protocols[0]
        await until(lambda: len(work.gates) == count)
        drained = factory.drain()
        work.open_gates()
        # Requests that crossed the GOAWAY, as many as the sockets take.
        late = b"".join(request_frame(2 * number + 1001, b"Work.plus_one", number=1) for number in range(50_000))
        sent = 0
        for _ in range(100):
            with contextlib.suppress(BlockingIOError):
                sent += peer.send(late[sent : sent + 65536])
            await deferLater(reactor, 0)  # type: ignore[arg-type]
        assert sent > 100_000
        got = bytearray()

        def read() -> bool:
            with contextlib.suppress(BlockingIOError):
                while part := peer.recv(65536):
                    got.extend(part)
                return True
            return False

        await until(read)
        peer.close()
        await drained
        answers = {call_id: len(payload) for kind, _, call_id, payload in frames(got, 8) if kind == Kind.RESPONSE}
        assert answers == {2 * number + 1: len(msgspec.msgpack.encode(bytes(size))) for number in range(count)}


class InOrder(SynchronousTestCase):
    """The end in order, in virtual time."""

    def test_what_runs_has_thirty_seconds(self) -> None:
        ends = Ends(Work)
        with timeout(3600):
            call = ends.proxy.wait()
        ends.turn()
        drained = ends.factory.drain()
        ends.turn(29.9)
        self.assertNoResult(drained)
        self.assertNoResult(call)
        self.assertEqual(ends.served.notes, ["began"])
        ends.turn(0.2)
        self.assertIs(self.failureResultOf(call).value.may_have_run, True)
        self.assertEqual(ends.served.notes, ["began", "cancelled"])
        self.successResultOf(drained)
        self.assertEqual(ends.clock.getDelayedCalls(), [])

    def test_an_answer_given_while_the_peer_does_not_read_is_sent_before_the_end(self) -> None:
        for size in (10, 300_000):
            ends = Ends(Work)
            call = ends.proxy.big_later(size)
            ends.turn()
            ends.server_carrier.pauseProducing()
            drained = ends.factory.drain()
            ends.served.open_gates()
            ends.clock.advance(0)
            self.assertFalse(ends.server_transport.disconnecting)
            ends.server_carrier.resumeProducing()
            ends.turn()
            self.assertEqual(len(self.successResultOf(call)), size)
            self.successResultOf(drained)
            self.assertEqual(ends.clock.getDelayedCalls(), [])

    def test_calls_that_wait_for_a_slot_fail_and_certainly_did_not_run(self) -> None:
        ends = Ends(Work, server_limits=Limits(max_calls=1))
        runs, waits = ends.proxy.wait(), ends.proxy.wait()
        stream = Deferred.fromCoroutine(anext(ends.proxy.counts(3)))
        ends.turn()
        ends.factory.drain()
        ends.turn()
        self.assertIs(self.failureResultOf(waits, GoingAway).value.may_have_run, False)
        self.assertIs(self.failureResultOf(stream, GoingAway).value.may_have_run, False)
        ends.served.open_gates()
        ends.turn()
        self.assertEqual(self.successResultOf(runs), 1)

    def test_calls_that_cross_the_goaway_fail_and_certainly_did_not_run(self) -> None:
        ends = Ends(Work)
        first = ends.proxy.wait()
        ends.turn()
        ends.factory.drain()
        crossed, streamed = ends.proxy.plus_one(1), Deferred.fromCoroutine(anext(ends.proxy.counts(3)))
        large = ends.proxy.total(_numbers(Deferred()))
        ends.turn()
        for outcome in (crossed, streamed, large):
            self.assertIs(self.failureResultOf(outcome, GoingAway).value.may_have_run, False)
        ends.served.open_gates()
        ends.turn()
        self.assertEqual(self.successResultOf(first), 1)
        self.assertEqual(ends.served.notes, ["began"])

    def test_both_ends_may_drain_at_once(self) -> None:
        ends = Ends(Work)
        call = ends.proxy.big_later(300_000)
        ends.turn()
        drained = [ends.server.drain(), ends.client.drain(), ends.client.drain()]
        ends.turn()
        ends.served.open_gates()
        ends.turn()
        self.assertEqual(len(self.successResultOf(call)), 300_000)
        for each in drained:
            self.successResultOf(each)
        self.assertEqual(ends.clock.getDelayedCalls(), [])

    def test_a_oneway_call_that_was_sent_before_is_served(self) -> None:
        ends = Ends(Work)
        told = ends.proxy.tell()
        ends.clock.advance(0)
        drained = ends.client.drain()
        ends.turn()
        self.successResultOf(told)
        self.assertEqual(ends.served.notes, ["told"])
        self.successResultOf(drained)

    def test_a_peer_that_does_not_close_is_cut_off(self) -> None:
        ends = Ends(Work)
        aborted: list[bool] = []
        ends.server_transport.abortConnection = lambda: aborted.append(True)  # type: ignore[method-assign]
        drained = ends.server.drain()
        ends.clock.advance(0)
        self.assertTrue(ends.server_transport.disconnecting)
        self.assertNoResult(drained)
        ends.clock.advance(5.1)
        self.assertEqual(aborted, [True])


def test_a_turned_away_peer_gets_a_preface_and_the_reason() -> None:
    factory = Factory(Work, limits=Limits(max_connections=1), reactor=Ends(Work).clock)  # type: ignore[arg-type]
    from twisted.internet.testing import StringTransport

    first, second = StringTransport(), StringTransport()
    for transport in (first, second):
        built: Any = factory.buildProtocol(transport.getPeer())
        built.makeConnection(transport)
    ((kind, _, _, payload),) = frames(second.value(), 8)
    assert (kind, struct.unpack_from("!H", payload)[0]) == (Kind.GOAWAY, 8)
    assert second.disconnecting
    assert not first.disconnecting


class Large(Protocol):
    @request(timeout=600.0)
    async def blob(self, size: int) -> bytes:
        return bytes(size)


class Slowly(SynchronousTestCase):
    def test_a_peer_that_reads_slowly_and_steadily_is_not_dropped(self) -> None:
        ends = Ends(Large, server_limits=Limits(write_timeout=2.0))
        transport, carrier = ends.server_transport, ends.server_carrier
        write = transport.write

        def write_some(data: bytes) -> None:
            # As Twisted's transports do it: one that has enough says so, and asks for more when that is read.
            write(data)
            if len(transport.value()) > 64 * 1024:
                carrier.pauseProducing()

        self.patch(transport, "write", write_some)
        calls = [ends.proxy.blob(50_000) for _ in range(100)]
        ends.clock.advance(0)
        carrier.dataReceived(ends.client_transport.value())
        ends.client_transport.clear()
        for _ in range(34):
            given = transport.value()
            self.assertLess(len(given), 256 * 1024)
            transport.clear()
            ends.clock.advance(1.5)
            self.assertFalse(transport.disconnected)
            ends.client_carrier.dataReceived(given)
            if ends.server._paused:
                carrier.resumeProducing()
        for call in calls:
            self.assertEqual(len(self.successResultOf(call)), 50_000)


@pytest_twisted.ensureDeferred
async def test_drain_takes_no_longer_than_it_may_whoever_does_not_close() -> None:
    factory = Factory(Work)
    async with served(factory=factory) as where:
        with socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2]))) as silent:
            # It greets, and never closes its end.
            silent.sendall(HELLO)
            await until(lambda: factory.connections)
            began = time.monotonic()
            await factory.drain(0.3)
            assert 0.25 <= time.monotonic() - began < 2.0


@pytest_twisted.ensureDeferred
async def test_whoever_waits_for_the_end_of_a_connection_and_is_cancelled_takes_it_from_nobody_else() -> None:
    factory = Factory(Work, limits=Limits(max_connections=1))
    async with served(factory=factory) as where:
        connecting = connect(reactor, where, Work)
        async with connecting as work:
            assert await work.plus_one(1) == 2
            for connection in (*factory.connections, connecting.connection):
                given_up = connection.closed
                given_up.addErrback(lambda failure: failure.trap(CancelledError))
                given_up.cancel()
            (server,) = factory.connections
            waited_for = server.closed
        await waited_for
        await until(lambda: not factory._connections)
        # And so there is room for another one.
        async with connect(reactor, where, Work) as work:
            assert await work.plus_one(1) == 2
