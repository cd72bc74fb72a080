"""What the stores have in common that go by the rules of `protoframe.servers.queue.rules`.

Knows which rule each call is, when the next thing is due, and who is told what has happened; not where the rules run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from protoframe.queue import Message, Receipt, Settings, Settled, Statistics, Tag, Waiting
from protoframe.servers.queue.rules import Rules
from protoframe.servers.queue.selector import Selector
from protoframe.servers.queue.store import IStoreListener, Position, Taken, Verdict

__all__ = ["Happened", "RuledStore"]

_log = Logger(namespace="protoframe.queue")

#: Seconds that a timer takes at most, and at least.
_LONGEST, _SHORTEST = 3600.0, 0.001


class Happened:
    """What happened in the rules that nobody waits for: taken from them, to be told.

    :ivar next_due: when the next thing is due.
    """

    __slots__ = ("_lost", "_woken", "next_due")

    def __init__(self, rules: Rules) -> None:
        self._woken, rules.woken = rules.woken, set()
        self._lost, rules.lost = rules.lost, []
        self.next_due = rules.next_due

    def tell(self, listener: IStoreListener) -> None:
        """Tells it."""
        lost: dict[tuple[str, str], list[Tag]] = {}
        for queue, group, tag in self._lost:
            lost.setdefault((queue, group), []).append(tag)
        for (queue, group), tags in lost.items():
            listener.lost(queue, group, tags)
        for queue, group in sorted(self._woken):
            listener.ready(queue, group)


class RuledStore:
    """A store that goes by `Rules`.

    :param reactor: for the time when something is due.
    :param clock: gives the time, in seconds since the epoch.
    """

    _listener: IStoreListener
    _rules: Rules

    def __init__(self, reactor: Any, clock: Callable[[], float]) -> None:
        self._reactor = reactor
        self._clock = clock
        self._timer: Any = None
        self._due = math.inf
        self._telling: Any = None

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
        """Has a rule applied, in its turn."""
        raise NotImplementedError

    def declare(self, queue: str, settings: Settings, replace: bool) -> Deferred[bool]:
        return self._submit(self._rules.declare, queue, settings, replace)

    def delete(self, queue: str, only_empty: bool) -> Deferred[int]:
        return self._submit(self._rules.delete, queue, only_empty)

    def publish(self, queue: str, messages: Sequence[Message]) -> Deferred[list[Receipt]]:
        return self._submit(self._rules.publish, queue, messages)

    def take(
        self, queue: str, group: str, count: int, octets: int, selector: Selector | None, after: Position | None
    ) -> Deferred[Taken]:
        return self._submit(self._rules.take, queue, group, count, octets, selector, after)

    def settle(self, queue: str, group: str, tags: Sequence[Tag], verdict: Verdict) -> Deferred[Settled]:
        return self._submit(self._rules.settle, queue, group, tags, verdict)

    def extend(self, queue: str, group: str, tags: Sequence[Tag]) -> Deferred[Settled]:
        return self._submit(self._rules.extend, queue, group, tags)

    def browse(
        self, queue: str, group: str, count: int, octets: int, selector: Selector | None, after: object
    ) -> Deferred[tuple[list[Waiting], object]]:
        return self._submit(self._rules.browse, queue, group, count, octets, selector, after)

    def purge(self, queue: str, group: str) -> Deferred[int]:
        return self._submit(self._rules.purge, queue, group)

    def statistics(self, queue: str) -> Deferred[Statistics]:
        return self._submit(self._rules.statistics, queue)

    # What is due, and what has happened.

    def _wake_at(self, due: float) -> None:
        """Sets the timer, unless it goes off before."""
        if due >= self._due:
            return
        self._due = due
        if self._timer is not None:
            self._timer.cancel()
        seconds = min(max(due - self._clock(), _SHORTEST), _LONGEST)
        self._timer = self._reactor.callLater(seconds, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        self._due = math.inf
        self._submit(self._rules.sweep).addCallbacks(self._swept, self._not_swept)

    def _swept(self, is_more: bool) -> None:
        self._wake_at(self._clock() if is_more else self._rules.next_due)

    def _not_swept(self, failure: Any) -> None:
        _log.failure("what is due could not be done", failure)
        self._wake_at(self._clock() + 1.0)

    def _tell_later(self) -> None:
        """Tells the listener, in the reactor's next turn."""
        self._wake_at(self._rules.next_due)
        if self._telling is None:
            self._telling = self._reactor.callLater(0, self._tell)

    def _tell(self) -> None:
        self._telling = None
        Happened(self._rules).tell(self._listener)

    def _stop(self) -> None:
        for timer in (self._timer, self._telling):
            if timer is not None:
                timer.cancel()
        self._timer = self._telling = None
        self._due = -math.inf
