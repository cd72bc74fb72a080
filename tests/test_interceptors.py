"""What runs around calls: in which order, what it may do, and what the two that log and count say of it."""

from __future__ import annotations

import builtins
import contextvars
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import MappingProxyType
from typing import Any

import msgspec
import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, fail, inlineCallbacks, succeed
from twisted.internet.task import Clock
from twisted.logger import LogLevel, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from protoframe._calling import CallCancelled
from protoframe._context import decode_metadata, metadata, scope, timeout
from protoframe.authentication import Identity
from protoframe.errors import (
    Cancelled,
    DeadlineExceeded,
    Error,
    Internal,
    LocalProtocolError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    unknown_error,
)
from protoframe.interceptors import (
    Chain,
    IInterceptor,
    InterceptedCall,
    LogCalls,
    MeterCalls,
    checked,
    run,
    status_of,
)

Proceed = Callable[[], Awaitable[Any]]


class Arguments(msgspec.Struct):
    text: str


CALL = InterceptedCall(
    method="Speech.upper",
    incoming=True,
    arguments=Arguments("a secret text"),
    address=None,
    identity=Identity("alice"),
    metadata=MappingProxyType({"key": "a secret entry"}),
    where="192.0.2.1:4242",
    streams=False,
)
MADE = msgspec.structs.replace(CALL, incoming=False, identity=None)
STREAM = msgspec.structs.replace(CALL, method="Speech.words", streams=True)


class TooLong(Error):
    limit: int


