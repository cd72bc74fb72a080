"""What an idle connection costs: by the bytes that Python allocates for it, which are the same in each run."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.protocol import Factory as TwistedFactory
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from protoframe import Factory, Limits, Protocol, request
from protoframe.core.frames import Hello, Kind, serialize_frame, serialize_preface, serialize_request

LIMITS = Limits()
HELLO = serialize_frame(
    Kind.HELLO,
    0,
    0,
    Hello(
        max_frame=LIMITS.max_frame,
        max_message=LIMITS.max_message,
        max_unfinished=LIMITS.max_unfinished,
        max_calls=LIMITS.max_calls,
        agent="somebody",
        stream_credit=LIMITS.stream_credit,
        connection_credit=LIMITS.connection_credit,
    ).serialize(),
)

COUNT = 200

#: Bytes of an idle connection above those of Twisted's own `Protocol` on the same transport: some more than it takes.
#: The transport is not among them.  With this the resident memory of a server, which the benchmarks measure, grows by
#: 1.4 to 1.6 times as much for an idle connection as that of Twisted's own does.
MOST = 2_100
#: The same of one that has served a call: it has what serves further ones.
MOST_AFTER_A_CALL = 4_200


class Speech(Protocol):
    @request
    async def upper(self, text: str) -> str:
        return text.upper()


class Echo(TwistedProtocol):
    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


class Wire:
    """A transport that costs next to nothing, and counts what is written."""

    __slots__ = ("port", "protocol", "written")

    def __init__(self, factory: Any, port: int) -> None:
        self.port = port
        self.written = 0
        self.protocol = factory.buildProtocol(self.getPeer())
        self.protocol.makeConnection(self)

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.1", self.port)

    def write(self, data: bytes) -> None:
        self.written += 1

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        pass


def cost(factory: Any, *said: bytes) -> float:
    """Bytes of each connection to a factory whose peer has said something."""

    def opened(first: int) -> list[Wire]:
        wires = [Wire(factory, port) for port in range(first, first + COUNT)]
        for wire in wires:
            for each in said:
                # As from a socket: in octets of its own.
                wire.protocol.dataReceived(bytes(bytearray(each)))
            assert wire.written
        return wires

    # What is made once, for all connections.
    held = opened(1000)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        held += opened(2000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / COUNT


class Idle(SynchronousTestCase):
    def setUp(self) -> None:
        self.factory = Factory(Speech)
        self.factory.reactor = Clock()  # type: ignore[assignment]
        self.raw = cost(TwistedFactory.forProtocol(Echo), b"hello")

    def test_one_that_is_open(self) -> None:
        ours = cost(self.factory, serialize_preface(), HELLO)
        self.assertLess(ours - self.raw, MOST)
        self.assertEqual(len(self.factory.connections), 2 * COUNT)

    def test_one_that_has_served_a_call(self) -> None:
        call = serialize_request(1.0, b"Speech.upper", b"", b"\x81\xa4text\xa5hello")
        ours = cost(self.factory, serialize_preface(), HELLO, serialize_frame(Kind.REQUEST, 0, 1, call))
        self.assertLess(ours - self.raw, MOST_AFTER_A_CALL)
