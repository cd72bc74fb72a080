"""The queues: what each is called, which module has its client, which server it needs, and how it is used here.

Knows them by name, and imports none before it is asked for.  The module of one has ``take(task, port)``, which does a
client's task and gives the figure.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

from benchmarks.peers import Peer
from benchmarks.queues.servers import PROGRAMS, version
from benchmarks.queues.workloads import OWN_CALLS

__all__ = ["QUEUES", "QueuePeer"]


@dataclasses.dataclass(frozen=True)
class QueuePeer(Peer):
    """One of those that are compared.

    :param server: what runs; several may use one.
    """

    server: str = "protoframe"

    def missing(self) -> str | None:
        """What is not installed of what it takes, if anything."""
        if self.server in PROGRAMS and version(self.server) is None:
            return f"the program {PROGRAMS[self.server]} (Debian's package of that name)"
        return super().missing()

    def load(self) -> ModuleType:
        """Its module."""
        return importlib.import_module(f"benchmarks.queues.peers.{self.module}")


_RABBITMQ = (
    "pika's `SelectConnection`: persistent messages, publisher confirms, consumers with a prefetch of 100 that"
    " acknowledge 50 together (`multiple`), and a question on the channel at the end, which is answered after them."
)

QUEUES = {
    peer.name: peer
    for peer in (
        QueuePeer(
            "protoframe",
            "protoframe_",
            ("protoframe", "twisted", "msgspec"),
            "`twistd pf-queue` with its defaults; `QueueClient`: `publish`, of which those that are called in one turn"
            " of the reactor go in one call, `publish_batch`, and `consume` with a prefetch of 100; each message is"
            " acknowledged by itself, and every answer is awaited.",
        ),
        QueuePeer(
            OWN_CALLS,
            "protoframe_calls",
            ("protoframe", "twisted", "msgspec"),
            "The same; each message is a call of its own of the `Queue` Protocol, `publish`, through `connect`.",
        ),
        QueuePeer(
            "RabbitMQ, quorum",
            "rabbitmq_quorum",
            ("pika",),
            f"A quorum queue of one node. {_RABBITMQ}",
            "RabbitMQ",
        ),
        QueuePeer(
            "RabbitMQ, classic",
            "rabbitmq_classic",
            ("pika",),
            f"A durable classic queue. {_RABBITMQ}",
            "RabbitMQ",
        ),
        QueuePeer(
            "NATS JetStream",
            "nats_",
            ("nats-py",),
            "A work-queue stream with file storage and, where the server knows it, `sync_interval: always`;"
            " `js.publish_async`, whose acknowledgements are awaited; a pull consumer that fetches 100 and acknowledges"
            " each.",
            "NATS",
        ),
        QueuePeer(
            "Redis, pipeline",
            "redis_pipeline",
            ("redis", "hiredis"),
            "A stream, with `appendonly yes` and `appendfsync always`; redis-py on asyncio with hiredis: `XADD`s in a"
            " pipeline, those that are in flight together or a batch; `XREADGROUP` of 100 and one `XACK` for them,"
            " which leaves them in the stream.",
            "Redis",
        ),
        QueuePeer(
            "Redis, tasks",
            "redis_tasks",
            ("redis", "hiredis"),
            "The same stream; each `XADD` in flight is a task of its own, with a connection of the pool.",
            "Redis",
        ),
    )
}
