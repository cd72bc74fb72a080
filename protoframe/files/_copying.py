"""Both ends of the copy of one file, while a stream each way is open: who sends, and who receives.

Knows the items of `Files.read` and `Files.write`, and in which order they go; not which end is the client, nor how the
streams are carried.  Disk work goes to a `Disk`; this runs in the reactor's thread.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from twisted.internet.defer import Deferred

from protoframe.files._blocks import window_for
from protoframe.files._contract import (
    Again,
    Answer,
    BadTransfer,
    Block,
    CorruptCopy,
    Got,
    Offer,
    Receipt,
    Sent,
    Want,
    Whole,
)
from protoframe.files._disk import Disk
from protoframe.files._partial import Partial
from protoframe.files._source import SourceFile

__all__ = ["Bell", "Receiver", "Sender", "pump", "whole_digest"]

#: Bytes that are read, or written, in one piece of disk work.
_STRETCH = 2048 * 1024
#: Bytes that are read in one piece of disk work, of a file whose digest alone is wanted.
_THROUGH = 8 * 1024 * 1024
#: How many stretches are read before they are sent.
_AHEAD = 2
#: Bytes that are verified in one piece of disk work, where all that is there is.
_SLICE = 32 * 1024 * 1024
#: Bytes that may be written and not read back yet, before more is written.
_MOST_UNCHECKED = 32 * 1024 * 1024
#: How often blocks may be wrong before a copy is given up, and how often all of it may be.
_MOST_WRONG = 1000
_MOST_ROUNDS = 8
#: Blocks that are asked for again at a time.
_MOST_AGAIN = 4096


class Bell:
    """Something has happened that somebody waits for."""

    __slots__ = ("_error", "_waiting")

    def __init__(self) -> None:
        self._waiting: list[Deferred[None]] = []
        self._error: BaseException | None = None

    def ring(self) -> None:
        """Wakes those who wait."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.called:
                one.callback(None)

    def fail(self, error: BaseException) -> None:
        """From now on there is nothing to wait for."""
        if self._error is None:
            self._error = error
        self.ring()

    def check(self) -> None:
        """Raises why there is nothing to wait for, if so."""
        if self._error is not None:
            raise self._error

    async def wait(self) -> None:
        """Waits for the next ring."""
        self.check()
        rung: Deferred[None] = Deferred()
        self._waiting.append(rung)
        await rung
        self.check()


class _ReadAhead:
    """What is to be said of a source, in order, read while what comes before it is sent.

    :param wanted: for each block, whether its data is to be sent.
    """

    def __init__(self, disk: Disk, source: SourceFile, wanted: bytearray) -> None:
        self._disk = disk
        self._source = source
        self._wanted = wanted
        self._index = 0
        self._is_over = False
        self._is_reading = False
        self._came: deque[list[Sent]] = deque()
        self._bell = Bell()
        self._read()

    async def take(self) -> list[Sent] | None:
        """What comes next; ``None`` where that was all."""
        while not self._came:
            if not self._is_reading and self._index >= len(self._wanted):
                return None
            await self._bell.wait()
        items = self._came.popleft()
        self._read()
        return items

    def stop(self) -> None:
        """Reads no further: the file is closed, and so may the threads be."""
        self._is_over = True

    def _read(self) -> None:
        if not self._is_over and not self._is_reading and self._index < len(self._wanted) and len(self._came) < _AHEAD:
            self._is_reading = True
            reading = self._disk.run(self._source.stretch, self._index, self._wanted, _STRETCH)
            reading.addCallbacks(self._have, lambda failure: self._bell.fail(failure.value))

    def _have(self, found: tuple[list[Sent], int]) -> None:
        items, self._index = found
        self._is_reading = False
        self._came.append(items)
        self._read()
        self._bell.ring()


async def whole_digest(disk: Disk, source: SourceFile) -> bytes:
    """The digest of a file, all of which is read for it.

    :raises SourceChanged: it changed meanwhile.
    :raises OSError: it cannot be read.
    """
    nothing, index = bytearray(source.blocks.count), 0
    while index < source.blocks.count:
        _, index = await disk.run(source.stretch, index, nothing, _THROUGH)
    return await disk.run(source.whole)


