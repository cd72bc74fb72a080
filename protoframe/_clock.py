"""The time that protocols go by, and timers that keep to it.

Knows which clock belongs to a reactor.  ``reactor.seconds()`` of a running reactor is the wall clock, which an
administrator or NTP may step, and ``callLater`` goes by it: a timer would go off early, or, where the clock is set back
by a day, a day late.  Deadlines and timers go by the monotonic clock instead.
"""

from __future__ import annotations

import threading
import time
import typing
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from twisted.internet.interfaces import IReactorCore, IReactorTime

__all__ = ["Timer", "call_later", "clock_of", "unwatch_steps", "watch_steps"]

#: Seconds between two looks at whether the wall clock was set, and how far it must have been.
_LOOK = 1.0
_STEP = 0.1
#: Seconds by which a timer may go off early.
_EARLY = 0.001


def clock_of(reactor: IReactorTime) -> Callable[[], float]:
    """A function that gives the time in seconds.

    A reactor that runs gets the monotonic clock; anything else that provides `IReactorTime`, such as
    `twisted.internet.task.Clock`, keeps the time itself.
    """
    core: Any = IReactorCore
    if core.providedBy(reactor):
        return time.monotonic
    return reactor.seconds


class _Steady(typing.Protocol):
    """What has timers of a reactor."""

    def rearm(self) -> None:
        """The wall clock was set: timers of the reactor are to be set anew."""


class _StepWatch:
    """Notices that the wall clock was set while something has timers of a reactor.

    A thread looks, for a reactor that waits for a timer sleeps until then.  It ends when nothing has timers any more.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._steady: WeakSet[_Steady] = WeakSet()
        self._thread: threading.Thread | None = None

    def add(self, steady: _Steady) -> None:
        """Something has timers."""
        self._steady.add(steady)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, name="protoframe clock", daemon=True)
            self._thread.start()

    def remove(self, steady: _Steady) -> None:
        """Something has none any more."""
        self._steady.discard(steady)

    def _look(self) -> None:
        known = time.time() - time.monotonic()
        while self._steady:
            time.sleep(_LOOK)
            offset = time.time() - time.monotonic()
            if abs(offset - known) > _STEP:
                known = offset
                self._reactor.callFromThread(self._rearm)

    def _rearm(self) -> None:
        for steady in list(self._steady):
            steady.rearm()


_watches: WeakKeyDictionary[IReactorTime, _StepWatch] = WeakKeyDictionary()


def watch_steps(reactor: IReactorTime, steady: _Steady) -> None:
    """Has something that has timers of a reactor set them anew when the wall clock was set."""
    if clock_of(reactor) is time.monotonic:
        watch = _watches.get(reactor)
        if watch is None:
            watch = _watches[reactor] = _StepWatch(reactor)
        watch.add(steady)


def unwatch_steps(reactor: IReactorTime, steady: _Steady) -> None:
    """It has none any more."""
    watch = _watches.get(reactor)
    if watch is not None:
        watch.remove(steady)


class Timer:
    """A call that is made later, by the clock of `clock_of`: what `call_later` returns."""

    __slots__ = ("__weakref__", "_call", "_clock", "_due", "_function", "_reactor")

    def __init__(self, reactor: IReactorTime, seconds: float, function: Callable[[], Any]) -> None:
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._due = self._clock() + seconds
        self._function = function
        self._call = reactor.callLater(seconds, self._fire)
        watch_steps(reactor, self)

    def cancel(self) -> None:
        """Makes no call, if none was made yet."""
        if self._call.active():
            self._call.cancel()

    def rearm(self) -> None:
        """The wall clock was set."""
        if self._call.active():
            self._call.reset(max(0.0, self._due - self._clock()))

    def _fire(self) -> None:
        left = self._due - self._clock()
        if left > _EARLY:
            self._call = self._reactor.callLater(left, self._fire)
        else:
            self._function()


def call_later(reactor: IReactorTime, seconds: float, function: Callable[[], Any]) -> Timer:
    """Calls a function in so many seconds, at once where they are below 0, whatever becomes of the wall clock."""
    return Timer(reactor, max(0.0, seconds), function)
