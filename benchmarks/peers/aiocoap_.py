"""aiocoap: CoAP (RFC 7252) over UDP, on asyncio."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from aiocoap import POST, Context, Message, Unreliable
from aiocoap.resource import Resource, Site

from benchmarks.loads import TEXT, Task, announce, asyncio_calls, check, free_port

__all__ = ["serve", "take", "take_coap"]


class Echo(Resource):
    async def render_post(self, request: Any) -> Any:
        return Message(payload=request.payload)


async def serve_coap() -> None:
    port = free_port(socket.SOCK_DGRAM)
    site = Site()
    site.add_resource(["echo"], Echo())
    # It would listen for CoAP over TCP as well, where the port may not be free.
    await Context.create_server_context(site, bind=("127.0.0.1", port), transports=["udp6"])
    announce(port)
    await asyncio.get_running_loop().create_future()


def serve() -> None:
    asyncio.run(serve_coap())


async def take_coap(task: Task, port: int, *, is_confirmable: bool) -> float:
    context = await Context.create_client_context()
    options = {} if is_confirmable else {"transport_tuning": Unreliable}
    uri = f"coap://127.0.0.1:{port}/echo"
    payload = TEXT.encode()

    async def call() -> bytes:
        answer = await context.request(Message(code=POST, payload=payload, uri=uri, **options)).response
        octets: bytes = answer.payload
        return octets

    try:
        check(await call(), payload)
        return await asyncio_calls([call], task)
    finally:
        await context.shutdown()


def take(task: Task, port: int) -> float:
    return asyncio.run(take_coap(task, port, is_confirmable=task.at_once == 1))
