"""thriftpy2: Thrift in threads, with its compiled protocol; the interface is `speech.thrift`."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import thriftpy2
from thriftpy2.rpc import make_client, make_server

from benchmarks.loads import TEXT, Task, announce, check, free_port, rate
from benchmarks.workloads import Kind

__all__ = ["serve", "take"]

speech_thrift = thriftpy2.load(str(Path(__file__).with_name("speech.thrift")), module_name="speech_thrift")
#: Milliseconds, above what a call may have to wait for its turn.
PATIENCE = 30_000


class Speech:
    def upper(self, text: str) -> str:
        return text.upper()

    def put(self, data: bytes) -> int:
        return len(data)


def serve() -> None:
    port = free_port(socket.SOCK_STREAM)
    server = make_server(speech_thrift.Speech, Speech(), "127.0.0.1", port, client_timeout=PATIENCE)
    server.trans.listen()
    threading.Thread(target=server.serve, daemon=True).start()
    announce(port)
    threading.Event().wait()


def take(task: Task, port: int) -> float:
    # One connection has one call at a time.
    clients = [
        make_client(speech_thrift.Speech, "127.0.0.1", port, timeout=PATIENCE)
        for _ in range(max(task.at_once, task.workload.connections))
    ]
    data = bytes(task.workload.size)
    for client in clients:
        check(client.upper(TEXT), TEXT.upper())
    check(clients[0].put(data), len(data))

    def chain(client: Any, count: int) -> None:
        if task.kind is Kind.PAYLOADS:
            for _ in range(count):
                client.put(data)
        else:
            for _ in range(count):
                client.upper(TEXT)

    async def run(count: int) -> None:
        if task.at_once == 1:
            chain(clients[0], count)
            return
        each = count // len(clients)
        for done in [threads.submit(chain, client, each) for client in clients]:
            done.result()

    with ThreadPoolExecutor(len(clients)) as threads:
        found = asyncio.run(rate(run, task))
    for client in clients:
        client.close()
    return found
