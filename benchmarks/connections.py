"""Many connections that are held, and what each costs the server.

Knows sockets' addresses, limits of descriptors, and where Linux tells the memory of a process.  It must not know what
is spoken over a connection: peers say how one is opened and used.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.loads import Task

__all__ = ["idle_memory", "place", "raise_limit"]

T = TypeVar("T")

#: Connections that are there before memory is looked at, so that what a server needs once is not counted.
FIRST = 20
#: How many are being opened at a time where they are to be held.
AT_ONCE = 32
#: Descriptors, for more connections than any workload has.
ENOUGH = 65_536
#: From one address to one port there are fewer connections than a host has ports for what goes out.
PER_ADDRESS = 5000


def raise_limit() -> None:
    """Lets this process have descriptors enough, or as many as it may."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = ENOUGH if hard == resource.RLIM_INFINITY else min(ENOUGH, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def place(port: int, number: int = 0) -> str:
    """The endpoint string of a client's connection of that number."""
    where = f"tcp:127.0.0.1:{port}"
    return f"{where}:bindAddress=127.0.0.{1 + number // PER_ADDRESS}" if number >= PER_ADDRESS else where


def resident(process: int) -> int:
    """Bytes of memory that a process has of the machine's."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except OSError:
        raise SystemExit("this system does not tell the memory of a process in /proc") from None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def _open(open_one: Callable[[int], Awaitable[T]], first: int, count: int) -> list[T]:
    """Connections of these numbers, several being opened at a time."""
    from twisted.internet.defer import Deferred, gatherResults

    numbers = iter(range(first, first + count))
    opened: list[T] = []

    async def chain() -> None:
        for number in numbers:
            opened.append(await open_one(number))

    await gatherResults([Deferred.fromCoroutine(chain()) for _ in range(AT_ONCE)])
    return opened


async def idle_memory(task: Task, open_one: Callable[[int], Awaitable[T]], use: Callable[[T], Awaitable[Any]]) -> float:
    """Bytes that the server has more for each connection that is open, in Twisted; all of them are used in the end.

    Where the workload says so, each is also used when it has been opened, before memory is looked at.
    """

    async def open_and_use(number: int) -> T:
        connection = await open_one(number)
        await use(connection)
        return connection

    make = open_and_use if task.workload.is_called else open_one
    first = min(FIRST, task.count // 2)
    held = await _open(make, 0, first)
    before = resident(task.server)
    held += await _open(make, first, task.count - first)
    after = resident(task.server)
    for connection in held:
        await use(connection)
    return (after - before) / (task.count - first)
