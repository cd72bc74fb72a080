"""PINGs of this end, and whoever waits for their PONGs.

Knows Deferreds and the time that an answer took; not what carries a PING, nor the keepalive of the conversation itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from protoframe._clock import Timer, call_later
from protoframe._context import Scope, fire_in, scope
from protoframe.core.events import PongReceived
from protoframe.errors import ConnectionLost, DeadlineExceeded

__all__ = ["Pings"]


class _Ping(msgspec.Struct):
    """A PING whose PONG is awaited."""

    deferred: Deferred[float]
    around: Scope
    sent: float
    timer: Timer


class Pings:
    """The PINGs of one connection.

    :param reactor: for their deadlines.
    :param clock: gives the time.
    :param default_timeout: seconds that an answer may take where nobody says.
    :ivar waiting: those whose answer has not come, by their payload.
    """

    __slots__ = ("_clock", "_default_timeout", "_reactor", "waiting")

    def __init__(self, reactor: IReactorTime, clock: Callable[[], float], default_timeout: float) -> None:
        self._reactor = reactor
        self._clock = clock
        self._default_timeout = default_timeout
        self.waiting: dict[bytes, _Ping] = {}

    def ping(self, send: Callable[[bytes], None]) -> Deferred[float]:
        """Sends one; fires with the seconds that the answer took.

        :param send: sends a PING with a payload.
        """
        around = scope.get()
        remaining = around.remaining()
        payload = secrets.token_bytes(8)

        def forget(_: Any) -> None:
            if self.waiting.pop(payload, None) is not None:
                timer.cancel()

        def expire() -> None:
            del self.waiting[payload]
            fire_in(around, deferred.errback, DeadlineExceeded("the other end gave no sign of life in time"))

        deferred: Deferred[float] = Deferred(forget)
        timer = call_later(self._reactor, self._default_timeout if remaining is None else remaining, expire)
        self.waiting[payload] = _Ping(deferred, around, self._clock(), timer)
        send(payload)
        return deferred

    def answered(self, event: PongReceived) -> None:
        """A PONG came, for one of these or for somebody else."""
        ping = self.waiting.pop(event.payload, None)
        if ping is not None:
            ping.timer.cancel()
            fire_in(ping.around, ping.deferred.callback, self._clock() - ping.sent)

    def lost(self) -> None:
        """The connection is gone: no answer comes any more."""
        while self.waiting:
            _, ping = self.waiting.popitem()
            ping.timer.cancel()
            fire_in(ping.around, ping.deferred.errback, ConnectionLost("the connection was lost"))
