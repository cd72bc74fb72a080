"""Streams over real sockets, and in virtual time where time or octets matter: what is sent arrives, in order and no
faster than it is taken; and whoever leaves, the other end hears of it."""

from __future__ import annotations

import gc
import hashlib
import time
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults, succeed
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from protoframe import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    InvalidResponse,
    Limits,
    LocalProtocolError,
    MessageTooLarge,
    Protocol,
    connect,
    current_call,
    request,
    timeout,
)
from protoframe.interceptors import IInterceptor
from tests.ends import Ends, Notes, becomes_idle, is_idle, leftovers, missing_credit, talk, until
from tests.test_calls import failures, logged, served

__all__ = ["logged"]

#: Items of a few octets that the credit of one stream covers, and what a batch may be above it.
AHEAD = 10_000

TINY = Limits(stream_credit=1024, connection_credit=1024)


class Reading(msgspec.Struct):
    number: int
    text: str = ""


class Halt(Error):
    """Enough."""

    at: int


class Gate:
    """What any number wait at until it opens."""

    def __init__(self) -> None:
        self._waiting: list[Deferred[None]] = []
        self._is_open = False

    def wait(self) -> Deferred[None]:
        waiting: Deferred[None] = Deferred()
        if self._is_open:
            waiting.callback(None)
        else:
            self._waiting.append(waiting)
        return waiting

    def open(self) -> None:
        self._is_open = True
        for waiting in self._waiting:
            if not waiting.called:
                waiting.callback(None)


class _Counter:
    """An async iterator that is no generator, and cannot be closed."""

    def __init__(self, count: int) -> None:
        self.left = iter(range(count))

    def __aiter__(self) -> _Counter:
        return self

    async def __anext__(self) -> int:
        for number in self.left:
            return number
        raise StopAsyncIteration


def blob(size: int) -> bytes:
    return bytes([size % 251]) * size


