"""What is measured, and what is asked of it, as tables of data.

Knows the name of each workload, what kind of work it is, and how much of it each peer does, which is about half a second
to a second of its time.  It must not know how peers work, how anything is run, or what was found.
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


#: How a figure of each kind is told.
UNITS = {
    Kind.CALLS: "calls/s",
    Kind.PAYLOADS: "MB/s",
    Kind.ITEMS: "items/s",
    Kind.OPENING: "connections/s",
    Kind.IDLE: "bytes a connection",
    Kind.START: "ms",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Work that several peers do alike.

    :param counts: how many calls, payloads, items, connections or starts are measured, for each peer.
    :param at_once: how many of them are on the way at a time, on all connections together.
    :param size: octets of a payload.
    :param connections: over how many connections.
    """

    name: str
    kind: Kind
    counts: Mapping[str, int]
    at_once: int = 1
    size: int = 0
    connections: int = 1

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
        return max(1, round(count * scale / self.at_once)) * self.at_once


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
    "raw_stream": "raw stream",
    "raw_datagrams": "raw datagrams",
    "handwritten": "hand-written",
    "amp": "AMP",
    "grpc_aio": "grpc.aio",
    "protoframe_udp": "protoframe, UDP",
    "aiocoap_confirmable": "aiocoap, confirmable",
}

MAIN = [
    calls(
        1,
        protoframe=6_000,
        raw_echo=8_000,
        handwritten=8_000,
        amp=3_000,
        grpc_aio=1_500,
        grpclib=800,
        pycapnp=3_000,
        rpyc=3_000,
        thriftpy2=6_000,
    ),
    calls(
        64,
        protoframe=38_400,
        handwritten=51_200,
        amp=5_120,
        grpc_aio=1_920,
        grpclib=1_280,
        pycapnp=9_600,
        rpyc=3_200,
        thriftpy2=6_400,
    ),
    calls(
        512,
        protoframe=40_960,
        handwritten=51_200,
        amp=5_120,
        grpc_aio=2_048,
        grpclib=1_536,
        pycapnp=10_240,
        rpyc=3_072,
        thriftpy2=6_144,
    ),
    payloads(
        KIB,
        protoframe=6_000,
        raw_stream=8_000,
        handwritten=6_000,
        amp=3_000,
        grpc_aio=1_500,
        grpclib=800,
        pycapnp=3_000,
        rpyc=3_000,
        thriftpy2=6_000,
    ),
    payloads(
        64 * KIB,
        protoframe=3_000,
        raw_stream=4_000,
        handwritten=3_000,
        grpc_aio=1_000,
        grpclib=400,
        pycapnp=1_500,
        rpyc=1_000,
        thriftpy2=2_000,
    ),
    payloads(
        4 * MIB,
        protoframe=100,
        raw_stream=150,
        handwritten=100,
        grpc_aio=40,
        grpclib=20,
        pycapnp=80,
        rpyc=60,
        thriftpy2=60,
    ),
    Workload(
        name="stream of small items",
        kind=Kind.ITEMS,
        counts=named({"protoframe": 300_000, "grpc_aio": 15_000, "grpclib": 15_000, "rpyc": 3_000}),
    ),
    Workload(
        name="opening connections",
        kind=Kind.OPENING,
        counts=named({"protoframe": 960, "raw_echo": 1_920, "amp": 960, "grpc_aio": 192}),
        at_once=16,
    ),
    Workload(
        name="memory of 1,000 connections", kind=Kind.IDLE, counts=named({"protoframe": 1_000, "raw_echo": 1_000})
    ),
    Workload(
        name="memory of 10,000 connections", kind=Kind.IDLE, counts=named({"protoframe": 10_000, "raw_echo": 10_000})
    ),
    Workload(
        name="UDP calls, one at a time",
        kind=Kind.CALLS,
        counts=named({"protoframe_udp": 6_000, "raw_datagrams": 8_000, "aiocoap": 800}),
    ),
    Workload(
        name="UDP calls, 64 in flight",
        kind=Kind.CALLS,
        counts=named(
            {"protoframe_udp": 32_000, "raw_datagrams": 32_000, "aiocoap": 1_280, "aiocoap_confirmable": 1_280}
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
        calls(at_once, protoframe=our_count, handwritten=our_count, amp=3_072, grpc_aio=1_024)
        for at_once, our_count in ((4, 12_000), (16, 19_200), (256, 25_600), (1024, 25_600))
    ),
    *(over(connections, protoframe=12_000, raw_echo=16_000) for connections in (10, 100, 1000)),
    *(
        payloads(size, protoframe=ours, raw_stream=theirs)
        for size, ours, theirs in ((16, 4_000, 5_000), (MIB, 200, 300))
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
        {1: "calls, one at a time"} | {each.connections: each.name for each in _sorted("connections") if each.connections > 1},
        ("protoframe", "raw echo"),
    ),
    Curve(
        "Size of a payload, one at a time",
        "octets",
        {each.size: each.name for each in _sorted("size") if each.size},
        ("protoframe", "raw stream"),
    ),
]
