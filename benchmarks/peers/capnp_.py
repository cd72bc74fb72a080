"""pycapnp: Cap'n Proto's RPC, by its C++ library, on asyncio; the schema is `speech.capnp`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import capnp

from benchmarks.loads import TEXT, Task, announce, asyncio_calls, check, free_port
from benchmarks.workloads import Kind

__all__ = ["serve", "take"]

speech_capnp = capnp.load(str(Path(__file__).with_name("speech.capnp")))


class Speech(speech_capnp.Speech.Server):
    async def upper(self, text: str, **_: Any) -> str:
        return text.upper()

    async def put(self, data: bytes, **_: Any) -> int:
        return len(data)


async def connected(stream: Any) -> None:
    await capnp.TwoPartyServer(stream, bootstrap=Speech()).on_disconnect()


async def serve_capnp() -> None:
    port = free_port(socket.SOCK_STREAM)
    server = await capnp.AsyncIoStream.create_server(connected, "127.0.0.1", port)
    announce(port)
    async with server:
        await server.serve_forever()


def serve() -> None:
    asyncio.run(capnp.run(serve_capnp()))


async def take_capnp(task: Task, port: int) -> float:
    stream = await capnp.AsyncIoStream.create_connection(host="127.0.0.1", port=port)
    client = capnp.TwoPartyClient(stream)
    speech = client.bootstrap().cast_as(speech_capnp.Speech)
    data = bytes(task.workload.size)

    def call() -> Awaitable[Any]:
        answer: Awaitable[Any] = speech.upper(TEXT)
        return answer

    def put() -> Awaitable[Any]:
        answer: Awaitable[Any] = speech.put(data)
        return answer

    if task.kind is Kind.PAYLOADS:
        check((await put()).length, len(data))
        return await asyncio_calls([put], task)
    check((await call()).text, TEXT.upper())
    return await asyncio_calls([call], task)


def take(task: Task, port: int) -> float:
    return asyncio.run(capnp.run(take_capnp(task, port)))
