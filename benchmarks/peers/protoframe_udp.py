"""protoframe over UDP: the Protocol that is served over TCP as well."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import react

from benchmarks.loads import Task, announce, in_reactor
from benchmarks.peers.protoframe_tcp import Speech, measure
from protoframe import Factory, connect, listen

__all__ = ["serve", "take"]


def serve() -> None:
    async def main(reactor: Any) -> None:
        port = await listen(reactor, "udp:0:interface=127.0.0.1", Factory(Speech))
        announce(port.getHost().port)
        await Deferred()

    react(main)


def take(task: Task, port: int) -> float:
    async def main(reactor: Any) -> float:
        async with connect(reactor, f"udp:127.0.0.1:{port}", Speech) as speech:
            return await measure([speech], task)

    return in_reactor(main)
