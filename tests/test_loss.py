"""A connection that is lost at any octet of a conversation that has everything in it: every call has one outcome, every
loop over a stream ends once, every handler and every iterator is told, and nothing is left behind."""

from __future__ import annotations

import gc
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from protoframe import Error, Factory, Limits, Protocol, request
from protoframe._connection import Connection
from protoframe._endpoints import _ClientFactory
from protoframe.core.frames import Kind
from tests.ends import leftovers
from tests.test_connection import frames

#: So that a large value is small, and streams meet their windows.
SMALL = Limits(max_frame=2048, max_message=4096, max_unfinished=8192, stream_credit=1024, connection_credit=4096)

ADDRESS = IPv4Address("TCP", "127.0.0.1", 1)
LARGE = b"l" * 2100


class Ledger:
    """What began and what ended."""

    def __init__(self) -> None:
        self.began: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.results: dict[str, Any] = {}

    @contextmanager
    def notes(self, name: str) -> Iterator[None]:
        self.began[name] += 1
        try:
            yield
        finally:
            self.ended[name] += 1

    def watch(self, name: str, deferred: Deferred[Any]) -> Deferred[Any]:
        self.began[name] += 1

        def fired(result: Any) -> None:
            self.ended[name] += 1
            self.results[name] = result

        return deferred.addBoth(fired)

    async def read(self, name: str, stream: Any) -> None:
        """Reads a stream: its one end is its outcome."""
        items: list[Any] = []
        with self.notes(name):
            try:
                async for item in stream:
                    items.append(item)
            except Error as error:
                items.append(type(error))
            self.results[name] = items

    async def give(self, name: str, *items: Any, then: Deferred[None] | None = None) -> AsyncIterator[Any]:
        with self.notes(name):
            for item in items:
                yield item
            if then is not None:
                await then


class Sorry(Error):
    code: int


class Stage(Protocol["Player"]):
    """The server."""

    ledger: Ledger

    @request
    async def note(self, text: str) -> str:
        with self.ledger.notes("note"):
            return text

    @request(raises=[Sorry])
    async def fails(self) -> None:
        raise Sorry(code=3)

    @request
    async def counts(self, number: int) -> AsyncIterator[int]:
        with self.ledger.notes("counts"):
            for each in range(number):
                yield each

    @request
    async def hangs_on(self) -> AsyncIterator[int]:
        with self.ledger.notes("hangs_on"):
            yield 1
            await Deferred()

    @request
    async def total(self, numbers: AsyncIterator[int]) -> int:
        total = 0
        with self.ledger.notes("total"):
            async for number in numbers:
                total += number
        return total

    @request
    async def echo(self, texts: AsyncIterator[str]) -> AsyncIterator[str]:
        with self.ledger.notes("echo"):
            async for text in texts:
                yield text

    @request
    async def large_item(self, data: bytes) -> AsyncIterator[bytes]:
        with self.ledger.notes("large_item"):
            yield data

    @request
    async def first_item(self, items: AsyncIterator[bytes]) -> bytes:
        with self.ledger.notes("first_item"):
            async for item in items:
                return item
        return b""

    @request(oneway=True)
    async def tell(self) -> None:
        with self.ledger.notes("tell"):
            await Deferred()

    @request
    async def hang(self) -> None:
        with self.ledger.notes("hang"):
            await Deferred()

    @request
    async def hang_back(self) -> int:
        """Waits for the peer, which waits for ever."""
        with self.ledger.notes("hang_back"):
            return await self.peer.hang()

    @request
    async def ask_back(self) -> int:
        """Calls the peer in every way."""
        with self.ledger.notes("ask_back"):
            self.ledger.watch("given up there", self.peer.hang()).cancel()  # type: ignore[arg-type]
            with self.ledger.notes("told"):
                await self.peer.heard("x")
            await self.ledger.read("counted", self.peer.counts(3))
            with self.ledger.notes("collected"):
                return await self.peer.collect(self.ledger.give("given", 1, 2, 3))

    @request(oneway=True)
    async def leave(self) -> None:
        for connection in self.factory.connections:
            self.ledger.watch("drained", connection.drain())


class Player(Protocol[Stage]):
    """The client."""

    ledger: Ledger

    @request
    async def heard(self, text: str) -> str:
        with self.ledger.notes("heard"):
            return text

    @request
    async def hang(self) -> int:
        with self.ledger.notes("hang here"):
            await Deferred()
        return 0

    @request
    async def counts(self, number: int) -> AsyncIterator[int]:
        with self.ledger.notes("counts here"):
            for each in range(number):
                yield each

    @request
    async def collect(self, numbers: AsyncIterator[int]) -> int:
        total = 0
        with self.ledger.notes("collect"):
            async for number in numbers:
                total += number
        return total