@implementer(IInterceptor)
class Noting:
    """Notes what happens around a call."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes

    async def intercept(self, call: InterceptedCall, proceed: Proceed) -> Any:
        self.notes.append(f"{self.name} in")
        try:
            result = await proceed()
        except BaseException as error:
            self.notes.append(f"{self.name} {type(error).__name__}")
            raise
        self.notes.append(f"{self.name} out")
        return result


@implementer(IInterceptor)
class Doing:
    """Is what a function says."""

    def __init__(self, function: Callable[[InterceptedCall, Proceed], Any]) -> None:
        self.function = function

    def intercept(self, call: InterceptedCall, proceed: Proceed) -> Any:
        return self.function(call, proceed)


def started(coroutine: Coroutine[Any, Any, Any]) -> Deferred[Any]:
    return Deferred.fromCoroutine(coroutine)


def raising(error: BaseException) -> Callable[[], Any]:
    def innermost() -> Any:
        raise error

    return innermost


class Words:
    """A stream that gives what it is told to give, and notes that it was closed."""

    def __init__(self, *words: Any) -> None:
        self.words = list(words)
        self.closed = 0

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self.words:
            raise StopAsyncIteration
        word = self.words.pop(0)
        if isinstance(word, BaseException):
            raise word
        return await word if isinstance(word, Deferred) else word

    async def aclose(self) -> None:
        self.closed += 1


async def collected(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


class Chains(SynchronousTestCase):
    def test_the_call_shows_what_it_says(self):
        self.assertEqual(
            CALL.__struct_fields__,
            ("method", "incoming", "arguments", "address", "identity", "metadata", "where", "streams"),
        )

    def test_the_first_is_the_outermost(self):
        notes: list[str] = []
        three = [Noting(name, notes) for name in "abc"]
        self.assertEqual(self.successResultOf(started(run(three, CALL, lambda: "HELLO"))), "HELLO")
        self.assertEqual(notes, ["a in", "b in", "c in", "c out", "b out", "a out"])

    def test_an_error_goes_outwards(self):
        notes: list[str] = []
        three = [Noting(name, notes) for name in "abc"]
        self.failureResultOf(started(run(three, CALL, raising(NotFound("no")))), NotFound)
        self.assertEqual(notes, ["a in", "b in", "c in", "c NotFound", "b NotFound", "a NotFound"])

    def test_cancelling_reaches_the_innermost_and_goes_outwards(self):
        notes: list[str] = []
        three = [Noting(name, notes) for name in "abc"]
        waiting: Deferred[Any] = Deferred(lambda _: notes.append("cancelled"))
        call = started(run(three, CALL, lambda: waiting))
        self.assertNoResult(call)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.assertEqual(notes[3:], ["cancelled", "c CancelledError", "b CancelledError", "a CancelledError"])

    def test_without_interceptors_the_innermost_runs(self):
        self.assertEqual(self.successResultOf(started(run([], CALL, lambda: 1))), 1)

    def test_the_innermost_may_give_a_value_a_coroutine_or_a_deferred(self):
        async def coroutine() -> int:
            return await succeed(1)

        for innermost in (lambda: 1, coroutine, lambda: succeed(1)):
            self.assertEqual(self.successResultOf(started(run([Noting("a", [])], CALL, innermost))), 1)

    def test_an_interceptor_is_shown_the_call(self):
        seen: list[InterceptedCall] = []

        async def look(call: InterceptedCall, proceed: Proceed) -> Any:
            seen.append(call)
            return await proceed()

        self.successResultOf(started(run([Doing(look), Doing(look)], CALL, lambda: 1)))
        self.assertTrue(seen[0] is CALL and seen[1] is CALL and len(seen) == 2)

    def test_an_interceptor_may_give_a_deferred(self):
        @inlineCallbacks
        def generator(call: InterceptedCall, proceed: Proceed) -> Any:
            result = yield Deferred.fromCoroutine(proceed())
            return result + 1

        def plain(call: InterceptedCall, proceed: Proceed) -> Any:
            return Deferred.fromCoroutine(proceed()).addCallback(lambda result: result * 10)

        notes: list[str] = []
        waiting: Deferred[Any] = Deferred(lambda _: notes.append("cancelled"))
        several = [Doing(generator), Doing(plain), Noting("a", notes)]
        self.assertEqual(self.successResultOf(started(run(several, CALL, lambda: 4))), 41)
        call = started(run(several, CALL, lambda: waiting))
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.assertEqual(notes[-2:], ["cancelled", "a CancelledError"])

    def test_who_passes_the_call_on_may_give_what_proceed_gives(self):
        several = [Doing(lambda call, proceed: proceed())] * 2
        self.assertEqual(self.successResultOf(started(run(several, CALL, lambda: 1))), 1)

    def test_a_refusal_keeps_the_call_from_running(self):
        ran: list[bool] = []
        notes: list[str] = []

        async def refuse(call: InterceptedCall, proceed: Proceed) -> Any:
            raise PermissionDenied("not you")

        call = run([Noting("a", notes), Doing(refuse), Noting("b", notes)], CALL, lambda: ran.append(True))
        self.failureResultOf(started(call), PermissionDenied)
        self.assertEqual((ran, notes), ([], ["a in", "a PermissionDenied"]))

    def test_a_refusal_may_wait(self):
        waiting: Deferred[Any] = Deferred()

        async def ask(call: InterceptedCall, proceed: Proceed) -> Any:
            await waiting
            return await proceed()

        call = started(run([Doing(ask)], CALL, lambda: 1))
        self.assertNoResult(call)
        waiting.errback(ResourceExhausted())
        self.failureResultOf(call, ResourceExhausted)

    def test_a_result_may_be_replaced(self):
        async def shout(call: InterceptedCall, proceed: Proceed) -> Any:
            return f"{await proceed()}!"

        async def know(call: InterceptedCall, proceed: Proceed) -> Any:
            return "known"

        several = [Doing(shout), Doing(shout)]
        self.assertEqual(self.successResultOf(started(run(several, CALL, lambda: "HELLO"))), "HELLO!!")
        several.append(Doing(know))
        self.assertEqual(self.successResultOf(started(run(several, CALL, raising(NotFound())))), "known!!")

    def test_an_error_may_become_a_result(self):
        async def forgive(call: InterceptedCall, proceed: Proceed) -> Any:
            try:
                return await proceed()
            except NotFound:
                return None

        self.assertIsNone(self.successResultOf(started(run([Doing(forgive)], CALL, raising(NotFound())))))

    def test_a_call_proceeds_once(self):
        ran: list[bool] = []

        async def again(call: InterceptedCall, proceed: Proceed) -> Any:
            await proceed()
            return await proceed()

        chain = Chain([Doing(again)], CALL, lambda: ran.append(True))
        error = self.failureResultOf(started(chain.run()), LocalProtocolError).value
        self.assertEqual(str(error), "an interceptor may proceed with a call once")
        self.assertEqual(ran, [True])
        self.assertIsNone(chain.innermost_error)

    def test_context_variables_hold_for_what_is_within(self):
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="outside")

        async def surround(call: InterceptedCall, proceed: Proceed) -> Any:
            variable.set("inside")
            with metadata(trace="1"), timeout(5.0):
                await succeed(None)
                return await proceed()

        async def innermost() -> Any:
            await succeed(None)
            around = scope.get()
            return variable.get(), dict(decode_metadata(around.metadata)), around.deadline is not None

        call = started(run([Noting("a", []), Doing(surround), Noting("b", [])], CALL, innermost))
        self.assertEqual(self.successResultOf(call), ("inside", {"trace": "1"}, True))
        self.assertEqual(variable.get(), "outside")
        self.assertIsNone(scope.get().deadline)

    def test_whose_an_error_is_can_be_told(self):
        def own(error: Exception) -> Doing:
            async def intercept(call: InterceptedCall, proceed: Proceed) -> Any:
                try:
                    await proceed()
                finally:
                    raise error

            return Doing(intercept)

        theirs = NotFound("theirs")
        for innermost in (raising(theirs), lambda: fail(theirs)):
            chain = Chain([Noting("a", []), Noting("b", [])], CALL, innermost)
            self.assertIs(self.failureResultOf(started(chain.run())).value, theirs)
            self.assertIs(chain.innermost_error, theirs)

            ours = NotFound("ours")
            chain = Chain([Noting("a", []), own(ours)], CALL, innermost)
            self.assertIs(self.failureResultOf(started(chain.run())).value, ours)
            self.assertIsNot(chain.innermost_error, ours)

    def test_what_is_no_interceptor_is_refused(self):
        noting = Noting("a", [])
        self.assertEqual(checked([noting]), (noting,))
        error = self.assertRaises(TypeError, checked, [noting, "no"])
        self.assertEqual(str(error), "'no' does not provide IInterceptor")

    def test_an_interceptor_that_gives_no_awaitable_fails(self):
        self.failureResultOf(started(run([Doing(lambda call, proceed: 1)], CALL, lambda: 1)), TypeError)

    @given(st.integers(0, 30), st.integers(0, 30))
    def test_however_many_there_are_all_are_left_that_were_entered(self, several, refusing):
        notes: list[str] = []

        async def refuse(call: InterceptedCall, proceed: Proceed) -> Any:
            raise PermissionDenied

        chain: list[Any] = [Noting(str(number), notes) for number in range(several)]
        chain.insert(refusing, Doing(refuse))
        self.failureResultOf(started(run(chain, CALL, lambda: 1)), PermissionDenied)
        entered = min(several, refusing)
        self.assertEqual(
            notes,
            [f"{number} in" for number in range(entered)]
            + [f"{number} PermissionDenied" for number in reversed(range(entered))],
        )


class Streams(SynchronousTestCase):
    def stream(self, interceptors: list[Any], words: Any, call: InterceptedCall = STREAM) -> Any:
        return self.successResultOf(started(run(interceptors, call, lambda: words)))

    def test_the_result_is_an_async_iterator(self):
        async def generate() -> AsyncIterator[str]:
            yield "a"
            yield await succeed("b")

        for words in (generate(), Words("a", succeed("b"))):
            stream = self.stream([Noting("a", []), LogCalls()], words)
            self.assertEqual(self.successResultOf(started(collected(stream))), ["a", "b"])

    def test_an_interceptor_may_replace_what_passes(self):
        async def shout(call: InterceptedCall, proceed: Proceed) -> Any:
            stream = await proceed()

            async def shouting() -> AsyncIterator[str]:
                async for word in stream:
                    yield f"{word}!"

            return shouting()

        stream = self.stream([Doing(shout), Doing(shout)], Words("a", "b"))
        self.assertEqual(self.successResultOf(started(collected(stream))), ["a!!", "b!!"])

    def test_whose_an_error_of_a_stream_is_can_be_told(self):
        async def two_at_most(call: InterceptedCall, proceed: Proceed) -> Any:
            stream = await proceed()

            async def counting() -> AsyncIterator[str]:
                left = 2
                async for word in stream:
                    if not left:
                        raise ResourceExhausted
                    left -= 1
                    yield word

            return counting()

        theirs = NotFound()
        for words, error_type in ((Words("a", theirs), NotFound), (Words("a", "b", "c"), ResourceExhausted)):
            chain = Chain([Doing(two_at_most)], STREAM, lambda words=words: words)
            stream = self.successResultOf(started(chain.run()))
            error = self.failureResultOf(started(collected(stream)), error_type).value
            self.assertEqual(chain.innermost_error is error, error is theirs)

    def test_cancelling_reaches_what_a_stream_waits_for(self):
        cancelled: list[Any] = []
        stream = self.stream([LogCalls()], Words(Deferred(cancelled.append)))
        item = started(anext(stream))
        item.cancel()
        self.failureResultOf(item, CancelledError)
        self.assertEqual(len(cancelled), 1)

    def test_closing_reaches_the_stream(self):
        words = Words("a", "b")
        stream = self.stream([LogCalls(), LogCalls()], words)
        self.successResultOf(started(anext(stream)))
        self.successResultOf(started(stream.aclose()))
        self.assertEqual(words.closed, 1)

    def test_closing_before_it_begins_reaches_a_stream_that_gives_a_generator(self):
        class Generating(Words):
            async def __aiter__(self) -> AsyncIterator[Any]:
                for word in self.words:
                    yield word

        words = Generating("a", "b")
        stream = self.stream([LogCalls()], words)
        self.successResultOf(started(stream.aclose()))
        self.assertEqual(words.closed, 1)
        stream = self.stream([LogCalls()], words)
        self.assertEqual(self.successResultOf(started(collected(stream))), ["a", "b"])

    def test_a_result_that_is_no_stream_is_left_to_others(self):
        self.assertEqual(self.stream([LogCalls()], "no stream"), "no stream")

    def test_the_stream_of_a_call_that_is_made_stays_what_it_is(self):
        words = Words()
        call = msgspec.structs.replace(STREAM, incoming=False)
        self.assertIs(self.stream([Noting("a", [])], words, call), words)


class Statuses(SynchronousTestCase):
    def test_each_ending_has_its_name(self):
        for error, status in (
            (None, "OK"),
            (NotFound(), "NOT_FOUND"),
            (TooLong(limit=1), "FAILED"),
            (Internal(), "INTERNAL"),
            (DeadlineExceeded(), "DEADLINE_EXCEEDED"),
            (Cancelled(), "CANCELLED"),
            (CallCancelled(), "CANCELLED"),
            (CancelledError(), "CANCELLED"),
            (GeneratorExit(), "CANCELLED"),
            (KeyError("x"), "INTERNAL"),
        ):
            self.assertEqual(status_of(error), status)


class Both(SynchronousTestCase):
    """A clock, a log and metrics around calls."""

    def setUp(self):
        self.clock = Clock()
        self.registry = prometheus_client.CollectorRegistry()
        self.several = [MeterCalls(self.registry, self.clock.seconds), LogCalls(self.clock.seconds)]
        self.events: list[dict[str, Any]] = []
        globalLogPublisher.addObserver(self.observe)
        self.addCleanup(globalLogPublisher.removeObserver, self.observe)

    def observe(self, event: dict[str, Any]) -> None:
        if event.get("log_namespace") == "protoframe.calls":
            self.events.append(event)

    def start(self, call: InterceptedCall, innermost: Callable[[], Any]) -> Deferred[Any]:
        return started(run(self.several, call, innermost))

    def value(self, name: str, call: InterceptedCall = CALL, **labels: str) -> float | None:
        side = "server" if call.incoming else "client"
        return self.registry.get_sample_value(f"protoframe_{name}", {"method": call.method, "side": side, **labels})

    def ended(self, call: InterceptedCall, status: str, outcome: str, seconds: float) -> dict[str, Any]:
        """Asserts that one call has ended so; gives the event of it."""
        (event,) = self.events
        self.assertEqual(self.value("calls_total", call, status=status), 1)
        self.assertEqual(self.value("calls_in_flight", call), 0)
        self.assertEqual(self.value("call_seconds_count", call), 1)
        self.assertAlmostEqual(self.value("call_seconds_sum", call), seconds)
        counted = [
            sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == "protoframe_calls_total"
        ]
        self.assertEqual(sum(counted), 1)
        self.assertEqual(event["outcome"], outcome)
        self.assertAlmostEqual(event["milliseconds"], seconds * 1000)
        self.assertIs(event["log_level"], LogLevel.info if status == "OK" else LogLevel.warn)
        for secret in ("a secret text", "a secret entry", "a secret error"):
            self.assertNotIn(secret, formatEvent(event))
            self.assertNotIn(secret, repr(event))
        return event

    def test_both_provide_the_interface(self):
        for interceptor in self.several:
            verifyObject(IInterceptor, interceptor)
        verifyObject(IInterceptor, Noting("a", []))

    def test_a_call_that_succeeds(self):
        waiting: Deferred[str] = Deferred()
        call = self.start(CALL, lambda: waiting)
        self.assertEqual(self.value("calls_in_flight"), 1)
        self.assertEqual(self.events, [])
        self.clock.advance(0.25)
        waiting.callback("HELLO")
        self.assertEqual(self.successResultOf(call), "HELLO")
        event = self.ended(CALL, "OK", "ok", 0.25)
        self.assertEqual(formatEvent(event), "incoming Speech.upper, 192.0.2.1:4242 (alice): ok, 250.0 ms")
        self.assertEqual(
            {name: event[name] for name in ("direction", "method", "where", "identity")},
            {"direction": "incoming", "method": "Speech.upper", "where": "192.0.2.1:4242", "identity": "alice"},
        )
        self.assertNotIn("items", event)

    def test_a_call_that_is_made(self):
        self.successResultOf(self.start(MADE, lambda: 1))
        event = self.ended(MADE, "OK", "ok", 0)
        self.assertEqual(formatEvent(event), "outgoing Speech.upper, 192.0.2.1:4242 (-): ok, 0.0 ms")

    def test_a_call_that_fails(self):
        self.failureResultOf(self.start(CALL, raising(TooLong("a secret error", limit=1))), TooLong)
        self.ended(CALL, "FAILED", "TooLong", 0)

    def test_a_call_that_fails_unforeseen(self):
        self.failureResultOf(self.start(CALL, raising(KeyError("a secret error"))), KeyError)
        self.ended(CALL, "INTERNAL", "KeyError", 0)

    def test_the_name_of_an_error_that_a_peer_made_up_is_not_logged(self):
        error = unknown_error(5, "a secret error\n", "", {})
        self.failureResultOf(self.start(MADE, raising(error)), NotFound)
        self.ended(MADE, "NOT_FOUND", "NotFound", 0)

    def test_a_call_that_is_cancelled(self):
        call = self.start(CALL, Deferred)
        self.clock.advance(1)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.ended(CALL, "CANCELLED", "Cancelled", 1)

    def test_a_call_that_is_abandoned(self):
        coroutine = run(self.several, CALL, Deferred)
        coroutine.send(None)
        coroutine.close()
        self.ended(CALL, "CANCELLED", "Cancelled", 0)

    def test_a_stream_ends_when_its_items_do(self):
        stream = self.successResultOf(self.start(STREAM, lambda: Words("a", "b")))
        self.successResultOf(started(anext(stream)))
        self.clock.advance(2)
        self.assertEqual(self.value("calls_in_flight", STREAM), 1)
        self.assertEqual(self.value("stream_items_total", STREAM), 1)
        self.assertEqual(self.events, [])
        self.assertEqual(self.successResultOf(started(collected(stream))), ["b"])
        self.clock.advance(2)
        self.successResultOf(started(stream.aclose()))
        del stream
        gc.collect()
        self.assertEqual(self.value("stream_items_total", STREAM), 2)
        event = self.ended(STREAM, "OK", "ok", 2)
        self.assertEqual(event["items"], 2)
        self.assertEqual(formatEvent(event), "incoming Speech.words, 192.0.2.1:4242 (alice): ok, 2000.0 ms, items: 2")

    def test_a_stream_that_fails(self):
        stream = self.successResultOf(self.start(STREAM, lambda: Words("a", NotFound("a secret error"))))
        self.clock.advance(1)
        self.failureResultOf(started(collected(stream)), NotFound)
        self.successResultOf(started(stream.aclose()))
        self.assertEqual(self.ended(STREAM, "NOT_FOUND", "NotFound", 1)["items"], 1)

    def test_a_stream_that_fails_before_it_begins(self):
        self.failureResultOf(self.start(STREAM, raising(NotFound())), NotFound)
        self.assertEqual(self.ended(STREAM, "NOT_FOUND", "NotFound", 0)["items"], 0)

    def test_a_stream_that_is_cancelled_while_it_waits(self):
        stream = self.successResultOf(self.start(STREAM, lambda: Words(Deferred())))
        item = started(anext(stream))
        item.cancel()
        self.failureResultOf(item, CancelledError)
        self.ended(STREAM, "CANCELLED", "Cancelled", 0)

    def test_a_stream_that_is_closed_early(self):
        stream = self.successResultOf(self.start(STREAM, lambda: Words("a", "b")))
        self.successResultOf(started(anext(stream)))
        for _ in range(2):
            self.successResultOf(started(stream.aclose()))
        self.assertEqual(self.ended(STREAM, "CANCELLED", "Cancelled", 0)["items"], 1)

    def test_a_stream_that_is_closed_before_it_begins(self):
        stream = self.successResultOf(self.start(STREAM, lambda: Words("a")))
        self.successResultOf(started(stream.aclose()))
        self.ended(STREAM, "CANCELLED", "Cancelled", 0)

    def test_a_stream_that_fails_to_close(self):
        async def generate() -> AsyncIterator[str]:
            try:
                yield "a"
            finally:
                raise NotFound

        stream = self.successResultOf(self.start(STREAM, generate))
        self.successResultOf(started(anext(stream)))
        self.failureResultOf(started(stream.aclose()), NotFound)
        self.ended(STREAM, "NOT_FOUND", "NotFound", 0)

    def test_a_stream_that_a_loop_breaks_off(self):
        async def first(stream: AsyncIterator[str]) -> str:
            async for word in stream:
                return word
            raise AssertionError

        stream = self.successResultOf(self.start(STREAM, lambda: Words("a", "b")))
        self.assertEqual(self.successResultOf(started(first(stream))), "a")
        self.assertEqual(self.events, [])
        del stream
        gc.collect()
        self.ended(STREAM, "CANCELLED", "Cancelled", 0)

    def test_a_stream_that_an_outer_interceptor_drops(self):
        async def refuse(call: InterceptedCall, proceed: Proceed) -> Any:
            await proceed()
            raise PermissionDenied

        self.failureResultOf(started(run([Doing(refuse), *self.several], STREAM, Words)), PermissionDenied)
        gc.collect()
        self.ended(STREAM, "CANCELLED", "Cancelled", 0)

    def test_those_that_meter_to_one_registry_share_its_metrics(self):
        others = [MeterCalls(self.registry), MeterCalls(self.registry, self.clock.seconds)]
        for meter in (*others, self.several[0]):
            self.successResultOf(started(run([meter], CALL, lambda: 1)))
        self.assertEqual(self.value("calls_total", status="OK"), 3)

    def test_registries_have_metrics_of_their_own(self):
        self.successResultOf(started(run([MeterCalls(prometheus_client.CollectorRegistry())], CALL, lambda: 1)))
        self.assertIsNone(self.value("calls_total", status="OK"))

    def test_without_a_registry_the_default_one_is_taken(self):
        registry = prometheus_client.CollectorRegistry()
        self.patch(prometheus_client, "REGISTRY", registry)
        self.successResultOf(started(run([MeterCalls()], CALL, lambda: 1)))
        labels = {"method": "Speech.upper", "side": "server", "status": "OK"}
        self.assertEqual(registry.get_sample_value("protoframe_calls_total", labels), 1)

    def test_without_prometheus_the_error_says_what_to_install(self):
        def without(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "prometheus_client":
                raise ImportError(name)
            return imported(name, *args, **kwargs)

        imported = builtins.__import__
        self.patch(builtins, "__import__", without)
        error = self.assertRaises(ImportError, MeterCalls)
        self.assertIn("protoframe[metrics]", str(error))
