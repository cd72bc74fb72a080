"""rpyc: Python's objects at a distance, in threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Any

import rpyc
from rpyc.utils.helpers import buffiter
from rpyc.utils.server import ThreadedServer

from benchmarks.loads import TEXT, Task, announce, check, rate
from benchmarks.workloads import Kind

__all__ = ["serve", "take"]


class Speech(rpyc.Service):
    def exposed_upper(self, text: str) -> str:
        return text.upper()

    def exposed_put(self, data: bytes) -> int:
        return len(data)

    def exposed_items(self, count: int) -> Iterator[str]:
        for _ in range(count):
            yield TEXT


def serve() -> None:
    server = ThreadedServer(Speech, hostname="127.0.0.1", port=0)
    announce(server.port)
    server.start()


def take(task: Task, port: int) -> float:
    connection = rpyc.connect("127.0.0.1", port)
    data = bytes(task.workload.size)
    # What a name stands for is asked for once, and not at each call.
    upper, put, items = connection.root.upper, connection.root.put, connection.root.items
    asynchronous = rpyc.async_(upper)

    async def run(count: int) -> None:
        if task.kind is Kind.ITEMS:
            # As it is, a remote iterator is asked for each item by itself; `buffiter` asks for up to 1,000 of them.
            check(sum(1 for _ in buffiter(items(count))), count)
        elif task.kind is Kind.PAYLOADS:
            for _ in range(count):
                put(data)
        elif task.at_once == 1:
            for _ in range(count):
                upper(TEXT)
        else:
            in_flight(asynchronous, count, task.at_once)

    try:
        check(put(data), len(data))
        check(upper(TEXT), TEXT.upper())
        return asyncio.run(rate(run, task))
    finally:
        connection.close()


def in_flight(call: Any, count: int, at_once: int) -> None:
    """So many calls, the oldest of which is waited for when there are so many on the way."""
    on_the_way = deque(call(TEXT) for _ in range(at_once))
    for _ in range(count - at_once):
        check(on_the_way.popleft().value, TEXT.upper())
        on_the_way.append(call(TEXT))
    for result in on_the_way:
        check(result.value, TEXT.upper())