class StageFactory(Factory):
    ledger: Ledger

    def create(self, protocol: Any) -> Any:
        made = protocol()
        made.ledger = self.ledger
        return made


async def play_large_item(ledger: Ledger, connection: Connection) -> None:
    """What the client does with values of several frames: a request, and an item that answers it."""
    stage: Any = connection.proxy(Stage)
    await ledger.read("read_large", stage.large_item(LARGE))


async def play_large_answer(ledger: Ledger, connection: Connection) -> None:
    """And the other way round: an item, and the answer to it."""
    stage: Any = connection.proxy(Stage)
    ledger.watch("call_large", stage.first_item(ledger.give("large", LARGE)))


async def play(ledger: Ledger, connection: Connection) -> None:
    """All else that the client does, once the conversation is open."""
    stage: Any = connection.proxy(Stage)
    ending = [
        ledger.watch("call_note", stage.note("hello")),
        ledger.watch("call_fails", stage.fails()),
        ledger.watch("call_total", stage.total(ledger.give("numbers", 1, 2, 3))),
        ledger.watch("call_ask_back", stage.ask_back()),
        ledger.watch("ping", connection.ping()),
        Deferred.fromCoroutine(ledger.read("read_counts", stage.counts(10))),
        Deferred.fromCoroutine(ledger.read("read_echo", stage.echo(ledger.give("texts", *["a" * 80] * 11)))),
    ]
    ledger.watch("call_tell", stage.tell())
    ledger.watch("call_hang", stage.hang())
    ledger.watch("call_hang_back", stage.hang_back())
    ledger.watch("call_that_hangs", stage.total(ledger.give("numbers that hang", 1, then=Deferred())))
    hanging = Deferred.fromCoroutine(ledger.read("read_hangs_on", stage.hangs_on()))
    ledger.watch("reading hangs_on", hanging)
    given_up = stage.hang()
    ledger.watch("call_given_up", given_up)
    for call in ending:
        await call
        given_up.cancel()
    ledger.watch("call_leave", stage.leave())
    ledger.watch("drain", connection.drain())


