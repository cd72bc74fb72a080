"""A raw Twisted stream: payloads of a length that both ends know, each acknowledged by that length."""

from __future__ import annotations

import struct
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.protocol import Factory, Protocol

from benchmarks.connections import place
from benchmarks.loads import Task, check, in_reactor, serve_until_ended, twisted_calls

__all__ = ["serve", "take"]

LENGTH = struct.Struct(">I")


class Sink(Protocol):
    """Counts what comes: first the length of all payloads of the connection, then the payloads."""

    size = 0
    came = 0

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def dataReceived(self, data: bytes) -> None:
        came = self.came + len(data)
        if not self.size:
            # The client waits for the first acknowledgement, so that these four come by themselves.
            (self.size,) = LENGTH.unpack(data)
            came = 0
            self.transport.write(data)
        elif came >= self.size:
            came -= self.size
            self.transport.write(LENGTH.pack(self.size))
        self.came = came


class Source(Protocol):
    """Sends payloads, each when the one before it is acknowledged."""

    acknowledged: Deferred[bytes]

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def put(self, data: bytes) -> Deferred[bytes]:
        """Fires with the acknowledgement."""
        self.acknowledged = Deferred()
        self.transport.write(data)
        return self.acknowledged

    def dataReceived(self, data: bytes) -> None:
        self.acknowledged.callback(data)


def serve() -> None:
    serve_until_ended(Factory.forProtocol(Sink))


def take(task: Task, port: int) -> float:
    async def main(reactor: Any) -> float:
        source = await connectProtocol(clientFromString(reactor, place(port)), Source())
        length = LENGTH.pack(task.workload.size)
        data = bytes(task.workload.size)
        check(await source.put(length), length)
        check(await source.put(data), length)
        return await twisted_calls([lambda: source.put(data)], task)

    return in_reactor(main)
