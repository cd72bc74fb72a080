"""One call of a `Client`, made as often as it takes: retries, hedges, and what its caller is told in the end.

Knows a call, its policy and its deadline; not what a server is, but that it can be called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from protoframe._calling import CallCancelled, Callee
from protoframe._clock import Timer, call_later
from protoframe._context import Scope, fire_in, scope
from protoframe.core.retry import RetryBudget, RetryPolicy
from protoframe.errors import DeadlineExceeded, Error, TryLater, not_run

__all__ = ["Attempts", "Servers"]


class Servers(Protocol):
    """Where calls are made."""

    reactor: Any
    clock: Callable[[], float]
    chance: Callable[[], float]
    budget: RetryBudget

    def pick(self, avoided: set[Any]) -> Any:
        """A server that takes calls, another than those where there is one; ``None`` where none does."""

    def wait(self, ready: Callable[[Error | None], None]) -> Callable[[], None]:
        """Has a function called when a server takes calls, or with why none ever will; what undoes that."""
        ...

    def reason(self) -> str:
        """Why no server takes calls."""
        ...

    def ended(self, link: Any, error: Error | None) -> None:
        """A call of a server has ended."""

    def over(self, attempts: Attempts) -> None:
        """A call has its outcome."""

    def lost(self, link: Any) -> None:
        """Another server has answered a call sooner, though it was asked later."""


class Attempts:
    """One call, until it has its outcome.

    :param servers: where it may be made.
    :param method: what is called.
    :param arguments: encoded.
    :param around: what surrounds it.
    :param deadline: when it fails if it has no answer by then; infinity for never.
    :param policy: when it is made again.
    :ivar done: fires with the result.
    """

    def __init__(
        self,
        servers: Servers,
        method: Callee,
        arguments: bytes,
        around: Scope,
        deadline: float,
        policy: RetryPolicy,
    ) -> None:
        self.done: Deferred[Any] = Deferred(self._cancel)
        self._servers = servers
        self._method = method
        self._arguments = arguments
        self._around = around
        self._deadline = deadline
        self._policy = policy
        self._count = 0
        self._running: dict[Deferred[Any], Any] = {}
        self._tried: set[Any] = set()
        self._may_have_run = False
        self._is_over = False
        self._timer: Timer | None = None
        self._hedging: Timer | None = None
        self._stop_waiting: Callable[[], None] | None = None

    def start(self) -> Deferred[Any]:
        """Makes the call."""
        self._servers.budget.made()
        self._try()
        after = self._policy.hedge_after
        if after is not None and self._method.options.idempotent and not self._is_over:
            self._hedging = call_later(self._servers.reactor, after, self._hedge)
        return self.done

    def stop(self, error: Error) -> None:
        """Ends the call with an error, which says that it did not run where that is so."""
        self._finish(not_run(error))

    def _try(self) -> None:
        self._timer = None
        if self._is_over:
            return
        link = self._servers.pick(self._tried)
        if link is None:
            self._wait()
            return
        self._count += 1
        self._tried.add(link)
        attempt: Deferred[Any] = link.call(
            self._method, self._arguments, self._around.metadata, self._deadline, self._may_move
        )
        self._running[attempt] = link
        attempt.addCallbacks(self._succeeded, self._failed, callbackArgs=(attempt, link), errbackArgs=(attempt, link))

    def _wait(self) -> None:
        """No server takes calls now."""
        seconds = self._deadline - self._servers.clock()
        if seconds != math.inf:
            self._timer = call_later(self._servers.reactor, seconds, self._expired)
        self._stop_waiting = self._servers.wait(self._ready)

    def _ready(self, error: Error | None) -> None:
        self._stop_waiting = None
        self._stop_timer()
        if self._is_over:
            return
        if error is not None:
            self._finish(error)
        else:
            self._try()

    def _expired(self) -> None:
        self._timer = None
        self._finish(not_run(DeadlineExceeded(f"no server could be reached in time: {self._servers.reason()}")))

    def _hedge(self) -> None:
        """There is no answer for a while: another server may have one sooner."""
        self._hedging = None
        servers = self._servers
        if servers.pick(self._tried) is None:
            return
        if self._running and self._count < self._policy.attempts and servers.budget.take_hedge(servers.clock()):
            self._try()

    # What comes of it.

    def _succeeded(self, result: Any, attempt: Deferred[Any], link: Any) -> None:
        earlier = list(self._running)
        del earlier[earlier.index(attempt) :]
        for slower in earlier:
            self._servers.lost(self._running[slower])
        del self._running[attempt]
        self._servers.ended(link, None)
        if not self._is_over:
            self._finish(result)

    def _failed(self, failure: Failure, attempt: Deferred[Any], link: Any) -> None:
        self._running.pop(attempt, None)
        error = failure.value
        if not isinstance(error, Error):
            # A fault of this package, or of a type of the user's.
            if not self._is_over:
                self._finish(error)
            return
        if not isinstance(error, CancelledError):
            self._servers.ended(link, error)
        if self._is_over:
            return
        self._may_have_run = self._may_have_run or error.may_have_run
        if self._running:
            # Another attempt may still have an answer.
            return
        servers, policy = self._servers, self._policy
        now = servers.clock()
        if policy.allows(
            error, self._count, may_have_run=self._may_have_run, idempotent=self._method.options.idempotent
        ):
            wait = policy.backoff.seconds(self._count, servers.chance())
            if isinstance(error, TryLater):
                wait = max(wait, error.retry_after)
            # At a server that was not tried yet there is nothing to wait for, unless it is asked for.
            elif servers.pick(self._tried) not in (None, *self._tried):
                wait = 0.0
            if now + wait < self._deadline and servers.budget.take(now):
                self._timer = call_later(servers.reactor, wait, self._try)
                return
        self._finish(error)

    def _may_move(self, error: Error) -> bool:
        """Whether the call is made at another server, after one has lost it, rather than there again."""
        servers = self._servers
        other = servers.pick(self._tried)
        return (
            not self._is_over
            and other is not None
            and other not in self._tried
            and self._policy.allows(error, self._count, may_have_run=True, idempotent=self._method.options.idempotent)
            and servers.budget.has(servers.clock())
        )

    def _cancel(self, _: Deferred[Any]) -> None:
        self._finish(CallCancelled("cancelled by the caller"))

    def _finish(self, outcome: Any) -> None:
        """Tells the caller; attempts that have no outcome yet are given up."""
        if self._is_over:
            return
        self._is_over = True
        self._servers.over(self)
        self._stop_timer()
        if self._hedging is not None:
            self._hedging.cancel()
            self._hedging = None
        if self._stop_waiting is not None:
            self._stop_waiting()
            self._stop_waiting = None
        if isinstance(outcome, Error):
            outcome.may_have_run = outcome.may_have_run or self._may_have_run or bool(self._running)
        done = self.done
        fire: Callable[[Any], None] = done.errback if isinstance(outcome, BaseException) else done.callback
        # What is left is given up first: whoever is told may look.
        for attempt in list(self._running):
            attempt.cancel()
        if scope.get() is self._around:
            fire(outcome)
        else:
            fire_in(self._around, fire, outcome)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
