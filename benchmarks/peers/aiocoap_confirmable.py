"""aiocoap with confirmable requests, however many are asked for at once."""

from __future__ import annotations

import asyncio

from benchmarks.loads import Task
from benchmarks.peers.aiocoap_ import serve, take_coap

__all__ = ["serve", "take"]


def take(task: Task, port: int) -> float:
    return asyncio.run(take_coap(task, port, is_confirmable=True))
