"""What is measured of queues, and what is asked of it, as tables of data.

Knows names, counts and bounds.  It must not know how a queue works, how anything is run, or what was found.
"""

from __future__ import annotations

from benchmarks.workloads import Asked, Kind, Workload

__all__ = ["ASKED", "BEST", "BODY", "DEPTHS", "OWN_CALLS", "PREFETCH", "SETTLED_TOGETHER", "WORKLOADS"]

#: What every message has.
BODY = bytes(range(256))
#: Messages that a consumer may hold, and how many of them it acknowledges together where a queue can do that.
PREFETCH, SETTLED_TOGETHER = 100, 50
#: Messages in a queue, of which publishing and consuming are measured.
DEPTHS = (1_000, 10_000, 100_000, 1_000_000)

#: protoframe once more, without what its client does for speed.
OWN_CALLS = "protoframe, a call each"
_QUEUES = ("protoframe", "RabbitMQ, quorum", "RabbitMQ, classic", "NATS JetStream", "Redis, pipeline")


def _work(name: str, kind: Kind, *more: str, count: int, ours: int, at_once: int = 1, batch: int = 1) -> Workload:
    counts = {peer: ours if peer.startswith("protoframe") else count for peer in (*_QUEUES, *more)}
    return Workload(name=name, kind=kind, counts=counts, size=len(BODY), at_once=at_once, batch=batch)


WORKLOADS = [
    _work("publish, 64 in flight", Kind.PUBLISH, OWN_CALLS, "Redis, tasks", ours=32_000, count=16_000, at_once=64),
    _work("publish, batches of 100", Kind.PUBLISH, ours=100_000, count=20_000, batch=100),
    _work("publish, batches of 100, 4 in flight", Kind.PUBLISH, ours=100_000, count=20_000, at_once=4, batch=100),
    _work("consume and acknowledge", Kind.CONSUME, ours=40_000, count=20_000),
]

#: The best of the others, in each round, of those that are durable.
BEST = "the best durable one"
ASKED = [Asked(name, "protoframe", BEST, least=1.0) for name in ("publish, 64 in flight", "publish, batches of 100")]
