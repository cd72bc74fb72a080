"""Calls over real sockets: what a Protocol declares reaches the other end and comes back, whatever it is made of."""

from __future__ import annotations

import datetime
import decimal
import enum
import pathlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults, succeed
from twisted.internet.task import deferLater
from twisted.logger import LogLevel, globalLogPublisher

from protoframe import (
    AlreadyExists,
    Cancelled,
    ConnectFailed,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    Factory,
    Internal,
    InvalidArgument,
    InvalidResponse,
    Limits,
    LocalProtocolError,
    MessageTooLarge,
    NotFound,
    Protocol,
    Unimplemented,
    UnknownMethod,
    connect,
    current_call,
    listen,
    metadata,
    request,
    timeout,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(msgspec.Struct, frozen=True):
    x: int
    y: int = 0


@dataclass
class Order:
    number: uuid.UUID
    placed: datetime.datetime
    total: decimal.Decimal
    lines: list[Point]
    colour: Colour | None = None
    notes: dict[str, list[str]] | None = None


class Empty(msgspec.Struct):
    pass


class TooLong(Error):
    """The text is too long."""

    limit: int
    where: Point | None = None


class NoSuchUser(NotFound):
    name: str


class Everything(Protocol):
    """One method of each kind."""

    served = 0

    @request(idempotent=True, raises=[TooLong])
    async def upper(self, text: str) -> str:
        if len(text) > 10:
            raise TooLong("too long by far", limit=10, where=Point(1, 2))
        return text.upper()

    @request
    def plain(self, number: int) -> int:
        return number + 1

    @request
    def deferred(self, number: int) -> Deferred[int]:
        return deferLater(reactor, 0.001, lambda: number + 2)

    @request
    def fired(self, number: int) -> Deferred[int]:
        return succeed(number + 3)

    @request
    async def waits(self, number: int) -> int:
        await deferLater(reactor, 0.001)
        await deferLater(reactor, 0.001)
        return number + 4

    @request
    async def order(self, order: Order, *, discount: decimal.Decimal = decimal.Decimal(0)) -> Order:
        order.total -= discount
        return order

    @request
    async def shapes(self, shapes: dict[int, tuple[Point, ...]], when: datetime.date | None = None) -> Any:
        return [sorted(shapes), when.isoformat() if when else None]

    @request
    async def positive(self, ttl: Annotated[int, msgspec.Meta(gt=0)]) -> None:
        return None

    @request
    async def binary(self, data: bytes) -> bytes:
        return data[::-1]

    @request(raises=[TooLong, NoSuchUser])
    async def find(self, name: str) -> str:
        raise NoSuchUser(f"who is {name}?", name=name)

    @request(raises=[NotFound])
    async def find_general(self, name: str) -> str:
        raise NoSuchUser("nobody", name=name)

    @request
    async def undeclared(self) -> None:
        raise AlreadyExists("the password is 12345")

    @request
    async def broken(self) -> None:
        raise ValueError("the password is 12345")

    @request
    async def broken_later(self) -> None:
        await deferLater(reactor, 0)
        raise ValueError("the password is 12345")

    @request
    def broken_deferred(self) -> Deferred[None]:
        return deferLater(reactor, 0, lambda: 1 / 0)

    @request
    async def exits(self) -> None:
        raise SystemExit(3)

    @request
    async def lies(self) -> int:
        return "no number"  # type: ignore[return-value]

    @request
    async def unsendable(self) -> Any:
        return object()

    @request
    async def awaits_wrongly(self) -> None:
        class Odd:
            def __await__(self) -> Any:
                yield 42

        await Odd()

    @request
    async def nothing(self) -> None:
        pass

    @request
    async def declared_only(self, text: str) -> str: ...

    @request
    async def big(self, size: int) -> str:
        return "x" * size

    @request(max_size=100)
    async def small(self, text: str) -> str:
        return text * 2

    @request
    async def stuck(self) -> None:
        calls.append("began")
        try:
            await Deferred()
        except CancelledError:
            calls.append("cancelled")
            raise

    @request(timeout=0.05)
    async def impatient(self) -> None:
        await Deferred()

    @request
    async def who(self) -> list[Any]:
        call = current_call()
        return [call.method, call.address.host, round(call.remaining, 1), dict(call.metadata)]


calls: list[str] = []


class Newer(Protocol, name="Everything"):
    """What a client thinks that the server is: a newer, and in part another, contract."""

    @request
    async def upper(self, text: str, language: str = "en") -> str:
        raise NotImplementedError

    @request
    async def plain(self, number: str) -> int:
        raise NotImplementedError

    @request
    async def find(self, name: str) -> str:
        raise NotImplementedError

    @request
    async def vanished(self) -> None:
        raise NotImplementedError


@asynccontextmanager
async def served(
    *protocols: type[Protocol[Any]],
    where: str = "tcp:0:interface=127.0.0.1",
    factory: Factory | None = None,
) -> AsyncIterator[str]:
    port = await listen(reactor, where, factory if factory is not None else Factory(*protocols))
    try:
        yield f"tcp:127.0.0.1:{port.getHost().port}" if where.startswith("tcp") else where
    finally:
        await port.stopListening()


@asynccontextmanager
async def talking(limits: Limits | None = None) -> AsyncIterator[Everything]:
    async with served(Everything) as where, connect(reactor, where, Everything, limits=limits) as everything:
        yield everything


@pytest.fixture
def logged() -> Any:
    events: list[Any] = []
    globalLogPublisher.addObserver(events.append)
    yield events
    globalLogPublisher.removeObserver(events.append)


def failures(events: list[Any]) -> list[Any]:
    return [event for event in events if event.get("log_level") is LogLevel.critical]


@pytest_twisted.ensureDeferred
async def test_every_kind_of_handler_serves() -> None:
    async with talking() as everything:
        assert await everything.upper("hello") == "HELLO"
        assert await everything.upper(text="hello") == "HELLO"
        assert await everything.plain(1) == 2
        assert await everything.deferred(1) == 3
        assert await everything.fired(1) == 4
        assert await everything.waits(1) == 5
        assert await everything.nothing() is None


@pytest_twisted.ensureDeferred
async def test_values_of_every_type_come_back_as_they_went() -> None:
    order = Order(
        number=uuid.uuid4(),
        placed=datetime.datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=datetime.UTC),
        total=decimal.Decimal("10.50"),
        lines=[Point(1), Point(-(2**63), 2**63 - 1)],
        colour=Colour.BLUE,
        notes={"é": ["ü", "\N{SNOWMAN}"]},
    )
    async with talking() as everything:
        assert await everything.order(order) == order
        answer = await everything.order(order, discount=decimal.Decimal("0.25"))
        assert answer.total == decimal.Decimal("10.25")
        assert await everything.shapes({3: (Point(1),), 1: ()}, datetime.date(2026, 1, 2)) == [[1, 3], "2026-01-02"]
        assert await everything.binary(bytes(range(256))) == bytes(range(256))[::-1]


