"""AMP, Twisted's own Asynchronous Messaging Protocol."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.protocol import Factory
from twisted.protocols import amp

from benchmarks.connections import place
from benchmarks.loads import TEXT, Task, check, in_reactor, serve_until_ended, twisted_calls
from benchmarks.workloads import Kind

__all__ = ["serve", "take"]


class Upper(amp.Command):
    arguments = [(b"text", amp.Unicode())]
    response = [(b"text", amp.Unicode())]


class Put(amp.Command):
    arguments = [(b"data", amp.String())]
    response = [(b"length", amp.Integer())]


class Server(amp.AMP):
    @Upper.responder
    def upper(self, text: str) -> dict[str, str]:
        return {"text": text.upper()}

    @Put.responder
    def put(self, data: bytes) -> dict[str, int]:
        return {"length": len(data)}


class Client(amp.AMP):
    def __init__(self) -> None:
        super().__init__()
        self.closed: Deferred[None] = Deferred()

    def connectionLost(self, reason: Any) -> None:
        super().connectionLost(reason)
        self.closed.callback(None)


def serve() -> None:
    serve_until_ended(Factory.forProtocol(Server))


def take(task: Task, port: int) -> float:
    async def main(reactor: Any) -> float:
        async def open_one() -> Client:
            client: Client = await connectProtocol(clientFromString(reactor, place(port)), Client())
            return client

        async def open_and_close() -> None:
            client = await open_one()
            await client.callRemote(Upper, text=TEXT)
            client.transport.loseConnection()
            await client.closed

        if task.kind is Kind.OPENING:
            return await twisted_calls([open_and_close], task)
        client = await open_one()
        data = bytes(task.workload.size)

        def call() -> Awaitable[Any]:
            return client.callRemote(Upper, text=TEXT)

        def put() -> Awaitable[Any]:
            return client.callRemote(Put, data=data)

        if task.kind is Kind.PAYLOADS:
            check(await put(), {"length": len(data)})
            return await twisted_calls([put], task)
        check(await call(), {"text": TEXT.upper()})
        return await twisted_calls([call], task)

    return in_reactor(main)
