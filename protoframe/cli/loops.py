"""Makes calls for a measurement, and takes down when they were due, sent and answered.

Knows the two ways to make load: a closed loop, which waits for answers, and an open one, which goes by a timetable.
Not connections nor what is called: it is given a function that makes a call, and the reactor for the time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from protoframe._clock import Timer, call_later, clock_of
from protoframe.cli.histogram import Histogram

__all__ = ["ClosedLoop", "ErrorKind", "Loop", "OpenLoop", "Plan"]

#: Seconds by which a call may go before it is due.  A reactor's timers are up to 1 ms late, which is not the server's
#: doing: so the timer is set for that much earlier.
_AHEAD = 0.0015
#: Seconds between two looks at the timetable.
_TICK = 0.0005
#: Seconds from a call that failed before it was sent to the next try.
_PAUSE = 0.05
#: Kinds of errors that are told apart: their names are the server's to choose.
_MOST_KINDS = 50
_NANOSECONDS = 1e9


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How much of what.

    :ivar concurrency: calls on the way at once, at most.
    :ivar duration: seconds for which calls are sent and counted; may be infinite where there is a number of requests.
    :ivar requests: calls that are counted; ``None`` for as many as the duration has room for.
    :ivar warmup: seconds before that, of which nothing is counted.
    :ivar rate: calls a second, of an open loop; ``None`` for a closed one.
    """

    concurrency: int
    duration: float
    requests: int | None = None
    warmup: float = 0.0
    rate: float | None = None


@dataclasses.dataclass(slots=True)
class ErrorKind:
    """Errors of one name.

    :ivar status: the error's number; ``None`` where it has none.
    :ivar first: the first of them.
    """

    status: int | None
    first: BaseException
    count: int = 0


