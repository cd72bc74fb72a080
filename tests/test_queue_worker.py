"""`Worker`: every message is handled until it is done, or is a dead letter that says why."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import globalLogPublisher

from protoframe import Backoff
from protoframe.queue import Message, NoSuchQueue, QueueClient, Reject, Worker, work
from tests.ends import until
from tests.support_queue import Gate, client_of, served

SOON = Backoff(first=0.01, longest=0.02)


@asynccontextmanager
async def orders(count: int, **settings: Any):
    """A client of a server that has a queue with so many messages, and one for its dead letters."""
    async with served() as server, client_of(server) as queue:
        await queue.declare("dead")
        await queue.declare("orders", dead_letter="dead", **settings)
        if count:
            await queue.publish_batch("orders", [Message(body=b"%d" % number) for number in range(count)])
        yield queue


@asynccontextmanager
async def working(worker: Worker):
    """Works in the block."""
    done = Deferred.fromCoroutine(worker.run())
    try:
        yield
    finally:
        worker.stop()
        await done


async def depth(queue: QueueClient, name: str = "orders") -> int:
    return (await queue.statistics(name)).depth


async def becomes(queue: QueueClient, name: str, count: int) -> None:
    while await depth(queue, name) != count:
        pass


@asynccontextmanager
async def logged():
    """What is logged in the block."""
    events: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(events.append)
    try:
        yield events
    finally:
        globalLogPublisher.removeObserver(events.append)


@pytest_twisted.ensureDeferred
async def test_each_message_is_handled_and_acknowledged_and_no_more_run_at_once_than_may() -> None:
    async with orders(50) as queue:
        handled: list[bytes] = []
        running = most = 0

        async def handle(message: Any) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await deferLater(reactor, 0.001)
            running -= 1
            handled.append(message.body)

        async with working(Worker(queue, "orders", handle, concurrency=7, prefetch=30)):
            await becomes(queue, "orders", 0)
        assert sorted(handled) == sorted(b"%d" % number for number in range(50))
        assert most == 7


@pytest_twisted.ensureDeferred
async def test_a_message_whose_handler_fails_comes_again_and_is_a_dead_letter_in_the_end() -> None:
    async with orders(2, max_deliveries=3) as queue, logged() as events:
        attempts: list[tuple[bytes, int]] = []

        def handle(message: Any) -> None:
            attempts.append((message.body, message.attempt))
            if message.body == b"1" and message.attempt < 3:
                raise ValueError("a secret")
            if message.body == b"0":
                raise KeyError("a secret")

        async with working(Worker(queue, "orders", handle, backoff=SOON)):
            await becomes(queue, "orders", 0)
        assert sorted(attempts) == [(body, attempt) for body in (b"0", b"1") for attempt in (1, 2, 3)]
        (waiting,) = [waiting async for waiting in queue.peek("dead")]
        assert waiting.message.body == b"0"
        assert waiting.message.dead.attempts == 3
        assert "secret" not in waiting.message.dead.note
        # The worker's own log has all of it.
        assert sum("log_failure" in event for event in events) == 5


@pytest_twisted.ensureDeferred
async def test_a_handler_decides_by_reject_and_a_worker_by_requeue() -> None:
    async with orders(2) as queue, logged():

        async def handle(message: Any) -> None:
            if message.body == b"0" and message.attempt == 1:
                raise Reject(requeue=True)
            if message.body == b"0":
                raise Reject(note="no such customer")
            raise ValueError("a secret")

        async with working(Worker(queue, "orders", handle, requeue=False)):
            await becomes(queue, "dead", 2)
        notes = {waiting.message.body: waiting.message.dead async for waiting in queue.peek("dead")}
        assert (notes[b"0"].reason, notes[b"0"].note, notes[b"0"].attempts) == ("rejected", "no such customer", 2)
        assert (notes[b"1"].note, notes[b"1"].attempts) == ("ValueError", 1)


@pytest_twisted.ensureDeferred
async def test_a_lease_lasts_for_as_long_as_the_handler_runs() -> None:
    async with orders(1, lease=0.2) as queue:
        attempts: list[int] = []

        async def handle(message: Any) -> None:
            attempts.append(message.attempt)
            await deferLater(reactor, 0.7)

        async with working(Worker(queue, "orders", handle)), working(Worker(queue, "orders", handle)):
            await becomes(queue, "orders", 0)
        assert attempts == [1]


@pytest_twisted.ensureDeferred
async def test_what_runs_ends_when_a_worker_is_stopped_or_cancelled() -> None:
    async with orders(3) as queue:
        gate = Gate()
        handled: list[bytes] = []

        async def handle(message: Any) -> None:
            handled.append(message.body)
            await gate()

        async def work_and_note() -> None:
            try:
                await work(queue, "orders", handle, concurrency=2)
            finally:
                handled.append(b"ended")

        working = Deferred.fromCoroutine(work_and_note())
        await until(lambda: len(handled) == 2)
        working.cancel()
        await queue.statistics("orders")
        assert handled == [b"0", b"1"]
        gate.open()
        with pytest.raises(CancelledError):
            await working
        assert handled.pop() == b"ended"
        assert await depth(queue) == 1
        gate.is_open = False
        worker = Worker(queue, "orders", handle)
        worker.startService()
        await until(lambda: len(handled) == 3)
        assert worker.running_handlers == 1
        stopped = worker.stopService()
        assert not stopped.called
        gate.open()
        await stopped
        assert await depth(queue) == 0
        assert handled == [b"0", b"1", b"2"]


@pytest_twisted.ensureDeferred
async def test_it_ends_by_an_error_of_its_queue_and_as_a_service_tries_again() -> None:
    async with served() as server, client_of(server) as queue, logged() as events:
        handled: list[bytes] = []
        with pytest.raises(NoSuchQueue):
            await work(queue, "later", lambda message: handled.append(message.body))
        worker = Worker(queue, "later", lambda message: handled.append(message.body))
        worker.startService()
        await until(lambda: any("again in" in event.get("log_format", "") for event in events))
        await queue.declare("later")
        await queue.publish("later", b"hello")
        await until(lambda: handled)
        await worker.stopService()
        assert await depth(queue, "later") == 0


def test_numbers_that_cannot_be_are_refused() -> None:
    client = QueueClient(reactor, "tcp:127.0.0.1:1")
    for wrong in ({"concurrency": 0}, {"prefetch": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            Worker(client, "orders", print, **wrong)  # type: ignore[arg-type]