@pytest_twisted.ensureDeferred
async def test_a_declared_error_arrives_as_its_class_with_its_fields() -> None:
    async with talking() as everything:
        with pytest.raises(TooLong) as caught:
            await everything.upper("much too long")
        assert (caught.value.limit, caught.value.where, caught.value.message) == (10, Point(1, 2), "too long by far")
        with pytest.raises(NoSuchUser) as user:
            await everything.find("ann")
        assert (user.value.name, user.value.status) == ("ann", 5)
        # Declared is the base: the narrower class's fields stay at home.
        with pytest.raises(NotFound) as general:
            await everything.find_general("ann")
        assert type(general.value) is NotFound
        assert general.value.message == "nobody"
        assert await everything.upper("go on") == "GO ON"


@pytest_twisted.ensureDeferred
async def test_an_error_that_this_end_does_not_know_keeps_its_status_name_and_fields() -> None:
    async with served(Everything) as where, connect(reactor, where, Newer) as newer:
        with pytest.raises(NotFound) as caught:
            await newer.find("bob")
        assert caught.value.type_name == "NoSuchUser"
        assert dict(caught.value.detail) == {"name": "bob"}


@pytest.mark.parametrize(
    "method",
    ["broken", "broken_later", "broken_deferred", "undeclared", "exits", "unsendable", "awaits_wrongly"],
)
@pytest_twisted.ensureDeferred
async def test_an_undeclared_error_stays_at_home_and_leaves_an_incident_in_the_log(
    method: str, logged: list[Any]
) -> None:
    async with talking() as everything:
        with pytest.raises(Internal) as caught:
            await getattr(everything, method)()
        assert "12345" not in f"{caught.value!r} {caught.value.message} {caught.value.detail}"
        (event,) = failures(logged)
        assert event["incident"] == caught.value.incident
        assert len(caught.value.incident) == 12
        assert event["log_failure"].getTraceback()
        assert await everything.plain(1) == 2


