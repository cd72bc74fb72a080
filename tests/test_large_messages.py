"""Messages of several frames, over real sockets: whole, unchanged, and in room that is nobody else's."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults
from twisted.trial.unittest import SynchronousTestCase

from protoframe import Factory, Limits, Protocol, request
from protoframe._stream import StreamCarrier
from protoframe.core import messages
from protoframe.testing.loopback import Loopback

MIB = 1024 * 1024
LIMITS = Limits(max_message=6 * MIB)


class Store(Protocol):
    #: What `keep` was given.
    kept: list[memoryview] = []  # noqa: RUF012 - of all conversations

    @request
    async def double(self, data: bytes) -> bytes:
        return data + data

    @request
    async def keep(self, data: memoryview) -> int:
        self.kept.append(data)
        return len(data)

    @request
    async def seen(self, data: memoryview) -> tuple[bool, int]:
        return data.readonly, hash(data)

    @request
    async def parts(self, count: int, size: int) -> AsyncIterator[bytes]:
        for number in range(count):
            yield bytes([number]) * size


@pytest.fixture
def loopback():
    made = Loopback()
    yield made
    pytest_twisted.blockon(made.close())


def noise(size, seed=1):
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest_twisted.ensureDeferred
async def test_they_come_as_they_were_sent(loopback, kind):
    where = await loopback.serve(Factory(Store, limits=LIMITS), kind)
    sizes = [65_535 - 60, 65_536, 131_072, 2 * MIB + 3] if kind == "tcp" else [65_536, 300_001]
    async with loopback.connect(where, Store, limits=LIMITS) as store:
        for size in sizes:
            data = noise(size)
            assert await store.double(data) == data + data


@pytest_twisted.ensureDeferred
async def test_many_at_once_do_not_get_into_each_others_room(loopback):
    where = await loopback.serve(Factory(Store, limits=LIMITS))
    async with loopback.connect(where, Store, limits=LIMITS) as store:
        for _ in range(3):
            sent = [noise(MIB + number, number) for number in range(6)]
            answers = await gatherResults([Deferred.fromCoroutine(awaited(store.double(data))) for data in sent])
            assert answers == [data + data for data in sent]


async def awaited(deferred):
    return await deferred


@pytest_twisted.ensureDeferred
async def test_a_view_that_a_handler_keeps_stays_as_it_is(loopback):
    Store.kept.clear()
    where = await loopback.serve(Factory(Store, limits=LIMITS))
    async with loopback.connect(where, Store, limits=LIMITS) as store:
        sent = [noise(MIB, number) for number in range(5)]
        for data in sent:
            assert await store.keep(data) == MIB
        assert [bytes(view) for view in Store.kept] == sent
    Store.kept.clear()


@pytest_twisted.ensureDeferred
async def test_a_view_is_the_same_kind_of_thing_whatever_its_size(loopback):
    where = await loopback.serve(Factory(Store, limits=LIMITS))
    async with loopback.connect(where, Store, limits=LIMITS) as store:
        for size in (10, 60_000, 70_000, MIB):
            data = noise(size)
            assert await store.seen(data) == (True, hash(data))


@pytest_twisted.ensureDeferred
async def test_large_items_come_as_they_were_sent(loopback):
    where = await loopback.serve(Factory(Store, limits=LIMITS))
    async with loopback.connect(where, Store, limits=LIMITS) as store:
        assert [item async for item in store.parts(5, 200_000)] == [bytes([one]) * 200_000 for one in range(5)]


class Socket:
    """A socket that takes so many octets at a time."""

    def __init__(self, takes):
        self.takes = list(takes)
        self.taken = b""

    def send(self, data):
        return self._take(bytes(data))

    def sendmsg(self, pieces):
        return self._take(b"".join(pieces))

    def _take(self, data):
        room = self.takes.pop(0)
        if room is None:
            raise BlockingIOError
        self.taken += data[:room]
        return min(room, len(data))


class Transport:
    dataBuffer = b""
    TLS = False

    def __init__(self):
        self._tempDataBuffer = []
        self.bufferSize = 65_536

    def write(self, data):
        self._tempDataBuffer.append(data)

    def writeSequence(self, pieces):
        self._tempDataBuffer.extend(pieces)


class Peer:
    """What a carrier of large messages asks of its connection."""

    allowance = StreamCarrier.allowance


class Sending(SynchronousTestCase):
    def carrier(self, *takes):
        made = StreamCarrier(lambda *_: None, Limits(), lambda: 0.0, pauses_peer=False)
        made.transport = Transport()
        made._socket = Socket(takes)
        made.connection = Peer()
        return made

    def sent(self, carrier):
        return carrier._socket.taken + b"".join(carrier.transport._tempDataBuffer)

    def test_what_the_kernel_does_not_take_is_left_to_the_transport_in_order(self):
        frames = [noise(20_000, number) for number in range(4)]
        whole = b"".join(frames)
        for room in (0, 1, 19_999, 20_000, 20_001, 59_999, len(whole) - 1, len(whole)):
            carrier = self.carrier(room)
            carrier.send(frames)
            self.assertEqual(self.sent(carrier), whole)
            self.assertEqual(len(carrier._socket.taken), room)

    def test_a_socket_that_is_full_leaves_all_to_the_transport(self):
        frames = [noise(20_000), noise(9_000, 2)]
        carrier = self.carrier(None, None)
        carrier.send(frames)
        self.assertEqual(carrier._socket.taken, b"")
        self.assertEqual(self.sent(carrier), b"".join(frames))

    def test_nothing_overtakes_what_the_transport_has_yet_to_write(self):
        carrier = self.carrier(5, 1000)
        carrier.send([b"a" * 10_000, b"b" * 10_000])
        carrier.send([b"c" * 10])
        self.assertEqual(self.sent(carrier), b"a" * 10_000 + b"b" * 10_000 + b"c" * 10)
        # Once the transport has written all, the socket is written to again.
        carrier._socket.taken, carrier.transport._tempDataBuffer = b"", []
        carrier.send([b"d" * 10])
        self.assertEqual(carrier._socket.taken, b"d" * 10)

    def test_more_is_sent_at_a_time_to_a_peer_that_takes_all_and_less_as_soon_as_it_does_not(self):
        frames = [noise(20_000), noise(9_000, 2)]
        for last in ((28_999,), (None, None)):
            carrier = self.carrier(*[29_000] * 16, *last)
            seen = []
            for _ in range(17):
                carrier.send(frames)
                seen.append(carrier.connection.allowance)
            self.assertEqual(seen, [131_072] * 15 + [524_288, 131_072])

    def test_more_is_read_at_a_time_while_much_comes(self):
        carrier = self.carrier()
        carrier._read_more()
        self.assertEqual(carrier.transport.bufferSize, 8 * 65_536)
        carrier._read_less()
        self.assertEqual(carrier.transport.bufferSize, 65_536)


class Room(SynchronousTestCase):
    def setUp(self):
        self.room = messages._Room()

    def give(self, size):
        given = messages._Octets(size)
        self.room.give_back(given)
        return given

    def test_none_is_made_before_octets_come(self):
        self.assertEqual(self.room.take(4 * MIB), b"")

    def test_what_was_given_back_is_taken_again_once(self):
        given = self.give(MIB)
        self.assertIs(self.room.take(MIB - 5), given)
        self.assertEqual(self.room.take(MIB), b"")

    def test_not_while_somebody_has_a_view_of_it(self):
        given = self.give(MIB)
        view = memoryview(given)[5:]
        self.assertEqual(self.room.take(MIB), b"")
        view.release()
        self.assertIs(self.room.take(MIB), given)

    def test_a_little_message_does_not_take_much(self):
        self.give(MIB)
        self.assertEqual(self.room.take(MIB // 2 - 1), b"")

    def test_of_so_many_and_so_much_alone(self):
        self.give(messages._MOST_ROOM + 1)
        self.assertEqual(self.room.take(messages._MOST_ROOM), b"")
        for size, most in ((MIB, messages._KEPT_ROOM // MIB), (100_000, messages._KEPT_ROOMS)):
            given = [self.give(size) for _ in range(most + 1)]
            taken = [self.room.take(size) for _ in range(most + 1)]
            self.assertEqual([any(one is room for room in taken) for one in given], [False] + [True] * most)
