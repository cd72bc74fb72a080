"""A handler while it runs.

Knows coroutines, Deferreds and plain results, and how each is cancelled; not what a call is.  A coroutine is driven
here rather than by Twisted so that one which never waits costs no Deferred, and one which does goes on in the context
in which it began.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.logger import Logger
from twisted.python.failure import Failure

__all__ = ["RunningHandler"]

_log = Logger(namespace="protoframe.handler")


class RunningHandler:
    """A handler that waits for something.

    :param context: what it runs in.
    :param done: called once, with the result and ``None``, or with ``None`` and the exception.
    :param waits: called each time when it begins to wait.
    """

    __slots__ = ("_context", "_coroutine", "_done", "_inside", "_is_cancelled", "_waits", "_waits_for")

    def __init__(
        self,
        context: Context,
        done: Callable[[Any, BaseException | None], None],
        waits: Callable[[], None] | None = None,
    ) -> None:
        self._context = context
        self._done = done
        self._waits = waits
        self._inside = False
        self._is_cancelled = False
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        self._waits_for: Deferred[Any] | None = None

    def follow(self, deferred: Deferred[Any]) -> None:
        """Runs on as a Deferred."""
        self._waits_for = deferred
        deferred.addCallbacks(self._succeeded, self._failed)

    def drive(self, coroutine: Coroutine[Any, Any, Any], awaited: object) -> None:
        """Runs on as a coroutine that was started, in the context and from within it, and now awaits something."""
        self._coroutine = coroutine
        self._inside = True
        self._wait(awaited)
        self._inside = False

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine from its beginning, in the context."""
        self._coroutine = coroutine
        self._context.run(self._step, None)

    def start_inside(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine from its beginning; the caller is in the context already."""
        self._coroutine = coroutine
        self._step(None)

    def cancel(self) -> None:
        """Asks the handler to end: what it waits for is cancelled.

        Where it runs just now, that is what it waits for next.
        """
        if self._waits_for is not None:
            _cancel(self._waits_for)
        elif self._inside:
            self._is_cancelled = True

    def _succeeded(self, result: Any) -> None:
        self._done(result, None)

    def _failed(self, failure: Failure) -> None:
        self._done(None, failure.value)

    def _wait(self, awaited: object) -> None:
        if not isinstance(awaited, Deferred):
            awaited = fail(TypeError(f"a handler awaits Deferreds and coroutines, not {type(awaited).__name__}"))
        self._waits_for = awaited
        if self._waits is not None and not awaited.called:
            self._waits()
        awaited.addBoth(self._resume)
        if self._is_cancelled:
            self._is_cancelled = False
            _cancel(awaited)

    def _resume(self, result: Any) -> None:
        self._waits_for = None
        if self._inside:
            # It had fired already: a context cannot be entered twice.
            self._step(result)
        else:
            self._context.run(self._step, result)

    def _step(self, result: Any) -> None:
        coroutine = self._coroutine
        if coroutine is None:
            return
        self._inside = True
        try:
            if isinstance(result, Failure):
                awaited = result.throwExceptionIntoGenerator(coroutine)
            else:
                # The awaited Deferred hands its result to the coroutine itself.
                awaited = coroutine.send(None)
        except StopIteration as stop:
            self._done(stop.value, None)
        except BaseException as raised:
            self._done(None, raised)
        else:
            self._wait(awaited)
        finally:
            self._inside = False


def _cancel(awaited: Deferred[Any]) -> None:
    try:
        awaited.cancel()
    except Exception:
        # Somebody's canceller: it harms this handler alone, which goes on waiting.
        _log.failure("cancelling what a handler awaits failed")
