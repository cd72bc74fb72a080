"""What is measured, and what is asked of it, as tables of data.

Knows the name of each workload, what kind of work it is, and how much of it each peer does, which is about half a
second to a second of its time.  It must not know how peers work, how anything is run, or what was found.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Mapping

__all__ = [
    "ASKED",
    "CURVES",
    "GROWTH",
    "MAIN",
    "WORKLOADS",
    "Asked",
    "Curve",
    "Kind",
    "Workload",
]

KIB = 1024
MIB = 1024 * KIB


class Kind(enum.Enum):
    """What a client does."""

    CALLS = "calls"  # a short text, given back in capitals
    PAYLOADS = "payloads"  # so many octets, of which the other end gives back the count
    ITEMS = "items"  # a stream of short texts, which the server sends
    OPENING = "opening"  # connections, each used once and closed
    IDLE = "idle"  # connections that are held, and what they cost the server
    START = "start"  # programs that begin and end
    PUBLISH = "publish"  # messages to a queue, durable when they are answered
    CONSUME = "consume"  # messages from a queue, each acknowledged
    COPY = "copy"  # MiB of one file
    TREE = "tree"  # small files of a tree


#: How a figure of each kind is told.
UNITS = {
    Kind.CALLS: "calls/s",
    Kind.PAYLOADS: "MB/s",
    Kind.ITEMS: "items/s",
    Kind.OPENING: "connections/s",
    Kind.IDLE: "bytes a connection",
    Kind.START: "ms",
    Kind.PUBLISH: "messages/s",
    Kind.CONSUME: "messages/s",
    Kind.COPY: "MB/s",
    Kind.TREE: "files/s",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Work that several peers do alike.

    :param counts: how many calls, payloads, items, connections or starts are measured, for each peer.
    :param at_once: how many of them are on the way at a time, on all connections together.
    :param size: octets of a payload.
    :param connections: over how many connections.
    :param is_called: whether each connection that is held has had a call before memory is looked at.
    :param batch: messages of one call; ``at_once`` counts calls.
    """

    name: str
    kind: Kind
    counts: Mapping[str, int] = dataclasses.field(hash=False)
    at_once: int = 1
    size: int = 0
    connections: int = 1
    is_called: bool = False
    batch: int = 1

    @property
    def unit(self) -> str:
        """What its figures count."""
        return UNITS[self.kind]

    @property
    def is_more_better(self) -> bool:
        """Whether a higher figure is the better one."""
        return self.kind not in (Kind.IDLE, Kind.START)

    @property
    def needs_fresh_server(self) -> bool:
        """Whether each run has a server of its own: what one has allocated, it hardly gives back."""
        return self.kind is Kind.IDLE

    def count(self, peer: str, scale: float) -> int:
        """How much of it a peer does, at least one for each that is on the way at a time.

        How many connections are held is what the workload is about, and how often a program starts is few as it is.
        """
        count = self.counts[peer]
        if self.kind is Kind.IDLE:
            return count
        step = self.at_once * self.batch
        return max(1, round(count * scale / step)) * step


def calls(at_once: int, **counts: int) -> Workload:
    """Calls over one connection."""
    how = "one at a time" if at_once == 1 else f"{at_once} in flight"
    return Workload(name=f"calls, {how}", kind=Kind.CALLS, counts=named(counts), at_once=at_once)


def over(connections: int, **counts: int) -> Workload:
    """Calls over many connections, one at a time on each."""
    return Workload(
        name=f"calls over {connections:,} connections",
        kind=Kind.CALLS,
        counts=named(counts),
        at_once=connections,
        connections=connections,
    )


def payloads(size: int, **counts: int) -> Workload:
    """Payloads, one at a time."""
    text = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB" if size >= KIB else f"{size} octets"
    return Workload(name=f"payloads of {text}", kind=Kind.PAYLOADS, counts=named(counts), size=size)


def named(counts: Mapping[str, int]) -> dict[str, int]:
    """The same by the peers' names, in which there are blanks, dots and hyphens."""
    return {_NAMES.get(name, name): count for name, count in counts.items()}


_NAMES = {
    "raw_echo": "raw echo",
    "raw_echo_direct": "raw echo, direct",
    "raw_stream": "raw stream",
    "raw_datagrams": "raw datagrams",
    "handwritten": "hand-written",
    "handwritten_direct": "hand-written, direct",
    "amp": "AMP",
    "grpc_aio": "grpc.aio",
    "protoframe_udp": "protoframe, UDP",
    "aiocoap_confirmable": "aiocoap, confirmable",
}