class Lost(SynchronousTestCase):
    def setUp(self) -> None:
        # What other tests have left behind is none of these.
        gc.collect()
        self.flushLoggedErrors()
        self.patch(secrets, "token_bytes", lambda count: b"\x01" * count)
        self.clock = Clock()
        self.play: Any = play
        self.ledger = Ledger()
        self.player = Player()
        self.stage_factory = StageFactory(Stage, reactor=self.clock, limits=SMALL)  # type: ignore[arg-type]
        self.player_factory = _ClientFactory(self.clock, SMALL, [self.player])  # type: ignore[arg-type]

    def begin(self) -> None:
        self.ledger = self.player.ledger = self.stage_factory.ledger = Ledger()

    def client_end(self) -> Any:
        """A client that plays its part as soon as it may."""
        carrier: Any = self.player_factory.buildProtocol(ADDRESS)
        carrier.makeConnection(StringTransport(peerAddress=ADDRESS))
        connection: Connection = carrier.connection
        ledger, play = self.ledger, self.play
        connection.opened.addCallback(lambda _: ledger.watch("play", Deferred.fromCoroutine(play(ledger, connection))))
        ledger.watch("opened", connection.opened)
        ledger.watch("closed", connection.closed)
        return carrier

    def server_end(self) -> Any:
        carrier: Any = self.stage_factory.buildProtocol(ADDRESS)
        carrier.makeConnection(StringTransport(peerAddress=ADDRESS))
        self.ledger.watch("closed", carrier.connection.closed)
        return carrier

    def record(self, **results: Any) -> tuple[list[bytes], list[bytes]]:
        """The whole conversation: what the client got, and what the server got, each as it came.

        :param results: what is to come of it at the client.
        """
        self.begin()
        client_ledger = self.ledger
        client = self.client_end()
        self.begin()
        self.player.ledger = client_ledger
        server = self.server_end()
        got: tuple[list[bytes], list[bytes]] = ([], [])
        for _ in range(100):
            for receiver, sender, record in ((server, client, got[1]), (client, server, got[0])):
                octets = sender.transport.value()
                sender.transport.clear()
                if octets:
                    record.append(octets)
                    receiver.dataReceived(octets)
                self.clock.advance(0)
        self.results = client_ledger.results
        self.assertEqual(set(self.results) & set(results), set(results))
        self.assertEqual({name: self.results[name] for name in results}, results)
        for carrier in (client, server):
            carrier.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.clock.getDelayedCalls(), [])
        return got

    def check_recorded(self, octets: bytes, *kinds: Kind) -> None:
        """The conversation has everything in it that it is meant to have."""
        found = {kind for kind, *_ in frames(octets, 8)}
        self.assertEqual({Kind(kind) for kind in found} - set(kinds), set())
        self.assertEqual(set(kinds) - found, set())

    def lose_at_every_octet(self, make: Any, chunks: list[bytes], everything: set[str], step: int = 1) -> None:
        # Where a record had a turn of the reactor, there is one: answers came after what they answer.
        seen: set[str] = set()
        reasons = [Failure(ConnectionDone()), Failure(ConnectionLost())]
        before = 0
        for index, chunk in enumerate(chunks):
            for cut in [*range(1 if index else 0, len(chunk), step), len(chunk)]:
                self.begin()
                carrier = make()
                for whole in chunks[:index]:
                    carrier.dataReceived(whole)
                    self.clock.advance(0)
                if cut:
                    carrier.dataReceived(chunk[:cut])
                # As often as not it is lost before what follows has happened.
                if cut % 2:
                    self.clock.advance(0)
                connection = carrier.connection
                self.assertFalse(carrier.transport.disconnecting, (index, cut))
                carrier.connectionLost(reasons[cut % 3 == 0])
                where = f"{before + cut} octets, {cut} of chunk {index}"
                self.assertEqual(self.ledger.began, self.ledger.ended, where)
                self.assertEqual([call.func for call in self.clock.getDelayedCalls()], [], where)
                self.assertEqual(leftovers(connection), [], where)
                self.assertEqual(self.flushLoggedErrors(), [], where)
                seen.update(self.ledger.began)
            before += len(chunk)
        self.assertEqual(self.stage_factory.connections, frozenset())
        self.assertEqual(everything - seen, set())
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def record_all(self) -> tuple[list[bytes], list[bytes]]:
        got = self.record(call_note="hello", call_total=6, call_ask_back=6, read_counts=list(range(10)))
        self.assertEqual(self.results["read_echo"], ["a" * 80] * 11)
        self.assertEqual(self.results["call_fails"].value.code, 3)
        self.assertGreater(self.results["ping"], -1)
        return got

    def test_the_client_loses_a_conversation_at_any_octet(self) -> None:
        got, _ = self.record_all()
        self.check_recorded(
            b"".join(got),
            *(Kind.HELLO, Kind.REQUEST, Kind.RESPONSE, Kind.ERROR, Kind.PONG),
            *(Kind.GOAWAY, Kind.ITEM, Kind.END, Kind.CREDIT, Kind.CANCEL),
        )
        everything = {"play", "heard", "counts here", "collect", "hang here", "drain", "read_echo", "numbers that hang"}
        self.lose_at_every_octet(self.client_end, got, everything)

    def test_the_server_loses_a_conversation_at_any_octet(self) -> None:
        _, got = self.record_all()
        self.check_recorded(
            b"".join(got),
            *(Kind.HELLO, Kind.REQUEST, Kind.RESPONSE, Kind.ERROR, Kind.PING, Kind.GOAWAY),
            *(Kind.ITEM, Kind.END, Kind.CREDIT, Kind.CANCEL),
        )
        everything = {"note", "counts", "hangs_on", "total", "echo", "tell", "hang", "ask_back", "given", "drained"}
        self.lose_at_every_octet(self.server_end, got, everything)

    def test_either_end_loses_a_large_request_and_a_large_item_at_any_octet(self) -> None:
        self.play = play_large_item
        by_client, by_server = self.record(read_large=[LARGE])
        self.assertIn((Kind.REQUEST, 17), [frame[:2] for frame in frames(b"".join(by_server), 8)])
        self.assertIn((Kind.ITEM, 1), [frame[:2] for frame in frames(b"".join(by_client), 8)])
        self.lose_at_every_octet(self.client_end, by_client, {"read_large"})
        self.lose_at_every_octet(self.server_end, by_server, {"large_item"})

    def test_either_end_loses_a_large_item_and_a_large_answer(self) -> None:
        self.play = play_large_answer
        by_client, by_server = self.record(call_large=LARGE)
        self.assertIn((Kind.RESPONSE, 1), [frame[:2] for frame in frames(b"".join(by_client), 8)])
        self.assertIn((Kind.ITEM, 1), [frame[:2] for frame in frames(b"".join(by_server), 8)])
        # Within a frame one octet is as good as the next: the test before this has them all.
        self.lose_at_every_octet(self.client_end, by_client, {"call_large"}, step=7)
        self.lose_at_every_octet(self.server_end, by_server, {"first_item"}, step=7)
