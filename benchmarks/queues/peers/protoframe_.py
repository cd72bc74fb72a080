"""pf-queue, by its Protocol and the public face alone."""

from __future__ import annotations

import time
import uuid
from typing import Any

from twisted.internet.defer import Deferred, gatherResults

from benchmarks.loads import Task, check, in_reactor, per_second, twisted_calls
from benchmarks.queues.workloads import BODY, PREFETCH, SETTLED_TOGETHER
from benchmarks.workloads import Kind
from protoframe import connect
from protoframe.queue import Message, Queue, Tag

__all__ = ["consume", "depth", "fill", "publish", "take"]

#: Messages of one call of those that fill a queue.
FILLED_TOGETHER = 1_000


def take(task: Task, port: int) -> float:
    async def main(reactor: Any) -> float:
        name = f"bench-{uuid.uuid4().hex}"
        async with connect(reactor, f"tcp:127.0.0.1:{port}", Queue) as queue:
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


async def publish(queue: Queue, name: str, task: Task) -> float:
    """Messages a second."""
    batch = [Message(body=BODY)] * task.workload.batch
    if len(batch) == 1:
        return await twisted_calls([lambda: queue.publish(name, BODY)], task)
    return await twisted_calls([lambda: queue.publish_batch(name, batch)], task)


async def fill(queue: Queue, name: str, count: int) -> None:
    """Publishes so many, as fast as may be."""
    while count:
        together = min(count, FILLED_TOGETHER)
        await queue.publish_batch(name, [Message(body=BODY)] * together)
        count -= together


async def consume(queue: Queue, name: str, count: int) -> float:
    """Seconds that it takes to consume so many, and to have all acknowledgements answered."""
    tags: list[Tag] = []
    settling: list[Deferred[Any]] = []
    taken = 0
    began = time.perf_counter()
    async for delivery in queue.consume(name, prefetch=PREFETCH):
        tags.append(delivery.tag)
        taken += 1
        if len(tags) == SETTLED_TOGETHER or taken == count:
            settling.append(Deferred.fromCoroutine(_settle(queue, name, tags)))
            tags = []
        if taken == count:
            await gatherResults(settling)
            break
    return time.perf_counter() - began


async def _settle(queue: Queue, name: str, tags: list[Tag]) -> None:
    check((await queue.acknowledge(name, tags)).count, len(tags))


def depth(waiting: int, publishing: Task, consumed: int, port: int, look: Any) -> dict[str, float]:
    """Fills a queue, and measures it: how fast it is filled, and takes and gives messages, and what ``look`` finds.

    ``look`` is called when so many messages wait, before they are consumed.
    """
    found: dict[str, float] = {}

    async def main(reactor: Any) -> float:
        name = "deep"
        async with connect(reactor, f"tcp:127.0.0.1:{port}", Queue) as queue:
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
