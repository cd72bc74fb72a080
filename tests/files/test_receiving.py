"""Both ends of a copy, each by itself: what a receiver says of what comes, and how far ahead a sender reads."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from protoframe.files import _copying
from protoframe.files._blocks import BlockMap
from protoframe.files._contract import Again, Block, Digest, Got, Holes, Receipt, Source, Want, Whole
from protoframe.files._copying import Receiver
from protoframe.files._disk import Disk
from protoframe.files._partial import Partial
from protoframe.files._tree import Tree
from tests.files.support import MIB, content

SIZE, BLOCK = 4 * MIB, 512 * 1024


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class ReceiverTests(SynchronousTestCase):
    """A file of 4 MiB comes, all of it before the first block is written."""

    def setUp(self) -> None:
        directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, directory)
        self.directory = directory
        self.tree = Tree(directory)
        self.addCleanup(self.tree.close)
        self.partial = Partial(self.tree, "file", Source(SIZE, 10**18, 0o644, BLOCK, Digest.SHA256))
        self.addCleanup(self.partial.close)
        self.receiver = Receiver(Disk(Clock(), threads=0), self.partial, self.partial.commit)
        self.answers = self.receiver.answers()
        self.data = content(SIZE)
        self.blocks = [self.data[at : at + BLOCK] for at in range(0, SIZE, BLOCK)]

    def next(self) -> object:
        return self.successResultOf(Deferred.fromCoroutine(anext(self.answers)))

    def feed(self, *items: object) -> None:
        for item in items:
            Deferred.fromCoroutine(self.receiver.feed(item))

    def whole(self) -> Whole:
        blocks = BlockMap(SIZE, BLOCK)
        for index, block in enumerate(self.blocks):
            blocks.add(index, digest_of(block))
        return Whole(blocks.root(digest_of))

    def test_the_sending_end_hears_of_each_piece_and_not_of_all_at_once(self) -> None:
        self.assertIsInstance(self.next(), Want)
        self.feed(*(Block(index, digest_of(block), block) for index, block in enumerate(self.blocks)), self.whole())
        said = [self.next() for _ in range(2)]
        self.assertEqual(said, [Got(2 * MIB)] * 2)
        self.assertIsInstance(self.next(), Receipt)

    def test_block_that_came_wrong_is_wanted_again_and_nothing_is_in_place_before(self) -> None:
        self.assertIsInstance(self.next(), Want)
        sent = [Block(index, digest_of(block), block) for index, block in enumerate(self.blocks)]
        sent[3] = Block(3, sent[3].digest, bytes(BLOCK))
        self.feed(*sent, self.whole())
        self.assertEqual([self.next() for _ in range(3)], [Got(2 * MIB), Again([3]), Got(2 * MIB)])
        self.assertRaises(FileNotFoundError, self.tree.stat, "file")
        self.feed(Block(3, digest_of(self.blocks[3]), self.blocks[3]), self.whole())
        self.assertEqual(self.next(), Got(BLOCK))
        self.assertIsInstance(self.next(), Receipt)
        self.assertEqual(self.tree.stat("file").size, SIZE)

    def test_what_is_told_to_be_a_hole_is_one_whatever_came_before(self) -> None:
        self.assertIsInstance(self.next(), Want)
        zeros = digest_of(bytes(BLOCK))
        # Wrong in the first, which is found out; right in the second.
        self.feed(Block(0, zeros, b"J" * BLOCK), Block(1, digest_of(self.blocks[1]), self.blocks[1]))
        self.assertEqual([self.next(), self.next()], [Got(2 * BLOCK), Again([0])])
        self.blocks[0] = self.blocks[1] = bytes(BLOCK)
        self.feed(
            Holes(0, 2), *(Block(number, digest_of(self.blocks[number]), self.blocks[number]) for number in range(2, 8))
        )
        self.feed(self.whole())
        while not isinstance(self.next(), Receipt):
            pass
        with open(os.path.join(self.directory, "file"), "rb") as file:
            self.assertEqual(file.read(), b"".join(self.blocks))

    def test_block_that_comes_again_and_again_takes_no_more_room_each_time(self) -> None:
        last = Block(7, digest_of(self.blocks[7]), self.blocks[7])
        (journal,) = (name for name in os.listdir(self.tree.partials()) if name.endswith(".journal"))
        sizes = []
        for _ in range(3):
            self.partial.take([last])
            sizes.append(os.stat(journal, dir_fd=self.tree.partials()).st_size)
        self.assertEqual(sizes[0], sizes[2])
        self.assertEqual(self.partial.unchecked, 3 * BLOCK)


class Stretches:
    """A source of ten blocks, a stretch each, that notes what was read."""

    def __init__(self, fails_at: int = 10) -> None:
        self.read: list[int] = []
        self._fails_at = fails_at

    def stretch(self, first: int, wanted: bytearray, octets: int) -> tuple[list[int], int]:
        if first == self._fails_at:
            raise OSError("the disk is gone")
        self.read.append(first)
        return [first], first + 1


class ReadAhead(SynchronousTestCase):
    def reading(self, source: Stretches) -> _copying._ReadAhead:
        return _copying._ReadAhead(Disk(Clock(), threads=0), source, bytearray(10))  # type: ignore[arg-type]

    def take(self, reading: _copying._ReadAhead) -> object:
        return self.successResultOf(Deferred.fromCoroutine(reading.take()))

    def test_it_is_as_far_ahead_as_it_may_be_and_gives_everything_in_order(self) -> None:
        source = Stretches()
        reading = self.reading(source)
        self.assertEqual(len(source.read), _copying._AHEAD)
        for number in range(10):
            self.assertEqual(self.take(reading), [number])
            self.assertEqual(len(source.read), min(10, number + 1 + _copying._AHEAD))
        self.assertIsNone(self.take(reading))

    def test_nothing_is_read_once_it_is_stopped(self) -> None:
        source = Stretches()
        reading = self.reading(source)
        reading.stop()
        self.take(reading)
        self.assertEqual(len(source.read), _copying._AHEAD)

    def test_what_was_read_before_a_failure_comes_before_it(self) -> None:
        reading = self.reading(Stretches(fails_at=1))
        self.assertEqual(self.take(reading), [0])
        self.failureResultOf(Deferred.fromCoroutine(reading.take()), OSError)
