"""Deadlines and cancellation across servers that call each other: what a caller gives holds for everything that is done
for it, however far away and however the handlers are written."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase

from protoframe import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Factory,
    Limits,
    Protocol,
    connect,
    current_call,
    metadata,
    request,
    timeout,
)
from protoframe._context import Scope, scope
from tests.ends import Ends, Notes, leftovers, talk, until
from tests.test_calls import served


class Hop(Protocol):
    """One of several servers in a row: does what it is asked, and has the next one do the rest."""

    def __init__(self, name: str, onward: Any, notes: Notes) -> None:
        self.name = name
        self.onward = onward
        self.notes = notes

    @request
    async def touch(self) -> None:
        await deferLater(reactor, 0)

    @request
    async def by_coroutine(self, kinds: list[str]) -> list[float]:
        seen = current_call().remaining
        await self.onward.touch()
        return [seen, *await self.ask_on(kinds)]

    @request
    def by_inline_callbacks(self, kinds: list[str]) -> Deferred[list[float]]:
        @inlineCallbacks
        def run() -> Generator[Any, Any, list[float]]:
            seen = current_call().remaining
            yield self.onward.touch()
            rest = yield self.ask_on(kinds)
            return [seen, *rest]

        return run()

    @request
    def by_callbacks(self, kinds: list[str]) -> Deferred[list[float]]:
        seen = current_call().remaining
        done: Deferred[Any] = self.onward.touch()
        done.addCallback(lambda _: self.onward.touch())
        done.addCallback(lambda _: self.ask_on(kinds))
        done.addCallback(lambda rest: [seen, *rest])
        return done

    @request
    async def by_generator(self, kinds: list[str]) -> list[float]:
        return [number async for number in self.streamed(kinds)]

    @request
    async def streamed(self, kinds: list[str]) -> AsyncIterator[float]:
        yield current_call().remaining
        await deferLater(reactor, 0)
        for number in await self.ask_on(kinds):
            yield number

    @request
    async def by_stream(self, kinds: list[str]) -> list[float]:
        return [current_call().remaining] + [number async for number in self.onward.streamed(kinds)]

    @request
    async def extending(self, kinds: list[str]) -> list[float]:
        with timeout(60):
            return [current_call().remaining, *await self.ask_on(kinds)]

    @request
    async def shortening(self, kinds: list[str]) -> list[float]:
        with timeout(0.5):
            return [current_call().remaining, *await self.ask_on(kinds)]

    @request
    async def remaining(self, kinds: list[str]) -> list[float]:
        return [current_call().remaining]

    @request(oneway=True)
    async def tell(self) -> None:
        self.notes.add((self.name, "told"))
        self.notes.append(current_call().remaining)

    @request
    async def telling(self) -> None:
        await self.onward.tell()

    def ask_on(self, kinds: list[str]) -> Any:
        return getattr(self.onward, kinds[0])(kinds[1:])

    @request
    async def tenant(self, names: list[dict[str, str]]) -> list[dict[str, str]]:
        names = [*names, dict(current_call().metadata)]
        return names if self.onward is None else await self.onward.tenant(names)

    @request
    async def hang(self) -> None:
        """The last one waits for ever."""
        self.notes.add((self.name, "began"))
        try:
            await (Deferred() if self.onward is None else self.onward.hang())
        except CancelledError:
            self.notes.add((self.name, "cancelled"))
            raise
        finally:
            self.notes.add((self.name, "ended"))

    @request
    def hang_by_callbacks(self) -> Deferred[None]:
        def noted(failure: Any) -> Any:
            if failure.check(CancelledError):
                self.notes.add((self.name, "cancelled"))
            self.notes.add((self.name, "ended"))
            return failure

        if self.onward is None:
            self.notes.add((self.name, "began"))
            forever: Deferred[None] = Deferred()
            return forever.addErrback(noted)
        done: Deferred[Any] = self.onward.touch()
        done.addCallback(lambda _: self.notes.add((self.name, "began")))
        done.addCallback(lambda _: self.onward.hang_by_callbacks())
        return done.addErrback(noted)

    @request
    def hang_by_inline_callbacks(self) -> Deferred[None]:
        @inlineCallbacks
        def run() -> Generator[Any, Any, None]:
            self.notes.add((self.name, "began"))
            try:
                yield (Deferred() if self.onward is None else self.onward.hang_by_inline_callbacks())
            except CancelledError:
                self.notes.add((self.name, "cancelled"))
                raise
            finally:
                self.notes.add((self.name, "ended"))

        return run()

    @request
    async def hang_in_a_stream(self) -> AsyncIterator[int]:
        self.notes.add((self.name, "began"))
        try:
            yield 1
            if self.onward is None:
                await Deferred()
            async for number in self.onward.hang_in_a_stream():
                yield number
        except CancelledError:
            self.notes.add((self.name, "cancelled"))
            raise
        finally:
            self.notes.add((self.name, "ended"))

    @request
    async def sleepless(self) -> None:
        """Does not let itself be cancelled."""
        self.notes.add((self.name, "began"))
        end: Deferred[None] = Deferred(lambda _: self.notes.add((self.name, "asked to end")))
        self.notes.end = end  # type: ignore[attr-defined]
        while True:
            try:
                await end
            except CancelledError:
                end = self.notes.end = Deferred()  # type: ignore[attr-defined]
            else:
                break
        self.notes.add((self.name, "ended"))


class HopFactory(Factory):
    def __init__(self, name: str, onward: Any, notes: Notes) -> None:
        super().__init__(Hop)
        self.arguments = (name, onward, notes)

    def create(self, protocol: Any) -> Any:
        return protocol(*self.arguments)


@asynccontextmanager
async def row() -> AsyncIterator[tuple[Any, Notes, list[Factory]]]:
    """A proxy of the first of three servers, each of which calls the next; what they note; and the factories."""
    notes = Notes()
    onward = None
    factories: list[Factory] = []
    async with AsyncExitStack() as stack:
        for name in ("C", "B", "A"):
            factory = HopFactory(name, onward, notes)
            factories.insert(0, factory)
            where = await stack.enter_async_context(served(factory=factory))
            onward = await stack.enter_async_context(connect(reactor, where, Hop))
        yield onward, notes, factories
        await until(lambda: all(not running(factory) for factory in factories))


def running(factory: Factory) -> int:
    return sum(connection._conversation.running for connection in factory.connections)


KINDS = ["by_coroutine", "by_inline_callbacks", "by_callbacks", "by_generator", "by_stream"]


@pytest.mark.parametrize("kind", KINDS)
@pytest_twisted.ensureDeferred
async def test_each_server_has_less_time_than_the_one_before_it(kind: str) -> None:
    async with row() as (first, _, _):
        onward = "streamed" if kind == "by_stream" else kind
        before = time.monotonic()
        with timeout(5.0):
            a, b, c = await getattr(first, kind)(["remaining"] if kind == "by_stream" else [onward, "remaining"])
        elapsed = time.monotonic() - before
        assert 5.0 > a > b > c > 5.0 - elapsed - 0.01
        # Each says it in whole milliseconds, rounded down.
        assert a - b < elapsed + 0.002


@pytest_twisted.ensureDeferred
async def test_one_second_is_one_second_for_all_together() -> None:
    async with row() as (first, _, _):
        with timeout(1.0):
            a, b, c = await first.by_coroutine(["by_coroutine", "remaining"])
        assert 1.0 > a > b > c > 0


@pytest_twisted.ensureDeferred
async def test_a_server_in_between_cannot_give_more_time_and_can_give_less() -> None:
    async with row() as (first, _, _):
        with timeout(2.0):
            a, b, c = await first.extending(["extending", "remaining"])
        assert 2.0 > a > b > c
        with timeout(2.0):
            a, b, c = await first.shortening(["extending", "remaining"])
        assert 0.5 > a > b > c > 0
        # Where nobody says anything, it is the ten seconds of the first caller.
        a, b, c = await first.extending(["extending", "remaining"])
        assert 10.0 > a > b > c > 9.0


@pytest_twisted.ensureDeferred
async def test_a_oneway_call_has_the_deadline_of_the_handler_that_makes_it() -> None:
    async with row() as (first, notes, _):
        with timeout(2.0):
            await first.telling()
        await notes.has(("B", "told"))
        assert 0 < notes[-1] < 2.0


@pytest_twisted.ensureDeferred
async def test_metadata_goes_one_hop_and_no_further() -> None:
    async with row() as (first, _, _):
        with metadata(tenant="a"):
            assert await first.tenant([]) == [{"tenant": "a"}, {}, {}]
        assert await first.tenant([]) == [{}, {}, {}]


async def all_of(stream: Any) -> list[Any]:
    return [item async for item in stream]


HANGS = ["hang", "hang_by_callbacks", "hang_by_inline_callbacks"]


@pytest.mark.parametrize("method", HANGS)
@pytest_twisted.ensureDeferred
async def test_cancelling_reaches_every_server(method: str) -> None:
    async with row() as (first, notes, _):
        for times in (1, 2):
            call = getattr(first, method)()
            await notes.has(("C", "began"), times)
            call.cancel()
            with pytest.raises(Cancelled):
                await call
            for name in "ABC":
                await notes.has((name, "cancelled"), times)
                await notes.has((name, "ended"), times)


@pytest_twisted.ensureDeferred
async def test_leaving_a_stream_reaches_every_server() -> None:
    async with row() as (first, notes, _):
        stream = first.hang_in_a_stream()
        assert [await anext(stream) for _ in range(3)] == [1, 1, 1]
        await stream.aclose()
        for name in "ABC":
            await notes.has((name, "cancelled"))
            await notes.has((name, "ended"))


@pytest.mark.parametrize("method", [*HANGS, "hang_in_a_stream"])
@pytest_twisted.ensureDeferred
async def test_a_deadline_that_passes_ends_everything_everywhere(method: str) -> None:
    async with row() as (first, notes, _):
        with timeout(0.15):
            made = getattr(first, method)()
        with pytest.raises(DeadlineExceeded):
            await (all_of(made) if method == "hang_in_a_stream" else made)
        # In between, the call to the next server may be what fails first.
        await notes.has(("C", "cancelled"))
        for name in "ABC":
            await notes.has((name, "ended"))


@pytest_twisted.ensureDeferred
async def test_a_lost_client_cancels_what_every_server_does_for_it() -> None:
    async with row() as (first, notes, factories):
        call = first.hang()
        await notes.has(("C", "began"))
        (connection,) = factories[0].connections
        connection._carrier.abort()
        for name in "ABC":
            await notes.has((name, "cancelled"))
        with pytest.raises(ConnectionError):
            await call


@pytest_twisted.ensureDeferred
async def test_a_caller_is_freed_at_its_deadline_whatever_the_handler_does() -> None:
    async with row() as (first, notes, factories):
        with timeout(0.1), pytest.raises(DeadlineExceeded):
            await first.sleepless()
        await notes.has(("A", "asked to end"))
        assert ("A", "ended") not in notes
        assert running(factories[0]) == 1
        assert await first.remaining([])
        notes.end.callback(None)  # type: ignore[attr-defined]
        await notes.has(("A", "ended"))


@pytest.mark.parametrize("step", [86_400.0, -86_400.0])
@pytest_twisted.ensureDeferred
async def test_a_step_of_the_wall_clock_changes_no_deadline(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    async with row() as (first, notes, _):
        with timeout(5.0):
            waiting = first.hang()
            await notes.has(("C", "began"))
            actual = time.time
            with monkeypatch.context() as patched:
                patched.setattr(time, "time", lambda: actual() + step)
                patched.setattr(reactor, "seconds", lambda: actual() + step)
                # A step forward makes every timer go off: none of them may find anything due.
                for _ in range(3):
                    await first.touch()
                assert not waiting.called
                a, b, c = await first.by_coroutine(["by_coroutine", "remaining"])
                assert 5.0 > a > b > c > 0
        waiting.cancel()
        with pytest.raises(Cancelled):
            await waiting


class Hedging(SynchronousTestCase):
    """A call that is cancelled by the callback of another, whose outcomes came at once."""

    def setUp(self) -> None:
        self.gates: list[Deferred[None]] = []
        gates = self.gates

        class Slow(Protocol):
            @request
            async def wait(self, text: str) -> str:
                gates.append(Deferred())
                await gates[-1]
                return text

        self.ends = Ends(Slow)
        self.first, self.second, self.third = (self.ends.proxy.wait(text) for text in ("one", "two", "three"))
        self.first.addBoth(self.hedge)
        self.ends.turn()

    def hedge(self, result: Any) -> Any:
        self.second.cancel()
        return result

    def test_when_both_have_their_answers(self) -> None:
        for gate in self.gates[:2]:
            gate.callback(None)
        self.ends.turn()
        self.assertEqual(self.successResultOf(self.first), "one")
        self.failureResultOf(self.second, Cancelled)
        self.assertNoResult(self.third)
        self.gates[2].callback(None)
        self.ends.turn()
        self.assertEqual(self.successResultOf(self.third), "three")

    def test_when_the_connection_is_lost(self) -> None:
        self.ends.lose()
        self.failureResultOf(self.first, ConnectionLost)
        self.failureResultOf(self.second, Cancelled)
        self.failureResultOf(self.third, ConnectionLost)
        self.assertEqual(self.ends.clock.getDelayedCalls(), [])

    def test_when_both_expire(self) -> None:
        self.ends.turn(10.1)
        for call in (self.first, self.third):
            self.failureResultOf(call, DeadlineExceeded)
        self.failureResultOf(self.second, Cancelled, DeadlineExceeded)
        self.ends.turn()
        self.assertFalse(self.ends.is_lost)
        call = self.ends.proxy.wait("four")
        self.ends.turn()
        self.gates[-1].callback(None)
        self.ends.turn()
        self.assertEqual(self.successResultOf(call), "four")


class Virtual(SynchronousTestCase):
    """The same to the millisecond, in virtual time."""

    def setUp(self) -> None:
        self.gates: list[Deferred[None]] = []
        gates = self.gates

        class Slow(Protocol):
            @request
            async def wait(self) -> float:
                before = current_call().remaining
                gates.append(Deferred())
                await gates[-1]
                return before

        self.ends = Ends(Slow, server_limits=Limits(max_calls=1))
        # `timeout` goes by the clock that surrounds it.
        token = scope.set(Scope(clock=self.ends.clock.seconds))
        self.addCleanup(scope.reset, token)

    def test_the_time_that_a_call_waits_for_a_slot_is_its_own(self) -> None:
        first = self.ends.proxy.wait()
        with timeout(4):
            second = self.ends.proxy.wait()
        self.ends.turn()
        self.ends.turn(1.5)
        self.gates[0].callback(None)
        self.ends.turn()
        self.gates[1].callback(None)
        self.ends.turn()
        self.assertEqual(self.successResultOf(first), 10.0)
        self.assertAlmostEqual(self.successResultOf(second), 2.5, 2)

    def test_callbacks_of_a_call_have_what_is_left_of_its_time(self) -> None:
        with timeout(3):
            first = self.ends.proxy.wait()
        second = first.addCallback(lambda _: self.ends.proxy.wait())
        self.ends.turn()
        self.ends.turn(1.0)
        self.gates[0].callback(None)
        self.ends.turn()
        self.gates[1].callback(None)
        self.ends.turn()
        self.assertAlmostEqual(self.successResultOf(second), 2.0, 2)

    def test_a_block_that_is_over_has_no_say_in_what_is_called_after_it(self) -> None:
        with timeout(1):
            pass
        call = self.ends.proxy.wait()
        self.ends.turn(9.9)
        self.assertNoResult(call)
        self.ends.turn(0.2)
        self.failureResultOf(call, DeadlineExceeded)

    def test_a_caller_and_a_handler_hear_of_the_same_deadline_each_at_its_own_end(self) -> None:
        seen: list[str] = []

        class Hanging(Protocol):
            @request
            async def hang(self) -> None:
                try:
                    await Deferred()
                except CancelledError:
                    seen.append("cancelled")
                    raise

        ends = Ends(Hanging)
        with timeout(1):
            call = ends.proxy.hang()
        ends.turn()
        # Nothing passes between them: each goes by its own timer.
        ends.clock.advance(1.01)
        self.failureResultOf(call, DeadlineExceeded)
        self.assertEqual(seen, ["cancelled"])
        ends.turn()
        self.assertEqual(leftovers(ends.client) + leftovers(ends.server), [])


@pytest_twisted.ensureDeferred
async def test_a_deadline_holds_in_the_callbacks_of_pings_and_oneway_calls() -> None:
    class Hop(Protocol):
        @request
        async def left(self) -> float:
            return current_call().remaining

        @request(oneway=True)
        async def note(self) -> None:
            pass

    async with talk(Hop) as ends:
        with timeout(1.0):
            pinged = ends.client.ping().addCallback(lambda _: ends.proxy.left())
            noted = ends.proxy.note().addCallback(lambda _: ends.proxy.left())
        for left in (await pinged, await noted):
            assert 0 < left < 1