@pytest_twisted.ensureDeferred
async def test_a_result_of_the_wrong_type_is_told_with_its_path() -> None:
    async with talking() as everything:
        with pytest.raises(
            InvalidResponse, match=r"Everything\.lies is not what was declared: \$: expected int, got str"
        ):
            await everything.lies()


@pytest_twisted.ensureDeferred
async def test_a_wrong_argument_is_told_with_its_path_and_did_not_run() -> None:
    async with talking() as everything:
        with pytest.raises(InvalidArgument) as caught:
            await everything.plain("one")  # type: ignore[arg-type]
        assert caught.value.message == "$.number: expected int, got str"
        assert caught.value.may_have_run is False
        with pytest.raises(InvalidArgument, match=r"^\$\.ttl: expected int >= 1$"):
            await everything.positive(0)
        bad: Any = {
            "number": uuid.uuid4(),
            "placed": datetime.datetime.now(datetime.UTC),
            "total": "1",
            "lines": [{"x": 1}, {"x": "y"}],
        }
        with pytest.raises(InvalidArgument, match=r"^\$\.order\.lines\[1\]\.x: expected int, got str$"):
            await everything.order(bad)
        with pytest.raises(TypeError, match="text"):
            await everything.upper()  # type: ignore[call-arg]


@pytest_twisted.ensureDeferred
async def test_an_added_parameter_is_ignored_by_an_older_server() -> None:
    async with served(Everything) as where, connect(reactor, where, Newer) as newer:
        assert await newer.upper("hello", language="de") == "HELLO"


@pytest_twisted.ensureDeferred
async def test_what_is_not_served_is_an_unknown_method() -> None:
    async with served(Everything) as where, connect(reactor, where, Newer) as newer:
        with pytest.raises(UnknownMethod, match=r"there is no method Everything\.vanished") as caught:
            await newer.vanished()
        assert isinstance(caught.value, Unimplemented)
        assert caught.value.may_have_run is False
    async with talking() as everything:
        with pytest.raises(UnknownMethod, match=r"Everything\.declared_only is declared here, but not served"):
            await everything.declared_only("x")


@pytest_twisted.ensureDeferred
async def test_thousands_of_calls_at_once_wait_for_their_slots_and_all_come_back() -> None:
    async with talking() as everything:
        answers = await gatherResults([everything.deferred(number) for number in range(3000)])
        assert answers == [number + 2 for number in range(3000)]


@pytest_twisted.ensureDeferred
async def test_values_have_no_size_cliff_below_the_limit() -> None:
    async with talking() as everything:
        for size in (65_000, 65_500, 65_536, 70_000, 1_000_000, 4_000_000):
            assert await everything.big(size) == "x" * size
            data = bytes(size)
            assert await everything.binary(data) == data


@pytest_twisted.ensureDeferred
async def test_a_value_above_the_limit_is_refused_where_it_is_made() -> None:
    async with talking() as everything:
        with pytest.raises(MessageTooLarge, match="the peer takes 4194304") as caught:
            await everything.binary(bytes(5_000_000))
        assert caught.value.may_have_run is False
        with pytest.raises(MessageTooLarge, match="the result is 500000"):
            await everything.big(5_000_000)
        with pytest.raises(MessageTooLarge, match="max_size is 100"):
            await everything.small("x" * 200)
        with pytest.raises(MessageTooLarge, match="100 are allowed"):
            await everything.small("x" * 60)
        assert await everything.small("x" * 40) == "x" * 80


@pytest_twisted.ensureDeferred
async def test_small_limits_at_the_caller_hold_the_server_to_them() -> None:
    async with talking(Limits(max_message=2048, max_unfinished=2048, max_frame=2048)) as everything:
        assert await everything.big(2000) == "x" * 2000
        with pytest.raises(MessageTooLarge, match="the peer takes 2048"):
            await everything.big(3000)


@pytest_twisted.ensureDeferred
async def test_a_deadline_frees_the_caller_and_cancels_the_handler() -> None:
    calls.clear()
    async with talking() as everything:
        with timeout(0.05), pytest.raises(DeadlineExceeded) as caught:
            await everything.stuck()
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.may_have_run is True
        while calls != ["began", "cancelled"]:
            await everything.nothing()
        with pytest.raises(DeadlineExceeded):
            await everything.impatient()
        with timeout(0), pytest.raises(DeadlineExceeded) as early:
            await everything.nothing()
        assert early.value.may_have_run is False


