"""Sessions bound to Twisted: what a server keeps of clients that have lost their connection, and for how long.

Knows the sessions of a `Factory` and their timers; what is kept, and what is forgotten first, is
`protoframe.core.replies`'s.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Hashable, Iterable

from twisted.internet.interfaces import IReactorTime

from protoframe._clock import Timer, call_later, clock_of
from protoframe.core.limits import Limits
from protoframe.core.replies import KeptCall, Reply, Session, Sessions

__all__ = ["Keeper", "Run", "User"]


class User(typing.Protocol):
    """A connection that a session is used over."""

    def superseded(self) -> None:
        """The client is here again, over another connection."""


class Waiter(typing.Protocol):
    """What takes the reply of a call to the client."""

    def deliver(self, call_id: int, reply: Reply) -> None:
        """The call, known by the id that it has there, is answered."""


class Run:
    """A call of a session while it runs.

    :param deadline: when it is to end.
    :param cancel: has it end, because the deadline passed or not.
    :ivar waiting: who waits for its reply, and by which call id it is known there.
    """

    def __init__(self, deadline: float, cancel: Callable[[bool], None]) -> None:
        self.deadline = deadline
        self.cancel = cancel
        self.waiting: list[tuple[Waiter, int]] = []
        self.timer: Timer | None = None

    def join(self, waiter: Waiter, call_id: int) -> None:
        """Somebody waits for it, over a connection that watches the deadline."""
        self.waiting.append((waiter, call_id))
        self.unwatch()

    def unwatch(self) -> None:
        """The deadline is watched elsewhere, or does not matter any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Keeper:
    """The sessions of a `Factory`.

    :param limits: the bounds.
    :param reactor: for the time.
    :ivar sessions: what is kept.
    """

    def __init__(self, limits: Limits, reactor: IReactorTime) -> None:
        self.sessions = Sessions(limits)
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._timer: Timer | None = None

    def open(self, name: Hashable, next_key: int, user: User) -> Session:
        """A client has come, for the first time or again; see `Sessions.open`."""
        session, former, given_up = self.sessions.open(name, next_key, user)
        self._wait()
        self._cancel(given_up)
        if former is not None:
            # Its connection watched deadlines; those of calls that the client asks for again, the new one will.
            self._watch(session)
            former.superseded()
        return session

    def finish(self, call: KeptCall, reply: Reply) -> None:
        """A call has its reply, which goes to whoever waits for it."""
        run: Run = call.runner
        run.unwatch()
        self.sessions.finish(call, reply)
        for waiter, call_id in run.waiting:
            waiter.deliver(call_id, reply)

    def left(self, session: Session, user: User) -> None:
        """A connection is lost; its client may come again."""
        if session.user is not user or session.is_over:
            return
        self.sessions.leave(session, user, self._clock())
        self._watch(session)
        self._wait()

    def _watch(self, session: Session) -> None:
        """Has what runs end at its deadline, where no connection sees to that."""
        now = self._clock()
        for call in session.calls.values():
            run: Run | None = call.runner
            if run is not None and run.deadline != math.inf:
                run.unwatch()
                run.timer = call_later(self._reactor, run.deadline - now, lambda run=run: run.cancel(True))  # type: ignore[misc]

    def end(self, session: Session, user: User) -> None:
        """A client is gone for good, unless it is here again over another connection."""
        if session.user is not user:
            return
        ended = self.sessions.end(session)
        self._wait()
        self._cancel(ended)

    def end_left(self) -> None:
        """No client that has lost its connection can come again."""
        ended = self.sessions.end_left()
        self._wait()
        self._cancel(ended)

    def _cancel(self, calls: Iterable[KeptCall]) -> None:
        for call in calls:
            run: Run = call.runner
            run.unwatch()
            run.cancel(False)

    def _wait(self) -> None:
        """Has `_expire` called when there is something to do; a timer that is early does no harm."""
        due = self.sessions.next_timer()
        if due == math.inf and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif due != math.inf and self._timer is None:
            self._timer = call_later(self._reactor, due - self._clock(), self._expire)

    def _expire(self) -> None:
        self._timer = None
        expired = self.sessions.expire(self._clock())
        self._wait()
        self._cancel(expired)
