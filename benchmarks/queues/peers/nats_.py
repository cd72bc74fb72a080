"""NATS JetStream, by nats-py."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import nats
from nats.js.api import RetentionPolicy, StorageType

from benchmarks.loads import Task, asyncio_calls, per_second
from benchmarks.queues.workloads import BODY, PREFETCH
from benchmarks.workloads import Kind

__all__ = ["take"]


def take(task: Task, port: int) -> float:
    return asyncio.run(_take(task, port))


async def _take(task: Task, port: int) -> float:
    connection = await nats.connect(f"nats://127.0.0.1:{port}")
    name = f"bench-{uuid.uuid4().hex}"
    stream = connection.jetstream()
    await stream.add_stream(
        name=name, subjects=[name], storage=StorageType.FILE, retention=RetentionPolicy.WORK_QUEUE, num_replicas=1
    )

    async def batch_of(count: int) -> None:
        await asyncio.gather(*[await stream.publish_async(name, BODY) for _ in range(count)])

    async def one() -> None:
        await (await stream.publish_async(name, BODY))

    if task.kind is Kind.CONSUME:
        for _ in range(0, task.count, 100):
            await batch_of(100)
        found = await _consume(stream, connection, name, task)
    elif task.workload.batch == 1:
        found = await asyncio_calls([one], task)
    else:
        found = await asyncio_calls([lambda: batch_of(task.workload.batch)], task)
    await stream.delete_stream(name)
    await connection.close()
    return found


async def _consume(stream: Any, connection: Any, name: str, task: Task) -> float:
    subscription = await stream.pull_subscribe(name, durable="bench")
    began = time.perf_counter()
    taken = 0
    while taken < task.count:
        messages = await subscription.fetch(PREFETCH, timeout=10)
        for message in messages:
            await message.ack()
        taken += len(messages)
    await connection.flush()
    return per_second(task, time.perf_counter() - began)
