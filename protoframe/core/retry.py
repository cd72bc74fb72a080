"""When a call is made again, and how often: policies, and the budget that keeps retries from multiplying an outage.

Knows numbers, errors and the time; not how a call is made, nor where chance comes from.
"""

from __future__ import annotations

import dataclasses
import math

from protoframe.errors import Error, MessageTooLarge, Status

__all__ = ["Backoff", "RetryBudget", "RetryPolicy"]


#: One retry; five fifths of one are a little less.
_ONE = 1.0 - 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """How long to wait before the next attempt: longer each time, and each time a little different.

    :param first: seconds before the second attempt; above 0.
    :param factor: how many times as long each time; 1 or more.
    :param longest: seconds at the most; at least ``first``.
    :param jitter: what part of it is left to chance, so that many do not come at once; 0 to 1.
    :raises ValueError: a value is out of its bounds.
    """

    first: float = 1.0
    factor: float = 1.5
    longest: float = 60.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        _bounded("first", self.first, 1e-6, 86400.0)
        _bounded("factor", self.factor, 1.0, 1000.0)
        _bounded("longest", self.longest, self.first, 86400.0)
        _bounded("jitter", self.jitter, 0.0, 1.0)

    def seconds(self, failures: int, chance: float) -> float:
        """The seconds to wait after so many failures in a row.

        :param failures: 1 or more.
        :param chance: from 0 to 1; at 1 it waits for as long as it may.
        """
        exponent = min(failures - 1, 1000)
        longest = (
            self.longest
            if self.factor > 1 and exponent > 700 / math.log(self.factor)
            else self.first * (self.factor**exponent)
        )
        return min(longest, self.longest) * (1 - self.jitter * (1 - chance))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Which calls are made again, and when.

    A call is made again only where it certainly did not run, or where its method is declared ``idempotent``; never past
    its deadline, and within the budget of its client.

    :param attempts: how often it is made in all; 1 for no retries, 100 at most.
    :param backoff: how long to wait before each further attempt, where the server does not say (`TryLater`).
    :param statuses: of errors after which it is made again.
    :param hedge_after: seconds after which an idempotent call that has no answer yet is made a second time, at another
        server if there is one; the first answer counts.  ``None``: never.
    :raises ValueError: a value is out of its bounds.
    """

    attempts: int = 4
    backoff: Backoff = dataclasses.field(
        default_factory=lambda: Backoff(first=0.05, factor=2.0, longest=2.0, jitter=0.5)
    )
    statuses: frozenset[Status] = frozenset({Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED})
    hedge_after: float | None = None

    def __post_init__(self) -> None:
        _bounded("attempts", self.attempts, 1, 100)
        if self.hedge_after is not None:
            _bounded("hedge_after", self.hedge_after, 0.0, 86400.0)

    def allows(self, error: Error, attempts: int, *, may_have_run: bool, idempotent: bool) -> bool:
        """Whether a call may be made again after an error.

        :param attempts: how often it was made.
        :param may_have_run: whether it may have run at any of these.
        """
        return (
            attempts < self.attempts
            and error.status in self.statuses
            and not isinstance(error, MessageTooLarge)
            and (idempotent or not may_have_run)
        )


class RetryBudget:
    """How many calls may be made again: a part of those that are made, and so many a second beside.

    :param ratio: retries for each call.
    :param per_second: retries a second that may be made in any case.
    :param now: the time.
    Hedges are no more than the part of the calls, however few they are: a second is a long time for them.

    :ivar calls: how many calls were made.
    :ivar retries: how many of them were made again, hedges included.
    :ivar refused: how many were not, for want of budget.
    """

    def __init__(self, ratio: float = 0.2, per_second: float = 10.0, *, now: float) -> None:
        _bounded("ratio", ratio, 0.0, 10.0)
        _bounded("per_second", per_second, 0.0, 1e6)
        self.calls = 0
        self.retries = 0
        self.refused = 0
        self._ratio = ratio
        self._per_second = per_second
        # What is saved is what a second brings: a budget is no licence for a burst after a quiet day.
        self._most = max(per_second, 1.0)
        self._left = self._most
        self._hedges = 1.0
        self._at = now

    def made(self) -> None:
        """A call is made."""
        self.calls += 1
        self._hedges = min(self._hedges + self._ratio, self._most)
        self._left = min(self._left + self._ratio, self._most)

    def has(self, now: float) -> bool:
        """Whether a call could be made again."""
        self._left = min(self._left + (now - self._at) * self._per_second, self._most)
        self._at = now
        return self._left >= _ONE

    def take_hedge(self, now: float) -> bool:
        """Whether a call may be hedged; if so, that is counted."""
        if self._hedges < _ONE:
            self.refused += 1
            return False
        if not self.take(now):
            return False
        self._hedges -= 1.0
        return True

    def take(self, now: float) -> bool:
        """Whether a call may be made again; if so, that is counted."""
        if not self.has(now):
            self.refused += 1
            return False
        self._left -= 1.0
        self.retries += 1
        return True


def _bounded(name: str, value: float, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}: expected {least:g} to {most:g}, got {value!r}")
