"""The loops of clients: so many calls, so many of them at once, and what they come to a second.

Knows Twisted's reactor and asyncio, and how calls are chained in each.  It must not know what a call is, nor whose.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from benchmarks.workloads import Kind, Workload

__all__ = [
    "TEXT",
    "Task",
    "announce",
    "asyncio_calls",
    "check",
    "free_port",
    "in_reactor",
    "per_second",
    "rate",
    "serve_until_ended",
    "twisted_calls",
]

#: What is asked to be written in capitals, and each item of a stream.
TEXT = "hello world"

Call = Callable[[], Awaitable[Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A workload, as one client is to do it.

    :param count: of calls, payloads, items or connections, beside those that warm up.
    :param server: the process id of the server.
    """

    workload: Workload
    count: int
    server: int

    @property
    def kind(self) -> Kind:
        """The workload's."""
        return self.workload.kind

    @property
    def at_once(self) -> int:
        """The workload's."""
        return self.workload.at_once

    @property
    def warm_up(self) -> int:
        """How many come before those that are measured: a tenth."""
        step = self.at_once * self.workload.batch
        return max(1, self.count // step // 10) * step


def announce(port: int) -> None:
    """Tells whoever started this server that it listens, and where."""
    print(port, flush=True)


def free_port(kind: socket.SocketKind) -> int:
    """A port of the loopback interface, for servers that are told one and do not tell which they were given."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check(answer: Any, wanted: Any) -> None:
    """Ends the process where what answers does not do what it is asked to."""
    if answer != wanted:
        raise SystemExit(f"the answer was {answer!r:.80}, not {wanted!r:.80}")


def per_second(task: Task, seconds: float) -> float:
    """The figure of a task that took so long: of payloads the megabytes (10**6 octets), of all else the number."""
    each = task.workload.size / 1e6 if task.kind is Kind.PAYLOADS else 1
    return task.count * each / seconds


async def rate(run: Callable[[int], Awaitable[Any]], task: Task) -> float:
    """The figure of what makes so many calls, once it has been warmed up."""
    await run(task.warm_up)
    began = time.perf_counter()
    await run(task.count)
    return per_second(task, time.perf_counter() - began)


async def one_at_a_time(call: Call, count: int) -> None:
    """Calls, each when the one before it is answered."""
    for _ in range(count):
        await call()


def chains(calls: Sequence[Call], count: int, at_once: int) -> list[Any]:
    """So many coroutines of calls one at a time, spread over those of each connection."""
    return [one_at_a_time(calls[number % len(calls)], count // at_once) for number in range(at_once)]


async def twisted_calls(calls: Sequence[Call], task: Task) -> float:
    """The figure of calls that are Deferreds; there is one way to call for each connection."""
    from twisted.internet.defer import Deferred, gatherResults

    async def run(count: int) -> None:
        if task.at_once == 1:
            await one_at_a_time(calls[0], count // task.workload.batch)
        else:
            each = chains(calls, count // task.workload.batch, task.at_once)
            await gatherResults([Deferred.fromCoroutine(chain) for chain in each])

    return await rate(run, task)


async def asyncio_calls(calls: Sequence[Call], task: Task) -> float:
    """The figure of calls that asyncio awaits; there is one way to call for each connection."""

    async def run(count: int) -> None:
        if task.at_once == 1:
            await one_at_a_time(calls[0], count // task.workload.batch)
        else:
            await asyncio.gather(*chains(calls, count // task.workload.batch, task.at_once))

    return await rate(run, task)


def in_reactor(main: Callable[[Any], Awaitable[float]]) -> float:
    """What a client finds that runs in Twisted's reactor, and is given it."""
    from twisted.internet.task import react

    found: list[float] = []

    async def run(reactor: Any) -> None:
        found.append(await main(reactor))

    try:
        react(run)
    except SystemExit as end:
        if end.code:
            raise
    return found[0]


def serve_until_ended(factory: Any) -> None:
    """Serves a factory of Twisted's at a free port, until the process is ended."""
    from twisted.internet.defer import Deferred
    from twisted.internet.endpoints import serverFromString
    from twisted.internet.task import react

    async def run(reactor: Any) -> None:
        port = await serverFromString(reactor, "tcp:0:interface=127.0.0.1:backlog=1024").listen(factory)
        announce(port.getHost().port)
        await Deferred()

    react(run)
