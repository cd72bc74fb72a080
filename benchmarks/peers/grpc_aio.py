"""gRPC's own package, on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import grpc.aio

from benchmarks.loads import TEXT, Task, announce, asyncio_calls, check, rate
from benchmarks.peers.protobuf_messages import Data, Number, Text
from benchmarks.workloads import MIB, Kind

__all__ = ["serve", "take"]

#: A message has 4 MiB at most where nothing else is said, and payloads have that much.
OPTIONS = [("grpc.max_receive_message_length", 8 * MIB), ("grpc.max_send_message_length", 8 * MIB)]


class Speech:
    async def upper(self, request: Any, context: Any) -> Any:
        return Text(text=request.text.upper())

    async def put(self, request: Any, context: Any) -> Any:
        return Number(number=len(request.data))

    async def items(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(request.number):
            yield Text(text=TEXT)


async def serve_grpc() -> None:
    speech = Speech()
    handlers = {
        "upper": grpc.unary_unary_rpc_method_handler(speech.upper, Text.FromString, Text.SerializeToString),
        "put": grpc.unary_unary_rpc_method_handler(speech.put, Data.FromString, Number.SerializeToString),
        "items": grpc.unary_stream_rpc_method_handler(speech.items, Number.FromString, Text.SerializeToString),
    }
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmarks.Speech", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(port)
    await server.wait_for_termination()


def serve() -> None:
    asyncio.run(serve_grpc())


async def take_grpc(task: Task, port: int) -> float:
    where = f"127.0.0.1:{port}"

    async def open_and_close() -> None:
        # Without this channels to one server share a connection.
        async with grpc.aio.insecure_channel(where, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            await upper_of(channel)(Text(text=TEXT))

    if task.kind is Kind.OPENING:
        return await asyncio_calls([open_and_close], task)
    async with grpc.aio.insecure_channel(where, options=OPTIONS) as channel:
        if task.kind is Kind.ITEMS:
            items = channel.unary_stream("/benchmarks.Speech/items", Number.SerializeToString, Text.FromString)

            async def run(count: int) -> None:
                taken = 0
                async for _ in items(Number(number=count)):
                    taken += 1
                check(taken, count)

            return await rate(run, task)
        if task.kind is Kind.PAYLOADS:
            put = channel.unary_unary("/benchmarks.Speech/put", Data.SerializeToString, Number.FromString)
            data = bytes(task.workload.size)
            check((await put(Data(data=data))).number, len(data))
            return await asyncio_calls([lambda: put(Data(data=data))], task)
        upper = upper_of(channel)

        def call() -> Awaitable[Any]:
            answer: Awaitable[Any] = upper(Text(text=TEXT))
            return answer

        check((await call()).text, TEXT.upper())
        return await asyncio_calls([call], task)


def upper_of(channel: Any) -> Any:
    return channel.unary_unary("/benchmarks.Speech/upper", Text.SerializeToString, Text.FromString)


def take(task: Task, port: int) -> float:
    return asyncio.run(take_grpc(task, port))
