"""Small files in a stream: read ahead where they are sent from, and where they come, made durable together.

Knows when a batch is enough; how it is written is `protoframe.files._small`'s.  Files go through three steps: they are
written down, made durable, and put into their places, where the next batch that is made durable makes them so too.  All
three are done at once, with different files, and batches are as large as the disk is slow.  Runs in the reactor's
thread, at both ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from protoframe.files._contract import Digest, Missing, Outcome, SmallFile
from protoframe.files._copying import Bell
from protoframe.files._disk import Disk, ended, over
from protoframe.files._small import BatchWriter, Staged, read_small
from protoframe.files._tree import Tree

__all__ = ["Batches", "read_ahead"]

T = TypeVar("T")
F = TypeVar("F", SmallFile, SmallFile | Missing)

#: Files that are read in one piece of disk work, while as many that were read before are sent.
_READ = 128

#: Files, and bytes, that go in one item.
_ITEM = 64
_ITEM_OCTETS = 64 * 1024
#: Files, and bytes, that are written down in one piece of disk work, and how many such pieces at once.
_PIECE = 256
_PIECE_OCTETS = 1024 * 1024
_AT_ONCE = 2
#: Files that are made durable together, while more are written down.
_BATCH = 1024
#: Files, and bytes, that are written down and not in place yet, at the most.
_MOST = 8192
_MOST_OCTETS = 64 * 1024 * 1024
#: Files that are in place of which nobody has taken the outcome, at the most.
_MOST_UNTOLD = 65536
#: What waits to be written down, at the most.
_WAITING = 1024
_WAITING_OCTETS = 4 * 1024 * 1024


async def read_ahead(
    disk: Disk, tree: Tree, paths: Sequence[str], digest: Digest
) -> AsyncIterator[list[SmallFile | Missing]]:
    """Small files, some at a time, in order; the next are read while the caller deals with some."""
    parts = [paths[at : at + _READ] for at in range(0, len(paths), _READ)]
    ahead: Deferred[list[SmallFile | Missing]] | None = None
    try:
        for number in range(len(parts)):
            found = await (ahead or disk.run(read_small, tree, parts[number], digest))
            ahead = disk.run(read_small, tree, parts[number + 1], digest) if number + 1 < len(parts) else None
            yield found
    finally:
        if ahead is not None:
            ahead.addErrback(lambda _: None)


def in_items(files: list[F]) -> Iterator[list[F]]:
    """Small files, as many in one item of a stream as make it worth its while."""
    together: list[F] = []
    octets = 0
    for file in files:
        together.append(file)
        octets += len(file.data) if isinstance(file, SmallFile) else 0
        if len(together) >= _ITEM or octets >= _ITEM_OCTETS:
            yield together
            together, octets = [], 0
    if together:
        yield together


class _Piece:
    """Files that are being written down.

    :ivar staged: they, when they are.
    :ivar over: fires then, or when that has failed.
    """

    def __init__(self, files: list[SmallFile]) -> None:
        self.files = len(files)
        self.octets = sum(len(file.data) for file in files)
        self.staged: Staged | None = None
        self.over: Deferred[None] = Deferred()


class Batches:
    """Takes small files by `feed`, and tells by `outcomes` what became of them, in order.

    :param disk: writes them.
    :param writer: how; it is closed at the end.
    """

    def __init__(self, disk: Disk, writer: BatchWriter) -> None:
        self._disk = disk
        self._writer = writer
        self._bell = Bell()
        self._room = Bell()
        self._queue: deque[SmallFile] = deque()
        self._octets = 0
        # In order, whichever is written down first.
        self._pieces: deque[_Piece] = deque()
        self._staged: Staged = []
        # A batch that is being made durable, and those that are so and wait for their places; what became of files that
        # are in place, and of those of which that is durable.
        self._syncing: Deferred[Any] | None = None
        self._batch: Staged = []
        self._durable: deque[Staged] = deque()
        self._placing: Deferred[Any] | None = None
        self._placed: list[Outcome] = []
        self._told: list[Outcome] = []
        # What is written down, or being so, and not in place yet.
        self._under_way = 0
        self._under_way_octets = 0
        self._ended = False
        self._is_left = False

    def feed(self, files: Sequence[SmallFile]) -> Awaitable[None] | None:
        """Files came; what is to be waited for before the next ones, where too many are not written down."""
        self._queue += files
        self._octets += sum(len(file.data) for file in files)
        if not self._pieces or len(self._queue) >= _PIECE:
            self._go_on()
        return self._until_room() if self._is_full() else None

    def _is_full(self) -> bool:
        return len(self._queue) > _WAITING or self._octets > _WAITING_OCTETS

    async def _until_room(self) -> None:
        while self._is_full():
            await self._room.wait()

    def end(self) -> None:
        """No more come."""
        self._ended = True
        self._bell.ring()

    def fail(self, error: BaseException) -> None:
        """No more come, although there are more."""
        self._bell.fail(error)
        self._room.fail(error)

    async def outcomes(self) -> AsyncIterator[list[Outcome]]:
        """What became of the files; ends when `end` was called and all are durable.

        Whoever leaves before waits until nothing is written any more, and what is not in place is gone.

        :raises OSError: the disk failed.
        """
        try:
            while True:
                self._bell.check()
                if self._told:
                    told, self._told = self._told, []
                    self._go_on()
                    yield told
                elif self._ended and self._is_idle():
                    return
                else:
                    await self._bell.wait()
        finally:
            self._is_left = True
            # Cancelled once more or not: nothing of it may stay.
            await ended(Deferred.fromCoroutine(self._leave()))

    async def _leave(self) -> None:
        for working in (self._syncing, self._placing, *(piece.over for piece in self._pieces)):
            if working is not None:
                await over(working)
        written = [piece.staged for piece in self._pieces if piece.staged is not None]
        rest = [one for batch in (self._batch, *self._durable, self._staged, *written) for one in batch]
        await over(self._disk.run(self._writer.abandon, rest))
        await over(self._disk.run(self._writer.close))

    def _is_idle(self) -> bool:
        steps = (self._queue, self._pieces, self._staged, self._syncing, self._durable, self._placing, self._placed)
        return not any(step for step in steps)

    def _go_on(self) -> None:
        """Begins with each step that can be."""
        if self._is_left:
            return
        self._write_down()
        if self._placing is None and self._durable:
            batch = self._durable.popleft()
            self._placing = self._disk.run(self._writer.place, batch)
            self._placing.addCallback(self._have_places, batch).addErrback(self._failed)
        if self._syncing is None and self._is_worth_syncing():
            self._batch, self._staged = self._staged, []
            placed, self._placed = self._placed, []
            self._syncing = self._disk.run(self._writer.sync, self._batch)
            self._syncing.addCallback(self._are_durable, placed).addErrback(self._failed)

    def _is_worth_syncing(self) -> bool:
        if len(self._staged) >= _BATCH:
            return True
        # There is nothing that is worth waiting for.
        if self._pieces or (self._queue and self._has_room()):
            return False
        return bool(self._staged or (self._placed and self._placing is None and not self._durable))

    def _are_durable(self, _: None, placed: list[Outcome]) -> None:
        self._syncing = None
        self._told += placed
        if self._batch:
            self._durable.append(self._batch)
            self._batch = []
        self._go_on()
        self._bell.ring()

    def _have_places(self, outcomes: list[Outcome], batch: Staged) -> None:
        self._placing = None
        self._placed += outcomes
        self._under_way -= len(batch)
        self._under_way_octets -= sum(size for _, size, _ in batch)
        self._go_on()
        self._bell.ring()

    def _failed(self, failure: Failure) -> None:
        self.fail(failure.value or CancelledError())

    def _write_down(self) -> None:
        while self._queue and len(self._pieces) < _AT_ONCE and self._has_room():
            files = self._take()
            piece = _Piece(files)
            self._pieces.append(piece)
            self._under_way += piece.files
            self._under_way_octets += piece.octets
            writing: Deferred[Any] = self._disk.run(self._writer.stage, files)
            writing.addCallback(self._written, piece).addErrback(self._not_written, piece)
            writing.addBoth(lambda _, piece: piece.over.callback(None), piece)

    def _has_room(self) -> bool:
        return (
            self._under_way < _MOST
            and self._under_way_octets < _MOST_OCTETS
            and len(self._placed) + len(self._told) < _MOST_UNTOLD
        )

    def _take(self) -> list[SmallFile]:
        files: list[SmallFile] = []
        octets = 0
        while self._queue and len(files) < _PIECE and octets < _PIECE_OCTETS:
            file = self._queue.popleft()
            octets += len(file.data)
            files.append(file)
        self._octets -= octets
        return files

    def _written(self, staged: Staged, piece: _Piece) -> None:
        piece.staged = staged
        while self._pieces and self._pieces[0].staged is not None:
            self._staged += self._pieces.popleft().staged or []
        self._go_on()
        self._room.ring()
        self._bell.ring()

    def _not_written(self, failure: Failure, piece: _Piece) -> None:
        if piece in self._pieces:
            self._pieces.remove(piece)
        self._failed(failure)