MAIN = [
    calls(
        1,
        protoframe=6_000,
        raw_echo=9_000,
        raw_echo_direct=10_000,
        handwritten=8_000,
        handwritten_direct=9_000,
        amp=3_600,
        grpc_aio=1_500,
        grpclib=1_200,
        pycapnp=2_400,
        rpyc=5_000,
        thriftpy2=6_000,
    ),
    calls(
        64,
        protoframe=96_000,
        handwritten=102_400,
        handwritten_direct=128_000,
        amp=12_800,
        grpc_aio=2_560,
        grpclib=3_840,
        pycapnp=19_200,
        rpyc=5_120,
        thriftpy2=6_400,
    ),
    calls(
        512,
        protoframe=81_920,
        handwritten=102_400,
        handwritten_direct=122_880,
        amp=12_288,
        grpc_aio=3_072,
        grpclib=3_072,
        pycapnp=15_360,
        rpyc=5_120,
        thriftpy2=5_120,
    ),
    payloads(
        KIB,
        protoframe=8_000,
        raw_stream=10_000,
        handwritten=8_000,
        amp=4_000,
        grpc_aio=1_500,
        grpclib=1_000,
        pycapnp=2_400,
        rpyc=4_800,
        thriftpy2=6_000,
    ),
    payloads(
        64 * KIB,
        protoframe=3_000,
        raw_stream=5_000,
        handwritten=5_000,
        grpc_aio=1_000,
        grpclib=600,
        pycapnp=1_800,
        rpyc=1_800,
        thriftpy2=4_000,
    ),
    payloads(
        4 * MIB,
        protoframe=300,
        raw_stream=700,
        handwritten=120,
        grpc_aio=50,
        grpclib=50,
        pycapnp=200,
        rpyc=45,
        thriftpy2=150,
    ),
    Workload(
        name="stream of small items",
        kind=Kind.ITEMS,
        counts=named({"protoframe": 1_000_000, "grpc_aio": 10_000, "grpclib": 24_000, "rpyc": 600_000}),
    ),
    Workload(
        name="opening connections",
        kind=Kind.OPENING,
        counts=named({"protoframe": 640, "raw_echo": 1_920, "amp": 1_600, "grpc_aio": 240}),
        at_once=16,
    ),
    Workload(
        name="memory of 1,000 connections", kind=Kind.IDLE, counts=named({"protoframe": 1_000, "raw_echo": 1_000})
    ),
    Workload(
        name="memory of 1,000 connections, each called once",
        kind=Kind.IDLE,
        counts=named({"protoframe": 1_000, "raw_echo": 1_000}),
        is_called=True,
    ),
    Workload(
        name="memory of 10,000 connections", kind=Kind.IDLE, counts=named({"protoframe": 10_000, "raw_echo": 10_000})
    ),
    Workload(
        name="UDP calls, one at a time",
        kind=Kind.CALLS,
        counts=named({"protoframe_udp": 5_000, "raw_datagrams": 8_000, "aiocoap": 800}),
    ),
    Workload(
        name="UDP calls, 64 in flight",
        kind=Kind.CALLS,
        counts=named(
            {"protoframe_udp": 76_800, "raw_datagrams": 96_000, "aiocoap": 1_920, "aiocoap_confirmable": 1_280}
        ),
        at_once=64,
    ),
    Workload(
        name="start-up",
        kind=Kind.START,
        counts=dict.fromkeys(
            ["import protoframe", "from protoframe import connect", "pf --help", "import twisted.internet.reactor"], 3
        ),
    ),
]

#: What only the curves need: a few peers, and less of each.
GROWTH = [
    *(
        calls(at_once, protoframe=count, handwritten=count, amp=8_192, grpc_aio=2_048)
        for at_once, count in ((4, 16_000), (16, 48_000), (256, 76_800), (1024, 76_800))
    ),
    *(over(connections, protoframe=8_000, raw_echo=14_000) for connections in (10, 100, 1000)),
    *(
        payloads(size, protoframe=ours, raw_stream=theirs)
        for size, ours, theirs in ((16, 7_000, 9_000), (MIB, 1_200, 2_000))
    ),
]

WORKLOADS = [*MAIN, *GROWTH]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of a figure of ours, or of its ratio to another's in the same workload.

    :param theirs: whose figure ours is divided by; none where ours is judged itself.
    :param least: what it must be at least.
    :param most: what it may be at most.
    """

    workload: str
    ours: str
    theirs: str | None = None
    least: float | None = None
    most: float | None = None


ASKED = [
    Asked("calls, one at a time", "protoframe", "raw echo", least=0.85),
    Asked("calls, 64 in flight", "protoframe", "hand-written", least=0.7),
    Asked("calls, 64 in flight", "protoframe", "AMP", least=8),
    Asked("calls, 64 in flight", "protoframe", "grpc.aio", least=20),
    Asked("calls, 64 in flight", "protoframe", "pycapnp", least=3),
    Asked("stream of small items", "protoframe", "grpc.aio", least=20),
    Asked("payloads of 4 MiB", "protoframe", "raw stream", least=0.6),
    Asked("UDP calls, one at a time", "protoframe, UDP", "raw datagrams", least=0.75),
    Asked("UDP calls, 64 in flight", "protoframe, UDP", "raw datagrams", least=0.6),
    Asked("UDP calls, 64 in flight", "protoframe, UDP", "aiocoap", least=30),
    Asked("memory of 1,000 connections", "protoframe", "raw echo", most=2),
    Asked("memory of 10,000 connections", "protoframe", "raw echo", most=2),
    Asked("start-up", "pf --help", most=150),
]


@dataclasses.dataclass(frozen=True)
class Curve:
    """How a figure goes as work grows: the workloads by how much of it each has."""

    title: str
    along: str
    points: Mapping[int, str]
    peers: tuple[str, ...]


def _sorted(field: str) -> list[Workload]:
    return sorted(WORKLOADS, key=operator.attrgetter(field))


CURVES = [
    Curve(
        "Calls in flight on one connection",
        "calls in flight",
        {each.at_once: each.name for each in _sorted("at_once") if each.name.startswith("calls, ")},
        ("protoframe", "hand-written", "AMP", "grpc.aio"),
    ),
    Curve(
        "Connections, one call at a time on each",
        "connections",
        {1: "calls, one at a time"}
        | {each.connections: each.name for each in _sorted("connections") if each.connections > 1},
        ("protoframe", "raw echo"),
    ),
    Curve(
        "Size of a payload, one at a time",
        "octets",
        {each.size: each.name for each in _sorted("size") if each.size},
        ("protoframe", "raw stream"),
    ),
]