class Sender:
    """Sends a file.

    :param disk: reads it.
    :param source: the file.
    :param offer: whether an `Offer` comes first.
    :param pace: awaited with the size of each block before it goes; may hold it back.
    :param sent: called with the size of each block that goes.
    :ivar whole: the digest of the file, once all of it was read.
    :ivar receipt: what the receiving end said at last.
    """

    def __init__(
        self,
        disk: Disk,
        source: SourceFile,
        *,
        offer: bool = False,
        pace: Callable[[int], Awaitable[None]] | None = None,
        sent: Callable[[int], None] | None = None,
    ) -> None:
        self._disk = disk
        self._source = source
        self._offer = offer
        self._pace = pace
        self._sent = sent
        self._bell = Bell()
        self._want: Want | None = None
        self._under_way = 0
        self._again: list[int] = []
        self.whole = b""
        self.receipt: Receipt | None = None

    def answer(self, item: Answer) -> None:
        """The receiving end says something.

        :raises BadTransfer: that has no place here.
        """
        blocks = self._source.blocks
        if isinstance(item, Want):
            if self._want is not None or not _are_ranges(item.ranges, blocks.count) or item.window < 0:
                raise BadTransfer("the receiving end wants what there is not")
            self._want = item
        elif isinstance(item, Got):
            self._under_way = max(0, self._under_way - item.octets)
        elif isinstance(item, Again):
            self._again += item.blocks
            if self._want is None or len(self._again) > blocks.count + _MOST_WRONG:
                raise BadTransfer("the receiving end wants too much again")
            if not all(0 <= index < blocks.count for index in item.blocks):
                raise BadTransfer("the receiving end wants what there is not")
        else:
            self.receipt = item
        self._bell.ring()

    def fail(self, error: BaseException) -> None:
        """The receiving end says nothing any more."""
        self._bell.fail(error)

    async def items(self) -> AsyncIterator[Sent]:
        """What to send; ends with the receipt."""
        if self._offer:
            yield Offer(self._source.source)
        while self._want is None:
            await self._bell.wait()
        wanted = bytearray(self._source.blocks.count)
        for first, count in self._want.ranges:
            wanted[first : first + count] = b"\1" * count
        reading = _ReadAhead(self._disk, self._source, wanted)
        try:
            while (items := await reading.take()) is not None:
                for item in items:
                    if isinstance(item, Block):
                        await self._may_send(item)
                    yield item
        finally:
            reading.stop()
        while self.receipt is None:
            while self._again:
                some, self._again = self._again[:8], self._again[8:]
                for item in await self._disk.run(self._source.again, some):
                    if isinstance(item, Block):
                        await self._may_send(item)
                    yield item
            self.whole = await self._disk.run(self._source.whole)
            yield Whole(self.whole)
            while self.receipt is None and not self._again:
                await self._bell.wait()

    async def _may_send(self, block: Block) -> None:
        size = len(block.data)
        window = self._want.window if self._want is not None else 0
        while self._under_way and self._under_way + size > window:
            await self._bell.wait()
        self._bell.check()
        if self._pace is not None:
            await self._pace(size)
        self._under_way += size
        if self._sent is not None:
            self._sent(size)


