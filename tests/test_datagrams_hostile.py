"""Datagrams of strangers and forgers: nothing is kept of them, nothing is told them that they did not pay for.

``PROTOFRAME_DATAGRAMS`` says how many are sent (`make soak` sends a million).
"""

from __future__ import annotations

import os
import random
import tracemalloc
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from protoframe import Factory, Protocol, request
from protoframe._datagram_sockets import DatagramServer
from protoframe.core.datagram import packets
from protoframe.core.datagram.packets import Initial, Kind, Reset, Retry, read_kind
from protoframe.testing import Network
from protoframe.testing._links import Packet

MANY = int(os.environ.get("PROTOFRAME_DATAGRAMS", "50000"))


class Speech(Protocol):
    @request
    async def upper(self, text: str) -> str:
        return text.upper()


class Wire:
    """A server without a network, and what it sends."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.factory = Factory(Speech, reactor=self.clock)  # type: ignore[arg-type]
        self.server = DatagramServer(self.clock, self.factory)
        self.sent: list[tuple[bytes, Any]] = []
        self.server.send_datagram = self.note  # type: ignore[method-assign]

    def note(self, datagram: bytes, address: Any) -> bool:
        self.sent.append((datagram, address))
        return False

    def receive(self, datagram: bytes, address: Any = ("10.0.0.9", 999)) -> list[bytes]:
        """What it says to a datagram."""
        self.sent.clear()
        self.server.datagramReceived(datagram, address)
        return [sent for sent, _ in self.sent]


def conversation() -> list[bytes]:
    """Every datagram of a real conversation with all that there is in one, both ways."""
    network = Network(9, duplicate=0.1)
    gathered: list[bytes] = []
    send = network.send

    def noting(source: Any, packet: Packet) -> None:
        gathered.append(packet.payload)
        send(source, packet)

    network.send = noting  # type: ignore[method-assign]
    speech = network.run(network.connect(network.serve(Speech), Speech))
    network.run(speech.upper("hello"))
    network.run(speech.upper("x" * 4000))
    network.host("client").change_address()
    network.run(speech.upper("moved"))
    network.close()
    return gathered


class Strangers(SynchronousTestCase):
    def test_forged_sources_get_no_more_than_they_send_and_nothing_is_kept(self):
        wire = Wire()
        chance = random.Random(1)
        came = went = 0
        tracemalloc.start()
        try:
            held = []
            for number in range(MANY):
                initial = Initial(1, 1, chance.getrandbits(64), chance.randbytes(chance.choice((0, 25)))).serialize()
                address = (
                    f"10.{chance.randrange(256)}.{chance.randrange(256)}.{chance.randrange(256)}",
                    number % 65536,
                )
                (answer,) = wire.receive(initial, address)
                self.assertEqual(read_kind(answer)[0], Kind.RETRY)
                came += len(initial)
                went += len(answer)
                if number in (MANY // 10, MANY - 1):
                    held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        self.assertLess(went, came / 10)
        self.assertLess(held[1] - held[0], 20_000, held)
        self.assertEqual((len(wire.server._carriers), len(wire.server._let_in)), (0, 0))

    def test_no_answer_is_longer_than_what_it_answers(self):
        wire = Wire()
        for datagram, kind in (
            (Initial(1, 1, 7, b"").serialize(), Kind.RETRY),
            (Initial(9, 9, 7, b"").serialize(), Kind.VERSIONS),
            (packets.serialize_data(Kind.TO_SERVER, 7, 1, packets.PING), Kind.RESET),
        ):
            (answer,) = wire.receive(datagram)
            self.assertEqual(read_kind(answer)[0], kind)
            self.assertLess(len(answer), len(datagram))

    def test_the_cookie_of_another_address_or_of_long_ago_is_worth_nothing(self):
        wire = Wire()
        (retry,) = wire.receive(Initial(1, 1, 7, b"").serialize(), ("10.0.0.9", 999))
        token = Retry.parse(retry).token
        for address, client_id in ((("10.0.0.8", 999), 7), (("10.0.0.9", 998), 7), (("10.0.0.9", 999), 8)):
            (answer,) = wire.receive(Initial(1, 1, client_id, token).serialize(), address)
            self.assertEqual(read_kind(answer)[0], Kind.RETRY)
        wire.clock.advance(16.0)
        (answer,) = wire.receive(Initial(1, 1, 7, token).serialize())
        self.assertEqual(read_kind(answer)[0], Kind.RETRY)
        self.assertFalse(wire.server._carriers)
        (answer,) = wire.receive(Initial(1, 1, 7, Retry.parse(answer).token).serialize())
        self.assertEqual(read_kind(answer)[0], Kind.ACCEPT)
        self.assertEqual(len(wire.server._carriers), 1)

    def test_an_initial_that_comes_again_lets_nobody_in_twice(self):
        wire = Wire()
        (retry,) = wire.receive(Initial(1, 1, 7, b"").serialize())
        initial = Initial(1, 1, 7, Retry.parse(retry).token).serialize()
        for _ in range(20):
            wire.receive(initial)
            wire.clock.advance(0.5)
        self.assertLessEqual(len(wire.server._carriers), 1)

    def test_one_that_shows_its_address_and_goes_away_is_forgotten(self):
        wire = Wire()
        (retry,) = wire.receive(Initial(1, 1, 7, b"").serialize())
        wire.receive(Initial(1, 1, 7, Retry.parse(retry).token).serialize())
        for _ in range(200):
            wire.clock.advance(0.1)
        self.assertEqual(
            (len(wire.server._carriers), len(wire.server._let_in), len(wire.factory._connections)), (0, 0, 0)
        )
        self.assertEqual(wire.clock.getDelayedCalls(), [])

    def test_what_a_server_says_and_errors_are_never_answered(self):
        wire = Wire()
        said = [
            Retry(7, b"token").serialize(),
            packets.Versions(7, 1, 1).serialize(),
            packets.Refused(7, b"\0\0" + bytes(8)).serialize(),
            Reset(7, 1).serialize(),
            packets.Accept(7, 0, 8, 1).serialize(packets.PING),
            packets.serialize_data(Kind.TO_CLIENT, 7, 1, packets.PING),
        ]
        for datagram in said:
            self.assertEqual(wire.receive(datagram), [])

    def test_two_servers_and_one_forged_error_are_silent(self):
        network = Network(1)
        for name in ("one", "other"):
            network.serve(Speech, host=name)
        one, other = network.host("one"), network.host("other")
        for datagram in (Reset(1, 1).serialize(), packets.serialize_data(Kind.TO_CLIENT, 1, 1, packets.CLOSE)):
            before = network.sent
            other.arrived(Packet("udp", (one.ipv4, 12000), (other.ipv4, 12000), 100, datagram))
            network.advance(10.0)
            self.assertEqual(network.sent, before)
        # Even what a client might have said leads to one answer, and to none to that.
        before = network.sent
        said = packets.serialize_data(Kind.TO_SERVER, 1, 1, packets.PING)
        other.arrived(Packet("udp", (one.ipv4, 12000), (other.ipv4, 12000), 100, said))
        network.advance(10.0)
        self.assertEqual(network.sent - before, 1)

    def test_resets_are_bounded(self):
        wire = Wire()
        answers = 0
        for number in range(1000):
            answers += len(wire.receive(packets.serialize_data(Kind.TO_SERVER, number, 1, packets.PING)))
        self.assertEqual(answers, 100)
        wire.clock.advance(0.5)
        for number in range(1000):
            answers += len(wire.receive(packets.serialize_data(Kind.TO_SERVER, number, 1, packets.PING)))
        self.assertEqual(answers, 150)


def mutate(datagram: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A datagram that was tampered with."""
    changed = bytearray(datagram)
    for _ in range(chance.choice((1, 1, 2, 5))):
        how = chance.randrange(6)
        at = chance.randrange(len(changed)) if changed else 0
        if how == 0 and changed:
            changed[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            del changed[at:]
        elif how == 2:
            changed[at:at] = chance.randbytes(chance.randrange(1, 20))
        elif how == 3:
            changed[at : at + 8] = chance.choice((b"\0" * 8, b"\xff" * 8, chance.randbytes(8)))
        elif how == 4:
            other = chance.choice(others)
            changed[at:] = other[at:]
        else:
            changed += chance.randbytes(chance.randrange(1, 40))
    return bytes(changed)


class Forgers(SynchronousTestCase):
    def test_what_is_tampered_with_is_dropped_without_a_word(self):
        wire = Wire()
        originals = conversation()
        known = set(originals)
        chance = random.Random(2)
        dropped = 0
        for _ in range(MANY):
            datagram = mutate(chance.choice(originals), originals, chance)
            if datagram in known:
                continue
            dropped += 1
            self.assertEqual(wire.receive(datagram), [], datagram.hex())
        self.assertGreater(dropped, MANY // 2)

    def test_what_is_tampered_with_and_sealed_again_raises_nothing_and_ends_in_order(self):
        # Whoever knows the ids of a conversation can break that one, and no other.
        chance = random.Random(3)
        failures: list[Any] = []
        for seed in range(max(3, MANY // 5000)):
            network = Network(seed)
            where = network.serve(Speech)
            speech = network.run(network.connect(where, Speech))
            other = network.run(network.connect(where, Speech, host="other"))
            sent: list[Packet] = []
            send = network.send

            def noting(source: Any, packet: Packet, send: Any = send, sent: list[Packet] = sent) -> None:
                if packet.kind == "udp":
                    sent.append(packet)
                send(source, packet)

            network.send = noting  # type: ignore[method-assign]
            call = speech.upper("x" * 3000)
            network.advance(0.02)
            call.addErrback(failures.append)
            said = tuple(sent)
            bodies = [packet.payload[4:] for packet in said]
            for packet in said:
                for _ in range(300):
                    body = mutate(packet.payload[4:], bodies, chance)
                    # The number of a packet is not one that was seen, and its id is right, most of the time.
                    if len(body) > 17 and chance.random() < 0.9:
                        body = packet.payload[4:13] + (1000 + chance.randrange(10**6)).to_bytes(8) + body[17:]
                    forged = packets.seal(body)
                    host = network.host("server" if packet.destination[1] == 12000 else "client")
                    host.arrived(Packet("udp", packet.source, packet.destination, len(forged), forged))
            network.advance(1.0)
            self.assertEqual(network.run(other.upper("hello")), "HELLO")
            network.close()
        self.assertEqual(self.flushLoggedErrors(), [])
