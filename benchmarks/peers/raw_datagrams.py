"""A raw Twisted echo of datagrams: as many octets as a call has, one call a datagram, and nothing made of them."""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import DatagramProtocol
from twisted.internet.task import react

from benchmarks.loads import Task, announce, in_reactor, rate

__all__ = ["serve", "take"]

#: Octets of a datagram: the mean of those of protoframe's request, 81, and of its response, 55, over UDP.
SIZE = 68
#: Seconds without an answer after which a datagram is taken for lost, and sent again.
PATIENCE = 0.5


class Echo(DatagramProtocol):
    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        self.transport.write(datagram, addr)


class EchoClient(DatagramProtocol):
    """Sends each datagram again when it has come back, or when it is lost."""

    def __init__(self, reactor: Any, port: int, at_once: int) -> None:
        self._reactor = reactor
        self._port = port
        self._datagrams = [bytes([number]).ljust(SIZE, b"x") for number in range(at_once)]
        self._left: list[int] = []
        self._running = 0
        self._done: Deferred[None] = Deferred()
        self.lost = 0

    def startProtocol(self) -> None:
        self.transport.connect("127.0.0.1", self._port)

    def run(self, count: int) -> Deferred[None]:
        """Fires when so many have come back."""
        self._running = len(self._datagrams)
        self._left = [count // self._running] * self._running
        self._done = Deferred()
        for datagram in self._datagrams:
            self.transport.write(datagram)
        self._reactor.callLater(PATIENCE, self._look, self._done, list(self._left))
        return self._done

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        number = datagram[0]
        left = self._left[number] - 1
        if left < 0:
            # One that was not lost after all.
            return
        self._left[number] = left
        if left:
            self.transport.write(datagram)
            return
        self._running -= 1
        if not self._running:
            self._done.callback(None)

    def _look(self, done: Deferred[None], before: list[int]) -> None:
        """Sends what has not come back for so long."""
        if done.called:
            return
        for number, left in enumerate(self._left):
            if left and left == before[number]:
                self.lost += 1
                self.transport.write(self._datagrams[number])
        self._reactor.callLater(PATIENCE, self._look, done, list(self._left))


def serve() -> None:
    async def main(reactor: Any) -> None:
        announce(reactor.listenUDP(0, Echo(), interface="127.0.0.1").getHost().port)
        await Deferred()

    react(main)


def take(task: Task, port: int) -> float:
    async def main(reactor: Any) -> float:
        client = EchoClient(reactor, port, task.at_once)
        reactor.listenUDP(0, client, interface="127.0.0.1")
        measured = await rate(client.run, task)
        if client.lost:
            print(f"{client.lost} datagrams were sent again", file=sys.stderr)
        return measured

    return in_reactor(main)
