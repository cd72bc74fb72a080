"""One timer for many connections.

Knows times, and who is to be woken at them; not why, nor what a connection is.  The times are those of
`protoframe._clock`.
"""

from __future__ import annotations

import heapq
import math
import typing

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from protoframe._clock import Timer, call_later, clock_of, unwatch_steps, watch_steps

__all__ = ["Alarms", "Sleeper"]

# Not in the class: there its namespace would become the class's name.
_log = Logger(namespace="protoframe.clock")

#: Entries of a heap that nobody waits for any more, above as many as there are others, until they are swept.
_SPARE = 64
#: Seconds that one waits at least, where it does.
_LEAST = 1e-6


class Sleeper(typing.Protocol):
    """What `Alarms` wake.

    :ivar timer_due: when; infinity for never.  It is the alarms' to set.
    """

    timer_due: float

    def woken(self) -> None:
        """The time has come."""

    def rearm(self) -> None:
        """The wall clock was set."""


class Alarms:
    """One timer of a reactor for many that each have one: an idle connection costs an entry of a dictionary.

    Those that are due within the next two seconds stand in a heap, by their times; all others in dictionaries, one
    for each second, so that whoever is told to sleep less, or is gone, is not kept until then.

    :param reactor: for the time.
    :ivar reactor: the same.
    """

    def __init__(self, reactor: IReactorTime) -> None:
        self.reactor = reactor
        self._clock = clock_of(reactor)
        # In the order in which they came, which no address in memory decides, so that a seed does what it did before.
        self._later: dict[int, dict[Sleeper, None]] = {}
        self._soon: list[tuple[float, int, Sleeper]] = []
        # Seconds below this one have no dictionary: what is due in them is in the heap.
        self._horizon = -math.inf
        self._count = 0
        self._sleeping = 0
        self._timer: Timer | None = None
        self._timer_due = math.inf

    def set(self, sleeper: Sleeper, due: float) -> None:
        """Has it woken at a time, and not at another that was set before."""
        if sleeper.timer_due != math.inf:
            self._take_out(sleeper)
        # No clock shows less, and there may be no such time: what says -infinity means at once.
        sleeper.timer_due = due = max(due, 0.0)
        self._sleeping += 1
        second = math.floor(due)
        if second >= self._horizon:
            self._move_horizon(self._clock())
        if second < self._horizon:
            self._push(sleeper)
            wanted = due
        else:
            sleepers = self._later.get(second)
            if sleepers is None:
                sleepers = self._later[second] = {}
            sleepers[sleeper] = None
            wanted = second - 1.0
        if wanted < self._timer_due:
            self._wait_until(wanted)

    def unset(self, sleeper: Sleeper) -> None:
        """Has it not woken."""
        if sleeper.timer_due == math.inf:
            return
        self._take_out(sleeper)
        if not self._sleeping:
            self._rest()

    def _rest(self) -> None:
        """Nobody sleeps: nothing is to be waited for."""
        self._soon.clear()
        self._stop()
        unwatch_steps(self.reactor, self)

    def _take_out(self, sleeper: Sleeper) -> None:
        second = math.floor(sleeper.timer_due)
        sleeper.timer_due = math.inf
        self._sleeping -= 1
        # One in the heap is skipped in its time, which is near.
        sleepers = self._later.get(second)
        if sleepers is not None:
            sleepers.pop(sleeper, None)
            if not sleepers:
                del self._later[second]

    def rearm(self) -> None:
        """The wall clock was set: others than timers may wait for the reactor, too."""
        known = [sleeper for sleepers in self._later.values() for sleeper in sleepers]
        for sleeper in [*known, *(sleeper for _, _, sleeper in self._soon)]:
            try:
                sleeper.rearm()
            except Exception:
                _log.failure("a timer of {sleeper} failed", sleeper=sleeper)

    def _push(self, sleeper: Sleeper) -> None:
        self._count += 1
        if len(self._soon) > 2 * self._sleeping + _SPARE:
            # Most were told otherwise since.
            self._soon = [entry for entry in self._soon if entry[2].timer_due == entry[0]]
            heapq.heapify(self._soon)
        heapq.heappush(self._soon, (sleeper.timer_due, self._count, sleeper))

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._timer_due = math.inf

    def _wait_until(self, due: float) -> None:
        self._stop()
        if due < math.inf:
            self._timer_due = due
            seconds = due - self._clock()
            # So little that a time may be the same with and without it would never pass.
            self._timer = call_later(self.reactor, max(seconds, _LEAST) if seconds > 0 else 0.0, self._wake)
            watch_steps(self.reactor, self)

    def _move_horizon(self, now: float) -> None:
        horizon = math.floor(now) + 2
        if horizon > self._horizon:
            self._horizon = horizon
            for second in [second for second in self._later if second < horizon]:
                for sleeper in self._later.pop(second):
                    self._push(sleeper)

    def _wake(self) -> None:
        self._timer = None
        self._timer_due = math.inf
        now = self._clock()
        self._move_horizon(now)
        woken = []
        while self._soon and self._soon[0][0] <= now:
            woken.append(heapq.heappop(self._soon))
        # What sleeps again until now, or less, is for the next time, so that others have their turn.
        for due, _, sleeper in woken:
            if sleeper.timer_due == due:
                sleeper.timer_due = math.inf
                self._sleeping -= 1
                try:
                    sleeper.woken()
                except Exception:
                    _log.failure("a timer of {sleeper} failed", sleeper=sleeper)
        if not self._sleeping:
            self._rest()
            return
        wanted = min(self._later) - 1.0 if self._later else math.inf
        if self._soon:
            wanted = min(wanted, self._soon[0][0])
        if wanted < self._timer_due:
            self._wait_until(wanted)
