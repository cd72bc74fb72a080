"""A raw Twisted echo: as many octets as a call has, there and back, and nothing made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.protocol import Factory, Protocol

from benchmarks.connections import idle_memory, place
from benchmarks.loads import Task, in_reactor, rate, serve_until_ended, twisted_calls
from benchmarks.workloads import Kind

__all__ = ["Echo", "EchoClient", "serve", "take", "take_with"]

#: Octets of a call: the mean of those of protoframe's request, 50, and of its response, 24.
SIZE = 37


class Echo(Protocol):
    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


class EchoClient(Protocol):
    """Sends its octets, and sends them again when they have come back."""

    left = 0
    done: Deferred[None]
    closed: Deferred[None]

    def connectionMade(self) -> None:
        self.closed = Deferred()
        self.transport.setTcpNoDelay(True)

    def run(self, count: int) -> Deferred[None]:
        """Fires when they have come back so many times."""
        self.left = count
        self.done = Deferred()
        self.transport.write(b"x" * SIZE)
        return self.done

    def dataReceived(self, data: bytes) -> None:
        self.left -= 1
        if self.left:
            self.transport.write(data)
        else:
            self.done.callback(None)

    def close(self) -> Deferred[None]:
        """Fires when the connection is gone."""
        self.transport.loseConnection()
        return self.closed

    def connectionLost(self, reason: Any) -> None:
        self.closed.callback(None)


def serve() -> None:
    serve_until_ended(Factory.forProtocol(Echo))


def take(task: Task, port: int) -> float:
    return take_with(EchoClient, task, port)


def take_with(make: Callable[[], EchoClient], task: Task, port: int) -> float:
    """What a client finds whose connections are made by this."""

    async def main(reactor: Any) -> float:
        async def open_one(number: int = 0) -> EchoClient:
            client: EchoClient = await connectProtocol(clientFromString(reactor, place(port, number)), make())
            # A conversation has begun when something came back, as protoframe's has when it is opened.
            await client.run(1)
            return client

        async def open_and_close() -> None:
            client = await open_one()
            await client.run(1)
            await client.close()

        if task.kind is Kind.OPENING:
            return await twisted_calls([open_and_close], task)
        if task.kind is Kind.IDLE:
            return await idle_memory(task, open_one, lambda client: client.run(1))
        clients = [await open_one(number) for number in range(task.workload.connections)]

        async def run(count: int) -> None:
            await gatherResults([client.run(count // len(clients)) for client in clients])

        return await rate(run, task)

    return in_reactor(main)