@pytest_twisted.ensureDeferred
async def test_cancelling_the_deferred_cancels_the_handler() -> None:
    calls.clear()
    async with talking() as everything:
        call: Any = everything.stuck()
        while calls != ["began"]:
            await everything.nothing()
        call.cancel()
        with pytest.raises(Cancelled):
            await call
        while calls != ["began", "cancelled"]:
            await everything.nothing()


@pytest_twisted.ensureDeferred
async def test_losing_the_connection_fails_every_call_once_and_cancels_every_handler() -> None:
    calls.clear()
    factory = Factory(Everything)
    async with served(factory=factory) as where:
        connecting = connect(reactor, where, Everything)
        everything = await connecting
        pending: list[Any] = [everything.stuck() for _ in range(5)]
        while calls.count("began") < 5:
            await everything.nothing()
        (connection,) = factory.connections
        connection._carrier.abort()
        for call in pending:
            with pytest.raises(ConnectionLost) as caught:
                await call
            assert caught.value.may_have_run is True
        with pytest.raises(ConnectionLost) as late:
            await everything.nothing()
        assert late.value.may_have_run is False
        while calls.count("cancelled") < 5:
            await deferLater(reactor, 0)
        assert not factory.connections
        await connecting.close()


@pytest_twisted.ensureDeferred
async def test_closing_fails_the_calls_that_have_no_answer() -> None:
    async with served(Everything) as where:
        async with connect(reactor, where, Everything) as everything:
            pending: Any = everything.stuck()
        with pytest.raises(ConnectionLost, match="the connection was closed"):
            await pending


@pytest_twisted.ensureDeferred
async def test_a_handler_can_look_at_its_call() -> None:
    async with talking() as everything:
        with metadata(tenant="a"), metadata(trace="1"), timeout(5):
            answer = await everything.who()
        assert answer == ["Everything.who", "127.0.0.1", 5.0, {"tenant": "a", "trace": "1"}]
        assert (await everything.who())[2:] == [10.0, {}]
    with pytest.raises(LocalProtocolError, match="for handlers"):
        current_call()


@pytest_twisted.ensureDeferred
async def test_one_factory_serves_several_protocols() -> None:
    class Other(Protocol):
        @request
        async def hello(self) -> str:
            return "hello"

    async with (
        served(Everything, Other) as where,
        connect(reactor, where, Other) as other,
        connect(reactor, where, Everything) as everything,
    ):
        assert await other.hello() == "hello"
        assert await everything.plain(1) == 2


class Chat(Protocol["ChatClient"]):
    """Either side calls the other."""

    @request
    async def say(self, text: str) -> int:
        return await self.peer.heard(text) + 1


class ChatClient(Protocol[Chat]):
    def __init__(self) -> None:
        self.texts: list[str] = []

    @request
    async def heard(self, text: str) -> int:
        self.texts.append(text)
        return len(self.texts)


@pytest_twisted.ensureDeferred
async def test_the_server_calls_its_client() -> None:
    client = ChatClient()
    async with served(Chat) as where, connect(reactor, where, Chat, serving=client) as chat:
        assert await chat.say("a") == 2
        assert await chat.say("b") == 3
        assert client.texts == ["a", "b"]


@pytest_twisted.ensureDeferred
async def test_a_contract_is_served_by_a_subclass_under_its_own_name() -> None:
    class Contract(Protocol):
        @request(raises=[NoSuchUser])
        async def find(self, name: str) -> str: ...

        @request
        async def unserved(self) -> None: ...

    class Server(Contract):
        async def find(self, name: str) -> str:
            if name == "nobody":
                raise NoSuchUser(name=name)
            return f"found {name}"

    async with served(Server) as where, connect(reactor, where, Contract) as contract:
        assert await contract.find("ann") == "found ann"
        with pytest.raises(NoSuchUser):
            await contract.find("nobody")
        with pytest.raises(UnknownMethod):
            await contract.unserved()
    async with served(Server) as where, connect(reactor, where, Server) as server:
        assert await server.find("ann") == "found ann"


@pytest_twisted.ensureDeferred
async def test_state_lives_on_the_factory_and_create_passes_it() -> None:
    class Counter(Protocol):
        def __init__(self, counts: list[int]) -> None:
            self.counts = counts

        @request
        def count(self) -> int:
            self.counts[0] += 1
            return self.counts[0]

        @request
        def served_by(self) -> str:
            return type(self.factory).__name__

    class CounterFactory(Factory):
        def __init__(self) -> None:
            super().__init__(Counter)
            self.counts = [0]

        def create(self, protocol: Any) -> Any:
            return protocol(self.counts)

    async with served(factory=CounterFactory()) as where:
        for expected in (1, 2):
            async with connect(reactor, where, Counter) as counter:
                assert await counter.count() == expected
                assert await counter.served_by() == "CounterFactory"


