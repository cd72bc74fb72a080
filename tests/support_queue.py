"""A queue server in the process of the test, whose calls can be counted, held up and made to fail."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from zope.interface import implementer

from protoframe import IInterceptor, InterceptedCall, ListeningPort, listen
from protoframe.queue import QueueClient
from protoframe.servers.queue.broker import Broker
from protoframe.servers.queue.memory import MemoryStore
from protoframe.servers.queue.service import QueueFactory


@implementer(IInterceptor)
class Watch:
    """Sees each call.

    :ivar calls: how often each method was called.
    :ivar arguments: of those of each.
    :ivar before: by method, what is awaited before the call.
    :ivar after: the same, before its answer goes.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.arguments: dict[str, list[Any]] = {}
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        self.after: dict[str, Callable[[], Awaitable[object]]] = {}

    async def intercept(self, call: InterceptedCall, proceed: Callable[[], Awaitable[Any]]) -> Any:
        name = call.method.rpartition(".")[2]
        self.calls[name] += 1
        self.arguments.setdefault(name, []).append(call.arguments)
        if name in self.before:
            await self.before[name]()
        result = await proceed()
        if name in self.after:
            await self.after[name]()
        return result


class Served:
    """A server.

    :ivar where: how to reach it.
    """

    def __init__(self) -> None:
        clock = time.time
        self.watch = Watch()
        self.broker = Broker(
            reactor, clock, MemoryStore(reactor, clock), MemoryStore(reactor, clock), broken=lambda _: None
        )
        self.broker.open()
        self.factory = QueueFactory(self.broker, interceptors=[self.watch])
        self.port: ListeningPort | None = None
        self.number = 0

    @property
    def where(self) -> str:
        return f"tcp:127.0.0.1:{self.number}"

    async def listen(self) -> None:
        self.port = await listen(reactor, f"tcp:{self.number}:interface=127.0.0.1", self.factory)  # type: ignore[arg-type]
        self.number = self.port.getHost().port

    async def stop_listening(self) -> None:
        assert self.port is not None
        await self.port.stopListening()

    def drop_connections(self) -> None:
        for connection in list(self.factory.connections):
            connection.close()


@asynccontextmanager
async def served() -> AsyncIterator[Served]:
    """A server, until the block is done."""
    running = Served()
    await running.listen()
    try:
        yield running
    finally:
        await running.stop_listening()
        await running.factory.drain(0.0)
        await running.broker.close()


@asynccontextmanager
async def client_of(server: Served, **options: Any) -> AsyncIterator[QueueClient]:
    """A client, until the block is done."""
    async with QueueClient(reactor, server.where, **options) as queue:
        yield queue


class Gate:
    """Holds up whoever passes, until it is opened."""

    def __init__(self) -> None:
        self._waiting: list[Deferred[None]] = []
        self.is_open = False

    async def __call__(self) -> None:
        if not self.is_open:
            waiting: Deferred[None] = Deferred()
            self._waiting.append(waiting)
            await waiting

    def open(self) -> None:
        self.is_open = True
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.callback(None)
