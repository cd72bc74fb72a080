"""The raw echo, with octets that are given to the socket at once: `raw_echo` leaves them to the reactor's next turn."""

from __future__ import annotations

from twisted.internet.protocol import Factory

from benchmarks.loads import Task, serve_until_ended
from benchmarks.peers import raw_echo
from benchmarks.peers.direct import give

__all__ = ["serve", "take"]


class Echo(raw_echo.Echo):
    def dataReceived(self, data: bytes) -> None:
        give(self.transport, data)


class EchoClient(raw_echo.EchoClient):
    def dataReceived(self, data: bytes) -> None:
        self.left -= 1
        if self.left:
            give(self.transport, data)
        else:
            self.done.callback(None)


def serve() -> None:
    serve_until_ended(Factory.forProtocol(Echo))


def take(task: Task, port: int) -> float:
    return raw_echo.take_with(EchoClient, task, port)
