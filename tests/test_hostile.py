"""Hostile bytes on the port of a real server: each ends in a closed connection or a clean error and a line in the log,
the server goes on serving others, and its memory does not grow."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from protoframe.core.frames import Flag, Hello, Kind, serialize_frame, serialize_preface
from tests.processes import Server, free_port, pf, server

HELLO = serialize_preface() + serialize_frame(
    Kind.HELLO,
    0,
    0,
    Hello(max_frame=65536, max_message=4 << 20, max_unfinished=16 << 20, max_calls=10).serialize(),
)


def request(call_id: int, method: bytes, arguments: bytes, *, milliseconds: int = 5000) -> bytes:
    return serialize_frame(
        Kind.REQUEST,
        0,
        call_id,
        struct.pack("!IHH", milliseconds, len(method), 0) + method + arguments,
    )


class Target:
    def __init__(self, running: Server, port: int) -> None:
        self.server = running
        self.port = port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def answer_to(self, data: bytes, *, ends: bool = False) -> bytes:
        """All that the server says to these bytes, until it closes; of its own accord, unless this end ends first."""
        with self.connect() as peer:
            try:
                peer.sendall(data)
                if ends:
                    peer.shutdown(socket.SHUT_WR)
                return read_all(peer)
            except (BrokenPipeError, ConnectionResetError):
                return b""

    def serves(self) -> bool:
        done = pf("call", f"tcp:127.0.0.1:{self.port}", "Speech.upper", "text=still here")
        return (done.stdout, done.returncode) == ('"STILL HERE"\n', 0)


def read_all(peer: socket.socket) -> bytes:
    parts = []
    while part := peer.recv(65536):
        parts.append(part)
    return b"".join(parts)


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """The frames behind a preface, cut by hand."""
    found = []
    at = 8
    while at + 12 <= len(data):
        length, kind, flags, call_id = struct.unpack_from("!HBBQ", data, at)
        found.append((kind, flags, call_id, data[at + 12 : at + 12 + length]))
        at += 12 + length
    return found


def read_frame(peer: socket.socket) -> tuple[int, int, int, bytes]:
    head = peer.recv(12, socket.MSG_WAITALL)
    length, kind, flags, call_id = struct.unpack("!HBBQ", head)
    return kind, flags, call_id, peer.recv(length, socket.MSG_WAITALL) if length else b""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    port = free_port()
    directory: Path = tmp_path_factory.mktemp("hostile")
    with server(directory, "pf-upper", "--listen", f"tcp:{port}:interface=127.0.0.1") as running:
        yield Target(running, port)


def said_goodbye(answer: bytes, text: str) -> bool:
    """Whether the last frame is a GOAWAY with status 13 (or 12) and this text."""
    kind, _, _, payload = frames(answer)[-1]
    status = struct.unpack_from("!H", payload)[0]
    return kind == Kind.GOAWAY and status in (12, 13) and text in payload[10:].decode()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "it opened with 'GET / HTTP/1.1"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "does not speak protoframe"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "does not speak protoframe"),
        (b"\xff\xff\xff\xff" * 4, "does not speak protoframe"),
        (serialize_preface(2, 9), "the peer speaks 2 to 9, this end 1"),
        (serialize_preface()[:4] + b"\x00\x00\x00\x00", "which is no range"),
        (serialize_preface() + b"\xff" * 12, "a frame of 65547 octets is longer than 65536"),
        (serialize_preface() + serialize_frame(Kind.HELLO, 0, 0, b"\xc1"), "HELLO: "),
        (serialize_preface() + serialize_frame(Kind.HELLO, 0, 0, b"\x91" * 60_000), "HELLO: 60000 octets are more"),
        (serialize_preface() + serialize_frame(Kind.PING, 0, 0, bytes(8)), "PING before HELLO"),
        (HELLO + HELLO[8:], "a second HELLO"),
        (HELLO + serialize_frame(0x7F, 0, 0, b""), "unknown kind 0x7f"),
        (HELLO + serialize_frame(Kind.REQUEST, 0, 1, b"\x00"), "1 octets are too few"),
        (HELLO + request(2, b"Speech.upper", b"\x80"), "2 is no call id of the peer's"),
        (HELLO + serialize_frame(Kind.RESPONSE, 0, 1, b"\x80"), "an answer to call 1, which is not open"),
        (HELLO + serialize_frame(Kind.CHUNK, 0, 1, b"\x80"), "no message of call 1 is on the way"),
        (HELLO + serialize_frame(Kind.PING, 0, 0, b"\x80"), "PING: 1 octets, not 8"),
    ],
)
def test_what_breaks_the_rules_is_told_why_logged_and_closed(target: Target, data: bytes, text: str) -> None:
    answer = target.answer_to(data)
    assert answer.startswith(serialize_preface())
    assert said_goodbye(answer, text)
    needle = text.replace("'", ".").replace("(", r"\(").replace(")", r"\)")
    target.server.wait_for_log(needle)


def test_random_bytes_close_the_connection_and_nothing_else(target: Target) -> None:
    source = random.Random(20260103)
    for round_ in range(200):
        prefix = HELLO if round_ % 2 else b""
        answer = target.answer_to(prefix + source.randbytes(source.randrange(16, 4096)), ends=True)
        assert len(answer) < 4096
    assert target.serves()
    assert "Traceback" not in target.server.log
    assert "Unhandled" not in target.server.log


def test_a_length_of_4_gib_is_never_waited_for(target: Target) -> None:
    # As the whole length of a message in several frames ...
    head = struct.pack("!IIHH", 0xFFFFFFFF, 5000, 12, 0) + b"Speech.upper"
    huge = serialize_frame(Kind.REQUEST, Flag.MORE, 1, head + bytes(100))
    with target.connect() as peer:
        peer.sendall(HELLO + huge)
        peer.recv(8, socket.MSG_WAITALL)
        assert read_frame(peer)[0] == Kind.HELLO
        kind, flags, call_id, payload = read_frame(peer)
        assert (kind, flags, call_id) == (Kind.ERROR, Flag.NOT_PROCESSED, 1)
        assert b"MessageTooLarge" in payload
    # ... and inside arguments: a string, an array, a map that claim 4 GiB.
    for claim in (b"\xdb\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"):
        with target.connect() as peer:
            peer.sendall(HELLO + request(1, b"Speech.upper", b"\x81\xa4text" + claim))
            peer.recv(8, socket.MSG_WAITALL)
            assert read_frame(peer)[0] == Kind.HELLO
            kind, _, _, payload = read_frame(peer)
            assert kind == Kind.ERROR
            assert payload[:2] == b"\x00\x03"
    assert target.serves()


def test_a_hundred_thousand_nested_arrays_are_an_invalid_argument(target: Target) -> None:
    bomb = b"\x81\xa4text" + b"\x91" * 100_000 + b"\x90"
    method = b"Speech.upper"
    message = struct.pack("!IHH", 5000, len(method), 0) + method + bomb
    first, rest = message[:60_000], message[60_000:]
    with target.connect() as peer:
        peer.sendall(
            HELLO
            + serialize_frame(Kind.REQUEST, Flag.MORE, 1, struct.pack("!I", len(message)) + first)
            + serialize_frame(Kind.CHUNK, 0, 1, rest)
            + request(3, method, msgspec.msgpack.encode({"text": "next"})),
        )
        peer.recv(8, socket.MSG_WAITALL)
        assert read_frame(peer)[0] == Kind.HELLO
        kind, _, call_id, payload = read_frame(peer)
        assert (kind, call_id, payload[:2]) == (Kind.ERROR, 1, b"\x00\x03")
        assert b"$" in payload
        assert read_frame(peer) == (Kind.RESPONSE, 0, 3, b"\xa4NEXT")
    assert target.serves()


def is_closed(peer: socket.socket, patience: float) -> bool:
    """Whether the server has closed, or does so before the patience ends."""
    peer.settimeout(patience)
    try:
        while peer.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_one_byte_a_second_is_not_waited_for_longer_than_the_handshake_may_take(target: Target) -> None:
    began = time.monotonic()
    peers = [target.connect() for _ in range(10)]
    try:
        for byte in HELLO[:20]:
            for peer in peers:
                with suppress(OSError):
                    peer.sendall(bytes([byte]))
            if byte == HELLO[2]:
                assert target.serves(), "others are served meanwhile"
            # The pace is the attack's own: a second, unless the server closes.
            if is_closed(peers[0], 1.0):
                break
        assert all(is_closed(peer, 1.0) for peer in peers)
        assert 9 < time.monotonic() - began < 14
    finally:
        for peer in peers:
            peer.close()
    target.server.wait_for_log("no HELLO within 10 s")


def test_a_flood_of_bad_connections_leaves_memory_as_it_was(target: Target) -> None:
    method = b"Speech.upper"
    attacks = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 70_000,
        HELLO + serialize_frame(Kind.REQUEST, Flag.MORE, 1, struct.pack("!I", 4_000_000) + bytes(60_000)),
        HELLO + request(1, method, b"\x81\xa4text" + b"\x91" * 60_000),
        HELLO + b"".join(request(2 * n + 1, b"x", b"\x80") for n in range(500)),
        HELLO + request(1, method, b"\xff" * 1000)[:-1],
    ]

    def attack() -> None:
        for data in attacks:
            with target.connect() as peer:
                try:
                    peer.sendall(data)
                    peer.shutdown(socket.SHUT_WR)
                    read_all(peer)
                except OSError:
                    pass

    for _ in range(20):
        attack()
    before = target.server.resident_kib()
    for _ in range(100):
        attack()
    assert target.serves()
    grown = target.server.resident_kib() - before
    assert grown < 4096, f"{grown} KiB more after 600 hostile connections"


def test_a_peer_that_never_reads_is_not_answered_without_end(target: Target) -> None:
    echo = request(1, b"Speech.echo", msgspec.msgpack.encode({"text": "x" * 50_000}))
    before = target.server.resident_kib()
    with target.connect() as peer:
        peer.settimeout(2.0)
        sent = 0
        try:
            peer.sendall(HELLO)
            for number in range(20_000):
                peer.sendall(echo[:4] + struct.pack("!Q", 2 * number + 1) + echo[12:])
                sent += len(echo)
        except TimeoutError:
            pass
        assert sent < 100_000_000, "the server read on although nobody read its answers"
        assert target.serves()
        assert target.server.resident_kib() - before < 64 * 1024


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server whose handlers count themselves, and whose patience with who does not read is short."""
    port = free_port()
    directory: Path = tmp_path_factory.mktemp("bounded")
    (directory / "bounded.py").write_text(BOUNDED)
    arguments = ("pf-serve", "--protocol", "bounded:factory", "--listen", f"tcp:{port}:interface=127.0.0.1")
    with server(directory, *arguments) as running:
        yield Target(running, port)


