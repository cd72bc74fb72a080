"""Timers keep to the monotonic clock, whatever becomes of the wall clock, which a reactor's own go by."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from protoframe import DeadlineExceeded, Protocol, _alarms, _clock, request, timeout
from protoframe._alarms import Alarms
from protoframe._clock import call_later
from tests.ends import Notes, talk

DAY = 86_400.0


class Sleeper(Protocol):
    def __init__(self) -> None:
        self.notes = Notes()

    @request
    async def sleep(self) -> None:
        self.notes.add("sleeps")
        await Deferred()


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the wall clock of this process, by so many seconds."""
    shift = [0.0]
    now = time.time
    monkeypatch.setattr(reactor, "seconds", lambda: now() + shift[0])
    monkeypatch.setattr(_clock.time, "time", lambda: now() + shift[0])

    def step(seconds: float) -> None:
        shift[0] += seconds

    yield step
    step(-shift[0])


@pytest.mark.parametrize("seconds", [-DAY, DAY])
@pytest_twisted.ensureDeferred
async def test_a_deadline_passes_in_its_time_when_the_wall_clock_is_set(seconds: float, wall: Any) -> None:
    async with talk(Sleeper, idle=False) as ends:
        began = time.monotonic()
        with timeout(1.5):
            call: Any = ends.proxy.sleep()
        # By then both ends have set their timers.
        await ends.served.notes.has("sleeps")
        wall(seconds)
        with pytest.raises(DeadlineExceeded):
            await call
        # When the clock is set back it is noticed within a second.
        assert 1.45 <= time.monotonic() - began < 4.0
        wall(-seconds)


class Timers(SynchronousTestCase):
    def test_one_goes_off_once_and_not_when_it_is_cancelled(self) -> None:
        clock = Clock()
        gone: list[str] = []
        call_later(clock, 1.0, lambda: gone.append("a"))
        cancelled = call_later(clock, 1.0, lambda: gone.append("b"))
        call_later(clock, -1.0, lambda: gone.append("c"))
        cancelled.cancel()
        cancelled.cancel()
        clock.advance(0)
        self.assertEqual(gone, ["c"])
        clock.pump([0.5, 0.5, 5.0])
        self.assertEqual(gone, ["c", "a"])

    def test_one_that_goes_off_early_waits_for_the_rest(self) -> None:
        gone: list[str] = []
        timer = call_later(reactor, 60.0, lambda: gone.append("a"))  # type: ignore[arg-type]
        timer._fire()
        self.assertEqual(gone, [])
        timer.cancel()


class Noting:
    """What wants to be woken at a time, and notes when it was."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.timer_due = math.inf
        self.wanted = math.inf
        self.woken_at: list[tuple[float, float]] = []

    def woken(self) -> None:
        self.woken_at.append((self.wanted, self.clock.seconds()))
        self.wanted = math.inf

    def rearm(self) -> None:
        pass


class OfMany(SynchronousTestCase):
    """`Alarms`: many timers behind one."""

    def test_each_is_woken_in_its_time_and_no_other(self) -> None:
        chance = random.Random(7)
        for _ in range(20):
            clock = Clock()
            alarms = Alarms(clock)  # type: ignore[arg-type]
            sleepers = [Noting(clock) for _ in range(chance.choice((1, 5, 200)))]
            for _ in range(300):
                sleeper = chance.choice(sleepers)
                if chance.random() < 0.2:
                    alarms.unset(sleeper)
                    sleeper.wanted = math.inf
                elif chance.random() < 0.7:
                    sleeper.wanted = clock.seconds() + chance.choice((0.0, 0.25, 1.5, 7.125, 30.0, 31.0))
                    alarms.set(sleeper, sleeper.wanted)
                clock.advance(chance.choice((0.0, 0.0625, 0.5, 2.25)))
                now = clock.seconds()
                self.assertEqual([one for one in sleepers if one.wanted < now], [])
                self.assertLessEqual(len(clock.getDelayedCalls()), 1)
            for sleeper in sleepers:
                alarms.unset(sleeper)
                self.assertTrue(all(wanted <= at for wanted, at in sleeper.woken_at))
            self.assertEqual((clock.getDelayedCalls(), alarms._later, alarms._soon), ([], {}, []))

    def test_one_that_is_gone_is_not_kept(self) -> None:
        clock = Clock()
        alarms = Alarms(clock)  # type: ignore[arg-type]
        stays = Noting(clock)
        alarms.set(stays, 60.0)
        for _ in range(500):
            goes = Noting(clock)
            alarms.set(goes, 1.0)
            alarms.unset(goes)
        self.assertLess(len(alarms._soon), 100)

    def test_at_once_may_be_said_as_any_time_that_has_passed(self) -> None:
        clock = Clock()
        sleeper = Noting(clock)
        Alarms(clock).set(sleeper, -math.inf)  # type: ignore[arg-type]
        clock.advance(0)
        self.assertEqual(len(sleeper.woken_at), 1)

    def test_one_that_fails_holds_up_no_other(self) -> None:
        clock = Clock()
        alarms = Alarms(clock)  # type: ignore[arg-type]
        broken, other = Noting(clock), Noting(clock)
        self.patch(broken, "woken", lambda: 1 // 0)
        alarms.set(broken, 1.0)
        alarms.set(other, 1.0)
        clock.advance(1.0)
        self.assertEqual(len(other.woken_at), 1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_the_wall_clock_that_was_set_is_told_to_all_though_one_fails(self) -> None:
        clock = Clock()
        alarms = Alarms(clock)  # type: ignore[arg-type]
        sleepers = [Noting(clock) for _ in range(3)]
        told: list[int] = []
        for number, sleeper in enumerate(sleepers):
            self.patch(sleeper, "rearm", lambda number=number: told.append(1 // number) if number != 1 else 1 // 0)
            alarms.set(sleeper, 0.5 if number else 60.0)
        alarms.rearm()
        self.assertEqual(told, [0])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    def test_when_nobody_sleeps_any_more_nobody_watches_the_wall_clock(self) -> None:
        clock = Clock()
        alarms = Alarms(clock)  # type: ignore[arg-type]
        rested: list[object] = []
        self.patch(_alarms, "unwatch_steps", lambda reactor, steady: rested.append(steady))
        alarms.set(Noting(clock), 1.0)
        clock.advance(1.0)
        self.assertEqual(rested, [alarms])
        sleeper = Noting(clock)
        alarms.set(sleeper, 5.0)
        alarms.unset(sleeper)
        self.assertEqual(rested, [alarms, alarms])
