"""grpclib: gRPC in Python, on asyncio."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from grpclib.client import Channel, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.const import Cardinality, Handler
from grpclib.server import Server

from benchmarks.loads import TEXT, Task, announce, asyncio_calls, check, free_port, rate
from benchmarks.peers.protobuf_messages import Data, Number, Text
from benchmarks.workloads import Kind

__all__ = ["serve", "take"]


class Speech:
    async def upper(self, stream: Any) -> None:
        request = await stream.recv_message()
        await stream.send_message(Text(text=request.text.upper()))

    async def put(self, stream: Any) -> None:
        request = await stream.recv_message()
        await stream.send_message(Number(number=len(request.data)))

    async def items(self, stream: Any) -> None:
        request = await stream.recv_message()
        for _ in range(request.number):
            await stream.send_message(Text(text=TEXT))

    def __mapping__(self) -> dict[str, Handler]:
        return {
            "/benchmarks.Speech/upper": Handler(self.upper, Cardinality.UNARY_UNARY, Text, Text),
            "/benchmarks.Speech/put": Handler(self.put, Cardinality.UNARY_UNARY, Data, Number),
            "/benchmarks.Speech/items": Handler(self.items, Cardinality.UNARY_STREAM, Number, Text),
        }


async def serve_grpclib() -> None:
    port = free_port(socket.SOCK_STREAM)
    server = Server([Speech()])
    await server.start("127.0.0.1", port)
    announce(port)
    await server.wait_closed()


def serve() -> None:
    asyncio.run(serve_grpclib())


async def take_grpclib(task: Task, port: int) -> float:
    async with Channel("127.0.0.1", port) as channel:
        if task.kind is Kind.ITEMS:
            items = UnaryStreamMethod(channel, "/benchmarks.Speech/items", Number, Text)

            async def run(count: int) -> None:
                taken = 0
                async with items.open() as stream:
                    await stream.send_message(Number(number=count), end=True)
                    async for _ in stream:
                        taken += 1
                check(taken, count)

            return await rate(run, task)
        if task.kind is Kind.PAYLOADS:
            put = UnaryUnaryMethod(channel, "/benchmarks.Speech/put", Data, Number)
            data = bytes(task.workload.size)
            check((await put(Data(data=data))).number, len(data))
            return await asyncio_calls([lambda: put(Data(data=data))], task)
        upper = UnaryUnaryMethod(channel, "/benchmarks.Speech/upper", Text, Text)
        check((await upper(Text(text=TEXT))).text, TEXT.upper())
        return await asyncio_calls([lambda: upper(Text(text=TEXT))], task)


def take(task: Task, port: int) -> float:
    return asyncio.run(take_grpclib(task, port))
