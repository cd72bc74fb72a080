"""Virtual time: what is to happen when, and in an order that a seed decides where that is at the same time.

Knows calls and when they are due; not what a network is.  A reactor makes no promise about the order of calls that are
due at once, and `twisted.internet.task.Clock` keeps one all the same: what relies on it passes there and fails in
earnest.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.interfaces import IDelayedCall
from zope.interface import implementer

__all__ = ["Call", "Timeline"]


@implementer(IDelayedCall)
class Call:
    """A call that is to be made."""

    def __init__(self, timeline: Timeline, due: float, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._timeline = timeline
        self._due = due
        self.function = function
        self._args = args
        self._kwargs = kwargs
        self._is_called = self._is_cancelled = False
        # Which entry of the heap is this call's: another one is out of date.
        self.entry = 0

    def getTime(self) -> float:
        """When it is due, in seconds."""
        return self._due

    def cancel(self) -> None:
        """Makes no call."""
        self._check()
        self._is_cancelled = True
        self._timeline.forget(self)

    def delay(self, secondsLater: float) -> None:  # noqa: N803 - the interface calls it so
        """Puts it off."""
        self._check()
        self._due += secondsLater
        self._timeline.add(self)

    def reset(self, secondsFromNow: float) -> None:  # noqa: N803 - likewise
        """Makes it due so many seconds from now."""
        self._check()
        self._due = self._timeline.now + secondsFromNow
        self._timeline.add(self)

    def active(self) -> bool:
        """Whether it is still to be made."""
        return not (self._is_called or self._is_cancelled)

    def _check(self) -> None:
        if self._is_called:
            raise AlreadyCalled
        if self._is_cancelled:
            raise AlreadyCancelled

    def run(self) -> None:
        """Makes the call."""
        self._is_called = True
        self.function(*self._args, **self._kwargs)


class Timeline:
    """The time, and what is still to happen.

    :param random: decides the order of what is due at the same time.
    :ivar now: the time, in seconds.
    """

    def __init__(self, random: random.Random) -> None:
        self.now = 0.0
        self._random = random
        self._heap: list[tuple[float, float, int, Call]] = []
        self._entries = 0
        self._calls: dict[Call, None] = {}

    @property
    def calls(self) -> list[Call]:
        """What is still to happen."""
        return list(self._calls)

    def call_later(self, seconds: float, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        """Makes a call in so many seconds; 0 is not at once, but in a turn of its own."""
        if not seconds >= 0:
            raise ValueError(f"a call cannot be made {seconds} seconds from now")
        call = Call(self, self.now + seconds, function, args, kwargs)
        self.add(call)
        return call

    def add(self, call: Call) -> None:
        """Has a call made when it is due."""
        self._entries += 1
        call.entry = self._entries
        self._calls[call] = None
        heapq.heappush(self._heap, (call.getTime(), self._random.random(), self._entries, call))

    def forget(self, call: Call) -> None:
        """A call is not to be made after all."""
        self._calls.pop(call, None)

    def next_due(self) -> float | None:
        """When the next call is due; ``None`` where there is none."""
        heap = self._heap
        while heap and (not heap[0][3].active() or heap[0][3].entry != heap[0][2]):
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def run_next(self) -> bool:
        """Lets the time pass until the next call, and makes it; whether there was one."""
        due = self.next_due()
        if due is None:
            return False
        call = heapq.heappop(self._heap)[3]
        self._calls.pop(call, None)
        self.now = max(self.now, due)
        call.run()
        return True