class Streams(Protocol):
    """Streams of all kinds."""

    def __init__(self) -> None:
        self.notes = Notes()
        self.given = 0
        self.gate = Gate()

    @request
    async def numbers(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    @request
    async def numbers_that_wait(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            await turn()
            yield number

    @request
    def from_plain(self, count: int) -> AsyncIterator[int]:
        return _Counter(count)

    @request
    async def from_coroutine(self, count: int) -> AsyncIterator[int]:
        await turn()
        return _Counter(count)  # type: ignore[return-value]

    @request
    def from_deferred(self, count: int) -> AsyncIterator[int]:
        return succeed(_Counter(count))  # type: ignore[return-value]

    @request
    async def total(self, numbers: AsyncIterator[int], start: int = 0) -> int:
        self.notes.add("began")
        try:
            async for number in numbers:
                start += number
        except BaseException as error:
            self.notes.add(type(error))
            raise
        finally:
            self.notes.add("ended")
        return start

    @request
    async def echo(self, items: AsyncIterator[Reading], times: int = 1) -> AsyncIterator[Reading]:
        try:
            async for item in items:
                for _ in range(times):
                    yield item
        finally:
            self.notes.add("ended")

    @request
    async def blobs(self, sizes: list[int]) -> AsyncIterator[bytes]:
        for size in sizes:
            self.given += 1
            yield blob(size)

    @request
    async def store(self, blobs: AsyncIterator[bytes]) -> list[str]:
        return [digest(octets) async for octets in blobs]

    @request
    async def store_later(self, blobs: AsyncIterator[bytes]) -> list[str]:
        await self.gate.wait()
        return [digest(octets) async for octets in blobs]

    @request
    async def plus_one(self, number: int) -> int:
        return number + 1

    @request
    async def laborious(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            until = time.perf_counter() + 0.0001
            while time.perf_counter() < until:
                pass
            self.given += 1
            yield number

    @request
    async def endless(self) -> AsyncIterator[int]:
        self.notes.add("began")
        try:
            while True:
                self.given += 1
                yield self.given
        finally:
            self.notes.add("ended")

    @request
    async def hangs(self, after: int) -> AsyncIterator[int]:
        self.notes.add("began")
        try:
            for number in range(after):
                yield number
            await self.gate.wait()
            yield after
        except BaseException as error:
            self.notes.add(type(error))
            raise
        finally:
            self.notes.add("ended")

    @request
    async def stubborn(self) -> AsyncIterator[int]:
        yield 0
        try:
            await Deferred()
        except CancelledError:
            self.notes.add("asked to end")
            await self.gate.wait()
        yield 1

    @request(raises=[Halt])
    async def halts(self, at: int, why: str = "Halt") -> AsyncIterator[int]:
        for number in range(at):
            yield number
        if why == "Halt":
            raise Halt("no further", at=at)
        raise ValueError("the password is 12345")

    @request
    def refuses(self) -> AsyncIterator[int]:
        raise ValueError("the password is 12345")

    @request
    def is_none(self) -> AsyncIterator[int]:
        return 3  # type: ignore[return-value]

    @request
    async def lies(self) -> AsyncIterator[int]:
        try:
            yield 1
            await turn()
            yield "two"  # type: ignore[misc]
            await Deferred()
        finally:
            self.notes.add("ended")

    @request(max_size=100)
    async def small(self, count: int, size: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield bytes(80)
        yield bytes(size)

    @request(max_size=100)
    async def take_small(self, items: AsyncIterator[bytes]) -> int:
        return len([item async for item in items])

    @request
    async def first(self, numbers: AsyncIterator[int]) -> int:
        async for number in numbers:
            return number
        return -1

    @request
    async def goes_on(self, numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        async for number in numbers:
            yield number
            break
        await self.gate.wait()
        yield -1

    @request
    async def takes_nothing(self, numbers: AsyncIterator[int]) -> int:
        del numbers
        await self.gate.wait()
        return 7

    @request
    async def keeps(self, numbers: AsyncIterator[int]) -> int:
        self.kept = numbers
        return await anext(numbers)

    @request
    async def ignores(self, numbers: AsyncIterator[int]) -> int:
        self.notes.add("began")
        try:
            await Deferred()
        finally:
            self.notes.add("ended")
        return 0

    @request
    async def remaining(self) -> AsyncIterator[float]:
        yield current_call().remaining


def turn() -> Deferred[None]:
    """Fires in the reactor's next turn."""
    return deferLater(reactor, 0)  # type: ignore[arg-type]


def digest(octets: bytes) -> str:
    return f"{len(octets)} {hashlib.sha256(octets).hexdigest()}"


async def read(stream: Any) -> list[Any]:
    return [item async for item in stream]


async def read_into(got: list[Any], stream: Any) -> None:
    async for item in stream:
        got.append(item)


def start(coroutine: Any) -> Deferred[Any]:
    return Deferred.fromCoroutine(coroutine)


class Source:
    """What a caller sends: notes how far it was asked, and whether it was closed."""

    def __init__(self, *, waits: bool = False) -> None:
        self.given = 0
        self.notes = Notes()
        self.waits = waits

    async def numbers(self, count: int = 1 << 60) -> AsyncIterator[int]:
        try:
            while self.given < count:
                self.given += 1
                yield self.given
                if self.waits:
                    await turn()
        finally:
            self.notes.add("ended")


async def given(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


# What is sent arrives.


@pytest.mark.parametrize("count", [0, 1, 2, 10_000])
@pytest.mark.parametrize("method", ["numbers", "numbers_that_wait", "from_plain", "from_coroutine", "from_deferred"])
@pytest_twisted.ensureDeferred
async def test_a_server_stream_is_complete_and_in_order_whatever_gives_it(method: str, count: int) -> None:
    async with talk(Streams) as ends:
        count = min(count, 500) if method == "numbers_that_wait" else count
        assert await read(getattr(ends.proxy, method)(count)) == list(range(count))


@pytest.mark.parametrize("count", [0, 1, 2, 10_000])
@pytest_twisted.ensureDeferred
async def test_a_client_stream_is_complete_whatever_gives_it(count: int) -> None:
    async with talk(Streams) as ends:
        expected = 5 + sum(range(count))
        assert await ends.proxy.total(given(count), start=5) == expected
        assert await ends.proxy.total(numbers=given(count), start=5) == expected
        assert await ends.proxy.total(_Counter(count), 5) == expected


@pytest.mark.parametrize("count", [0, 1, 2, 10_000])
@pytest_twisted.ensureDeferred
async def test_streams_both_ways_are_complete_and_in_order(count: int) -> None:
    async def readings() -> AsyncIterator[Reading]:
        for number in range(count):
            if not number % 1000:
                await turn()
            yield Reading(number, "x")

    async with talk(Streams) as ends:
        assert [reading.number async for reading in ends.proxy.echo(readings())] == list(range(count))
        twice = [reading.number async for reading in ends.proxy.echo(readings(), times=2)]
        assert twice == [number // 2 for number in range(2 * count)]


@pytest_twisted.ensureDeferred
async def test_a_stream_may_be_awaited_before_it_is_read_and_read_item_by_item() -> None:
    async with talk(Streams) as ends:
        stream = await ends.proxy.numbers(3)
        assert [await anext(stream), await anext(stream)] == [0, 1]
        assert await read(stream) == [2]
        assert await anext(stream, "over") == "over"
        assert await read(await ends.proxy.from_plain(3)) == [0, 1, 2]


@implementer(IInterceptor)
class Passing:
    async def intercept(self, call: Any, proceed: Any) -> Any:
        return await proceed()


@pytest_twisted.ensureDeferred
async def test_a_stream_may_be_awaited_where_interceptors_run_too() -> None:
    async with talk(Streams, interceptors=[Passing()]) as ends:
        assert await read(ends.proxy.numbers(3)) == [0, 1, 2]
        await by_break(ends.proxy.endless())
        await ends.served.notes.has("ended")
        assert await read(await ends.proxy.numbers(3)) == [0, 1, 2]


@pytest_twisted.ensureDeferred
async def test_a_wait_for_one_item_may_be_given_up_and_the_stream_goes_on() -> None:
    async with talk(Streams) as ends:
        stream = ends.proxy.hangs(1)
        assert await anext(stream) == 0
        waiting = start(anext(stream))
        await turn()
        waiting.cancel()
        with pytest.raises(CancelledError):
            await waiting
        ends.served.gate.open()
        assert await anext(stream) == 1
        assert await read(stream) == []


@pytest_twisted.ensureDeferred
async def test_each_item_arrives_when_it_is_given_and_not_when_the_next_one_is() -> None:
    async with talk(Streams) as ends:
        stream = ends.proxy.hangs(3)
        assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
        ends.served.gate.open()
        assert await read(stream) == [3]


@pytest_twisted.ensureDeferred
async def test_a_conversation_by_streams_answers_each_item_before_the_next_is_sent() -> None:
    turns: list[Deferred[int]] = [Deferred()]

    async def questions() -> AsyncIterator[Reading]:
        for _ in range(20):
            yield Reading(await turns[-1])

    async with talk(Streams) as ends:
        answers = ends.proxy.echo(questions())
        for number in range(20):
            before, _ = turns[-1], turns.append(Deferred())
            before.callback(number)
            assert (await anext(answers)).number == number
        assert await read(answers) == []


SIZES = [1, 70_000, 3, 65_500, 65_501, 65_510, 65_536, 10, 300_000, 4 * 1024 * 1024 - 20, 2, 1_000_000, 0, 5, 131_072]


@pytest_twisted.ensureDeferred
async def test_large_items_between_small_ones_keep_their_order() -> None:
    expected = [digest(blob(size)) for size in SIZES]

    async def blobs() -> AsyncIterator[bytes]:
        for size in SIZES:
            yield blob(size)

    async with talk(Streams) as ends:
        assert [digest(octets) async for octets in ends.proxy.blobs(SIZES)] == expected
        assert await ends.proxy.store(blobs()) == expected


@pytest_twisted.ensureDeferred
async def test_a_large_item_waits_with_those_before_it_where_other_streams_have_used_up_the_room() -> None:
    gate = Gate()

    async def late() -> AsyncIterator[bytes]:
        await gate.wait()
        yield blob(3)
        yield blob(70_000)

    async def much() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield blob(50_000)

    limits = Limits(stream_credit=256 * 1024, connection_credit=256 * 1024, max_unread=0)
    async with talk(Streams, server_limits=limits) as ends:
        storing = ends.proxy.store(late())
        held = ends.proxy.store_later(much())
        await until(lambda: ends.client._conversation.traffic.credit.connection <= 0)
        gate.open()
        await turn()
        ends.served.gate.open()
        assert await storing == [digest(blob(3)), digest(blob(70_000))]
        assert await held == [digest(blob(50_000))] * 30


@pytest_twisted.ensureDeferred
async def test_an_item_above_what_the_peer_takes_fails_the_call_and_what_came_before_arrives() -> None:
    async def blobs() -> AsyncIterator[bytes]:
        yield b"a"
        yield bytes(5_000_000)

    async with talk(Streams) as ends:
        got: list[bytes] = []
        with pytest.raises(Error) as caught:
            await read_into(got, ends.proxy.blobs([1, 2, 5_000_000]))
        assert got == [blob(1), blob(2)]
        assert type(caught.value) is MessageTooLarge
        with pytest.raises(MessageTooLarge, match="an item is 5000005 bytes"):
            await ends.proxy.store(blobs())


@pytest_twisted.ensureDeferred
async def test_calls_are_answered_between_the_items_of_streams() -> None:
    async with talk(Streams) as ends:
        got = 0

        async def read_on(stream: Any) -> None:
            nonlocal got
            async for _ in stream:
                got += 1

        reading = start(read_on(ends.proxy.endless()))
        await until(lambda: got)
        for number in range(20):
            before = got
            assert await ends.proxy.plus_one(number) == number + 1
            assert got - before < 100_000
        reading.cancel()
        with pytest.raises(CancelledError):
            await reading

        # Twenty calls, one after the other, take less than the way of a few large items.
        got = 0
        reading = start(read_on(ends.proxy.blobs([4_000_000] * 12)))
        await until(lambda: ends.served.given)
        for number in range(10):
            assert await ends.proxy.plus_one(number) == number + 1
        assert got < 12
        await reading
        assert got == 12


@pytest_twisted.ensureDeferred
async def test_calls_are_answered_between_items_that_take_their_time_to_make() -> None:
    async with talk(Streams) as ends:
        reading = start(read(ends.proxy.laborious(6000)))
        await until(lambda: ends.served.given)
        for number in range(5):
            before = ends.served.given
            assert await ends.proxy.plus_one(number) == number + 1
            # A message has room for a thousand of them.
            assert ends.served.given - before < 700
        reading.cancel()
        with pytest.raises(CancelledError):
            await reading


@pytest_twisted.ensureDeferred
async def test_two_hundred_streams_at_once_each_get_everything() -> None:
    async with talk(Streams) as ends:
        results = await gatherResults(
            [start(read(ends.proxy.numbers(100 + number))) for number in range(100)]
            + [ends.proxy.total(given(300 + number)) for number in range(50)]
            + [start(read(ends.proxy.echo(readings(100 + number)))) for number in range(50)],
        )
        assert results[:100] == [list(range(100 + number)) for number in range(100)]
        assert results[100:150] == [sum(range(300 + number)) for number in range(50)]
        assert [len(result) for result in results[150:]] == [100 + number for number in range(50)]


@pytest_twisted.ensureDeferred
async def test_more_streams_than_the_server_has_slots_wait_for_their_turn() -> None:
    async with talk(Streams, server_limits=Limits(max_calls=4)) as ends:
        results = await gatherResults(
            [start(read(ends.proxy.numbers(50))) for _ in range(30)]
            + [ends.proxy.total(given(100)) for _ in range(30)]
            + [start(read(ends.proxy.echo(readings(30)))) for _ in range(30)],
        )
        assert all(result == list(range(50)) for result in results[:30])
        assert all(result == 4950 for result in results[30:60])
        assert all(len(result) == 30 for result in results[60:])


async def readings(count: int) -> AsyncIterator[Reading]:
    for number in range(count):
        yield Reading(number, "y" * (number % 50))


@pytest_twisted.ensureDeferred
async def test_both_ends_stream_through_the_smallest_windows() -> None:
    async with talk(Streams, limits=TINY, server_limits=TINY) as ends:
        results = await gatherResults([start(read(ends.proxy.echo(readings(500)))) for _ in range(5)])
        assert all([reading.number for reading in result] == list(range(500)) for result in results)
        # Each item is more than both windows.
        sizes = [3000, 1, 100_000, 2, 70_000]
        assert [len(octets) async for octets in ends.proxy.blobs(sizes)] == sizes
        assert await ends.proxy.total(given(3000)) == sum(range(3000))


@pytest.mark.parametrize("unread", [1, 2, 3])
def test_streams_that_nobody_reads_hold_up_no_other_while_there_is_credit_left(unread: int) -> None:
    # Each holds a quarter of what the connection may hold.
    ends = Ends(Streams)
    held = [ends.proxy.endless() for _ in range(unread)]
    ends.turn()
    reading = start(read(ends.proxy.numbers(100_000)))
    sizes = [1, 300_000, 1, 500_000, 100] * 4
    large = start(read(ends.proxy.blobs(sizes)))
    ends.turn()
    assert reading.called
    assert reading.result == list(range(100_000))
    assert [len(octets) for octets in large.result] == sizes
    held.clear()
    ends.turn()
    assert is_idle(ends.client, ends.server)


class Chat(Protocol["Chat"]):
    def __init__(self) -> None:
        self.heard = 0

    @request
    async def talk(self, words: AsyncIterator[str]) -> AsyncIterator[str]:
        async for word in words:
            self.heard += 1
            yield word.upper()

    @request
    async def cross(self, count: int) -> int:
        """Has the other end stream to this one, and this one to it, at once."""

        async def words() -> AsyncIterator[str]:
            for _ in range(count):
                yield "word" * 100

        got = 0
        async for _ in self.peer.talk(words()):
            got += 1
        return got


@pytest.mark.parametrize(
    "limits",
    [None, Limits(stream_credit=1024, connection_credit=12 * 1024)],
    ids=["default", "tiny"],
)
def test_two_ends_that_stream_to_each_other_at_once_do_not_wait_for_each_other(limits: Limits | None) -> None:
    count, streams = (5000, 4) if limits is None else (500, 4)

    async def words() -> AsyncIterator[str]:
        for _ in range(count):
            yield "word" * 100

    me = Chat()
    ends = Ends(Chat, serving=me, limits=limits, server_limits=limits)
    there = [ends.proxy.cross(count) for _ in range(streams)]
    here = [start(read(ends.proxy.talk(words()))) for _ in range(streams)]
    ends.turn()
    assert (me.heard, ends.served.heard) == (streams * count, streams * count)
    assert [call.result for call in there] == [count] * streams
    assert [len(reading.result) for reading in here] == [count] * streams
    assert is_idle(ends.client, ends.server)


# Leaving early.


async def by_break(stream: Any) -> None:
    async for _ in stream:
        break


async def by_exception(stream: Any) -> None:
    async def body() -> None:
        async for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()


async def by_cancelling(stream: Any) -> None:
    got: list[int] = []

    async def body() -> None:
        async for item in stream:
            got.append(item)
            await Deferred()

    running = start(body())
    await until(lambda: got)
    running.cancel()
    with pytest.raises(CancelledError):
        await running


async def by_dropping(stream: Any) -> None:
    del stream


async def by_aclose(stream: Any) -> None:
    await stream.aclose()
    assert await read(stream) == []


async def by_anext_and_dropping(stream: Any) -> None:
    await anext(stream)


async def by_anext_and_aclose(stream: Any) -> None:
    await anext(stream)
    await stream.aclose()


async def by_cancelling_a_wait(stream: Any) -> None:
    async def body() -> None:
        async for _ in stream:
            pass

    running = start(body())
    for _ in range(5):
        await turn()
    running.cancel()
    with pytest.raises(CancelledError):
        await running


async def by_garbage(stream: Any) -> None:
    knot: list[Any] = [stream]
    knot.append(knot)
    del knot, stream
    gc.collect()


WAYS = [
    by_break,
    by_exception,
    by_cancelling,
    by_dropping,
    by_aclose,
    by_anext_and_dropping,
    by_anext_and_aclose,
    by_garbage,
]


@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
@pytest.mark.parametrize("method", ["endless", "hangs"])
@pytest_twisted.ensureDeferred
async def test_who_leaves_a_server_stream_cancels_what_gives_it(method: str, way: Any) -> None:
    async with talk(Streams) as ends:
        for times in (1, 2, 3):
            stream = [getattr(ends.proxy, method)(*([3] if method == "hangs" else []))]
            await ends.served.notes.has("began", times)
            await way(stream.pop())
            await ends.served.notes.has("ended", times)
            assert ends.served.notes.count("ended") == times
            assert await ends.proxy.plus_one(1) == 2
        if method == "hangs":
            # It waited, and was told so there.
            assert ends.served.notes.count(CancelledError) == 3


@pytest_twisted.ensureDeferred
async def test_who_is_cancelled_while_it_waits_for_an_item_cancels_what_gives_it() -> None:
    async with talk(Streams) as ends:
        await by_cancelling_a_wait(ends.proxy.hangs(0))
        await ends.served.notes.has(CancelledError)
        await ends.served.notes.has("ended")


@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
@pytest_twisted.ensureDeferred
async def test_who_leaves_streams_both_ways_ends_both(way: Any) -> None:
    async with talk(Streams) as ends:
        source = Source(waits=True)

        async def readings() -> AsyncIterator[Reading]:
            async for number in source.numbers():
                yield Reading(number)

        await way(ends.proxy.echo(readings()))
        await source.notes.has("ended")
        await ends.served.notes.has("ended")


@pytest_twisted.ensureDeferred
async def test_a_slot_that_a_left_stream_had_is_free_again() -> None:
    async with talk(Streams, server_limits=Limits(max_calls=1)) as ends:
        for _ in range(5):
            async for _ in ends.proxy.endless():
                break
        assert await ends.proxy.plus_one(1) == 2
        assert ends.served.notes.count("ended") == 5


@pytest_twisted.ensureDeferred
async def test_a_stream_that_waits_for_a_slot_and_is_left_never_runs() -> None:
    async with talk(Streams, server_limits=Limits(max_calls=1)) as ends:
        first = ends.proxy.hangs(1)
        await ends.served.notes.has("began")
        second = ends.proxy.hangs(1)
        await turn()
        await second.aclose()
        ends.served.gate.open()
        assert await read(first) == [0, 1]
        assert await ends.proxy.plus_one(1) == 2
        assert ends.served.notes.count("began") == 1


@pytest_twisted.ensureDeferred
async def test_cancelling_a_call_that_sends_a_stream_stops_the_iterator_and_the_handler() -> None:
    async with talk(Streams) as ends:
        for times, source in enumerate((Source(), Source(waits=True)), 1):
            call = ends.proxy.total(source.numbers())
            await ends.served.notes.has("began", times)
            call.cancel()
            with pytest.raises(Cancelled):
                await call
            await source.notes.has("ended")
            await ends.served.notes.has("ended", times)
        assert ends.served.notes.count(CancelledError) == 2


@pytest_twisted.ensureDeferred
async def test_closing_the_connection_ends_all_streams_at_both_ends() -> None:
    source = Source(waits=True)
    async with talk(Streams, idle=False) as ends:
        stream, call = ends.proxy.hangs(2), ends.proxy.total(source.numbers())
        await ends.served.notes.has("began", 2)
        assert await anext(stream) == 0
        reading = start(read(stream))
    with pytest.raises(ConnectionLost):
        await reading
    with pytest.raises(ConnectionLost):
        await call
    await source.notes.has("ended")
    await ends.served.notes.has("ended", 2)
    assert leftovers(ends.client) == leftovers(ends.server) == []


# What goes wrong.


@pytest.mark.parametrize("at", [0, 1, 10, 20_000])
@pytest_twisted.ensureDeferred
async def test_an_error_in_the_middle_comes_after_the_items_before_it(at: int, logged: list[Any]) -> None:
    async with talk(Streams) as ends:
        got: list[int] = []
        with pytest.raises(Halt) as caught:
            await read_into(got, ends.proxy.halts(at))
        assert got == list(range(at))
        assert (caught.value.at, caught.value.message) == (at, "no further")
        assert failures(logged) == []
        got.clear()
        with pytest.raises(Internal) as internal:
            await read_into(got, ends.proxy.halts(at, "else"))
        assert got == list(range(at))
        assert "12345" not in f"{internal.value!r} {internal.value.message} {internal.value.detail}"
        (event,) = failures(logged)
        assert event["incident"] == internal.value.incident


@pytest.mark.parametrize("method", ["refuses", "is_none"])
@pytest_twisted.ensureDeferred
async def test_what_gives_no_stream_is_an_internal_error_of_that_call_alone(method: str, logged: list[Any]) -> None:
    async with talk(Streams) as ends:
        with pytest.raises(Internal) as caught:
            await read(getattr(ends.proxy, method)())
        assert "12345" not in repr(caught.value)
        assert len(failures(logged)) == 1
        assert await read(ends.proxy.numbers(2)) == [0, 1]


@pytest_twisted.ensureDeferred
async def test_an_error_is_raised_once_and_then_the_stream_is_over() -> None:
    async with talk(Streams) as ends:
        stream = ends.proxy.halts(0)
        with pytest.raises(Halt):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


class StreamsToo(Protocol, name="Streams"):
    """What a client takes the server for, and is wrong in."""

    @request
    def numbers(self, count: int) -> AsyncIterator[str]:
        raise NotImplementedError

    @request
    def total(self, numbers: AsyncIterator[str]) -> AsyncIterator[int]:
        raise NotImplementedError

    @request
    async def plus_one(self, number: int, more: AsyncIterator[int]) -> int:
        raise NotImplementedError

    @request
    async def endless(self) -> int:
        raise NotImplementedError

    @request
    def vanished(self) -> AsyncIterator[int]:
        raise NotImplementedError


@pytest_twisted.ensureDeferred
async def test_an_item_of_the_wrong_type_is_an_invalid_response_and_ends_the_handler() -> None:
    async with talk(Streams) as ends:
        stream = ends.proxy.lies()
        assert await anext(stream) == 1
        with pytest.raises(InvalidResponse, match=r"Streams\.lies is not what was declared: .*expected int, got str"):
            await anext(stream)
        await ends.served.notes.has("ended")
        assert await read(stream) == []


@pytest_twisted.ensureDeferred
async def test_an_argument_item_of_the_wrong_type_is_an_invalid_argument_in_the_handler(logged: list[Any]) -> None:
    source = Source(waits=True)

    async def words() -> Any:
        async for number in source.numbers():
            yield number if number < 3 else "three"

    async with talk(Streams) as ends:
        with pytest.raises(InvalidArgument):
            await ends.proxy.total(words())
        assert ends.served.notes == ["began", InvalidArgument, "ended"]
        await source.notes.has("ended")
        failures(logged)


@pytest_twisted.ensureDeferred
async def test_streams_where_the_other_end_declares_none_are_refused_before_anything_runs() -> None:
    async with served(Streams) as where, connect(reactor, where, StreamsToo) as wrong:
        with pytest.raises(InvalidResponse, match="expected str, got int"):
            await read(wrong.numbers(3))
        source = Source(waits=True)
        with pytest.raises(FailedPrecondition, match=r"plus_one takes no stream, and the call sends one") as it:
            await wrong.plus_one(1, source.numbers())
        assert it.value.may_have_run is False
        await source.notes.has("ended")
        with pytest.raises(FailedPrecondition, match="answers with a stream, and the call takes none"):
            await wrong.endless()
        with pytest.raises(Error, match="there is no method"):
            await read(wrong.vanished())
        with pytest.raises(TypeError, match="expected an async iterator, got list"):
            wrong.plus_one(1, [1, 2])  # type: ignore[arg-type]
        with pytest.raises(InvalidResponse, match="answered with a value"):
            await read(wrong.total(_words()))


async def _words(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item


@pytest_twisted.ensureDeferred
async def test_max_size_holds_for_each_item_and_not_for_all_together() -> None:
    async def items(*sizes: int) -> AsyncIterator[bytes]:
        for size in sizes:
            yield bytes(size)

    async with talk(Streams) as ends:
        assert [len(item) async for item in ends.proxy.small(200, 90)] == [80] * 200 + [90]
        assert await ends.proxy.take_small(items(*[80] * 200)) == 200
        got: list[bytes] = []
        with pytest.raises(Error) as caught:
            await read_into(got, ends.proxy.small(2, 200))
        assert got == [bytes(80), bytes(80)]
        assert type(caught.value) is MessageTooLarge
        with pytest.raises(MessageTooLarge, match=r"an item is 20\d bytes, and 100 are allowed"):
            await ends.proxy.take_small(items(80, 200, 80))


@pytest_twisted.ensureDeferred
async def test_what_the_callers_iterator_raises_is_what_its_call_fails_with() -> None:
    oops = ZeroDivisionError("mine")

    async def numbers() -> AsyncIterator[int]:
        yield 1
        await turn()
        raise oops

    async def at_once() -> AsyncIterator[int]:
        raise oops
        yield 1

    async with talk(Streams) as ends:
        for times, iterator in enumerate((numbers(), at_once()), 1):
            with pytest.raises(ZeroDivisionError) as caught:
                await ends.proxy.total(iterator)
            assert caught.value is oops
            if times == 1:
                await ends.served.notes.has(CancelledError)
        # Where the answer is a stream, its loop is what fails.
        with pytest.raises(ZeroDivisionError) as both:
            await read(ends.proxy.echo(at_once()))
        assert both.value is oops


@pytest_twisted.ensureDeferred
async def test_an_item_that_cannot_be_sent_fails_its_call_alone(logged: list[Any]) -> None:
    async with talk(Streams) as ends:
        with pytest.raises(TypeError, match="unsupported"):
            await ends.proxy.total(_words(1, 2, object()))
        assert await ends.proxy.total(given(10)) == 45
        assert failures(logged) == []


@pytest.mark.parametrize("waits", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_handler_that_answers_early_stops_the_callers_iterator(waits: bool) -> None:
    async with talk(Streams) as ends:
        source = Source(waits=waits)
        assert await ends.proxy.first(source.numbers()) == 1
        await source.notes.has("ended")
        stopped_at = source.given
        for _ in range(3):
            await ends.proxy.plus_one(1)
        assert source.given == stopped_at


@pytest_twisted.ensureDeferred
async def test_a_handler_that_leaves_the_callers_stream_may_go_on_with_its_own() -> None:
    async with talk(Streams) as ends:
        source = Source()
        stream = ends.proxy.goes_on(source.numbers(30_000))
        assert await anext(stream) == 1
        # What makes them is told, and stops.
        await source.notes.has("ended")
        assert source.given < 30_000
        ends.served.gate.open()
        assert await read(stream) == [-1]


@pytest_twisted.ensureDeferred
async def test_a_handler_that_never_looks_at_the_callers_stream_answers_all_the_same() -> None:
    async with talk(Streams) as ends:
        source = Source()
        call = ends.proxy.takes_nothing(source.numbers(30_000))
        await source.notes.has("ended")
        ends.served.gate.open()
        assert await call == 7


@pytest_twisted.ensureDeferred
async def test_a_stream_that_outlives_its_call_is_over() -> None:
    async with talk(Streams) as ends:
        source = Source(waits=True)
        assert await ends.proxy.keeps(source.numbers()) == 1
        await source.notes.has("ended")
        with pytest.raises(LocalProtocolError, match="the call is over"):
            await anext(ends.served.kept)
        assert await read(ends.served.kept) == []


@pytest.mark.parametrize("by_loop", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_second_reader_is_refused_and_the_first_one_gets_everything(by_loop: bool) -> None:
    async with talk(Streams) as ends:
        stream = ends.proxy.hangs(2)
        assert [await anext(stream), await anext(stream)] == [0, 1]
        first = start(read(stream))
        await turn()
        with pytest.raises(LocalProtocolError, match="one reader at a time"):
            await (read(stream) if by_loop else anext(stream))
        ends.served.gate.open()
        assert await first == [2]


class Own(SynchronousTestCase):
    """What a caller does to its own call, in virtual time."""

    def setUp(self) -> None:
        self.ends = Ends(Streams)
        self.notes: list[str] = []

    def test_an_iterator_that_cancels_its_own_call_is_stopped_where_it_waits_next(self) -> None:
        calls: list[Any] = []
        waits: Deferred[None] = Deferred()

        async def numbers() -> AsyncIterator[int]:
            try:
                await waits
                calls[0].cancel()
                await Deferred()
                yield 1
            finally:
                self.notes.append("ended")

        calls.append(self.ends.proxy.total(numbers()))
        self.ends.turn()
        waits.callback(None)
        self.ends.turn()
        self.failureResultOf(calls[0], Cancelled)
        self.assertEqual(self.notes, ["ended"])
        self.assertEqual(leftovers(self.ends.client) + leftovers(self.ends.server), [])

    def test_a_stream_dropped_in_the_callback_of_a_oneway_call_ends_at_the_other_end(self) -> None:
        class Both(Streams, name="Streams"):
            @request(oneway=True)
            async def note(self) -> None:
                self.notes.add("noted")

        ends = Ends(Both)
        held = [ends.proxy.hangs(1)]
        ends.turn()
        ends.proxy.note().addCallback(lambda _: held.clear())
        ends.turn()
        self.assertEqual(ends.served.notes, ["began", "noted", CancelledError, "ended"])
        self.assertEqual(leftovers(ends.client) + leftovers(ends.server), [])

    def test_a_stream_dropped_while_frames_are_sent_ends_at_the_other_end(self) -> None:
        # The collector of cycles drops things anywhere.
        ends = self.ends
        held = [ends.proxy.hangs(1)]
        ends.turn()
        send = ends.client_carrier.send

        def sends(frames: list[bytes]) -> None:
            held.clear()
            send(frames)

        ends.client_carrier.send = sends
        call = ends.proxy.plus_one(1)
        ends.turn()
        self.assertEqual(self.successResultOf(call), 2)
        self.assertEqual(ends.served.notes[-1], "ended")

    def test_a_stream_is_not_dropped_by_a_reader_in_another_thread(self) -> None:
        import threading

        ends = self.ends
        held = [ends.proxy.hangs(1)]
        ends.turn()
        moved: list[Any] = []
        ends.client.inlets._reactor = type("R", (), {"callFromThread": lambda _, function: moved.append(function)})()
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        self.assertEqual(len(moved), 1)
        self.assertNotIn("ended", ends.served.notes)
        moved[0]()
        ends.turn()
        self.assertEqual(ends.served.notes[-1], "ended")


# Deadlines of streams.


class Expiry(SynchronousTestCase):
    """Deadlines, in virtual time."""

    def test_a_deadline_in_the_middle_ends_the_loop_at_once_and_the_handler(self) -> None:
        ends = Ends(Streams)
        got: list[Any] = []
        with timeout(2):
            reading = start(read_into(got, ends.proxy.hangs(3)))
        ends.turn(1.9)
        self.assertNoResult(reading)
        ends.turn(0.2)
        error = self.failureResultOf(reading, DeadlineExceeded).value
        self.assertIs(error.may_have_run, True)
        self.assertEqual(got, [0, 1, 2])
        self.assertEqual(ends.served.notes, ["began", CancelledError, "ended"])
        self.assertEqual(leftovers(ends.client) + leftovers(ends.server), [])
        self.assertEqual(missing_credit(ends.client, ends.server), [0, 0, 0, 0])

    def test_what_came_and_was_not_taken_is_not_given_out_after_the_deadline(self) -> None:
        ends = Ends(Streams)
        with timeout(2):
            stream = ends.proxy.hangs(3)
        ends.turn()
        self.assertEqual(self.successResultOf(start(anext(stream))), 0)
        ends.turn(2.1)
        self.failureResultOf(start(anext(stream)), DeadlineExceeded)
        self.assertEqual(missing_credit(ends.client, ends.server), [0, 0, 0, 0])

    def test_a_deadline_frees_the_caller_of_a_handler_that_does_not_end(self) -> None:
        ends = Ends(Streams)
        with timeout(1):
            reading = start(read(ends.proxy.stubborn()))
        ends.turn(1.1)
        self.failureResultOf(reading, DeadlineExceeded)
        self.assertEqual(ends.served.notes, ["asked to end"])
        self.assertEqual(ends.server._conversation.running, 1)
        ends.served.gate.open()
        ends.turn()
        self.assertEqual(leftovers(ends.client) + leftovers(ends.server), [])

    def test_a_deadline_ends_what_goes_with_a_call_too(self) -> None:
        ends = Ends(Streams)
        notes: list[str] = []

        async def numbers() -> AsyncIterator[int]:
            try:
                yield 1
                await Deferred()
            finally:
                notes.append("ended")

        with timeout(1):
            call = ends.proxy.total(numbers())
        ends.turn(0.9)
        self.assertEqual(notes, [])
        ends.turn(0.2)
        self.failureResultOf(call, DeadlineExceeded)
        self.assertEqual(notes, ["ended"])
        self.assertEqual(ends.served.notes, ["began", CancelledError, "ended"])
        self.assertEqual(leftovers(ends.client) + leftovers(ends.server), [])

    def test_streams_have_no_deadline_unless_somebody_sets_one(self) -> None:
        # Each end goes on hearing of the other, as it would in a real conversation.
        ends = Ends(Streams)
        reading = start(read(ends.proxy.hangs(1)))
        sending = ends.proxy.total(_held(ends.served.gate))
        told = start(anext(ends.proxy.remaining()))
        unary = ends.proxy.plus_one(1)
        ends.turn()
        self.assertEqual(self.successResultOf(told), float("inf"))
        self.assertEqual(self.successResultOf(unary), 2)
        for _ in range(360):
            ends.turn(10.0)
        self.assertNoResult(reading)
        self.assertNoResult(sending)
        ends.served.gate.open()
        ends.turn()
        self.assertEqual(self.successResultOf(reading), [0, 1])
        self.assertEqual(self.successResultOf(sending), 1)

    def test_the_deadline_that_a_request_declares_holds_for_its_stream(self) -> None:
        class Hasty(Protocol):
            @request(timeout=3)
            async def hangs(self) -> AsyncIterator[int]:
                yield 1
                await Deferred()

        ends = Ends(Hasty)
        reading = start(read(ends.proxy.hangs()))
        ends.turn(2.9)
        self.assertNoResult(reading)
        ends.turn(0.2)
        self.failureResultOf(reading, DeadlineExceeded)


async def _held(gate: Gate) -> AsyncIterator[int]:
    yield 1
    await gate.wait()


# How far ahead.


@pytest_twisted.ensureDeferred
async def test_a_generator_is_never_further_ahead_than_the_credit_and_stops_with_its_reader() -> None:
    async with talk(Streams) as ends:
        taken = 0
        stream = ends.proxy.endless()
        async for item in stream:
            taken += 1
            assert item == taken
            assert ends.served.given - taken <= AHEAD
            if not taken % 100:
                await turn()
            if taken == 30_000:
                break
        stopped_at = -1
        stream = ends.proxy.endless()
        ends.served.given = 0
        await anext(stream)
        while stopped_at != ends.served.given:
            stopped_at = ends.served.given
            for _ in range(20):
                await ends.proxy.plus_one(1)
        assert 5000 < stopped_at <= AHEAD
        await stream.aclose()


@pytest_twisted.ensureDeferred
async def test_a_million_items_pass_at_the_pace_of_who_takes_them() -> None:
    async with talk(Streams) as ends:
        furthest = taken = 0
        async for number in ends.proxy.endless():
            taken += 1
            assert number == taken
            if not number % 50_000:
                # It stops reading for a while.
                for _ in range(10):
                    await ends.proxy.plus_one(1)
                furthest = max(furthest, ends.served.given - taken)
            if number == 1_000_000:
                break
        assert 0 < furthest <= AHEAD


@pytest_twisted.ensureDeferred
async def test_a_callers_iterator_is_never_further_ahead_than_the_credit() -> None:
    async with talk(Streams) as ends:
        source = Source()
        call = ends.proxy.ignores(source.numbers())
        await ends.served.notes.has("began")
        stopped_at = -1
        while stopped_at != source.given:
            stopped_at = source.given
            for _ in range(20):
                await ends.proxy.plus_one(1)
        assert 5000 < stopped_at <= AHEAD
        call.cancel()
        with pytest.raises(Cancelled):
            await call
        await source.notes.has("ended")


@pytest_twisted.ensureDeferred
async def test_memory_does_not_grow_with_the_items_that_pass() -> None:
    async with talk(Streams) as ends:
        tracemalloc.start()
        try:
            # Thirty MiB and a hundred thousand items.
            async for _ in ends.proxy.blobs([300] * 1000):
                pass
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            got = 0
            async for octets in ends.proxy.blobs([300] * 100_000):
                got += len(octets)
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert got == 30_000_000
        assert peak - before < 6_000_000
        assert after - before < 1_500_000


@pytest_twisted.ensureDeferred
async def test_nothing_is_left_of_a_mixture_of_everything() -> None:
    async with talk(Streams, limits=Limits(stream_credit=4096, connection_credit=8192)) as ends:
        calls: list[Deferred[Any]] = []
        for number in range(60):
            kind = number % 6
            if kind == 0:
                calls.append(start(by_break(ends.proxy.endless())))
            elif kind == 1:
                calls.append(start(read(ends.proxy.halts(number * 10))))
            elif kind == 2:
                calls.append(ends.proxy.total(given(number * 20)))
            elif kind == 3:
                calls.append(start(read(ends.proxy.echo(readings(number)))))
            elif kind == 4:
                calls.append(ends.proxy.first(Source().numbers()))
            else:
                calls.append(start(read(ends.proxy.blobs([number * 3000, 1]))))
        for number, call in enumerate(calls):
            if number % 6 == 1:
                with pytest.raises(Halt):
                    await call
            else:
                await call
        await becomes_idle(ends.client, ends.server)


# What several streams have in common.


@pytest_twisted.ensureDeferred
async def test_streams_that_nobody_reads_just_now_hold_up_no_other() -> None:
    async with talk(Streams, idle=False) as ends:
        unread = [ends.proxy.endless() for _ in range(12)]
        for stream in unread:
            await anext(stream)
        assert await read(ends.proxy.numbers(100_000)) == list(range(100_000))
        for stream in unread:
            await stream.aclose()


@pytest_twisted.ensureDeferred
async def test_streams_both_ways_in_both_directions_at_once_end() -> None:
    async with talk(Mirror, serving=Mirror()) as ends:
        there = ends.proxy
        back = ends.server.proxy(Mirror)
        texts = [f"{number:0400}" for number in range(2000)]

        async def source() -> AsyncIterator[str]:
            for text in texts:
                yield text

        readings = [Deferred.fromCoroutine(read(proxy.mirror(source()))) for proxy in (there, back) for _ in range(12)]
        for reading in readings:
            assert await reading == texts


class Mirror(Protocol):
    @request
    async def mirror(self, texts: AsyncIterator[str]) -> AsyncIterator[str]:
        async for text in texts:
            yield text

    @request
    async def never(self) -> None:
        await Deferred()

    @request
    async def plus_one(self, number: int) -> int:
        return number + 1

    @request
    async def ticks(self) -> AsyncIterator[int]:
        yield 0
        await Deferred()


@pytest_twisted.ensureDeferred
async def test_who_cancels_often_is_no_flood() -> None:
    async with talk(Mirror, idle=False) as ends:
        for _ in range(2):
            calls = [ends.proxy.never() for _ in range(600)]
            assert await ends.proxy.plus_one(1) == 2
            for call in calls:
                call.addErrback(lambda failure: failure.trap(Cancelled))
                call.cancel()
            assert await ends.proxy.plus_one(1) == 2
        for _ in range(1500):
            stream = ends.proxy.ticks()
            assert await anext(stream) == 0
            await stream.aclose()
        assert await ends.proxy.plus_one(1) == 2


class Fussy(msgspec.Struct):
    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise RuntimeError("the path is /etc/secret")


class Fuss(Protocol):
    @request
    async def total(self, items: AsyncIterator[Fussy]) -> int:
        return sum([item.number async for item in items])


@pytest_twisted.ensureDeferred
async def test_what_a_type_raises_for_an_item_of_the_callers_stays_at_home(logged: list[Any]) -> None:
    async def source(*numbers: int) -> AsyncIterator[Fussy]:
        for number in numbers:
            item = Fussy(abs(number))
            item.number = number
            yield item

    async with talk(Fuss) as ends:
        assert await ends.proxy.total(source(1, 2)) == 3
        with pytest.raises(Internal) as caught:
            await ends.proxy.total(source(1, -2))
        assert "secret" not in repr(caught.value)
        assert len(failures(logged)) == 1


def broken_canceller(_: Any) -> None:
    raise ValueError("a canceller that fails")


@pytest_twisted.ensureDeferred
async def test_a_canceller_that_fails_harms_nobody_else(logged: list[Any]) -> None:
    class Stuck(Protocol):
        @request
        async def wait(self) -> None:
            await Deferred(broken_canceller)

        @request
        async def plus_one(self, number: int) -> int:
            return number + 1

    async with talk(Stuck, idle=False) as ends:
        stuck = ends.proxy.wait()
        assert await ends.proxy.plus_one(1) == 2
        stuck.addErrback(lambda failure: failure.trap(Cancelled))
        stuck.cancel()
        assert await ends.proxy.plus_one(1) == 2
        assert len(failures(logged)) == 1


@pytest_twisted.ensureDeferred
async def test_what_a_handler_raises_while_it_is_cancelled_is_in_the_log(logged: list[Any]) -> None:
    class Untidy(Protocol):
        @request
        async def wait(self) -> None:
            try:
                await Deferred()
            finally:
                raise ValueError("while it tidied up")

        @request
        async def plus_one(self, number: int) -> int:
            return number + 1

    async with talk(Untidy) as ends:
        untidy = ends.proxy.wait()
        assert await ends.proxy.plus_one(1) == 2
        untidy.addErrback(lambda failure: failure.trap(Cancelled))
        untidy.cancel()
        assert await ends.proxy.plus_one(1) == 2
        (event,) = failures(logged)
        assert event["method"] == "Untidy.wait"


class Ticking(Protocol):
    def __init__(self) -> None:
        self.gates: list[Deferred[None]] = []

    def gate(self) -> Deferred[None]:
        self.gates.append(Deferred())
        return self.gates[-1]

    @request
    async def ticks(self) -> AsyncIterator[int]:
        yield 1
        await self.gate()
        yield 2

    @request
    async def first(self, numbers: AsyncIterator[int]) -> int:
        async for number in numbers:
            await self.gate()
            return number
        return 0


class SameTurn(SynchronousTestCase):
    def test_an_iterator_that_ends_when_its_call_is_answered_ends_once(self) -> None:
        ends = Ends(Ticking)
        ticks = ends.proxy.ticks()
        started = Deferred.fromCoroutine(ticks.__anext__())
        ends.turn()
        self.assertEqual(self.successResultOf(started), 1)

        async def source() -> AsyncIterator[int]:
            yield 7
            await anext(ticks)

        call = ends.proxy.first(source())
        ends.turn()
        for gate in ends.served.gates:
            gate.callback(None)
        ends.turn()
        self.assertEqual(self.successResultOf(call), 7)
        self.assertEqual(ends.client.calls._senders, {})
        # What nobody handled is told when it is collected.
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])
