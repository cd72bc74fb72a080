"""`Worker` and `work`: have a function handle the messages of a queue, some at once, each until it is done.

Knows handlers, what their outcome means for their messages, and leases; messages come from a `QueueClient`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred, succeed
from twisted.internet.task import deferLater
from twisted.logger import Logger

from protoframe import Backoff, Error, TryLater
from protoframe.queue._client import QueueClient
from protoframe.queue._consumer import Consumer, ReceivedMessage
from protoframe.queue._contract import LeaseLost

__all__ = ["Reject", "Worker", "work"]

_log = Logger(namespace="protoframe.queue")

#: Parts of a lease: it begins anew so often while a handler runs.
_PARTS = 3
#: Characters of a note.
_LONGEST_NOTE = 255
#: How a worker that is a service goes on after an error of its queue.
_AGAIN = Backoff(first=1.0, factor=2.0, longest=60.0)


class Reject(Exception):
    """Raised by a handler: its message is not to be acknowledged.

    :param requeue: whether it is delivered again; otherwise it becomes a dead letter.
    :param delay: seconds before it is.
    :param note: why; it goes with a dead letter.
    """

    def __init__(self, *, requeue: bool = False, delay: float = 0.0, note: str = "") -> None:
        super().__init__(note)
        self.requeue = requeue
        self.delay = delay
        self.note = note


class Worker(Service):
    """Has a handler work a queue off.

    A message is acknowledged when its handler has returned.  Where the handler raises, the message is rejected: it
    comes again after a while, longer each time, until the queue's ``max_deliveries`` make it a dead letter, whose note
    is the name of the error's class.  The handler decides otherwise by raising `Reject`.  Errors are logged, and end
    nothing.  While a handler runs, the lease of its message is extended.

    As an `IService` it works for as long as it runs; an error of its queue, such as `NoSuchQueue`, is logged, and it
    tries again after a while.  `stopService` fires when the handlers that run have ended.  Whoever makes both it and
    its client services of one application stops the worker first, by adding it after the client.

    :param queue: the client.
    :param name: of the queue.
    :param handler: a function of a `ReceivedMessage` that may return a Deferred, or a coroutine function.
    :param concurrency: handlers that run at once, at most.
    :param group: of consumers.
    :param prefetch: messages that may be here, those that are handled included; ``concurrency`` where nothing is said.
        More saves the time in which a message comes, and has others wait that are not handled yet.
    :param subject: see `QueueClient.consume`, as for the next two.
    :param requeue: whether a message whose handler raises comes again; otherwise it becomes a dead letter.
    :param backoff: after how long it comes again.
    :raises ValueError: ``concurrency`` or ``prefetch`` is not 1 or more.
    :ivar running_handlers: handlers that run now.
    """

    def __init__(
        self,
        queue: QueueClient,
        name: str,
        handler: Callable[[ReceivedMessage], Any],
        *,
        concurrency: int = 10,
        group: str = "",
        prefetch: int | None = None,
        subject: str = "",
        headers: Mapping[str, str] | None = None,
        exclusive: bool = False,
        requeue: bool = True,
        backoff: Backoff | None = None,
    ) -> None:
        for what, number in (("concurrency", concurrency), ("prefetch", prefetch)):
            if number is not None and number < 1:
                raise ValueError(f"{what}: expected 1 or more, got {number}")
        self._queue = queue
        # Not `name`: that is the service's.
        self._queue_name = name
        self._handler = handler
        self._concurrency = concurrency
        self._consume: Callable[[], Consumer] = lambda: queue.consume(
            name,
            group=group,
            prefetch=prefetch or concurrency,
            subject=subject,
            headers=headers,
            exclusive=exclusive,
        )
        self._requeue = requeue
        self._backoff = backoff or Backoff(first=1.0, factor=2.0, longest=300.0)
        self._handled: dict[ReceivedMessage, None] = {}
        self._is_stopping = False
        # What it waits for: a message, or that a handler has ended, or for a while.
        self._coming: Deferred[Any] | None = None
        self._free: Deferred[None] | None = None
        self._serving: Deferred[None] = succeed(None)

    @property
    def running_handlers(self) -> int:
        """Handlers that run now."""
        return len(self._handled)

    def startService(self) -> None:
        """Works, until it is stopped."""
        super().startService()  # type: ignore[no-untyped-call]
        self._is_stopping = False
        self._serving = Deferred.fromCoroutine(self._serve())
        self._serving.addErrback(lambda failure: _log.failure("{worker} failed", failure, worker=self))

    def stopService(self) -> Deferred[None]:
        """Takes no more messages; fires when the handlers that run have ended, and their messages are settled."""
        super().stopService()  # type: ignore[no-untyped-call]
        self.stop()
        stopped: Deferred[None] = Deferred()
        self._serving.addBoth(lambda _: stopped.callback(None))
        return stopped

    def stop(self) -> None:
        """Has `run` return, when the handlers that run have ended."""
        self._is_stopping = True
        if self._coming is not None:
            self._coming.cancel()

    async def _serve(self) -> None:
        failures = 0
        while not self._is_stopping:
            try:
                await self.run()
                failures = 0
            except Error as error:
                if self._is_stopping:
                    return
                failures += 1
                wait = _AGAIN.seconds(failures, random.random())  # noqa: S311 - it spreads load
                _log.error("{worker}: {error}; again in {wait:.1f} s", worker=self, error=error, wait=wait)
                self._coming = deferLater(self._queue.reactor, wait)
                self._coming.addErrback(lambda _: None)
                await self._coming

    def __repr__(self) -> str:
        return f"<Worker of {self._queue_name}>"

    async def run(self) -> None:
        """Works until it is stopped, or its coroutine cancelled; what runs by then ends first.

        :raises Error: of the queue, such as `NoSuchQueue`, or of the connection where the client was stopped.
        """
        consumer = self._consume()
        watching: Deferred[None] = Deferred.fromCoroutine(self._keep_leases())
        watching.addErrback(lambda _: None)
        try:
            while not self._is_stopping:
                self._coming = coming = Deferred.fromCoroutine(consumer.take(self._concurrency - len(self._handled)))
                messages = await coming
                if not messages:
                    break
                for message in messages:
                    self._handle(message)
                while len(self._handled) >= self._concurrency and not self._is_stopping:
                    self._coming = self._handler_ends()
                    await self._coming
        except CancelledError:
            if not self._is_stopping:
                raise
        finally:
            self._coming = None
            # The leases are kept, and deliveries can be settled, for as long as the stream lasts.
            while self._handled:
                await self._handler_ends()
            watching.cancel()
            await consumer.aclose()

    def _handler_ends(self) -> Deferred[None]:
        """Fires when the next handler has ended."""
        self._free = Deferred()
        return self._free

    def _handle(self, message: ReceivedMessage) -> None:
        self._handled[message] = None
        handling: Deferred[None] = Deferred.fromCoroutine(self._run_handler(message))
        handling.addErrback(lambda failure: _log.failure("{worker}: {message}", failure, worker=self, message=message))
        handling.addBoth(lambda _: self._has_ended(message))

    def _has_ended(self, message: ReceivedMessage) -> None:
        del self._handled[message]
        free, self._free = self._free, None
        if free is not None and not free.called:
            free.callback(None)

    async def _run_handler(self, message: ReceivedMessage) -> None:
        try:
            await maybeDeferred(self._handler, message)
        except Reject as reject:
            settled = message.reject(reject.requeue, reject.delay, reject.note[:_LONGEST_NOTE])
        except BaseException as error:
            _log.failure("{message}: its handler failed", message=message)
            wait = self._backoff.seconds(message.attempt, random.random()) if self._requeue else 0.0  # noqa: S311
            settled = message.reject(self._requeue, wait, type(error).__name__[:_LONGEST_NOTE])
        else:
            settled = message.ack()
        try:
            await settled
        except LeaseLost:
            _log.warn("{message}: it is, or was, delivered again", message=message)
        except Error as error:
            _log.warn("{message}: not settled, so it is delivered again: {error}", message=message, error=error)

    async def _keep_leases(self) -> None:
        """Extends the leases of what is handled, until it is cancelled."""
        lease = 0.1
        while True:
            # Looked up each time, for somebody may have changed it.
            try:
                lease = (await self._queue.statistics(self._queue_name)).settings.lease
            except Error as error:
                if isinstance(error, TryLater):
                    lease = max(lease, error.retry_after)
                lease = max(lease, 1.0)
            await deferLater(self._queue.reactor, lease / _PARTS)
            for message in self._handled:
                message.extend().addErrback(lambda _: None)


async def work(
    queue: QueueClient,
    name: str,
    handler: Callable[[ReceivedMessage], Any],
    *,
    concurrency: int = 10,
    group: str = "",
    prefetch: int | None = None,
    subject: str = "",
    headers: Mapping[str, str] | None = None,
    exclusive: bool = False,
    requeue: bool = True,
    backoff: Backoff | None = None,
) -> None:
    """Has a handler work a queue off, until it is cancelled; what runs by then ends first.  See `Worker`.

    :raises Error: of the queue, such as `NoSuchQueue`.
    """
    worker = Worker(
        queue,
        name,
        handler,
        concurrency=concurrency,
        group=group,
        prefetch=prefetch,
        subject=subject,
        headers=headers,
        exclusive=exclusive,
        requeue=requeue,
        backoff=backoff,
    )
    await worker.run()
