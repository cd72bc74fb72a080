"""Items a second of a server stream, side by side in one run: protoframe and gRPC's Python on asyncio (grpc.aio).

    python benchmarks/streams.py [--rounds N] [--items N]

Each server and each client is a process of its own; the clients take turns, round after round, so that a machine
whose speed drifts drifts for all.  Items are small texts, and gRPC sends them without protobuf, encoded by msgspec as
protoframe's are, so that what is compared is the streams.  Printed are the medians, and the median of the ratios
within each round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import msgspec
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import react

from protoframe import Factory, Protocol, connect, listen, request

ITEM = "hello world"
METHOD = "/Source/items"

encode = msgspec.msgpack.Encoder().encode
decode_text = msgspec.msgpack.Decoder(str).decode
decode_number = msgspec.msgpack.Decoder(int).decode


class Source(Protocol):
    @request
    async def items(self, count: int) -> AsyncIterator[str]:
        for _ in range(count):
            yield ITEM


def check(taken: int, amount: int) -> None:
    """Ends the run where items are missing."""
    if taken != amount:
        raise SystemExit(f"{taken} items of {amount} came")


async def serve_protoframe() -> None:
    port = await listen(reactor, "tcp:0:interface=127.0.0.1", Factory(Source))
    print(port.getHost().port, flush=True)
    await Deferred()


async def take_protoframe(where: str, count: int) -> float:
    async with connect(reactor, f"tcp:{where}", Source) as source:
        for amount in (count // 10, count):
            began = time.perf_counter()
            taken = 0
            async for _ in source.items(amount):
                taken += 1
            check(taken, amount)
        return count / (time.perf_counter() - began)


class GRPCSource(grpc.GenericRpcHandler):
    def service(self, details: Any) -> Any:
        if details.method != METHOD:
            return None
        return grpc.unary_stream_rpc_method_handler(
            self.items,
            request_deserializer=decode_number,
            response_serializer=encode,
        )

    async def items(self, count: int, context: Any) -> AsyncIterator[str]:
        for _ in range(count):
            yield ITEM


async def serve_grpc() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((GRPCSource(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def take_grpc(where: str, count: int) -> float:
    async with grpc.aio.insecure_channel(where) as channel:
        call = channel.unary_stream(METHOD, request_serializer=encode, response_deserializer=decode_text)
        for amount in (count // 10, count):
            began = time.perf_counter()
            taken = 0
            async for _ in call(amount):
                taken += 1
            check(taken, amount)
        return count / (time.perf_counter() - began)


def run(peer: str, where: str, count: int) -> None:
    """What a client's process does: it prints the items a second."""
    if peer == "grpc.aio":
        print(asyncio.run(take_grpc(where, count)))
        return

    async def take() -> None:
        print(await take_protoframe(where, count))

    react(lambda _: Deferred.fromCoroutine(take()))


def compare(rounds: int, counts: dict[str, int]) -> None:
    servers: dict[str, subprocess.Popen[str]] = {}
    rates: dict[str, list[float]] = {peer: [] for peer in counts}
    try:
        wheres = {}
        for peer in counts:
            servers[peer] = subprocess.Popen(
                [sys.executable, __file__, "--serve", peer], stdout=subprocess.PIPE, text=True
            )
            wheres[peer] = f"127.0.0.1:{servers[peer].stdout.readline().strip()}"
        for _ in range(rounds):
            for peer, count in counts.items():
                command = [sys.executable, __file__, "--take", peer, "--where", wheres[peer], "--items", str(count)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rates[peer].append(float(done.stdout))
    finally:
        for server in servers.values():
            server.terminate()
            server.wait()
    for peer, each in rates.items():
        print(f"{peer:12}{statistics.median(each):12,.0f} items/s   ({min(each):,.0f} to {max(each):,.0f})")
    ours, theirs = rates.values()
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"{' / '.join(rates)}: {ratio:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--items", type=int, default=500_000)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--take", help=argparse.SUPPRESS)
    parser.add_argument("--where", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve == "grpc.aio":
        asyncio.run(serve_grpc())
    elif options.serve:
        react(lambda _: Deferred.fromCoroutine(serve_protoframe()))
    elif options.take:
        run(options.take, options.where, options.items)
    else:
        compare(options.rounds, {"protoframe": options.items, "grpc.aio": max(1, options.items // 20)})


if __name__ == "__main__":
    main()
