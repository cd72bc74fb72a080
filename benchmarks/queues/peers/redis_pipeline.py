"""Redis streams, by redis-py on asyncio: what is on the way together is a pipeline."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from redis.asyncio import Redis

from benchmarks.loads import Task, asyncio_calls, check, per_second, rate
from benchmarks.queues.workloads import BODY, PREFETCH
from benchmarks.workloads import Kind

__all__ = ["take"]

GROUP, CONSUMER = "bench", "one"


def take(task: Task, port: int) -> float:
    return asyncio.run(_take(task, port))


async def _take(task: Task, port: int) -> float:
    name = f"bench-{uuid.uuid4().hex}"
    async with Redis(host="127.0.0.1", port=port) as redis:

        async def publish(count: int) -> None:
            pipeline = redis.pipeline(transaction=False)
            for _ in range(count):
                pipeline.xadd(name, {"body": BODY})
            await pipeline.execute()

        async def publish_in_pipelines(count: int) -> None:
            for _ in range(count // task.at_once):
                await publish(task.at_once)

        if task.kind is Kind.CONSUME:
            await redis.xgroup_create(name, GROUP, id="0", mkstream=True)
            for _ in range(0, task.count, 100):
                await publish(100)
            found = await _consume(redis, name, task)
        elif task.workload.batch == 1:
            found = await rate(publish_in_pipelines, task)
        else:
            found = await asyncio_calls([lambda: publish(task.workload.batch)], task)
        await redis.delete(name)
    return found


async def _consume(redis: Any, name: str, task: Task) -> float:
    began = time.perf_counter()
    taken = 0
    while taken < task.count:
        ((_, entries),) = await redis.xreadgroup(GROUP, CONSUMER, {name: ">"}, count=PREFETCH, block=10_000)
        ids = [number for number, _ in entries]
        check(await redis.xack(name, GROUP, *ids), len(ids))
        taken += len(ids)
    return per_second(task, time.perf_counter() - began)
