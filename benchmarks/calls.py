"""Calls a second, side by side in one run: protoframe, Twisted's AMP, and a raw Twisted echo as the limit.

    python benchmarks/calls.py [--rounds N]

The servers run in a process of their own; the workloads take turns, round after round, so that a machine whose speed
drifts drifts for all.  Printed are the medians, and the medians of the ratios within each round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.protocol import Factory as TwistedFactory
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.task import react
from twisted.protocols import amp

from protoframe import Factory, Protocol, connect, listen, request

TEXT = "hello world"


class Speech(Protocol):
    @request
    async def upper(self, text: str) -> str:
        return text.upper()


class Upper(amp.Command):
    arguments = [(b"text", amp.Unicode())]
    response = [(b"text", amp.Unicode())]


class AMPServer(amp.AMP):
    @Upper.responder
    def upper(self, text: str) -> dict[str, str]:
        return {"text": text.upper()}


class Echo(TwistedProtocol):
    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


class EchoClient(TwistedProtocol):
    """Sends as many octets as a call has, and sends them again when they have come back."""

    left = 0
    done: Deferred[None]

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def run(self, count: int) -> Deferred[None]:
        self.left = count
        self.done = Deferred()
        self.transport.write(b"x" * 45)
        return self.done

    def dataReceived(self, data: bytes) -> None:
        self.left -= 1
        if self.left:
            self.transport.write(data)
        else:
            self.done.callback(None)


async def serve() -> None:
    for factory in (TwistedFactory.forProtocol(Echo), TwistedFactory.forProtocol(AMPServer), Factory(Speech)):
        port = await listen(reactor, "tcp:0:interface=127.0.0.1", factory)
        print(port.getHost().port, flush=True)
    await Deferred()


async def one_at_a_time(call: Callable[[], Awaitable[Any]], count: int) -> None:
    for _ in range(count):
        await call()


async def in_flight(call: Callable[[], Awaitable[Any]], count: int, at_once: int = 64) -> None:
    await gatherResults([Deferred.fromCoroutine(one_at_a_time(call, count // at_once)) for _ in range(at_once)])


async def measure(ports: list[str], rounds: int) -> None:
    wheres = [f"tcp:127.0.0.1:{port}" for port in ports]
    echo = await connectProtocol(clientFromString(reactor, wheres[0]), EchoClient())
    peer = await connectProtocol(clientFromString(reactor, wheres[1]), amp.AMP())
    async with connect(reactor, wheres[2], Speech) as speech:

        def protoframe_call() -> Awaitable[str]:
            return speech.upper(TEXT)

        def amp_call() -> Awaitable[dict[str, str]]:
            answer: Awaitable[dict[str, str]] = peer.callRemote(Upper, text=TEXT)
            return answer

        workloads: dict[str, tuple[Callable[[int], Awaitable[Any]], int]] = {
            "raw echo, 1 at a time": (echo.run, 6000),
            "protoframe, 1 at a time": (lambda count: one_at_a_time(protoframe_call, count), 6000),
            "AMP, 1 at a time": (lambda count: one_at_a_time(amp_call, count), 3200),
            "protoframe, 64 in flight": (lambda count: in_flight(protoframe_call, count), 25600),
            "AMP, 64 in flight": (lambda count: in_flight(amp_call, count), 6400),
        }
        rates: dict[str, list[float]] = {name: [] for name in workloads}
        for round_ in range(rounds + 1):
            for name, (run, count) in workloads.items():
                began = time.perf_counter()
                await run(count)
                if round_:
                    rates[name].append(count / (time.perf_counter() - began))
            if sys.stderr.isatty():
                print(f"\rround {round_} of {rounds} ", end="", file=sys.stderr, flush=True)
    for name, each in rates.items():
        print(f"{name:26}{statistics.median(each):10,.0f} calls/s   ({min(each):,.0f} to {max(each):,.0f})")
    for one, other in (
        ("protoframe, 1 at a time", "raw echo, 1 at a time"),
        ("protoframe, 64 in flight", "AMP, 64 in flight"),
    ):
        ratio = statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))
        print(f"{one} / {other}: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        react(lambda _: Deferred.fromCoroutine(serve()))
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True) as servers:
        try:
            ports = [servers.stdout.readline().strip() for _ in range(3)]
            react(lambda _: Deferred.fromCoroutine(measure(ports, options.rounds)))
        finally:
            servers.terminate()


if __name__ == "__main__":
    main()
