"""protoframe over TCP, by its public face alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from typing import Any

from benchmarks.connections import idle_memory, place
from benchmarks.loads import TEXT, Task, check, in_reactor, rate, serve_until_ended, twisted_calls
from benchmarks.workloads import MIB, Kind
from protoframe import Factory, Limits, Protocol, connect, request

__all__ = ["Speech", "serve", "take"]

#: Both ends keep the defaults, but for payloads of 4 MiB, which with their name are larger than a message may be.
LARGE = Limits(max_message=8 * MIB)


class Speech(Protocol):
    @request
    async def upper(self, text: str) -> str:
        return text.upper()

    @request
    async def put(self, data: bytes) -> int:
        return len(data)

    @request
    async def items(self, count: int) -> AsyncIterator[str]:
        for _ in range(count):
            yield TEXT


def serve() -> None:
    serve_until_ended(Factory(Speech, limits=LARGE))


def take(task: Task, port: int) -> float:
    async def main(reactor: Any) -> float:
        if task.kind is Kind.IDLE:
            return await idle(reactor, task, port)
        if task.kind is Kind.OPENING:
            return await opening(reactor, task, port)
        limits = LARGE if task.workload.size >= MIB else None
        async with AsyncExitStack() as stack:
            speeches = [
                await stack.enter_async_context(connect(reactor, place(port, number), Speech, limits=limits))
                for number in range(task.workload.connections)
            ]
            return await measure(speeches, task)

    return in_reactor(main)


async def measure(speeches: list[Speech], task: Task) -> float:
    """The figure of calls, payloads or items."""
    speech = speeches[0]
    if task.kind is Kind.ITEMS:

        async def run(count: int) -> None:
            taken = 0
            async for _ in speech.items(count):
                taken += 1
            check(taken, count)

        return await rate(run, task)
    if task.kind is Kind.PAYLOADS:
        data = bytes(task.workload.size)
        check(await speech.put(data), len(data))
        return await twisted_calls([lambda: speech.put(data)], task)
    for each in speeches:
        check(await each.upper(TEXT), TEXT.upper())

    def call_of(each: Speech) -> Any:
        return lambda: each.upper(TEXT)

    return await twisted_calls([call_of(each) for each in speeches], task)


async def opening(reactor: Any, task: Task, port: int) -> float:
    async def open_and_close() -> None:
        async with connect(reactor, place(port), Speech) as speech:
            await speech.upper(TEXT)

    return await twisted_calls([open_and_close], task)


async def idle(reactor: Any, task: Task, port: int) -> float:
    async def open_one(number: int) -> Speech:
        return await connect(reactor, place(port, number), Speech)

    def use(speech: Speech) -> Awaitable[str]:
        return speech.upper(TEXT)

    return await idle_memory(task, open_one, use)
