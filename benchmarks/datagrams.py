"""Calls a second over UDP, side by side in one run: protoframe, aiocoap, and a raw Twisted echo as the limit.

    python benchmarks/datagrams.py [--rounds N] [--scale N]

Each server and each client is a process of its own; the clients take turns, round after round, so that a machine
whose speed drifts drifts for all.  What is printed are the medians, the medians of the ratios within each round, and
in brackets the least and the most.

The raw echo is a `DatagramProtocol` that sends each datagram back; its client keeps as many in flight as there are
calls, one call a datagram, while protoframe puts several into one.  aiocoap has a resource that echoes what is POSTed,
as its documentation shows it.  To one server it has a single confirmable request on the way at a time (NSTART, RFC
7252, section 4.7), and keeps the others back; so what is in flight are non-confirmable ones
(``transport_tuning=Unreliable``), which it does not hold back, and which nothing sends again.  Confirmable ones, 64
asked for at once, are in a line of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.protocol import DatagramProtocol
from twisted.internet.task import react

from protoframe import Factory, Protocol, connect, listen, request

TEXT = "hello world"
#: Octets of a datagram of the raw echo: the mean of those of a request, 81, and of its response, 55, over UDP.
SIZE = 68
#: Seconds without an answer after which a datagram of the raw echo is taken for lost, and sent again.
PATIENCE = 0.5
MANY = 64

ECHO, UDP, TCP, COAP, CONFIRMABLE = "raw echo", "protoframe, udp", "protoframe, tcp", "aiocoap", "aiocoap, confirmable"


@dataclasses.dataclass(frozen=True)
class Workload:
    """So many calls of a peer, so many of them at once."""

    peer: str
    at_once: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.peer}, {self.at_once} {'at a time' if self.at_once == 1 else 'in flight'}"


WORKLOADS = [
    Workload(ECHO, 1, 8000),
    Workload(UDP, 1, 8000),
    Workload(TCP, 1, 8000),
    Workload(COAP, 1, 1000),
    Workload(ECHO, MANY, 38400),
    Workload(UDP, MANY, 51200),
    Workload(TCP, MANY, 51200),
    Workload(COAP, MANY, 3200),
    Workload(CONFIRMABLE, MANY, 1920),
]

#: What is compared, and the ratio that is asked for.
RATIOS = [
    ((UDP, 1), (ECHO, 1), 0.6),
    ((UDP, MANY), (ECHO, MANY), 0.45),
    ((UDP, MANY), (COAP, MANY), 25.0),
    ((UDP, MANY), (CONFIRMABLE, MANY), None),
    ((UDP, 1), (COAP, 1), None),
    ((UDP, 1), (TCP, 1), None),
    ((UDP, MANY), (TCP, MANY), None),
]


class Speech(Protocol):
    @request
    async def upper(self, text: str) -> str:
        return text.upper()


class Echo(DatagramProtocol):
    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        self.transport.write(datagram, addr)


class EchoClient(DatagramProtocol):
    """Sends each datagram again when it has come back, or when it is lost."""

    def __init__(self, port: int, at_once: int) -> None:
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
        reactor.callLater(PATIENCE, self._look, self._done, list(self._left))
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
        reactor.callLater(PATIENCE, self._look, done, list(self._left))


async def one_at_a_time(call: Callable[[], Awaitable[Any]], count: int) -> None:
    for _ in range(count):
        await call()


async def rate(run: Callable[[int], Awaitable[Any]], workload: Workload) -> float:
    """Calls a second, once as many as a tenth have been made to warm up."""
    at_once = workload.at_once
    await run(max(1, workload.count // at_once // 10) * at_once)
    began = time.perf_counter()
    await run(workload.count // at_once * at_once)
    return workload.count // at_once * at_once / (time.perf_counter() - began)


def check(answer: Any, wanted: Any) -> None:
    """Ends the run where what answers is not what was asked."""
    if answer != wanted:
        raise SystemExit(f"the answer was {answer!r}")


# Twisted: the raw echo and protoframe.


async def serve_twisted(peer: str) -> None:
    if peer == ECHO:
        print(reactor.listenUDP(0, Echo(), interface="127.0.0.1").getHost().port, flush=True)
    else:
        port = await listen(reactor, f"{peer[-3:]}:0:interface=127.0.0.1", Factory(Speech))
        print(port.getHost().port, flush=True)
    await Deferred()


async def take_twisted(workload: Workload, port: int) -> float:
    if workload.peer == ECHO:
        echo = EchoClient(port, workload.at_once)
        reactor.listenUDP(0, echo, interface="127.0.0.1")
        measured = await rate(echo.run, workload)
        if echo.lost:
            print(f"{workload.name}: {echo.lost} sent again", file=sys.stderr)
        return measured
    async with connect(reactor, f"{workload.peer[-3:]}:127.0.0.1:{port}", Speech) as speech:

        def call() -> Awaitable[str]:
            return speech.upper(TEXT)

        async def run(count: int) -> None:
            each = count // workload.at_once
            chains = [Deferred.fromCoroutine(one_at_a_time(call, each)) for _ in range(workload.at_once)]
            await gatherResults(chains)

        check(await call(), TEXT.upper())
        return await rate(run, workload)


# asyncio: aiocoap.


async def serve_coap() -> None:
    from aiocoap import Context, Message
    from aiocoap.resource import Resource, Site

    class EchoResource(Resource):
        async def render_post(self, request: Any) -> Any:
            return Message(payload=request.payload)

    # It does not tell which port it was given.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    site = Site()
    site.add_resource(["echo"], EchoResource())
    await Context.create_server_context(site, bind=("127.0.0.1", port))
    print(port, flush=True)
    await asyncio.get_running_loop().create_future()


async def take_coap(workload: Workload, port: int) -> float:
    from aiocoap import POST, Context, Message, Unreliable

    context = await Context.create_client_context()
    options = {"transport_tuning": Unreliable} if workload.peer == COAP and workload.at_once > 1 else {}
    uri = f"coap://127.0.0.1:{port}/echo"
    payload = TEXT.encode()

    async def call() -> bytes:
        answer = await context.request(Message(code=POST, payload=payload, uri=uri, **options)).response
        octets: bytes = answer.payload
        return octets

    async def run(count: int) -> None:
        await asyncio.gather(
            *[one_at_a_time(call, count // workload.at_once) for _ in range(workload.at_once)],
        )

    try:
        check(await call(), payload)
        return await rate(run, workload)
    finally:
        await context.shutdown()


# Both.


def serve(peer: str) -> None:
    """What a server's process does: it prints its port, and serves until it is ended."""
    if peer == COAP:
        asyncio.run(serve_coap())
    else:
        react(lambda _: Deferred.fromCoroutine(serve_twisted(peer)))


