"""Queue servers, publishers and consumers, and a ledger of what each of these saw, to be compared in the end.

Knows how a server is started; not when it is killed, nor what its disk is.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from protoframe import Backoff, Client, Error, connect, timeout
from protoframe.queue import Delivery, Message, Queue, Receipt, Tag
from tests.processes import Server, free_port, server

__all__ = ["Ledger", "Load", "client", "pause", "queue_server"]

#: Seconds after which a call counts as lost.
_PATIENCE = 8.0


def client(where: str) -> Client[Queue]:
    """One that does not wait long before it connects again."""
    return Client(reactor, where, Queue, reconnect=Backoff(first=0.05, factor=1.2, longest=0.2))


async def pause(seconds: float) -> None:
    await deferLater(reactor, seconds)  # type: ignore[arg-type]


@asynccontextmanager
async def queue_server(directory: Path, data: Path, *more: str, **variables: str) -> AsyncIterator[tuple[Server, Any]]:
    """A server, and a conversation with it."""
    port = free_port()
    words = ("pf-queue", "--data", str(data), "--listen", f"tcp:{port}:interface=127.0.0.1", *more)
    running = server(directory, *words, variables=variables)
    started = await deferToThread(running.__enter__)
    try:
        async with connect(reactor, f"tcp:127.0.0.1:{port}", Queue) as queue:
            yield started, queue
    finally:
        await deferToThread(running.__exit__, None, None, None)


class Ledger:
    """What happened to one queue, as its clients saw it.

    :ivar stored: the numbers of messages of which a receipt came, by their bodies.
    :ivar refused: bodies of which an error said that they are not stored.
    :ivar deliveries: each delivery, in the order in which its consumer got it, with the stream's number before.
    :ivar settled: acknowledgements that were answered, with what they acknowledged.
    """

    def __init__(self) -> None:
        self.stored: dict[bytes, int] = {}
        self.refused: set[bytes] = set()
        self.deliveries: list[tuple[int, Delivery]] = []
        self.settled: set[Tag] = set()
        self.contradictions: list[str] = []

    def receipt(self, body: bytes, receipt: Receipt) -> None:
        if body in self.stored and not receipt.is_duplicate:
            self.contradictions.append(f"{body!r} is stored already, and {receipt} does not say so")
        if self.stored.setdefault(body, receipt.sequence) != receipt.sequence:
            self.contradictions.append(f"{body!r} is {self.stored[body]}, and {receipt}")

    @property
    def delivered(self) -> Counter[int]:
        """How often each message came."""
        return Counter(delivery.sequence for _, delivery in self.deliveries)

    def check(self, *, is_once: bool) -> None:
        """What must hold, whatever was killed.

        :param is_once: whether the queue delivers at most once.
        """
        assert self.contradictions == []
        bodies: dict[int, bytes] = {}
        sequences: dict[bytes, int] = dict(self.stored)
        seen: dict[int, int] = {}
        # In the order in which the server gave them: what was on its way to one that is slow may be taken by it late.
        for _, delivery in sorted(self.deliveries, key=lambda one: one[1].lease):
            number = delivery.sequence
            assert bodies.setdefault(number, delivery.body) == delivery.body, f"{number} has two bodies"
            found = sequences.setdefault(delivery.body, number)
            assert found == number, f"{delivery.body!r} is stored twice, as {found} and {number}"
            assert delivery.body not in self.refused, f"{delivery.body!r} was said not to be stored"
            if number in seen:
                assert not is_once, f"{number} came twice"
                assert delivery.redelivered, f"{number} came again, and {delivery} does not say so"
                assert delivery.attempt > 1, f"{number} came again, and {delivery} does not say so"
                assert delivery.lease > 0, delivery
            assert delivery.redelivered == (delivery.attempt > 1), delivery
            seen[number] = delivery.lease
        assert len(set(sequences.values())) == len(sequences), "two messages have one number"
        tags = Counter(delivery.tag for _, delivery in self.deliveries)
        if not is_once:
            assert set(tags.values()) <= {1}, "a lease was given twice"
            last: dict[int, int] = {}
            for tag in tags:
                last[tag.sequence] = max(last.get(tag.sequence, 0), tag.lease)
            again = [tag for tag in self.settled if last[tag.sequence] != tag.lease]
            assert not again, f"{again} were acknowledged, and delivered again"
        first: dict[int, int] = {}
        for stream, delivery in self.deliveries:
            if delivery.attempt == 1:
                assert delivery.sequence > first.get(stream, 0), f"{delivery.sequence} came late to {stream}"
                first[stream] = delivery.sequence


class Load:
    """Publishers and consumers that go on until they are told to stop.

    :param where: the server's endpoint string.
    :param chance: what consumers do with which message.
    :ivar errors: how many calls failed, by the names of their errors.
    """

    def __init__(self, where: str, chance: random.Random) -> None:
        self.ledgers: dict[str, Ledger] = {}
        self.errors: Counter[str] = Counter()
        self.is_over = False
        self.is_drained = False
        self._where = where
        self._chance = chance
        self._streams = itertools.count()

    def ledger(self, queue: str) -> Ledger:
        return self.ledgers.setdefault(queue, Ledger())

    def _failed(self, error: Error) -> None:
        self.errors[type(error).__name__] += 1

    async def publish(self, queue: str, publisher: str, size: int, *, has_keys: bool, delay: float) -> None:
        """Publishes messages, each with a body of its own, so many with a call.

        :param has_keys: whether they have deduplication keys, and are published until there is a receipt.
        :param delay: seconds between two calls.
        """
        ledger = self.ledger(queue)
        earlier: list[list[bytes]] = []
        async with client(self._where) as proxy:
            for number in itertools.count():
                if self.is_over:
                    return
                bodies = [f"{publisher}.{number}.{part}".encode() for part in range(size)]
                while not await self._publish(proxy, queue, ledger, bodies, has_keys=has_keys) and has_keys:
                    await pause(0.05)
                if has_keys:
                    earlier.append(bodies)
                    if self._chance.random() < 0.2:
                        # It has a receipt, of this run of the server or of one before.
                        await self._publish(proxy, queue, ledger, self._chance.choice(earlier), has_keys=True)
                await pause(delay)

    async def _publish(self, proxy: Any, queue: str, ledger: Ledger, bodies: list[bytes], *, has_keys: bool) -> bool:
        keys = [body.decode() if has_keys else "" for body in bodies]
        try:
            with timeout(_PATIENCE):
                if len(bodies) == 1:
                    receipts = [await proxy.publish(queue, bodies[0], dedup=keys[0])]
                else:
                    messages = [Message(body=body, dedup=key) for body, key in zip(bodies, keys, strict=True)]
                    receipts = await proxy.publish_batch(queue, messages)
        except Error as error:
            self._failed(error)
            if not error.may_have_run and not has_keys:
                ledger.refused.update(bodies)
            return False
        for body, receipt in zip(bodies, receipts, strict=True):
            ledger.receipt(body, receipt)
        return True

    async def consume(self, queue: str, settle: Callable[..., Any] | None, prefetch: int = 50) -> None:
        """Takes messages, from one stream after the other, until all is drained.

        :param settle: is called with the proxy and each delivery, and says what is done with it.
        """
        ledger = self.ledger(queue)
        consumer = client(self._where)
        async with consumer as proxy:
            while not self.is_drained:
                stream = next(self._streams)
                try:
                    async for delivery in proxy.consume(queue, prefetch=prefetch):
                        ledger.deliveries.append((stream, delivery))
                        if settle is not None:
                            await settle(proxy, queue, ledger, delivery)
                        if self.is_drained:
                            return
                except Error as error:
                    self._failed(error)
                    await pause(0.02)

    async def at_once(self, proxy: Any, queue: str, ledger: Ledger, delivery: Delivery) -> None:
        """Acknowledges."""
        try:
            with timeout(_PATIENCE):
                settled = await proxy.acknowledge(queue, [delivery.tag])
        except Error as error:
            self._failed(error)
        else:
            if settled.count:
                ledger.settled.add(delivery.tag)

    async def slowly(self, proxy: Any, queue: str, ledger: Ledger, delivery: Delivery) -> None:
        """Acknowledges after a while."""
        if not self.is_over:
            await pause(0.02)
        await self.at_once(proxy, queue, ledger, delivery)

    async def fussily(self, proxy: Any, queue: str, ledger: Ledger, delivery: Delivery) -> None:
        """Rejects the half of them, to be delivered again, and acknowledges the others."""
        if self.is_over or self._chance.random() < 0.5:
            await self.at_once(proxy, queue, ledger, delivery)
            return
        try:
            with timeout(_PATIENCE):
                await proxy.reject(queue, [delivery.tag], requeue=True)
        except Error as error:
            self._failed(error)
