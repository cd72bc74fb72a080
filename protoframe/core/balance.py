"""Which of several servers takes the next call: whether one lost races, and whether its calls fail again and again.

Knows servers by what they are told apart by alone, outcomes and the time; not what a call is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

from protoframe.errors import Error, Status

__all__ = ["Balance"]

T = TypeVar("T", bound=Hashable)

#: Failures in a row after which a server is left alone, and for how many seconds, times how often it was in a row.
_FAILURES = 5
_SECONDS, _LONGEST = 10.0, 120.0
#: What counts against a server: not what a caller did wrong.
_COUNTS = frozenset(
    {Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.INTERNAL, Status.RESOURCE_EXHAUSTED, Status.DATA_LOSS}
)
#: How many times as long a server is taken to be at the most, and the seconds after which half of that is believed.
_SLOWEST = 64
_FADES = 10.0


class _Record:
    __slots__ = ("failures", "slow_since", "slowness", "times", "until")

    def __init__(self) -> None:
        self.failures = 0
        self.times = 0
        self.until = 0.0
        self.slowness = 1
        self.slow_since = 0.0


class Balance:
    """Keeps account of the servers of one client."""

    def __init__(self) -> None:
        self._records: dict[Hashable, _Record] = {}

    def forget(self, server: Hashable) -> None:
        """A server is one no more."""
        self._records.pop(server, None)

    def ended(self, server: Hashable, now: float, error: Error | None) -> None:
        """A call of a server has ended."""
        record = self._record(server)
        if error is None or error.status not in _COUNTS:
            record.failures = 0
            if now >= record.until:
                record.times = 0
            return
        record.failures += 1
        if record.failures >= _FAILURES and now >= record.until:
            record.times += 1
            record.failures = 0
            record.until = now + min(_SECONDS * record.times, _LONGEST)

    def lost(self, server: Hashable, now: float) -> None:
        """Another server had the answer to the same call sooner, though it was asked later.

        That is the one fair comparison of two servers: how long calls take says more of the calls.
        """
        slowness = self.slowness(server, now)
        record = self._record(server)
        record.slowness, record.slow_since = min(2 * slowness, _SLOWEST), now

    def without(self, servers: Sequence[T], now: float) -> list[T]:
        """Those that are not left alone; all of them where that would be more than half."""
        good = [server for server in servers if self.until(server) <= now]
        return good if 2 * len(good) >= len(servers) else list(servers)

    def until(self, server: Hashable) -> float:
        """Until when a server is left alone."""
        record = self._records.get(server)
        return record.until if record is not None else 0.0

    def slowness(self, server: Hashable, now: float) -> int:
        """How many times as long a server is taken to be as others, a power of 2.

        That fades, so that it is tried again.
        """
        record = self._records.get(server)
        if record is None or record.slowness == 1:
            return 1
        return max(1, record.slowness >> int((now - record.slow_since) / _FADES))

    def _record(self, server: Hashable) -> _Record:
        record = self._records.get(server)
        if record is None:
            record = self._records[server] = _Record()
        return record