BOUNDED = """
from collections.abc import AsyncIterator
from twisted.internet.defer import Deferred
from protoframe import Factory, Limits, Protocol, request

class Count(Protocol):
    now = most = begun = 0

    @request
    async def wait(self) -> None:
        Count.begun += 1
        Count.now += 1
        Count.most = max(Count.most, Count.now)
        try:
            await Deferred()
        finally:
            Count.now -= 1

    @request
    async def flow(self) -> AsyncIterator[bytes]:
        while True:
            Count.begun += 1
            yield bytes(1000)

    @request
    async def counts(self) -> list[int]:
        return [Count.now, Count.most, Count.begun]

def factory() -> Factory:
    return Factory(Count, limits=Limits(write_timeout=1.0, max_calls=100))
"""


def counts(target: Target) -> list[int]:
    done = pf("call", f"tcp:127.0.0.1:{target.port}", "Count.counts")
    assert done.returncode == 0, done.stderr
    decoded: list[int] = msgspec.json.decode(done.stdout)
    return decoded


def test_a_hundred_thousand_calls_and_cancels_end_in_a_goaway_and_never_in_more_handlers(bounded: Target) -> None:
    flood = bytearray(HELLO)
    for number in range(100_000):
        flood += request(2 * number + 1, b"Count.wait", b"\x80")
        flood += serialize_frame(Kind.CANCEL, 0, 2 * number + 1, b"")
    # A handler that runs is counted.
    assert pf("call", f"tcp:127.0.0.1:{bounded.port}", "Count.wait", "--timeout", "0.3").returncode == 28
    assert counts(bounded)[1] == 1
    before = bounded.server.resident_kib()
    with bounded.connect() as peer:
        sender = threading.Thread(target=send_what_is_taken, args=(peer, bytes(flood)))
        sender.start()
        answer = read_all(peer)
        peer.close()
        sender.join()
    kind, _, _, payload = frames(answer)[-1]
    assert kind == Kind.GOAWAY
    assert payload[:2] == b"\x00\x08"
    # Which of the two is seen first depends on how the octets come in.
    assert b"calls are cancelled at once" in payload or b"calls are opened than 100 at once" in payload
    running, most, begun = counts(bounded)
    assert running == 0
    # The one of before; of the flood there may be none, where all of it was seen before the first was served.
    assert 0 < most <= 100
    assert most <= begun <= 1001
    bounded.server.wait_for_log("CancelFlood")
    assert bounded.server.resident_kib() - before < 16 * 1024