@pytest_twisted.ensureDeferred
async def test_hooks_tell_when_a_conversation_begins_and_ends() -> None:
    seen: list[str] = []

    class Hooked(Protocol):
        def connectionMade(self) -> None:
            seen.append("made")

        def connectionLost(self, reason: Any) -> None:
            seen.append("lost")

        @request
        async def nothing(self) -> None:
            return

    async with served(Hooked) as where:
        async with connect(reactor, where, Hooked) as hooked:
            await hooked.nothing()
            assert seen == ["made"]
        while seen != ["made", "lost"]:
            await deferLater(reactor, 0)


@pytest_twisted.ensureDeferred
async def test_nothing_listens() -> None:
    async with served(Everything) as where:
        pass
    connecting = connect(reactor, where, Everything)
    with pytest.raises(ConnectFailed, match="connection refused") as caught:
        await connecting
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.may_have_run is False
    await connecting.close()


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("tcp:host:99999", "port 99999 is above 65535"),
        ("tcp:host:http", "'http' is no port number"),
        ("tcp:host", "missing, unknown or too many"),
        ("carrier-pigeon:host", "Unknown endpoint type"),
        ("", "no place to connect to"),
    ],
)
def test_a_wrong_string_is_a_value_error_on_one_line(where: str, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        connect(reactor, where, Everything)
    assert "\n" not in str(caught.value)


@pytest_twisted.ensureDeferred
async def test_a_wrong_place_to_listen_is_a_value_error() -> None:
    for where in ("tcp:99999", "tcp:http", "tcp", "bogus:1", "tcp:1:nosuch=2"):
        with pytest.raises(ValueError, match=r"port|place to listen"):
            await listen(reactor, where, Factory(Everything))


def test_a_factory_says_what_it_cannot_serve() -> None:
    class Unannotated(Protocol):
        @request
        async def method(self, text) -> str:  # type: ignore[no-untyped-def]
            return str(text)

    class Streams(Protocol):
        @request
        def method(self) -> AsyncIterator:  # type: ignore[type-arg]
            raise NotImplementedError

    class Nested(Protocol):
        @request
        def method(self) -> AsyncIterator[AsyncIterator[str]]:
            raise NotImplementedError

    class Two(Protocol):
        @request
        async def method(self, one: AsyncIterator[str], other: AsyncIterator[str]) -> None:
            raise NotImplementedError

    class Answers(Protocol):
        @request(oneway=True)
        async def method(self) -> int:
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"Unannotated\.method: parameter text has no annotation"):
        Factory(Unannotated)
    with pytest.raises(TypeError, match=r"Streams\.method: result: a stream of what\?"):
        Factory(Streams)
    with pytest.raises(TypeError, match=r"Nested\.method: result: the items of a stream cannot be streams"):
        Factory(Nested)
    with pytest.raises(TypeError, match=r"Two\.method: one and other are streams, and a call sends one at most"):
        Factory(Two)
    with pytest.raises(TypeError, match=r"Answers\.method: a oneway request has no result"):
        Factory(Answers)
    with pytest.raises(TypeError, match="at least one Protocol"):
        Factory()
    with pytest.raises(TypeError, match="subclasses of protoframe"):
        Factory(int)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Everything\.upper is served by"):
        Factory(Everything, type("Everything", (Newer,), {"upper": Everything.upper}))


def test_limits_are_checked_when_they_are_made() -> None:
    for wrong in ({"max_message": 0}, {"max_frame": 100}, {"handshake_timeout": 0}, {"default_timeout": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_calls"):
        Limits(max_calls="many")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest_twisted.ensureDeferred
async def test_sockets_are_written_to_at_once(kind: str, tmp_path: pathlib.Path) -> None:
    where = f"unix:{tmp_path / 's'}" if kind == "unix" else "tcp:0:interface=127.0.0.1"
    factory = Factory(Everything)
    async with served(factory=factory, where=where) as place, connect(reactor, place, Everything) as everything:
        assert await everything.plain(1) == 2
        (connection,) = factory.connections
        # Else Twisted has renamed what `StreamCarrier` looks at, and each write takes a turn of the reactor again.
        assert connection._carrier._socket is not None
