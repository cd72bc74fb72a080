"""Timers keep to the monotonic clock, whatever becomes of the wall clock, which a reactor's own go by."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from protoframe import DeadlineExceeded, Protocol, _clock, request, timeout
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
