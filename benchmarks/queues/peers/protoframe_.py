"""pf-queue, by its client."""

from __future__ import annotations

import time
import uuid
from typing import Any

from twisted.internet.defer import Deferred, gatherResults

from benchmarks.loads import Task, check, in_reactor, per_second, twisted_calls
from benchmarks.queues.workloads import BODY, PREFETCH
from benchmarks.workloads import Kind
from protoframe.queue import Message, QueueClient

__all__ = ["consume", "depth", "fill", "publish", "take"]

#: Messages of one call of those that fill a queue.
FILLED_TOGETHER = 1_000


def take(task: Task, port: int) -> float:
    async def main(reactor: Any) -> float:
        name = f"bench-{uuid.uuid4().hex}"
        async with QueueClient(reactor, f"tcp:127.0.0.1:{port}") as queue:
            await queue.declare(name)
            if task.kind is Kind.CONSUME:
                await fill(queue, name, task.count)
                found = per_second(task, await consume(queue, name, task.count))
                check((await queue.statistics(name)).depth, 0)
            else:
                found = await publish(queue, name, task)
                check((await queue.statistics(name)).depth, task.warm_up + task.count)
            await queue.delete(name)
        return found

    return in_reactor(main)


async def publish(queue: QueueClient, name: str, task: Task) -> float:
    """Messages a second."""
    batch = [Message(body=BODY)] * task.workload.batch
    if len(batch) == 1:
        return await twisted_calls([lambda: queue.publish(name, BODY)], task)
    return await twisted_calls([lambda: queue.publish_batch(name, batch)], task)


async def fill(queue: QueueClient, name: str, count: int) -> None:
    """Publishes so many, as fast as may be."""
    while count:
        together = min(count, FILLED_TOGETHER)
        await queue.publish_batch(name, [Message(body=BODY)] * together)
        count -= together


async def consume(queue: QueueClient, name: str, count: int) -> float:
    """Seconds that it takes to consume so many, and to have all acknowledgements answered."""
    settling: list[Deferred[None]] = []
    began = time.perf_counter()
    async for message in queue.consume(name, prefetch=PREFETCH, limit=count):
        settling.append(message.ack())
    await gatherResults(settling)
    return time.perf_counter() - began


def depth(waiting: int, publishing: Task, consumed: int, port: int, look: Any) -> dict[str, float]:
    """Fills a queue, and measures it: how fast it is filled, and takes and gives messages, and what ``look`` finds.

    ``look`` is called when so many messages wait, before they are consumed.
    """
    found: dict[str, float] = {}

    async def main(reactor: Any) -> float:
        name = "deep"
        async with QueueClient(reactor, f"tcp:127.0.0.1:{port}") as queue:
            await queue.declare(name)
            began = time.perf_counter()
            await fill(queue, name, waiting)
            filled = waiting / (time.perf_counter() - began)
            check((await queue.statistics(name)).depth, waiting)
            found.update(filled=filled, **look())
            found["published"] = await publish(queue, name, publishing)
            found["consumed"] = consumed / await consume(queue, name, consumed)
        return filled

    in_reactor(main)
    return found