class Loop:
    """Makes calls, as its subclasses say when.

    :param reactor: for the timer; times are those of its monotonic clock.
    :param call: makes a call; the Deferred may fire with the number of items that the answer has.
    :ivar done: fires when all is answered, or fails with the very first outcome where that is an error.
    :ivar latency: from when calls were due to their answers; only answers that are no errors are here.
    :ivar service: the same, from when they were sent.
    :ivar sent: calls that were sent and count.
    :ivar answered: those of them that have an answer, which is no error.
    :ivar items: that came in these answers.
    :ivar errors: the others', by name.
    :ivar unsent: calls that were due in time, and were not sent because too many others were on the way.
    :ivar in_flight: calls on the way, counted or not.
    """

    def __init__(self, reactor: IReactorTime, call: Callable[[], Deferred[Any]], plan: Plan) -> None:
        self.done: Deferred[None] = Deferred()
        self.latency = Histogram()
        self.service = Histogram()
        self.sent = 0
        self.answered = 0
        self.items = 0
        self.errors: dict[str, ErrorKind] = {}
        self.unsent = 0
        self.in_flight = 0
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._call = call
        self._plan = plan
        self._began = self._from = self._until = self._last = 0.0
        self._in_time = 0
        self._items_in_time = 0
        self._has_outcome = False
        self._is_full = False
        self._is_pumping = False
        self._is_stuck = False
        self._has_ended = False
        self._is_over = False
        self._timer: Timer | None = None
        self._end_timer: Timer | None = None

    def start(self) -> None:
        """Begins."""
        plan = self._plan
        self._began = self._last = self._clock()
        self._from = self._began + plan.warmup
        self._until = self._from + plan.duration
        if math.isfinite(plan.duration):
            self._end_timer = call_later(self._reactor, plan.warmup + plan.duration, self._end)
        self._pump()

    def stop(self) -> None:
        """Ends it where it is: what is on the way does not count any more."""
        if not self._has_ended:
            self._until = min(self._until, self._clock())
            self._last = self._until
            self._is_over = True
            self._end()
        self._is_over = True

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def seconds(self) -> float:
        """Seconds for which calls were counted, up to now."""
        end = min(self._until, self._last if self._has_ended else self._clock())
        if self._has_ended and math.isfinite(self._plan.duration) and self._plan.requests is None:
            end = self._until
        return max(0.0, end - self._from)

    @property
    def achieved(self) -> float:
        """Answers a second: those that came while calls were counted."""
        seconds = self.seconds
        return self._in_time / seconds if seconds > 0 else 0.0

    @property
    def achieved_items(self) -> float:
        """Items a second, of the same answers."""
        seconds = self.seconds
        return self._items_in_time / seconds if seconds > 0 else 0.0

    @property
    def failed(self) -> int:
        """Calls that count and ended with an error."""
        return sum(kind.count for kind in self.errors.values())

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is sent."""
        return self._has_ended

    def _next(self, now: float) -> tuple[float, bool] | None:
        """When the next call is due that is to be sent now, and whether it counts; ``None`` for none now."""
        raise NotImplementedError

    def _wait(self, now: float) -> float:
        """Seconds until there may be one, while there is room for more; infinity for never."""
        raise NotImplementedError

    def _pump(self) -> None:
        """Sends what is to be sent now."""
        self._timer = None
        if self._is_pumping or self._has_ended:
            return
        self._is_pumping = True
        self._is_stuck = False
        most = self._plan.concurrency
        now = self._clock()
        try:
            while self.in_flight < most and not self._is_stuck and (next_one := self._next(now)) is not None:
                self._send(*next_one, now)
                now = self._clock()
        finally:
            self._is_pumping = False
        if self._has_ended:
            self._settle()
            return
        self._is_full = self.in_flight >= most
        if not self._is_full:
            wait = max(_PAUSE if self._is_stuck else _TICK, self._wait(now))
            if math.isfinite(wait):
                self._timer = call_later(self._reactor, wait, self._pump)

    def _send(self, due: float, counts: bool, now: float) -> None:
        self.in_flight += 1
        self.sent += counts
        # What goes a little before it is due would look faster than it was.
        given = (min(due, now), now, counts)
        self._call().addCallbacks(self._succeeded, self._failed, callbackArgs=given, errbackArgs=given)

    def _succeeded(self, result: Any, due: float, sent: float, counts: bool) -> None:
        now = self._clock()
        if self._is_over:
            return
        items = result if type(result) is int else 0
        if counts:
            self.answered += 1
            self.items += items
            self.latency.record(int((now - due) * _NANOSECONDS))
            self.service.record(int((now - sent) * _NANOSECONDS))
        if now <= self._until and (counts or now >= self._from):
            self._in_time += 1
            self._items_in_time += items
        self._has_outcome = True
        self._ended_one(now)

    def _failed(self, failure: Failure, due: float, sent: float, counts: bool) -> None:
        del due, sent
        if self._is_over:
            return
        error = cast("BaseException", failure.value)
        if not self._has_outcome:
            self._is_over = True
            self._end()
            self.done.errback(error)
            return
        if counts:
            name = getattr(error, "type_name", type(error).__name__)
            if name not in self.errors and len(self.errors) >= _MOST_KINDS:
                name = "others"
            kind = self.errors.setdefault(name, ErrorKind(getattr(error, "status", None), error))
            kind.count += 1
        self._ended_one(self._clock())

    def _ended_one(self, now: float) -> None:
        self.in_flight -= 1
        self._last = now
        if self._is_pumping:
            # It had its outcome before it was sent: another would have the same.
            self._is_stuck = True
        elif self._has_ended:
            self._settle()
        elif self._is_full:
            self._pump()

    def _end(self) -> None:
        """Sends no more."""
        self._has_ended = True
        self._count_unsent()
        for timer in (self._timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._end_timer = None
        if not self._is_pumping:
            self._settle()

    def _count_unsent(self) -> None:
        """There is nothing that waits, in general."""

    def _settle(self) -> None:
        if not self.in_flight and not self._is_over:
            self._is_over = True
            self.done.callback(None)


class ClosedLoop(Loop):
    """Sends a call when an answer is there: so many are on the way all the time.

    A server that stalls is asked less meanwhile, and the calls that nobody made then are not in the latencies
    ("coordinated omission").
    """

    def _next(self, now: float) -> tuple[float, bool] | None:
        requests = self._plan.requests
        if now >= self._until or (requests is not None and self.sent >= requests):
            self._end()
            return None
        return now, now >= self._from

    def _wait(self, now: float) -> float:
        # There is room only where something is stuck.
        return _PAUSE


class OpenLoop(Loop):
    """Sends calls by a timetable, so many a second, whatever becomes of those before.

    One that is due when as many are on the way as may be waits for its turn, and its waiting is in the latency.  Those
    of the warm-up that still wait when it is over are dropped: or a server that is asked too much would be busy with
    them for all the time in which calls are counted.
    """

    def __init__(self, reactor: IReactorTime, call: Callable[[], Deferred[Any]], plan: Plan) -> None:
        if plan.rate is None:
            raise ValueError("an open loop needs a rate")
        super().__init__(reactor, call, plan)
        self._rate = plan.rate
        self._number = 0
        # Whole numbers, for sums of floating-point times would lose a call now and then.
        self._first = self._due_before(plan.warmup)
        counted = plan.requests if plan.requests is not None else math.inf
        if math.isfinite(plan.duration):
            counted = min(counted, self._due_before(plan.warmup + plan.duration) - self._first)
        self._total = self._first + counted

    def _due_before(self, seconds: float) -> int:
        return max(0, math.ceil(seconds * self._rate - 1e-6))

    def _due(self) -> float:
        return self._began + self._number / self._rate

    def _next(self, now: float) -> tuple[float, bool] | None:
        if self._number < self._first and now >= self._from:
            self._number = self._first
        number = self._number
        if number >= self._total:
            if self._plan.requests is not None:
                self._end()
            return None
        due = self._due()
        if due > now + _AHEAD:
            return None
        self._number = number + 1
        return due, number >= self._first

    def _wait(self, now: float) -> float:
        return self._due() - _AHEAD - now if self._number < self._total else math.inf

    def _count_unsent(self) -> None:
        due = self._total
        if math.isfinite(self._until):
            due = min(due, self._due_before(self._until - self._began))
        self.unsent = int(max(0, due - max(self._number, self._first)))
