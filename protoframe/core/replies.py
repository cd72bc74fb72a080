"""Sessions: the calls of a client that outlive its connections, and what they were answered with.

Knows keys, digests of calls and encoded replies, and for how long they are kept; not connections, nor what serves a
call.  A call of a session runs once, however often it comes: while it runs it is joined, and when it has run its reply
is given again.  What cannot be told any more is said to be lost, and nothing runs on a guess.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import msgspec

from protoframe.core.frames import ErrorBody, Key
from protoframe.core.limits import Limits
from protoframe.errors import FailedPrecondition, SessionLost, TooManyCalls, not_run

__all__ = ["KeptCall", "Reply", "Session", "Sessions"]

#: What a call that is kept counts for beside its reply.
_CALL = 256


class Reply(msgspec.Struct, frozen=True, gc=False):
    """What a call was answered with.

    :ivar result: the encoded result; ``None`` where it was an error.
    :ivar error: that.
    """

    result: bytes | None = None
    error: ErrorBody | None = None

    @property
    def size(self) -> int:
        """Octets, more or less."""
        if self.error is not None:
            return len(self.error.name) + len(self.error.text) + len(self.error.detail)
        return len(self.result or b"")


class KeptCall:
    """A call of a session.

    :ivar session: whose it is.
    :ivar number: its key.
    :ivar reply: what it was answered with; ``None`` while it runs.
    :ivar runner: what runs it, for whoever drives this.
    """

    __slots__ = ("digest", "number", "reply", "runner", "session")

    def __init__(self, session: Session, number: int, digest: bytes) -> None:
        self.session = session
        self.number = number
        self.digest = digest
        self.reply: Reply | None = None
        self.runner: Any = None


class Session:
    """The calls of one client.

    :ivar name: what it is known by.
    :ivar user: the connection that it is used over now; ``None`` while there is none.
    :ivar left: when the last one was lost.
    :ivar running: how many calls are not answered yet.
    :ivar is_over: whether nothing is kept of it any more.
    """

    __slots__ = ("calls", "floor", "is_over", "left", "name", "running", "unsettled", "user")

    def __init__(self, name: Hashable, floor: int) -> None:
        self.name = name
        self.user: Any = None
        self.left = 0.0
        self.running = 0
        self.is_over = False
        self.calls: dict[int, KeptCall] = {}
        # Of lower keys the caller knows the outcome, or does not care for it.
        self.unsettled = 0
        # Of lower keys nothing is known but what is kept.
        self.floor = floor


class Sessions:
    """The sessions of all clients of a server, within bounds.

    A session is kept for `Limits.session_retention` after its connection was lost, and there may be
    `Limits.max_sessions`; all replies together may have `Limits.max_replies` octets.  Beyond that the oldest go.

    :param limits: the bounds.
    :ivar octets: what all calls that are kept count for.
    """

    def __init__(self, limits: Limits) -> None:
        self.octets = 0
        self._limits = limits
        self._sessions: dict[Hashable, Session] = {}
        # Those without a connection, and calls with a reply: the longest so first.
        self._left: OrderedDict[Hashable, Session] = OrderedDict()
        self._answered: OrderedDict[KeptCall, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, name: Hashable, next_key: int, user: Any) -> tuple[Session, Any, list[KeptCall]]:
        """A client has come, for the first time or again.

        It gives its session, the connection that it is still used over, and calls that are given up to make room.

        :param name: what it is known by, which nobody can guess.
        :param next_key: the lowest key that it has not used.
        :param user: its connection.
        """
        session = self._sessions.get(name)
        given_up: list[KeptCall] = []
        if session is None:
            if len(self._sessions) >= self._limits.max_sessions and self._left:
                given_up = self.end(next(iter(self._left.values())))
            session = self._sessions[name] = Session(name, next_key)
        self._left.pop(name, None)
        former, session.user = session.user, user
        return session, former, given_up

    def take(self, session: Session, key: Key, digest: bytes) -> tuple[KeptCall, bool]:
        """The call of a key, and whether it came for the first time, so that it is to be run.

        :raises SessionLost: it may have run.
        :raises FailedPrecondition: the key is another call's.
        :raises TooManyCalls: more run than `Limits.max_calls` already.
        """
        self._settle(session, key.unsettled)
        number = key.number
        call = session.calls.get(number)
        if call is not None:
            if call.digest != digest:
                raise not_run(FailedPrecondition(f"another call came with key {number} before"))
            return call, False
        if number < session.floor or session.is_over:
            raise SessionLost("it is not known here any more whether the call ran")
        if session.running >= self._limits.max_calls:
            raise not_run(TooManyCalls(f"{session.running} calls of this session run already"))
        call = session.calls[number] = KeptCall(session, number, digest)
        session.running += 1
        self.octets += _CALL
        self._make_room()
        return call, True

    def drop(self, call: KeptCall) -> None:
        """A call was turned away, and did not run: when it comes again, that is looked at anew."""
        if call.session.calls.get(call.number) is call:
            call.session.running -= 1
            self._forget(call)

    def finish(self, call: KeptCall, reply: Reply) -> None:
        """A call has its reply."""
        session = call.session
        call.reply = reply
        call.runner = None
        if session.calls.get(call.number) is not call:
            return
        session.running -= 1
        self.octets += reply.size
        if call.number < session.unsettled:
            self._forget(call)
            return
        self._answered[call] = None
        self._make_room()

    def leave(self, session: Session, user: Any, now: float) -> None:
        """A connection is lost."""
        if session.user is user and not session.is_over:
            session.user = None
            session.left = now
            self._left[session.name] = session

    def end(self, session: Session) -> list[KeptCall]:
        """A client is gone for good; its calls that still run."""
        if session.is_over:
            return []
        session.is_over = True
        del self._sessions[session.name]
        self._left.pop(session.name, None)
        running = [call for call in session.calls.values() if call.reply is None]
        for call in list(session.calls.values()):
            self._forget(call)
        return running

    def end_left(self) -> list[KeptCall]:
        """Ends the sessions that have no connection; their calls that still run."""
        return [call for session in list(self._left.values()) for call in self.end(session)]

    def next_timer(self) -> float:
        """When `expire` wants to be called; infinity for never."""
        if not self._left:
            return math.inf
        return next(iter(self._left.values())).left + self._limits.session_retention

    def expire(self, now: float) -> list[KeptCall]:
        """Ends the sessions to which nobody came back in time; their calls that still run."""
        given_up: list[KeptCall] = []
        while self.next_timer() <= now:
            given_up += self.end(next(iter(self._left.values())))
        return given_up

    def _settle(self, session: Session, unsettled: int) -> None:
        first = session.unsettled
        if unsettled <= first:
            return
        session.unsettled = unsettled
        session.floor = max(session.floor, unsettled)
        calls = session.calls
        numbers = range(first, unsettled) if unsettled - first <= len(calls) else [n for n in calls if n < unsettled]
        for number in numbers:
            call = calls.get(number)
            if call is not None and call.reply is not None:
                self._forget(call)

    def _make_room(self) -> None:
        """Forgets the oldest replies, where there are too many."""
        while self.octets > self._limits.max_replies and self._answered:
            oldest = next(iter(self._answered))
            oldest.session.floor = max(oldest.session.floor, oldest.number + 1)
            self._forget(oldest)

    def _forget(self, call: KeptCall) -> None:
        del call.session.calls[call.number]
        self._answered.pop(call, None)
        self.octets -= _CALL + (call.reply.size if call.reply is not None else 0)
