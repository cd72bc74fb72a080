"""Servers that call their clients, over the connections that these opened, in all the ways in which clients call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults

from protoframe import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    Factory,
    Internal,
    Limits,
    LocalProtocolError,
    Protocol,
    UnknownMethod,
    connect,
    current_call,
    metadata,
    request,
    timeout,
)
from tests.ends import Ends, Notes, becomes_idle, leftovers, talk, until
from tests.test_calls import failures, logged, served  # noqa: F401 - a fixture


class Refused(Error):
    """The client does not want to hear it."""

    word: str


class Chat(Protocol["ChatClient"]):
    """A room."""

    def __init__(self) -> None:
        self.notes = Notes()

    def connectionMade(self) -> None:
        self.notes.add("made")

    def connectionLost(self, reason: Any) -> None:
        self.notes.add("lost")

    @request
    async def say(self, text: str) -> list[str]:
        """Tells everybody, and says who heard it."""
        heard = [connection.proxy(ChatClient).heard(text) for connection in self.factory.connections]
        return sorted(await gatherResults(heard))  # type: ignore[arg-type]

    @request
    async def relay(self, words: AsyncIterator[str]) -> AsyncIterator[str]:
        """Has its own client answer each word that it sends."""
        async for answer in self.peer.shouts(words):
            yield answer

    @request
    async def ask(self, name: str) -> Any:
        return await getattr(self.peer, name)()

    @request
    async def ask_and_hang(self) -> None:
        self.notes.add("asking")
        try:
            await self.peer.hang()
        except CancelledError:
            self.notes.add("cancelled")
            raise
        except ConnectionLost:
            self.notes.add("lost it")

    @request
    async def bounce(self, times: int) -> int:
        return times if not times else await self.peer.bounce(times - 1)


class ChatClient(Protocol[Chat]):
    """Who is in the room."""

    def __init__(self, name: str = "anybody") -> None:
        self.name = name
        self.texts: list[str] = []
        self.notes = Notes()
        self.given = 0

    @request(raises=[Refused])
    async def heard(self, text: str) -> str:
        if text == "rude":
            raise Refused("no", word=text)
        self.texts.append(text)
        return self.name

    @request
    async def counts(self, number: int) -> AsyncIterator[int]:
        try:
            for each in range(number):
                self.given += 1
                yield each
        finally:
            self.notes.add("ended")

    @request
    async def total(self, numbers: AsyncIterator[int]) -> int:
        total = 0
        async for number in numbers:
            total += number
        return total

    @request
    async def shouts(self, words: AsyncIterator[str]) -> AsyncIterator[str]:
        async for word in words:
            yield word.upper()

    @request
    async def hang(self) -> None:
        self.notes.add("began")
        try:
            await Deferred()
        except CancelledError:
            self.notes.add("cancelled")
            raise

    @request
    async def surroundings(self) -> list[Any]:
        call = current_call()
        return [call.method, dict(call.metadata), call.remaining]

    @request
    async def broken(self) -> None:
        raise ValueError("the password is 12345")

    @request
    async def bounce(self, times: int) -> int:
        return times if not times else await self.peer.bounce(times - 1)

    @request(oneway=True)
    async def tell(self, text: str) -> None:
        self.texts.append(text)
        self.notes.add("told")


class Room:
    """A server, and its clients.

    :ivar factory: the server's.
    :ivar clients: what serves at each client.
    :ivar chats: each client's proxy of the server.
    :ivar connecting: what opened each conversation.
    """

    def __init__(self, factory: Factory) -> None:
        self.factory = factory
        self.clients: list[ChatClient] = []
        self.chats: list[Any] = []
        self.connecting: list[Any] = []

    def proxies(self) -> list[Any]:
        """Proxies of all clients."""
        return [connection.proxy(ChatClient) for connection in self.factory.connections]


@asynccontextmanager
async def room(count: int = 3) -> AsyncIterator[Room]:
    made = Room(Factory(Chat))
    async with AsyncExitStack() as stack:
        where = await stack.enter_async_context(served(factory=made.factory))
        for number in range(count):
            client = ChatClient(f"client {number}")
            connecting = connect(reactor, where, Chat, serving=client)
            made.clients.append(client)
            made.connecting.append(connecting)
            made.chats.append(await stack.enter_async_context(connecting))
        await until(lambda: sum(connection.is_open for connection in made.factory.connections) == count)
        yield made


async def words(*them: str) -> AsyncIterator[str]:
    for word in them:
        yield word


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


async def read(stream: Any) -> list[Any]:
    return [item async for item in stream]


@pytest_twisted.ensureDeferred
async def test_a_server_calls_each_of_its_clients() -> None:
    async with room() as here:
        for connection in here.factory.connections:
            assert (await connection.proxy(ChatClient).heard("hello")).startswith("client ")
        assert [client.texts for client in here.clients] == [["hello"]] * 3
        assert await here.chats[0].say("all") == ["client 0", "client 1", "client 2"]
        assert [client.texts for client in here.clients] == [["hello", "all"]] * 3


@pytest_twisted.ensureDeferred
async def test_connections_are_those_that_are_open_and_what_was_given_out_stays_as_it_was() -> None:
    async with room(2) as here:
        before = here.factory.connections
        assert len(before) == 2
        await here.connecting[0].close()
        await until(lambda: len(here.factory.connections) == 1)
        assert len(before) == 2
        with pytest.raises(AttributeError):
            here.factory.connections.clear()  # type: ignore[attr-defined]
        assert await here.chats[1].say("still here") == ["client 1"]


@pytest_twisted.ensureDeferred
async def test_streams_go_from_clients_to_their_server_and_back() -> None:
    async with room() as here:
        for proxy in here.proxies():
            assert await read(proxy.counts(3000)) == list(range(3000))
            assert await proxy.total(numbers(3000)) == sum(range(3000))
            assert await read(proxy.shouts(words("a", "b"))) == ["A", "B"]
        # Through both: what a client sends comes back to it, is answered there, and is its own call's answer.
        results = await gatherResults(
            [Deferred.fromCoroutine(read(chat.relay(words(*"abc" * 200)))) for chat in here.chats]
        )
        assert results == [list("ABC" * 200)] * 3


@pytest_twisted.ensureDeferred
async def test_leaving_a_stream_of_a_client_ends_it_there() -> None:
    async with room(1) as here:
        (proxy,) = here.proxies()
        async for number in proxy.counts(1_000_000):
            if number == 5:
                break
        await here.clients[0].notes.has("ended")
        assert here.clients[0].given < 20_000
        (connection,) = here.factory.connections
        await becomes_idle(here.connecting[0].connection, connection)


@pytest_twisted.ensureDeferred
async def test_both_ends_call_each_other_in_turn() -> None:
    client = ChatClient()
    async with talk(Chat, serving=client) as ends:
        assert await ends.proxy.bounce(50) == 0
        assert await gatherResults([ends.proxy.bounce(20) for _ in range(50)]) == [0] * 50
        assert await ends.served.peer.bounce(7) == 0


@pytest_twisted.ensureDeferred
async def test_errors_and_surroundings_are_the_same_in_this_direction(logged: list[Any]) -> None:  # noqa: F811
    async with room(1) as here:
        (proxy,) = here.proxies()
        with pytest.raises(Refused) as caught:
            await proxy.heard("rude")
        assert caught.value.word == "rude"
        with pytest.raises(Internal) as internal:
            await proxy.broken()
        assert "12345" not in repr(internal.value)
        assert len(failures(logged)) == 1
        with timeout(3.0), metadata(room="1"):
            method, got, remaining = await proxy.surroundings()
        assert (method, got) == ("ChatClient.surroundings", {"room": "1"})
        assert 2 < remaining < 3
        with timeout(0.05), pytest.raises(DeadlineExceeded):
            await proxy.hang()
        await here.clients[0].notes.has("cancelled")
        await proxy.tell("psst")
        await here.clients[0].notes.has("told")
        assert here.clients[0].texts == ["psst"]
        with pytest.raises(LocalProtocolError):
            current_call()


@pytest_twisted.ensureDeferred
async def test_a_client_that_serves_nothing_says_so() -> None:
    async with talk(Chat) as ends:
        with pytest.raises(UnknownMethod, match=r"there is no method ChatClient\.heard") as caught:
            await ends.served.peer.heard("x")
        assert caught.value.may_have_run is False
        with pytest.raises(UnknownMethod):
            await read(ends.served.peer.counts(3))
        with pytest.raises(UnknownMethod):
            await ends.served.peer.total(numbers(3))


@pytest_twisted.ensureDeferred
async def test_a_server_calls_as_soon_as_the_conversation_is_open() -> None:
    class Eager(Chat, name="Chat"):
        def connectionMade(self) -> None:
            self.first = self.peer.heard("welcome")

    client = ChatClient("me")
    async with talk(Eager, serving=client) as ends:
        assert await ends.served.first == "me"
        assert client.texts == ["welcome"]


@pytest_twisted.ensureDeferred
async def test_the_deadline_of_a_clients_call_holds_for_what_its_server_asks_of_it() -> None:
    client = ChatClient()
    async with talk(Chat, serving=client) as ends:
        with timeout(2.0), metadata(mine="x"):
            method, got, remaining = await ends.proxy.ask("surroundings")
        assert (method, got) == ("ChatClient.surroundings", {})
        assert 0 < remaining < 2
        call: Any = ends.proxy.ask_and_hang()
        await client.notes.has("began")
        call.cancel()
        with pytest.raises(Cancelled):
            await call
        await client.notes.has("cancelled")
        await ends.served.notes.has("cancelled")


@pytest_twisted.ensureDeferred
async def test_a_client_that_disappears_fails_what_its_server_asked_of_it_and_no_more(
    logged: list[Any],  # noqa: F811
) -> None:
    async with room(3) as here:
        open_ones = {connection.address.port: connection for connection in here.factory.connections}
        gone = here.connecting[1].connection
        port = gone._carrier.transport.getHost().port
        connection = open_ones.pop(port)
        proxy = connection.proxy(ChatClient)
        call, stream, sending = proxy.hang(), proxy.counts(1_000_000), proxy.total(_endless())
        theirs = here.chats[1].ask_and_hang()
        assert await anext(stream) == 0
        await here.clients[1].notes.has("began", 2)
        others = [each.proxy(ChatClient).hang() for each in open_ones.values()]

        gone._carrier.abort()
        with pytest.raises(ConnectionLost) as caught:
            await call
        assert caught.value.may_have_run is True
        with pytest.raises(ConnectionLost):
            await read(stream)
        with pytest.raises(ConnectionLost):
            await sending
        with pytest.raises(ConnectionLost):
            await theirs
        served_there: Any = connection.protocols[0]
        await served_there.notes.has("lost")
        assert {"lost it", "cancelled"} & set(served_there.notes)
        # At the client too, all that its server had asked for is over.
        await here.clients[1].notes.has("cancelled", 2)
        await here.clients[1].notes.has("ended")
        with pytest.raises(ConnectionLost) as late:
            await proxy.heard("x")
        assert late.value.may_have_run is False

        assert await here.chats[0].say("who is left?") == ["client 0", "client 2"]
        assert not any(other.called for other in others)
        for other in others:
            other.cancel()
            with pytest.raises(Cancelled):
                await other
        assert leftovers(connection) == leftovers(gone) == []
        assert failures(logged) == []


async def _endless() -> AsyncIterator[int]:
    yield 1
    await Deferred()


@pytest_twisted.ensureDeferred
async def test_a_client_that_disappears_in_a_broadcast_fails_its_own_part_alone() -> None:
    async with room(4) as here:
        calls = {
            connection.address.port: connection.proxy(ChatClient).hang() for connection in here.factory.connections
        }
        for client in here.clients:
            await client.notes.has("began")
        gone = here.connecting[2].connection
        gone._carrier.abort()
        lost = calls.pop(gone._carrier.transport.getHost().port)
        with pytest.raises(ConnectionLost):
            await lost
        for call in calls.values():
            assert not call.called  # type: ignore[attr-defined]
            call.cancel()  # type: ignore[attr-defined]
            with pytest.raises(Cancelled):
                await call


# Calls that want no answer.


class Board(Protocol["Board"]):
    def __init__(self) -> None:
        self.notes = Notes()
        self.seen: list[Any] = []

    @request(oneway=True)
    async def pin(self, text: str) -> None:
        self.seen.append(text if len(text) < 100 else len(text))
        self.notes.add("pinned")

    @request(oneway=True)
    async def hang(self) -> None:
        self.notes.add("began")
        try:
            await Deferred()
        finally:
            self.notes.add("ended")

    @request(oneway=True)
    async def fails(self) -> None:
        raise ValueError("the password is 12345")

    @request(oneway=True)
    async def gives(self) -> None:
        return 3  # type: ignore[return-value]

    @request
    async def plus_one(self, number: int) -> int:
        return number + 1

    @request
    async def echo(self, text: str) -> str:
        return text

    @request
    async def pin_back(self, text: str) -> None:
        await self.peer.pin(text)


@pytest_twisted.ensureDeferred
async def test_oneway_calls_arrive_whatever_their_size_and_in_either_direction() -> None:
    client = Board()
    async with talk(Board, serving=client) as ends:
        assert await ends.proxy.pin("a") is None
        await ends.proxy.pin("x" * 3_000_000)
        await ends.served.notes.has("pinned", 2)
        assert ends.served.seen == ["a", 3_000_000]
        await gatherResults([ends.proxy.pin(str(number)) for number in range(900)])
        await ends.served.notes.has("pinned", 902)
        assert ends.served.seen[2:] == [str(number) for number in range(900)]
        await ends.proxy.pin_back("b")
        await client.notes.has("pinned")
        assert client.seen == ["b"]


@pytest.mark.parametrize("size", [10, 300_000])
def test_what_is_called_when_a_oneway_call_was_sent_goes_at_once(size: int) -> None:
    ends = Ends(Board)
    second = ends.proxy.pin("a").addCallback(lambda _: ends.proxy.pin("x" * size))
    third = second.addCallback(lambda _: ends.proxy.echo("y" * size))
    ends.turn()
    assert third.result == "y" * size
    assert len(ends.served.seen) == 2


@pytest_twisted.ensureDeferred
async def test_a_oneway_call_that_fails_is_in_the_log_of_who_serves_it_and_nowhere_else(
    logged: list[Any],  # noqa: F811
) -> None:
    async with talk(Board) as ends:
        await ends.proxy.fails()
        await ends.proxy.gives()
        assert await ends.proxy.plus_one(1) == 2
        (event,) = failures(logged)
        assert event["method"] == "Board.fails"


@pytest_twisted.ensureDeferred
async def test_of_oneway_calls_that_go_on_there_are_so_many_and_no_more_and_others_are_served() -> None:
    async with talk(Board, server_limits=Limits(max_calls=2), idle=False) as ends:
        for _ in range(5):
            await ends.proxy.hang()
        await ends.served.notes.has("began", 2)
        # They take no slots of calls that want an answer.
        assert await ends.proxy.plus_one(1) == 2
        assert ends.served.notes == ["began", "began"]
    await ends.served.notes.has("ended", 2)


@pytest_twisted.ensureDeferred
async def test_a_oneway_call_with_a_deadline_is_cancelled_when_it_passes() -> None:
    async with talk(Board) as ends:
        with timeout(0.05):
            await ends.proxy.hang()
        await ends.served.notes.has("ended")


def test_a_oneway_call_that_was_not_sent_says_so() -> None:
    ends = Ends(Board, limits=Limits(max_waiting=2))
    made = [ends.proxy.pin(text) for text in "abc"]
    ends.lose()
    errors: list[Any] = []
    for call in made:
        call.addErrback(lambda failure: errors.append(failure.value))
    assert sorted(type(error).__name__ for error in errors) == ["ConnectionLost", "ConnectionLost", "TooManyCalls"]
    assert [error.may_have_run for error in errors] == [False] * 3
    assert ends.served.seen == []
    assert ends.clock.getDelayedCalls() == []


@pytest_twisted.ensureDeferred
async def test_a_oneway_call_made_just_before_the_end_arrives() -> None:
    factory = Factory(Board)
    async with served(factory=factory) as where:
        async with connect(reactor, where, Board) as board:
            await until(lambda: factory.connections)
            (connection,) = factory.connections
            await board.plus_one(1)
            await board.pin("last words")
        there: Any = connection.protocols[0]
        await there.notes.has("pinned")
        assert there.seen == ["last words"]


class Asked(Protocol["Asking"]):
    @request
    async def name(self) -> str:
        return await self.peer.my_name()


class Asking(Protocol[Asked]):
    def __init__(self, name: str = "") -> None:
        self.name = name

    @request
    async def my_name(self) -> str:
        return self.name


@pytest_twisted.ensureDeferred
async def test_an_instance_that_serves_two_conversations_has_no_one_peer() -> None:
    class Shared(Factory):
        def __init__(self) -> None:
            super().__init__(Asked)
            self.instance = Asked()

        def create(self, protocol: Any) -> Any:
            return self.instance

    async with served(factory=Shared()) as where, connect(reactor, where, Asked, serving=Asking("ann")) as ann:
        assert await ann.name() == "ann"
        async with connect(reactor, where, Asked, serving=Asking("bob")) as bob:
            for asked in (ann, bob):
                with pytest.raises(Internal):
                    await asked.name()
