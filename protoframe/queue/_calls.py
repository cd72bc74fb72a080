"""Calls that are made again, and deliveries that are settled together.

Knows errors, deadlines and tags; not what publishes, nor what consumes.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from contextvars import Context
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater

from protoframe import DeadlineExceeded, Error, TryLater, Unavailable, timeout
from protoframe.queue._contract import MOST_AT_ONCE, LeaseLost, Queue, Settled, Tag

__all__ = ["Settling", "insist", "is_passing", "never_ran", "own_copy", "run_in"]

T = TypeVar("T")

#: Seconds before the second attempt, and at most before a further one.
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
#: Calls that settle deliveries in the same way, on their way at once.
_MOST_CALLS = 2


def is_passing(error: Error) -> bool:
    """Whether it may be otherwise in a moment: the connection, the server or its store is not there now."""
    return isinstance(error, Unavailable)


def never_ran(error: Error) -> bool:
    """The same, of a call that certainly did not run."""
    return isinstance(error, Unavailable) and not error.may_have_run


def own_copy(error: BaseException) -> BaseException:
    """The same error for somebody else, with a traceback of its own."""
    return copy.copy(error)


def run_in(context: Context, coroutine: Coroutine[Any, Any, T]) -> Deferred[T]:
    """Runs a coroutine in a context, and what is called back with its result too.

    What fires a call's Deferred has its callbacks surrounded by the call's own deadline: who goes on from there, or
    waits, is to have their own.
    """
    running: Deferred[T] = context.copy().run(Deferred.fromCoroutine, coroutine)
    done: Deferred[T] = Deferred(lambda _: running.cancel())
    running.addCallbacks(
        lambda result: context.copy().run(done.callback, result),
        lambda failure: context.copy().run(done.errback, failure),
    )
    return done


async def insist(
    reactor: Any, seconds: float, call: Callable[[], Awaitable[T]], may_repeat: Callable[[Error], bool]
) -> T:
    """The result of a call that is made again, until its deadline.

    :param seconds: that all of it may take, where no deadline that surrounds it is sooner.
    :param may_repeat: whether it is made again after an error.
    :raises Error: the last one; it says that the call did not run only where it did not at any time.
    """
    earlier: Error | None = None
    may_have_run = False
    pause = _FIRST_PAUSE
    with timeout(seconds):
        while True:
            try:
                return await call()
            except Error as error:
                may_have_run = error.may_have_run = error.may_have_run or may_have_run
                if not may_repeat(error):
                    if earlier is not None and isinstance(error, DeadlineExceeded):
                        error.message = f"{error.message}; before that, {type(earlier).__name__}: {earlier.message}"
                    raise
                earlier = error
                wait = max(pause, error.retry_after) if isinstance(error, TryLater) else pause
            await deferLater(reactor, wait)
            pause = min(2 * pause, _LONGEST_PAUSE)


class Settling:
    """Settles the deliveries of a queue, to one group: what is asked for in one turn of the reactor goes in one call.

    :param insist: makes a call, again where need be.  That is safe, for a tag is settled once.
    :param context: where the calls are made: they are of several who asked.
    """

    def __init__(
        self,
        reactor: Any,
        calls: Queue,
        queue: str,
        group: str,
        insist: Callable[[Callable[[], Awaitable[Settled]]], Coroutine[Any, Any, Settled]],
        context: Context,
    ) -> None:
        self.queue = queue
        self.group = group
        self._reactor = reactor
        self._calls = calls
        self.insist = insist
        self.context = context
        self._gathered: dict[Hashable, _Gathered] = {}

    def acknowledge(self, tag: Tag) -> Deferred[None]:
        """Fires when that is durable; fails with `LeaseLost`, or another `Error`."""
        return self._settle("acknowledge", tag, lambda tags: self._calls.acknowledge(self.queue, tags, self.group))

    def reject(self, tag: Tag, requeue: bool, delay: float, note: str) -> Deferred[None]:
        """The same."""
        return self._settle(
            (requeue, delay, note),
            tag,
            lambda tags: self._calls.reject(self.queue, tags, self.group, requeue=requeue, delay=delay, note=note),
        )

    def extend(self, tag: Tag) -> Deferred[None]:
        """Fires when the lease has begun anew."""
        return self._settle("extend", tag, lambda tags: self._calls.extend(self.queue, tags, self.group))

    def give_back(self, tags: Sequence[Tag]) -> Deferred[None]:
        """Has what nobody has looked at be delivered again, at once; fires when that is done, or cannot be."""
        calls: list[Deferred[Any]] = [
            run_in(self.context, self._give_back(tags[start : start + MOST_AT_ONCE]))
            for start in range(0, len(tags), MOST_AT_ONCE)
        ]
        return DeferredList(calls, consumeErrors=True).addCallback(lambda _: None)

    async def _give_back(self, tags: Sequence[Tag]) -> None:
        # Not made again: where it fails, the end of the stream or of the lease does the same.
        await self._calls.reject(self.queue, tags, self.group, requeue=True, seen=False)

    def flush(self) -> Deferred[None]:
        """Sends what is gathered now, and fires when all that is on its way has its outcome."""
        waits: list[Deferred[Any]] = [gathered.flush() for gathered in list(self._gathered.values())]
        return DeferredList(waits).addCallback(lambda _: None)

    def _settle(self, how: Hashable, tag: Tag, call: Callable[[Sequence[Tag]], Awaitable[Settled]]) -> Deferred[None]:
        gathered = self._gathered.get(how)
        if gathered is None:
            gathered = self._gathered[how] = _Gathered(self, call, lambda: self._gathered.pop(how, None))
        return gathered.add(tag)

    def call_soon(self, function: Callable[[], None]) -> None:
        """Calls a function in the next turn of the reactor."""
        self._reactor.callLater(0, function)


class _Gathered:
    """Deliveries that are settled in one way.

    :param call: settles several.
    :param over: called when none is left.
    """

    def __init__(
        self, settling: Settling, call: Callable[[Sequence[Tag]], Awaitable[Settled]], over: Callable[[], Any]
    ) -> None:
        self._settling = settling
        self._call = call
        self._over = over
        self._waiting: list[tuple[Tag, Deferred[None]]] = []
        self._is_due = False
        self._calls = 0
        self._flushed: list[Deferred[None]] = []

    def add(self, tag: Tag) -> Deferred[None]:
        done: Deferred[None] = Deferred()
        self._waiting.append((tag, done))
        if not self._is_due and self._calls < _MOST_CALLS:
            self._is_due = True
            self._settling.call_soon(self._send)
        return done

    def flush(self) -> Deferred[None]:
        flushed: Deferred[None] = Deferred()
        self._flushed.append(flushed)
        # What is sent after this is to find them settled: here there is no waiting for the calls before.
        while self._waiting:
            self._send_some()
        self._settle_flushed()
        return flushed

    def _send(self) -> None:
        self._is_due = False
        while self._waiting and self._calls < _MOST_CALLS:
            self._send_some()
        self._settle_flushed()

    def _send_some(self) -> None:
        several = self._waiting[:MOST_AT_ONCE]
        del self._waiting[:MOST_AT_ONCE]
        self._calls += 1
        tags = [tag for tag, _ in several]
        sending = run_in(self._settling.context, self._settling.insist(lambda: self._call(tags)))
        sending.addBoth(self._settled, several)

    def _settled(self, result: Any, several: list[tuple[Tag, Deferred[None]]]) -> None:
        self._calls -= 1
        if isinstance(result, Settled):
            lost = set(result.lost)
            for tag, done in several:
                if tag not in lost:
                    done.callback(None)
                else:
                    done.errback(
                        LeaseLost(
                            "the message was delivered again, was settled, or is gone",
                            queue=self._settling.queue,
                            sequence=tag.sequence,
                        )
                    )
        else:
            for _, done in several:
                done.errback(own_copy(result.value))
        if not self._is_due:
            self._send()

    def _settle_flushed(self) -> None:
        if self._waiting or self._calls:
            return
        if not self._is_due:
            self._over()
        flushed, self._flushed = self._flushed, []
        for one in flushed:
            one.callback(None)
