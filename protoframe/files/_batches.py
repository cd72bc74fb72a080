"""Small files in a stream: read ahead where they are sent from, and where they come, made durable together.

Knows when a batch is enough; how it is written is `protoframe.files._small`'s.  While one batch is made durable the
next is written down, so batches are as large as the disk is slow.  But no two of them are written down, or put into
their places, at once: threads that do so wait for each other most of the time, in the interpreter and in the file
system.  Runs in the reactor's thread, at both ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from protoframe.files._contract import Digest, Missing, Outcome, SmallFile
from protoframe.files._copying import Bell
from protoframe.files._disk import Disk
from protoframe.files._small import BatchWriter, Staged, read_small
from protoframe.files._tree import Tree

__all__ = ["Batches", "read_ahead"]

#: Files that are read in one piece of disk work, while as many that were read before are sent.
_READ = 128

#: Files, and bytes, that are written down in one piece of disk work.
_PIECE = 256
_PIECE_OCTETS = 1024 * 1024
#: Files, and bytes, that are written down and not durable yet, at the most.
_MOST = 8192
_MOST_OCTETS = 64 * 1024 * 1024
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


class Batches:
    """Takes small files by `feed`, and tells by `outcomes` what became of them, in order.

    :param disk: writes them.
    :param writer: how.
    """

    def __init__(self, disk: Disk, writer: BatchWriter) -> None:
        self._disk = disk
        self._writer = writer
        self._bell = Bell()
        self._room = Bell()
        self._queue: deque[SmallFile] = deque()
        self._octets = 0
        self._ended = False

    def feed(self, file: SmallFile) -> Awaitable[None] | None:
        """A file came; what is to be waited for before the next one, where too many are not written down."""
        self._queue.append(file)
        self._octets += len(file.data)
        if len(self._queue) == 1 or len(self._queue) >= _PIECE:
            self._bell.ring()
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

        :raises OSError: the disk failed.
        """
        staged: Staged = []
        octets = 0
        # What is made durable now.
        batch: Staged = []
        syncing: Deferred[None] | None = None
        try:
            while True:
                if syncing is not None and syncing.called:
                    done, syncing = syncing, None
                    await done
                    durable, batch = batch, []
                    yield await self._disk.run(self._writer.place, durable)
                if syncing is None and staged and (not self._queue or len(staged) >= _MOST // 4):
                    batch, staged, octets = staged, [], 0
                    syncing = self._disk.run(self._writer.sync, batch)
                    syncing.addBoth(self._rung)
                if self._queue and len(staged) < _MOST and octets < _MOST_OCTETS:
                    piece = self._piece()
                    octets += sum(len(file.data) for file in piece)
                    staged += await self._stage(piece)
                    self._room.ring()
                elif syncing is not None and not syncing.called:
                    await self._bell.wait()
                elif syncing is None and not staged:
                    if self._ended and not self._queue:
                        return
                    if not self._queue:
                        await self._bell.wait()
        finally:
            if syncing is not None:
                syncing.addErrback(lambda _: None)
            if batch or staged:
                self._disk.run(self._writer.abandon, batch + staged).addErrback(lambda _: None)

    def _stage(self, piece: list[SmallFile]) -> Deferred[Staged]:
        """Writes files down; where nobody waits for that any more, they are removed again, and count for no quota."""
        waiting: Deferred[Staged] = Deferred()

        def written(staged: Any) -> None:
            if not waiting.called:
                waiting.callback(staged)
            elif not isinstance(staged, Failure):
                self._disk.run(self._writer.abandon, staged).addErrback(lambda _: None)

        self._disk.run(self._writer.stage, piece).addBoth(written)
        return waiting

    def _piece(self) -> list[SmallFile]:
        piece: list[SmallFile] = []
        octets = 0
        while self._queue and len(piece) < _PIECE and octets < _PIECE_OCTETS:
            file = self._queue.popleft()
            octets += len(file.data)
            piece.append(file)
        self._octets -= octets
        return piece

    def _rung(self, result: None) -> None:
        self._bell.ring()
        return result
