"""pf-queue, by its Protocol: each message is a call."""

from __future__ import annotations

import uuid
from typing import Any

from benchmarks.loads import Task, in_reactor, twisted_calls
from benchmarks.queues.workloads import BODY
from protoframe import connect
from protoframe.queue import Queue

__all__ = ["take"]


def take(task: Task, port: int) -> float:
    async def main(reactor: Any) -> float:
        name = f"bench-{uuid.uuid4().hex}"
        async with connect(reactor, f"tcp:127.0.0.1:{port}", Queue) as queue:
            await queue.declare(name)
            found = await twisted_calls([lambda: queue.publish(name, BODY)], task)
            await queue.delete(name)
        return found

    return in_reactor(main)
