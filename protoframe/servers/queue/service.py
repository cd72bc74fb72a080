"""`Queue`, as it is served: each call is given to the broker.

Knows calls; what they do is `protoframe.servers.queue.broker`'s.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from twisted.internet.defer import Deferred

from protoframe import Factory
from protoframe.queue import (
    Count,
    Delivery,
    Duration,
    Headers,
    Message,
    Messages,
    NoSuchQueue,
    Positive,
    Priority,
    Queue,
    QueueName,
    Receipt,
    Receipts,
    Settings,
    Settled,
    ShortText,
    Statistics,
    Tags,
    Wait,
    Waiting,
)
from protoframe.servers.queue.broker import Broker
from protoframe.servers.queue.selector import Selector
from protoframe.servers.queue.store import Action, Verdict

__all__ = ["QueueFactory", "QueueServer"]

_ORDINARY = Settings()
_NONE: Headers = {}
_DONE = Verdict(Action.DONE)


class QueueServer(Queue, name="Queue"):
    """One client's conversation with a queue server.

    :param broker: has the queues.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def declare(self, queue: QueueName, settings: Settings = _ORDINARY, replace: bool = False) -> bool:
        """Has a queue be there; whether it was not yet."""
        return await self._broker.declare(queue, settings, replace=replace)

    def publish(
        self,
        queue: QueueName,
        body: bytes,
        subject: ShortText = "",
        headers: Headers = _NONE,
        key: ShortText = "",
        priority: Priority = 0,
        ttl: Duration | None = None,
        delay: Wait | None = None,
        dedup: ShortText = "",
    ) -> Deferred[Receipt]:
        """Publishes a message."""
        message = Message(
            body=body,
            subject=subject,
            headers=headers,
            key=key,
            priority=priority,
            ttl=ttl,
            delay=delay,
            dedup=dedup,
        )
        return self._broker.publish(queue, (message,)).addCallback(_first)

    def publish_batch(self, queue: QueueName, messages: Messages) -> Deferred[Receipts]:
        """Publishes messages, all or none of them."""
        return self._broker.publish(queue, messages)

    async def consume(
        self,
        queue: QueueName,
        group: str = "",
        prefetch: Count = 100,
        subject: ShortText = "",
        headers: Headers = _NONE,
        exclusive: bool = False,
        limit: Positive | None = None,
    ) -> AsyncIterator[Delivery]:
        """Delivers messages."""
        selector = Selector.of(subject, headers)
        consumer = self._broker.consume(queue, group, prefetch, selector, is_exclusive=exclusive, limit=limit)
        try:
            while True:
                await consumer.wait()
                while consumer.buffer:
                    yield consumer.next()
        finally:
            consumer.leave()

    def acknowledge(self, queue: QueueName, tags: Tags, group: str = "") -> Deferred[Settled]:
        """Settles deliveries as done."""
        return self._broker.settle(queue, group, tags, _DONE)

    def reject(
        self,
        queue: QueueName,
        tags: Tags,
        group: str = "",
        requeue: bool = False,
        delay: Wait = 0.0,
        note: ShortText = "",
        seen: bool = True,
    ) -> Deferred[Settled]:
        """Settles deliveries: their messages are dead letters, or are delivered again."""
        if not requeue:
            verdict = Verdict(Action.DEAD, note=note)
        else:
            verdict = Verdict(Action.AGAIN if seen else Action.UNSEEN, delay=delay)
        return self._broker.settle(queue, group, tags, verdict)

    def extend(self, queue: QueueName, tags: Tags, group: str = "") -> Deferred[Settled]:
        """Has the leases of deliveries begin anew."""
        return self._broker.extend(queue, group, tags)

    def peek(
        self,
        queue: QueueName,
        group: str = "",
        count: Positive = 10,
        subject: ShortText = "",
        headers: Headers = _NONE,
    ) -> AsyncIterator[Waiting]:
        """Shows messages that are in a queue."""
        return self._broker.browse(queue, group, count, Selector.of(subject, headers))

    async def purge(self, queue: QueueName, group: str | None = None) -> int:
        """Removes the messages that no consumer has."""
        return await self._broker.purge(queue, group)

    async def statistics(self, queue: QueueName) -> Statistics:
        """How a queue stands."""
        return await self._broker.statistics(queue)

    async def list(self, prefix: str = "") -> AsyncIterator[Statistics]:
        """How the queues stand whose names begin so."""
        for name in self._broker.names(prefix):
            try:
                statistics = await self._broker.look(name)
            except NoSuchQueue:
                # It was deleted meanwhile.
                continue
            yield statistics

    async def delete(self, queue: QueueName, only_unused: bool = False) -> int:
        """Deletes a queue."""
        return await self._broker.delete(queue, only_unused=only_unused)


def _first(receipts: Receipts) -> Receipt:
    return receipts[0]


class QueueFactory(Factory):
    """Serves a broker's queues to everyone who connects.

    :param broker: has them.
    :param options: those of `Factory`.
    """

    def __init__(self, broker: Broker, **options: Any) -> None:
        super().__init__(QueueServer, **options)
        self._broker = broker

    def create(self, protocol: Any) -> Any:
        """One end of a conversation."""
        return protocol(self._broker)