class Receiver:
    """Receives a file into a `Partial`, and has it put into its place.

    `feed` is given what comes; `answers` does the work, and is what to send.

    :param disk: writes it.
    :param partial: the copy, just opened.
    :param commit: called in a thread when all is verified and durable: it puts the file into its place.
    :param began: called with the bytes that are there already.
    :param got: called with the bytes of blocks that were dealt with.
    """

    def __init__(
        self,
        disk: Disk,
        partial: Partial,
        commit: Callable[[], Any],
        began: Callable[[int], None] | None = None,
        got: Callable[[int], None] | None = None,
    ) -> None:
        self._disk = disk
        self._partial = partial
        self._commit = commit
        self._began = began
        self._got = got
        self._bell = Bell()
        self._room = Bell()
        self._queue: deque[Sent] = deque()
        self._octets = 0
        self._window = window_for(partial.source.size, partial.source.block_size, partial.attempts)
        self._checking = False
        # Blocks to ask for again, and those that were asked for and have not come.
        self._bad: list[int] = []
        self._asked: set[int] = set()
        self._wrong = 0
        self._rounds = 0
        self.receipt: Receipt | None = None

    async def feed(self, item: Sent) -> None:
        """Something came; waits while too much of it is not dealt with.

        :raises BadTransfer: it has no place here.
        """
        if isinstance(item, Offer):
            raise BadTransfer("an offer comes first, and once")
        self._queue.append(item)
        if isinstance(item, Block):
            self._octets += len(item.data)
        self._bell.ring()
        while self._octets > self._window or len(self._queue) > 1000:
            await self._room.wait()

    def fail(self, error: BaseException) -> None:
        """Nothing comes any more."""
        self._bell.fail(error)
        self._room.fail(error)

    async def answers(self) -> AsyncIterator[Answer]:
        """What to send; ends with the receipt.

        :raises CorruptCopy: what is on the disk does not become what was sent.
        """
        blocks = self._partial.blocks
        if blocks.missing < blocks.count:
            # Of an earlier attempt: believed when the disk says the same.
            await self._verify()
        if self._began is not None:
            self._began(blocks.size - blocks.missing_size())
        yield Want(blocks.missing_ranges(), self._window)
        while self.receipt is None:
            if self._bad:
                again, self._bad = self._bad[:_MOST_AGAIN], self._bad[_MOST_AGAIN:]
                self._count_wrong(len(again))
                self._asked.update(again)
                yield Again(again)
            if not self._queue or self._partial.unchecked > _MOST_UNCHECKED:
                await self._bell.wait()
                continue
            batch: list[Sent] = []
            whole: Whole | None = None
            octets = 0
            # Not all that came: the sending end is to send, for what it is told of now, while the rest is written.
            while self._queue and whole is None and octets < _STRETCH:
                item = self._queue.popleft()
                if isinstance(item, Whole):
                    whole = item
                else:
                    batch.append(item)
                    if isinstance(item, Block):
                        octets += len(item.data)
                        self._asked.discard(item.index)
            if batch:
                again, octets = await self._disk.run(self._partial.take, batch)
                self._bad += again
                self._check()
                self._octets -= octets
                self._room.ring()
                if octets:
                    yield Got(octets)
                    if self._got is not None:
                        self._got(octets)
            if whole is not None and not self._queue:
                await self._finish(whole)
        yield self.receipt

    def _check(self) -> None:
        """Has what was written read back, while more comes and is written."""
        if not self._checking and self._partial.unchecked:
            self._checking = True
            self._disk.run(self._partial.check).addCallbacks(
                self._checked, lambda failure: self._not_checked(failure.value)
            )

    def _checked(self, bad: list[int]) -> None:
        self._checking = False
        self._bad += bad
        self._check()
        self._bell.ring()

    def _not_checked(self, error: BaseException) -> None:
        self._checking = False
        self._bell.fail(error)

    async def _all_checked(self) -> None:
        while self._checking:
            await self._bell.wait()
        self._bell.check()

    async def _finish(self, whole: Whole) -> None:
        """Everything was sent: the file is in its place afterwards, or there are blocks that are wanted again."""
        blocks = self._partial.blocks
        await self._all_checked()
        if not blocks.missing:
            await self._disk.run(self._partial.sync)
            if self._partial.may_be_changed():
                await self._verify()
        if blocks.missing:
            # What was asked for when this was said already comes, and then it is said again.
            missing = (index for first, count in blocks.missing_ranges() for index in range(first, first + count))
            self._bad = list(itertools.islice((index for index in missing if index not in self._asked), _MOST_AGAIN))
            self._count_round()
            return
        root = await self._disk.run(self._partial.root)
        if root != whole.digest:
            raise CorruptCopy("the digest of the whole is not the sender's")
        await self._disk.run(self._commit)
        self.receipt = Receipt(root, blocks.size)

    async def _verify(self) -> None:
        """Reads what is there from the disk, in two threads, and drops what is wrong."""
        partial = self._partial
        count = max(1, _SLICE // partial.blocks.block_size)
        firsts = iter(range(0, partial.blocks.count, count))

        async def work() -> None:
            for first in firsts:
                await self._disk.run(partial.recheck, first, count)

        other = Deferred.fromCoroutine(work())
        try:
            await work()
        except BaseException:
            other.addErrback(lambda _: None)
            raise
        await other

    def _count_wrong(self, number: int) -> None:
        self._wrong += number
        if self._wrong > _MOST_WRONG + self._partial.blocks.count:
            raise CorruptCopy("blocks come wrong, again and again")

    def _count_round(self) -> None:
        self._rounds += 1
        if self._rounds > _MOST_ROUNDS:
            raise CorruptCopy("what was written is not what is read from the disk, again and again")


def pump(items: AsyncIterator[Any], feed: Callable[[Any], Awaitable[None] | None], end: Any) -> Deferred[None]:
    """Gives items to a `Receiver` or `Sender` as they come, and tells it when none come any more.

    :param end: the receiver or sender.
    """

    async def run() -> None:
        try:
            async for item in items:
                waiting = feed(item)
                if waiting is not None:
                    await waiting
        except BaseException as error:
            end.fail(error)
            if isinstance(error, GeneratorExit):
                raise
        else:
            end.fail(BadTransfer("the other end says nothing any more, in the midst of a copy"))

    return Deferred.fromCoroutine(run())


def _are_ranges(ranges: Iterable[tuple[int, int]], count: int) -> bool:
    before = 0
    for first, length in ranges:
        if first < before or length < 1:
            return False
        before = first + length
    return before <= count
