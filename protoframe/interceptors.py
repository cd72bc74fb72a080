"""What runs around calls, at either end: one interface, and two that log and count calls.

Knows a call as its method, its surroundings and a way to go on with it; not connections, frames, nor what becomes of a
result or an error afterwards.  Interceptors are nested coroutines and nothing else: what cancels the outermost reaches
what the innermost awaits, and context variables that one sets hold for all within it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import msgspec
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger, LogLevel
from zope.interface import Interface, implementer

from protoframe.errors import Error, LocalProtocolError, Status

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = [
    "Chain",
    "IInterceptor",
    "InterceptedCall",
    "Interceptor",
    "LogCalls",
    "MeterCalls",
    "checked",
    "run",
    "status_of",
]

# Not in a class: there its namespace would become the class's name.
_log = Logger(namespace="protoframe.calls")


class InterceptedCall(msgspec.Struct, frozen=True):
    """A call that is served here, or made here, for interceptors to look at.

    :ivar method: ``Protocol.method``.
    :ivar incoming: whether it is served here, and not made here.
    :ivar arguments: by name; ``None`` of a call that is made with JSON.
    :ivar address: the peer's, as Twisted's transport gives it.
    :ivar identity: who the peer has shown to be; ``None`` where nobody asked.
    :ivar metadata: what goes with the call.
    :ivar where: the peer's address as text.
    :ivar streams: whether the result is an async iterator.
    """

    method: str
    incoming: bool
    arguments: msgspec.Struct | None
    address: Any
    identity: Any
    metadata: Mapping[str, str]
    where: str
    streams: bool


class IInterceptor(Interface):
    """What runs around each call."""

    def intercept(call: InterceptedCall, proceed: Callable[[], Awaitable[Any]]) -> Awaitable[Any]:  # noqa: N805 - zope
        """The result of the call: a coroutine, or a Deferred.

        It may raise an `Error` before it proceeds, and so refuse the call: one of protoframe's own classes reaches the
        caller as it is.  Calls of `protoframe.reflection.Reflection` go through it too.  It may surround ``proceed()``
        with ``with timeout(...)`` or ``with metadata(...)``; look at the result, and give another in its place.  A
        result that it has and gives to nobody, an async iterator too, it closes itself.

        :param call: what is called.
        :param proceed: goes on with the call, once at most; gives an awaitable of the result, which is an async
            iterator where ``call.streams``.
        """


class Interceptor(Protocol):
    """What provides `IInterceptor`, as type checkers see it without a plugin for zope.interface."""

    def intercept(self, call: InterceptedCall, proceed: Callable[[], Awaitable[Any]]) -> Awaitable[Any]:
        """See `IInterceptor`."""
        ...


def checked(interceptors: Iterable[Interceptor]) -> tuple[Interceptor, ...]:
    """The interceptors, for `run`.

    :raises TypeError: one of them is none.
    """
    several = tuple(interceptors)
    for interceptor in several:
        if not IInterceptor.providedBy(interceptor):
            raise TypeError(f"{interceptor!r} does not provide IInterceptor")
    return several


class Chain:
    """One call on its way through interceptors, the first of which is the outermost, at either end.

    :param interceptors: as `checked` gave them.
    :param call: what they are shown.
    :param innermost: what they surround; gives a result, a coroutine or a Deferred.
    :ivar innermost_error: what was raised by ``innermost``, or, of a call that is served, by the async iterator that it
        gave.  An error that comes out of the chain and is another is an interceptor's own.
    """

    __slots__ = ("_call", "_innermost", "_interceptors", "innermost_error")

    def __init__(
        self, interceptors: Sequence[Interceptor], call: InterceptedCall, innermost: Callable[[], Any]
    ) -> None:
        self._interceptors = interceptors
        self._call = call
        self._innermost = innermost
        self.innermost_error: BaseException | None = None

    def run(self) -> Coroutine[Any, Any, Any]:
        """The result, once all have had their say."""
        return self._step(0)

    async def _step(self, index: int) -> Any:
        if index == len(self._interceptors):
            return await self._run_innermost()
        proceeded = False

        def proceed() -> Coroutine[Any, Any, Any]:
            nonlocal proceeded
            if proceeded:
                raise LocalProtocolError("an interceptor may proceed with a call once")
            proceeded = True
            return self._step(index + 1)

        return await self._interceptors[index].intercept(self._call, proceed)

    async def _run_innermost(self) -> Any:
        try:
            result = self._innermost()
            if isinstance(result, (CoroutineType, Deferred)):
                result = await result
        except BaseException as error:
            self.innermost_error = error
            raise
        if self._call.incoming and self._call.streams and isinstance(result, AsyncIterable):
            return _Watched(result, _nothing, self._stream_ended)
        return result

    def _stream_ended(self, error: BaseException | None) -> None:
        self.innermost_error = error


def run(
    interceptors: Sequence[Interceptor], call: InterceptedCall, innermost: Callable[[], Any]
) -> Coroutine[Any, Any, Any]:
    """Runs interceptors around a call, as `Chain` does, for whoever need not know which of them raised what."""
    return Chain(interceptors, call, innermost).run()


def status_of(error: BaseException | None) -> str:
    """How a call ended, as metrics name it: ``"OK"``, or the name of a `Status`.

    What is cancelled or left early is ``"CANCELLED"``, and an exception that is no `Error` is ``"INTERNAL"``.
    """
    if error is None:
        return "OK"
    if isinstance(error, _GIVEN_UP):
        return Status.CANCELLED.name
    return error.status.name if isinstance(error, Error) else Status.INTERNAL.name


#: What a coroutine, or an iterator, sees of being given up.
_GIVEN_UP = (CancelledError, GeneratorExit)


@implementer(IInterceptor)
class LogCalls:
    """Logs a line for each call when it has ended, as ``protoframe.calls``: of level info, or warn where it failed.

    A stream has ended when its iterator has, or was closed.  Arguments, metadata and the texts of errors stay out: they
    hold what people would not want in a log.

    The fields of an event: ``direction`` (``"incoming"`` or ``"outgoing"``), ``method``, ``where``, ``identity`` (a
    name, or ``"-"``), ``outcome`` (``"ok"``, or the error's type), ``milliseconds``, and of a stream ``items``.

    :param clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    async def intercept(self, call: InterceptedCall, proceed: Callable[[], Awaitable[Any]]) -> Any:
        """Proceeds."""
        began = self._clock()
        items = 0

        def passed() -> None:
            nonlocal items
            items += 1

        def ended(error: BaseException | None) -> None:
            text = "{direction} {method}, {where} ({identity}): {outcome}, {milliseconds:.1f} ms"
            fields = {
                "direction": "incoming" if call.incoming else "outgoing",
                "method": call.method,
                "where": call.where,
                "identity": getattr(call.identity, "name", "-"),
                "outcome": _outcome(error),
                "milliseconds": (self._clock() - began) * 1000,
            }
            if call.streams:
                text += ", items: {items}"
                fields["items"] = items
            _log.emit(LogLevel.info if error is None else LogLevel.warn, text, **fields)

        return await _watch(call, proceed, passed, ended)


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    # The class's own name: `Error.type_name` may be what a peer made up.
    return "Cancelled" if isinstance(error, _GIVEN_UP) else type(error).__name__


@implementer(IInterceptor)
class MeterCalls:
    """Counts and times calls, for Prometheus.  Needs the extra ``protoframe[metrics]``.

    The metrics, with the labels ``method`` and ``side`` (``"server"`` or ``"client"``), are ``protoframe_calls_total``,
    with ``status`` too, as `status_of` has it; ``protoframe_call_seconds``; ``protoframe_calls_in_flight``; and
    ``protoframe_stream_items_total``.  A stream is in flight until its iterator has ended, or was closed.

    :param registry: a ``prometheus_client.CollectorRegistry``; its default where none is given.  All that meter calls
        to one registry share its metrics.
    :param clock: gives the time in seconds.
    :raises ImportError: ``prometheus_client`` is not installed.
    """

    def __init__(self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise ImportError("MeterCalls needs prometheus-client: pip install 'protoframe[metrics]'") from error
        registry = prometheus_client.REGISTRY if registry is None else registry
        metrics = _METRICS.get(registry)
        if metrics is None:
            metrics = _METRICS[registry] = _Metrics(registry)
        self._metrics = metrics
        self._clock = clock

    async def intercept(self, call: InterceptedCall, proceed: Callable[[], Awaitable[Any]]) -> Any:
        """Proceeds."""
        series = self._metrics.series(call)
        began = self._clock()

        def ended(error: BaseException | None) -> None:
            series.in_flight.dec()
            series.seconds.observe(self._clock() - began)
            series.calls(status_of(error)).inc()

        series.in_flight.inc()
        return await _watch(call, proceed, series.items.inc, ended)


class _Metrics:
    """The metrics of one registry, and the series of them that are in use."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        labels = ("method", "side")
        self._calls = Counter(
            "protoframe_calls_total", "Calls that have ended.", (*labels, "status"), registry=registry
        )
        self._seconds = Histogram(
            "protoframe_call_seconds", "Seconds that calls took.", labels, registry=registry, buckets=_BUCKETS
        )
        self._in_flight = Gauge("protoframe_calls_in_flight", "Calls that have not ended.", labels, registry=registry)
        self._items = Counter("protoframe_stream_items_total", "Items of streams.", labels, registry=registry)
        self._series: dict[tuple[str, bool], _Series] = {}

    def series(self, call: InterceptedCall) -> _Series:
        """Where a call is counted."""
        key = (call.method, call.incoming)
        series = self._series.get(key)
        if series is None:
            labels = (call.method, "server" if call.incoming else "client")
            series = self._series[key] = _Series(
                self._calls,
                labels,
                self._seconds.labels(*labels),
                self._in_flight.labels(*labels),
                self._items.labels(*labels),
            )
        return series


class _Series:
    """Where the calls of one method at one side are counted."""

    def __init__(
        self, calls: Counter, labels: tuple[str, str], seconds: Histogram, in_flight: Gauge, items: Counter
    ) -> None:
        self._calls = calls
        self._labels = labels
        self.seconds = seconds
        self.in_flight = in_flight
        self.items = items
        # An iterator that is dropped counts as this from `__del__`, where the lock of `labels()` may be held already.
        given_up = Status.CANCELLED.name
        self._by_status = {given_up: calls.labels(*labels, given_up)}

    def calls(self, status: str) -> Counter:
        """Counts the calls that ended so."""
        counter = self._by_status.get(status)
        if counter is None:
            counter = self._by_status[status] = self._calls.labels(*self._labels, status)
        return counter


#: The default's begin at 5 ms, where many calls would have long ended.
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

#: A registry takes a metric once.
_METRICS: WeakKeyDictionary[CollectorRegistry, _Metrics] = WeakKeyDictionary()


async def _watch(
    call: InterceptedCall,
    proceed: Callable[[], Awaitable[Any]],
    passed: Callable[[], None],
    ended: Callable[[BaseException | None], None],
) -> Any:
    """Proceeds, and tells once how the call ended: with its result, or, where that is a stream, with the stream.

    :param passed: called for each item of a stream.
    :param ended: called with the error, if any.
    """
    try:
        result = await proceed()
    except BaseException as error:
        ended(error)
        raise
    if call.streams and isinstance(result, AsyncIterable):
        return _Watched(result, passed, ended)
    ended(None)
    return result


class _Watched:
    """An async iterator that tells of each item, and once how it ended.

    Not a generator: one that is closed, or dropped, before it began would tell nobody.
    """

    __slots__ = ("_ended", "_items", "_over", "_passed", "_stream")

    def __init__(
        self, stream: AsyncIterable[Any], passed: Callable[[], None], ended: Callable[[BaseException | None], None]
    ) -> None:
        self._over = False
        self._passed = passed
        self._ended = ended
        self._stream = stream
        self._items = aiter(stream)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            item = await anext(self._items)
        except StopAsyncIteration:
            self._end(None)
            raise
        except BaseException as error:
            self._end(error)
            raise
        self._passed()
        return item

    async def aclose(self) -> None:
        """Closes the stream, which is thereby left early, unless it has ended."""
        try:
            await _close(self._items)
            if self._items is not self._stream:
                # It may have given a generator, which is closed without a word where it never began.
                await _close(self._stream)
        except BaseException as error:
            self._end(error)
            raise
        self._end(GeneratorExit())

    def __del__(self) -> None:
        # A loop that is left by `break` closes nothing.
        self._end(GeneratorExit())

    def _end(self, error: BaseException | None) -> None:
        if not self._over:
            self._over = True
            self._ended(error)


async def _close(stream: Any) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()


def _nothing() -> None:
    pass
