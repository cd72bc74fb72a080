"""Disk work, away from the reactor: the threads that do it.

Knows functions that block; not what they do.  Without threads they run at once, which is for simulated time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.python.failure import Failure

from protoframe.files._system import keep_memory

__all__ = ["Disk", "ended", "over"]


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T")
C = TypeVar("C", bound=_Closable)


class Disk:
    """Threads that do disk work.

    What waits for a thread is bounded by those who ask: each copy has two or three pieces of work there at a time.

    :param reactor: where results are told.
    :param threads: how many; 0 runs everything at once, in the caller's.
    """

    def __init__(self, reactor: Any, threads: int = 4) -> None:
        keep_memory()
        self._reactor = reactor
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pf-files") if threads else None
        # Pieces of work that have not ended.
        self._under_way = 0
        self._is_closing = False
        self._closed: Deferred[None] = Deferred()
        self.threads = threads

    def run(self, function: Callable[..., T], *arguments: Any) -> Deferred[T]:
        """Calls a function in a thread.  Cancelling gives up waiting: what has begun goes on."""
        pool = self._pool
        if pool is None:
            return execute(function, *arguments)
        done: Deferred[T] = Deferred()
        tell = self._reactor.callFromThread
        self._under_way += 1

        def work() -> None:
            result: Any
            try:
                result = function(*arguments)
            except BaseException:
                result = Failure()
            tell(self._fire, done, result)

        pool.submit(work)
        return done

    async def open(self, function: Callable[..., C], *arguments: Any) -> C:
        """As `run`, for what is to be closed; cancelling waits until it is closed again."""
        opened: Deferred[C] = Deferred()
        let_go: Deferred[None] = Deferred()

        def done(result: Any) -> None:
            if not opened.called:
                opened.callback(result)
            elif isinstance(result, Failure):
                let_go.callback(None)
            else:
                self.run(result.close).chainDeferred(let_go)

        self.run(function, *arguments).addBoth(done)
        try:
            return await opened
        except CancelledError:
            await let_go
            raise

    def close(self) -> Deferred[None]:
        """Lets the threads go, when what was begun has ended, and what follows from that; fires then.

        What comes later is done at once, in the caller's thread.
        """
        self._is_closing = True
        self._close_if_idle()
        return over(self._closed)

    def _fire(self, done: Deferred[Any], result: Any) -> None:
        # One that was cancelled takes, and drops, one result more.
        done.callback(result)
        self._under_way -= 1
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._is_closing and not self._under_way and not self._closed.called:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None
            self._closed.callback(None)


def over(deferred: Deferred[Any]) -> Deferred[None]:
    """Fires when another has, however that ended."""
    fired: Deferred[None] = Deferred()
    deferred.addBoth(lambda _: fired.callback(None))
    return fired


async def ended(*deferreds: Deferred[Any]) -> None:
    """Waits until all have fired, for what must be done before anything else is.

    :raises CancelledError: whoever waits was cancelled meanwhile, once or more; that is raised when all have fired.
    """
    was_cancelled = False
    for deferred in deferreds:
        while not (fired := over(deferred)).called:
            try:
                await fired
            except CancelledError:
                was_cancelled = True
            else:
                break
    if was_cancelled:
        raise CancelledError
