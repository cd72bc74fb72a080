"""Redis streams, by redis-py on asyncio: each message that is on the way is a task, with a connection of its own."""

from __future__ import annotations

import asyncio
import uuid

from redis.asyncio import Redis

from benchmarks.loads import Task, asyncio_calls
from benchmarks.queues.workloads import BODY

__all__ = ["take"]


def take(task: Task, port: int) -> float:
    return asyncio.run(_take(task, port))


async def _take(task: Task, port: int) -> float:
    name = f"bench-{uuid.uuid4().hex}"
    async with Redis(host="127.0.0.1", port=port) as redis:
        found = await asyncio_calls([lambda: redis.xadd(name, {"body": BODY})], task)
        await redis.delete(name)
    return found
