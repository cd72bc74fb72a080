"""The time that protocols go by.

Knows which clock belongs to a reactor.  ``reactor.seconds()`` of a running reactor is the wall clock, which an
administrator or NTP may step; deadlines and timers go by the monotonic clock instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReactorCore, IReactorTime

__all__ = ["clock_of"]


def clock_of(reactor: IReactorTime) -> Callable[[], float]:
    """A function that gives the time in seconds.

    A reactor that runs gets the monotonic clock; anything else that provides `IReactorTime`, such as
    `twisted.internet.task.Clock`, keeps the time itself.
    """
    core: Any = IReactorCore
    if core.providedBy(reactor):
        return time.monotonic
    return reactor.seconds