def take(workload: Workload, port: int) -> None:
    """What a client's process does: it prints the calls a second."""
    if workload.peer in (COAP, CONFIRMABLE):
        print(asyncio.run(take_coap(workload, port)))
        return

    async def run() -> None:
        print(await take_twisted(workload, port))

    react(lambda _: Deferred.fromCoroutine(run()))


def compare(rounds: int, workloads: list[Workload]) -> dict[str, list[float]]:
    """The calls a second of each workload, in each round."""
    servers: dict[str, subprocess.Popen[str]] = {}
    rates: dict[str, list[float]] = {workload.name: [] for workload in workloads}
    try:
        ports = {}
        for peer in dict.fromkeys(workload.peer for workload in workloads if workload.peer != CONFIRMABLE):
            command = [sys.executable, __file__, "--serve", peer]
            servers[peer] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            ports[peer] = servers[peer].stdout.readline().strip()
            if not ports[peer]:
                raise SystemExit(f"the server of {peer} did not come up")
        ports[CONFIRMABLE] = ports.get(COAP, "")
        for round_ in range(rounds):
            for workload in workloads:
                if sys.stderr.isatty():
                    print(f"\rround {round_ + 1} of {rounds}, {workload.name:40}", end="", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--take", workload.name, "--port", ports[workload.peer]]
                command += ["--count", str(workload.count)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
                rates[workload.name].append(float(done.stdout))
    finally:
        for server in servers.values():
            server.terminate()
            server.wait()
        if sys.stderr.isatty():
            print("\r" + " " * 64 + "\r", end="", file=sys.stderr, flush=True)
    return rates


def report(rates: dict[str, list[float]]) -> None:
    for name, each in rates.items():
        print(f"{name:36}{statistics.median(each):10,.0f} calls/s   ({min(each):,.0f} to {max(each):,.0f})")
    for one, other, wanted in RATIOS:
        names = [Workload(*peer, 0).name for peer in (one, other)]
        if not rates.keys() >= set(names):
            continue
        ratios = [a / b for a, b in zip(*(rates[name] for name in names), strict=True)]
        target = f"; at least {wanted:g} is asked for" if wanted is not None else ""
        print(
            f"{' / '.join(names)}: {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f}{target})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="how many times as many calls as usual each makes")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--take", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    elif options.take:
        (workload,) = (each for each in WORKLOADS if each.name == options.take)
        take(dataclasses.replace(workload, count=options.count), options.port)
    else:
        workloads = [
            dataclasses.replace(each, count=max(1, round(each.count * options.scale / each.at_once)) * each.at_once)
            for each in WORKLOADS
        ]
        if importlib.util.find_spec("aiocoap") is None:
            print("aiocoap is not installed, and left out", file=sys.stderr)
            workloads = [each for each in workloads if each.peer not in (COAP, CONFIRMABLE)]
        report(compare(options.rounds, workloads))


if __name__ == "__main__":
    main()