def send_what_is_taken(peer: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        peer.sendall(data)


def test_a_flood_of_pings_and_one_of_calls_above_the_limit_end_in_a_goaway(bounded: Target) -> None:
    pings = serialize_frame(Kind.PING, 0, 0, bytes(8)) * 5000
    calls = b"".join(request(2 * number + 1, b"Count.wait", b"\x80") for number in range(5000))
    for flood, text in ((pings, "PINGs at once"), (calls, "more calls are opened than 100 at once")):
        answer = bounded.answer_to(HELLO + flood)
        kind, _, _, payload = frames(answer)[-1]
        assert kind == Kind.GOAWAY
        assert payload[:2] == b"\x00\x08"
        assert text in payload[10:].decode()
    assert counts(bounded)[0] == 0


def test_a_peer_that_never_reads_stops_the_generator_and_is_dropped_at_the_bound(bounded: Target) -> None:
    # 0xffffffff: no deadline.
    message = struct.pack("!IHH", 0xFFFFFFFF, 10, 0) + b"Count.flow" + b"\x80"
    greeting = Hello(
        max_frame=65536,
        max_message=4 << 20,
        max_unfinished=16 << 20,
        max_calls=10,
        stream_credit=(1 << 31) - 1,
        connection_credit=(1 << 31) - 1,
    )
    _, _, before = counts(bounded)
    memory = bounded.server.resident_kib()
    began = time.monotonic()
    with bounded.connect() as peer:
        peer.sendall(serialize_preface() + serialize_frame(Kind.HELLO, 0, 0, greeting.serialize()))
        peer.sendall(serialize_frame(Kind.REQUEST, Flag.STREAM, 1, message))
        bounded.server.wait_for_log(r"WriteTimeout: the peer read nothing for 1 s")
        assert time.monotonic() - began < 10
        # The kernel's buffers took a few thousand; credit of 2 GiB notwithstanding, nobody asked for more.
        assert counts(bounded)[2] - before < 20_000
        assert bounded.server.resident_kib() - memory < 8 * 1024
