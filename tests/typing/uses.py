"""Right and wrong uses of the public face, for type checkers; nothing here is called.

A line that a type checker must complain about says so at its end: ``# wrong: mypy=CODE pyright=CODE``, with commas
between several codes, and with one checker alone where the other says nothing.  All other lines must pass.
``tests/test_typing.py`` compares.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, assert_type

from msgspec import Struct
from twisted.internet.defer import Deferred, ensureDeferred

from protoframe import (
    Backoff,
    Call,
    Client,
    ClientState,
    Connection,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    Factory,
    Identity,
    Internal,
    InvalidArgument,
    Limits,
    ListeningPort,
    LogCalls,
    MeterCalls,
    NotFound,
    Protocol,
    RetryPolicy,
    Status,
    Token,
    TokenAuthenticator,
    connect,
    current_call,
    listen,
    metadata,
    request,
    timeout,
)

# -- Errors ------------------------------------------------------------------------------------------------------------


class TooLong(Error):
    limit: int


class NoSuchWord(NotFound):
    word: str
    suggestions: list[str] = field(default_factory=list[str])
    language: str = "en"


def errors() -> None:
    TooLong(limit=3)
    TooLong("the text is too long", limit=3)
    TooLong(message="the text is too long", limit=3)
    assert_type(TooLong(limit=3).limit, int)
    assert_type(TooLong(limit=3).message, str)
    assert_type(TooLong(limit=3).may_have_run, bool)
    assert_type(TooLong(limit=3).detail, Mapping[str, Any])
    assert_type(TooLong.status, Status)
    NoSuchWord(word="a", language="de")
    Internal("no", incident="1")
    InvalidArgument("text: expected str")
    TooLong()  # wrong: mypy=call-arg pyright=reportCallIssue
    TooLong(3)  # wrong: mypy=call-arg,arg-type pyright=reportCallIssue
    TooLong(limit="3")  # wrong: mypy=arg-type pyright=reportArgumentType
    TooLong(limit=3, unit="m")  # wrong: mypy=call-arg pyright=reportCallIssue
    TooLong("the text is too long", 3)  # wrong: mypy=call-arg pyright=reportCallIssue
    TooLong(limit=3, may_have_run=False)  # wrong: mypy=call-arg pyright=reportCallIssue
    TooLong(limit=3).length  # wrong: mypy=attr-defined pyright=reportAttributeAccessIssue


# -- Protocols ---------------------------------------------------------------------------------------------------------


class Statistics(Struct):
    words: int


@dataclass
class Place:
    line: int
    column: int = 0


class Speech(Protocol):
    @request
    async def upper(self, text: str) -> str:
        if len(text) > 1000:
            raise TooLong(limit=1000)
        return text.upper()

    @request(idempotent=True, timeout=2.0, raises=[TooLong, NoSuchWord], max_size=4096)
    async def count(self, text: str, *, strict: bool = False) -> Statistics:
        return Statistics(words=len(text.split()))

    @request(idempotent=True)
    async def find(self, word: str, start: Place | None = None) -> list[Place]:
        return [start] if start is not None else []

    @request
    async def forget(self) -> None:
        self.helper()

    @request
    def at_once(self, number: int) -> int:
        return number + 1

    @request
    def later(self, number: int) -> Deferred[int]:
        return ensureDeferred(self.compute(number))

    async def compute(self, number: int) -> int:
        return number

    def helper(self) -> None:
        self.factory.noisy = False


class Wrong(Protocol):
    @request
    async def result(self, text: str) -> str:
        return len(text)  # wrong: mypy=return-value pyright=reportReturnType

    @request(idempotent=True)
    async def option(self, text: str) -> str:
        text.uper()  # wrong: mypy=attr-defined pyright=reportAttributeAccessIssue
        return text


def options() -> None:
    request(timeout=3)
    request(raises=(TooLong,))
    request(idempotent="yes")  # wrong: mypy=call-overload pyright=reportArgumentType
    request(idempotnet=True)  # wrong: mypy=call-overload pyright=reportCallIssue
    request(timeout="2 s")  # wrong: mypy=call-overload pyright=reportArgumentType
    request(raises=[ValueError])  # wrong: mypy=list-item pyright=reportArgumentType
    request(raises=TooLong)  # wrong: mypy=call-overload pyright=reportArgumentType
    request(max_size=1.5)  # wrong: mypy=call-overload pyright=reportArgumentType
    request(3)  # wrong: mypy=call-overload pyright=reportArgumentType


# -- Contracts: declarations that a server's module serves -------------------------------------------------------------


class Contract(Protocol):
    # What a module under mypy writes; mypy knows that it returns nothing because it never returns.
    @request(raises=[NoSuchWord])
    async def define(self, word: str) -> str:
        raise NotImplementedError

    @request
    async def note(self, word: str) -> None: ...


class ShortContract(Protocol):
    # What pyright takes, and mypy takes for a body that lacks its `return`.
    @request(raises=[NoSuchWord])
    async def define(self, word: str) -> str: ...  # wrong: mypy=empty-body

    @request
    async def note(self, word: str) -> None: ...


class Dictionary(Contract):
    async def define(self, word: str) -> str:
        raise NoSuchWord(word=word)


class WrongDictionary(Contract):
    async def define(self, word: int) -> str:  # wrong: mypy=override pyright=reportIncompatibleMethodOverride
        return str(word)

    async def note(self, word: str) -> int:  # wrong: mypy=override pyright=reportIncompatibleMethodOverride
        return len(word)


# -- Peers: either end calls the other ---------------------------------------------------------------------------------


class ChatClient(Protocol["Chat"]):
    @request
    async def show(self, line: str) -> int:
        await self.peer.say(line)
        await self.peer.say(3)  # wrong: mypy=arg-type pyright=reportArgumentType
        return len(line)


class Chat(Protocol["ChatClient"]):
    @request
    async def say(self, line: str) -> None:
        assert_type(self.peer, ChatClient)
        assert_type(await self.peer.show(line), int)
        await self.peer.shout(line)  # wrong: mypy=attr-defined pyright=reportAttributeAccessIssue
        await self.peer.show(line, 3)  # wrong: mypy=call-arg pyright=reportCallIssue
        self.peer.show(line)  # wrong: mypy=unused-coroutine pyright=reportUnusedCoroutine


class NobodySaid(Protocol):
    @request
    async def hello(self) -> None:
        assert_type(self.peer, Any)
        await self.peer.anything(1, two=3)


class NoSuchPeer(Protocol["ChatCleint"]):  # wrong: mypy=name-defined pyright=reportUndefinedVariable
    pass


# -- Calling -----------------------------------------------------------------------------------------------------------


async def calls(reactor: Any) -> None:
    async with connect(reactor, "tcp:127.0.0.1:12000", Speech) as speech:
        assert_type(speech, Speech)
        assert_type(await speech.upper("hello"), str)
        assert_type(await speech.upper(text="hello"), str)
        assert_type(await speech.count("hello", strict=True), Statistics)
        assert_type((await speech.count("hello")).words, int)
        assert_type(await speech.find("hello", Place(line=1)), list[Place])
        assert_type(await speech.later(1), int)
        await speech.forget()
        with timeout(2.0), metadata(tenant="a", user="b"):
            await speech.upper("hello")

        await speech.upper(3)  # wrong: mypy=arg-type pyright=reportArgumentType
        await speech.upper()  # wrong: mypy=call-arg pyright=reportCallIssue
        await speech.upper("a", "b")  # wrong: mypy=call-arg pyright=reportCallIssue
        await speech.upper(txt="a")  # wrong: mypy=call-arg pyright=reportCallIssue,reportCallIssue
        await speech.count("a", True)  # wrong: mypy=call-arg pyright=reportCallIssue
        await speech.find("a", start=1)  # wrong: mypy=arg-type pyright=reportArgumentType
        await speech.uper("a")  # wrong: mypy=attr-defined pyright=reportAttributeAccessIssue
        speech.upper("hello")  # wrong: mypy=unused-coroutine pyright=reportUnusedCoroutine
        number: int = await speech.upper("hello")  # wrong: mypy=assignment pyright=reportAssignmentType
        assert_type(number, int)
        (await speech.count("hello")).lines  # wrong: mypy=attr-defined pyright=reportAttributeAccessIssue
        timeout("2 s")  # wrong: mypy=arg-type pyright=reportArgumentType
        metadata(tenant=1)  # wrong: mypy=arg-type pyright=reportArgumentType
        with timeout():  # wrong: mypy=call-arg pyright=reportCallIssue
            pass


async def failures(speech: Speech) -> None:
    try:
        await speech.upper("hello")
    except TooLong as error:
        assert_type(error.limit, int)
        error.limt  # wrong: mypy=attr-defined pyright=reportAttributeAccessIssue
    except (ConnectionLost, DeadlineExceeded) as error:
        assert_type(error.may_have_run, bool)


async def connecting(reactor: Any, where: str) -> None:
    attempt = connect(reactor, where, Speech, limits=Limits(max_calls=3))
    assert_type(await attempt, Speech)
    await attempt.close()
    connect(reactor, where, Chat, serving=ChatClient)
    connect(reactor, where, Chat, serving=ChatClient())
    connect(reactor, where)  # wrong: mypy=call-arg pyright=reportCallIssue
    connect(reactor, where, str)  # wrong: mypy=type-var pyright=reportArgumentType
    connect(reactor, where, Chat())  # wrong: mypy=arg-type pyright=reportArgumentType
    connect(reactor, 12000, Speech)  # wrong: mypy=arg-type pyright=reportArgumentType
    connect(reactor, where, Chat, serving=str)  # wrong: mypy=arg-type pyright=reportArgumentType
    connect(reactor, where, Chat, ChatClient)  # wrong: mypy=call-arg pyright=reportCallIssue
    connect(reactor, where, Speech, limits={"max_calls": 3})  # wrong: mypy=arg-type pyright=reportArgumentType


async def surviving(reactor: Any, where: str) -> None:
    async with Client(reactor, [where, where], Speech, retry=RetryPolicy(attempts=2)) as speech:
        assert_type(speech, Speech)
        assert_type(await speech.upper("hello"), str)
        await speech.upper(1)  # wrong: mypy=arg-type pyright=reportArgumentType
    client = Client(reactor, where, Speech, retries={"upper": RetryPolicy(hedge_after=0.1)}, reconnect=Backoff())
    client.startService()
    assert_type(await client.whenConnected(), Speech)
    assert_type(client.proxy, Speech)
    assert_type(client.state, ClientState)
    assert_type(client.budget.retries, int)
    client.watch(lambda state: None)()
    client.watch(lambda: None)  # wrong: mypy=arg-type,misc pyright=reportArgumentType
    Client(reactor, where, str)  # wrong: mypy=type-var pyright=reportArgumentType
    await client.stopService()


# -- Serving -----------------------------------------------------------------------------------------------------------


class Bank(Protocol):
    def __init__(self, accounts: dict[str, int]) -> None:
        self.accounts = accounts

    @request
    async def balance(self, account: str) -> int:
        call = current_call()
        assert_type(call, Call)
        assert_type(call.remaining, float)
        assert_type(call.metadata, Mapping[str, str])
        return self.accounts[account]


class BankFactory(Factory):
    def __init__(self, accounts: dict[str, int]) -> None:
        super().__init__(Bank)
        self.accounts = accounts

    def create(self, protocol: Any) -> Any:
        return Bank(self.accounts)


async def serving(reactor: Any) -> None:
    assert_type(await listen(reactor, "tcp:0:interface=127.0.0.1", Factory(Speech, Chat)), ListeningPort)
    Factory(Speech, limits=Limits(max_message=1 << 20), reflection=False)
    await listen(reactor, "tcp:0", BankFactory({}))
    Factory(Speech())  # wrong: mypy=arg-type pyright=reportArgumentType
    Factory(str)  # wrong: mypy=arg-type pyright=reportArgumentType
    Factory(Speech, limit=Limits())  # wrong: mypy=call-arg pyright=reportCallIssue
    Factory(Speech, limits=3)  # wrong: mypy=arg-type pyright=reportArgumentType
    await listen(reactor, 12000, Factory(Speech))  # wrong: mypy=arg-type pyright=reportArgumentType


def limits() -> None:
    assert_type(Limits().max_message, int)
    assert_type(Limits().default_timeout, float)
    Limits(4096)  # wrong: mypy=call-arg pyright=reportCallIssue
    Limits(max_message="4 MiB")  # wrong: mypy=arg-type pyright=reportArgumentType
    Limits(max_mesage=4096)  # wrong: mypy=call-arg pyright=reportCallIssue
    Limits().max_message = 3  # wrong: mypy=misc pyright=reportAttributeAccessIssue


# -- Streams, and who calls --------------------------------------------------------------------------------------------


class Feed(Protocol, permission="read"):
    @request
    async def items(self, count: int) -> AsyncIterator[str]:
        for number in range(count):
            yield str(number)

    @request
    def declared(self) -> AsyncIterator[int]: ...  # wrong: mypy=empty-body

    @request(permission="write")
    async def total(self, numbers: AsyncIterator[int], start: int = 0) -> int:
        return start + sum([number async for number in numbers])

    @request(oneway=True)
    async def note(self, text: str) -> None:
        pass


async def numbers() -> AsyncIterator[int]:
    yield 1


async def streams(reactor: Any) -> None:
    token = Token.from_environment()
    factory = Factory(Feed, authenticator=TokenAuthenticator.from_file("tokens"), interceptors=[LogCalls()])
    for connection in factory.connections:
        assert_type(connection, Connection)
        assert_type(connection.identity, Identity | None)
        await connection.proxy(Feed).note("all")
    async with connect(reactor, "tls:localhost:12000", Feed, token=token, interceptors=[MeterCalls()]) as feed:
        async for item in feed.items(3):
            assert_type(item, str)
        async for number in feed.declared():
            assert_type(number, int)
        assert_type(await feed.total(numbers(), start=1), int)
        await feed.total(feed.items(3))  # wrong: mypy=arg-type pyright=reportArgumentType
        await feed.total([1, 2])  # wrong: mypy=arg-type pyright=reportArgumentType
    connect(reactor, "tls:localhost:12000", Feed, token="secret")  # wrong: mypy=arg-type pyright=reportArgumentType
    Factory(Feed, interceptors=LogCalls())  # wrong: mypy=arg-type pyright=reportArgumentType
