"""Trees, in either direction: what is at both ends side by side, and what of it is copied.

Knows two listings in one order, and who copies; a file's copy is `protoframe.files._client`'s, those of small files are
`protoframe.files._batches`'s.  What is held is bounded by the largest directory, not by the tree.
"""

from __future__ import annotations

import enum
import errno
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from msgspec import structs
from twisted.internet.defer import CancelledError, Deferred

from protoframe import Error, Unavailable
from protoframe.files._batches import Batches, in_items, read_ahead
from protoframe.files._contract import (
    BadTransfer,
    CorruptCopy,
    Entry,
    FileTooLarge,
    Kind,
    Missing,
    NoSuchPath,
    Outcome,
    OutOfSpace,
    OverQuota,
    ReadOnly,
    SmallFile,
)
from protoframe.files._copying import Bell
from protoframe.files._disk import Disk, ended, over
from protoframe.files._progress import Action, Change, Meter
from protoframe.files._small import SMALL, BatchWriter
from protoframe.files._tree import Refused, Tree
from protoframe.files._verifying import small_digests

if TYPE_CHECKING:
    from protoframe.files._client import FileClient

__all__ = ["Direction", "TreeCopy"]

#: Small files that are asked for, or taken to be sent, at a time.
_PIECE = 512
#: Entries that wait to be copied, at the most.
_WAITING = 2048
#: Paths that wait for their small file, at the most.
_ASKED = 2048

_REASONS: dict[Outcome, Callable[[], Error]] = {
    Outcome.REFUSED: lambda: NoSuchPath("no such path"),
    Outcome.CORRUPT: lambda: CorruptCopy("what was written is not what was sent"),
    Outcome.TOO_LARGE: lambda: FileTooLarge("a file may not have so many bytes", limit=0),
    Outcome.OVER_QUOTA: lambda: OverQuota("the files there would take too many bytes", left=0),
    Outcome.READ_ONLY: lambda: ReadOnly("nothing can be written there"),
    Outcome.NO_SPACE: lambda: OutOfSpace("the disk is full"),
}


class Direction(enum.Enum):
    """Which end of a tree is made like the other."""

    PUT = "put"
    """The server's."""
    GET = "get"
    """This one."""


class _Queue:
    """Entries that wait for who copies them; who adds waits while there are too many."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._ended = False
        self._bell = Bell()
        self._room = Bell()

    async def add(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._bell.ring()
        while len(self._entries) > _WAITING:
            await self._room.wait()

    def end(self) -> None:
        self._ended = True
        self._bell.ring()

    def fail(self, error: BaseException) -> None:
        self._bell.fail(error)
        self._room.fail(error)

    async def take(self, most: int) -> list[Entry]:
        """So many, or fewer; none when there are no more."""
        while not self._entries and not self._ended:
            await self._bell.wait()
        taken = [self._entries.popleft() for _ in range(min(most, len(self._entries)))]
        self._room.ring()
        return taken


async def walk(
    disk: Disk,
    tree: Tree,
    unreadable: Callable[[str, OSError], None],
    unnamed: Callable[[str], None],
) -> AsyncIterator[Entry]:
    """What is below a tree of this end, in the order of `Files.list`.

    :param unreadable: called with each directory that cannot be read, and why.
    :param unnamed: called with each file or directory that is left out because its name may not be.
    """

    async def names(path: str) -> Iterator[Entry]:
        refused: list[str] = []
        found = await disk.run(tree.names, path, refused)
        for one in refused:
            unnamed(one)
        return iter(found)

    waiting = [await names("")]
    while waiting:
        entry = next(waiting[-1], None)
        if entry is None:
            waiting.pop()
            continue
        yield entry
        if entry.kind is Kind.DIRECTORY:
            try:
                waiting.append(await names(entry.path))
            except Refused as error:
                # It is too deep: nothing in it has a path.
                unreadable(entry.path, error)
            except FileNotFoundError:
                # It is gone meanwhile.
                continue
            except OSError as error:
                unreadable(entry.path, error)


class TreeCopy:
    """One copy of a tree.

    :param client: copies files.
    :param tree: this end.
    :param remote: the path of the other end's.
    :param meter: counts.
    :param by_digest: whether files of one size are compared by their contents.
    :param delete: whether what the source has not is removed.
    :param dry_run: called with each change, instead of that it is made.
    """

    def __init__(
        self,
        client: FileClient,
        tree: Tree,
        remote: str,
        direction: Direction,
        meter: Meter,
        *,
        by_digest: bool,
        delete: bool,
        dry_run: Callable[[Change], None] | None = None,
    ) -> None:
        self._client = client
        self._disk = client.disk
        self._tree = tree
        self._prefix = remote.rstrip("/") + "/" if remote else ""
        self._remote = remote.rstrip("/")
        self._is_put = direction is Direction.PUT
        self._meter = meter
        self._by_digest = by_digest
        self._delete = delete
        self._dry_run = dry_run
        self._unread = False
        self._small = _Queue()
        self._large = _Queue()
        self._compare = _Queue()
        self._compare_small = _Queue()
        self._extra: list[Entry] = []
        self._found_files = 0
        self._found_octets = 0

    async def run(self, *, differing: bool) -> None:
        """Copies everything, or with ``differing`` what differs.

        :raises Error: the tree cannot be listed, or the server is gone.
        """
        if self._is_put and self._remote and self._dry_run is None:
            await self._client.persist(lambda: self._client.mkdir(self._remote, parents=True), self._meter)
        parts = [self._copy_small(), *(self._copy_large() for _ in range(self._client.at_once))]
        if self._by_digest:
            parts += [self._compare_digests() for _ in range(self._client.at_once)]
            parts += [self._compare_small_digests() for _ in range(self._client.at_once)]
        comparing = 2 * self._client.at_once if self._by_digest else 0
        running = [Deferred.fromCoroutine(part) for part in parts]
        listing = Deferred.fromCoroutine(self._list(differing=differing))
        failed: list[BaseException] = []

        def stop(failure: Any) -> None:
            failed.append(failure.value)
            if len(failed) > 1:
                return
            for queue in (self._small, self._large, self._compare, self._compare_small):
                queue.fail(failure.value)
            for one in (*running, listing):
                one.cancel()

        for one in (*running, listing):
            one.addErrback(stop)
        try:
            # That each is over is told apart: one that fails has others end while it still does, and this go on.
            await over(listing)
            self._compare.end()
            self._compare_small.end()
            for one in running[len(running) - comparing :] if comparing else []:
                await over(one)
            self._small.end()
            # A small file that cannot be had as one is copied as a large one.
            await over(running[0])
            self._large.end()
            for one in running:
                await over(one)
        except CancelledError:
            for one in (*running, listing):
                one.cancel()
            raise
        finally:
            # The tree is in use until then.
            await ended(*running, listing)
        if failed:
            raise failed[0]
        await self._remove_extra()

    # What differs.

    async def _list(self, *, differing: bool) -> None:
        self._meter.files_total = self._meter.octets_total = None
        ours = self._ours()
        theirs = self._theirs()
        async with aclosing(cast("Any", ours if self._is_put else theirs)) as sources:
            if not differing:
                async for entry in sources:
                    await self._choose(entry, None)
                self._totals()
                return
            async with aclosing(cast("Any", theirs if self._is_put else ours)) as targets:
                source = await anext(sources, None)
                target = await anext(targets, None)
                while source is not None or target is not None:
                    order = _order(source, target)
                    if source is not None and order <= 0:
                        await self._choose(source, target if order == 0 else None)
                    elif target is not None and self._delete:
                        self._extra.append(target)
                    if order <= 0:
                        source = await anext(sources, None)
                    if order >= 0:
                        target = await anext(targets, None)
        self._totals()

    def _totals(self) -> None:
        self._meter.files_total, self._meter.octets_total = self._found_files, self._found_octets

    async def _choose(self, source: Entry, target: Entry | None) -> None:
        if target is not None and target.kind is not source.kind:
            self._meter.problem(source.path, FileExistsError("the other end has something of another kind here"))
        elif source.kind is Kind.DIRECTORY:
            if target is None:
                await self._make_directory(source.path)
        elif target is not None and target.size == source.size and self._by_digest:
            await (self._compare_small if source.size <= SMALL else self._compare).add(source)
        elif target is not None and (target.size, target.mtime_ns) == (source.size, source.mtime_ns):
            self._meter.skipped += 1
        else:
            await self._copy(source)

    async def _copy(self, entry: Entry) -> None:
        self._found_files += 1
        self._found_octets += entry.size
        if self._dry_run is not None:
            self._dry_run(Change(Action.COPY, entry.path, entry.size))
            self._meter.done(entry.path, entry.size)
            return
        await (self._small if entry.size <= SMALL else self._large).add(entry)

    async def _make_directory(self, path: str) -> None:
        if self._dry_run is not None:
            self._dry_run(Change(Action.MAKE, path, 0))
            return
        try:
            if self._is_put:
                await self._client.persist(lambda: self._client.mkdir(self._prefix + path, parents=True), self._meter)
            else:
                await self._disk.run(lambda: self._tree.mkdir(path, parents=True))
        except Unavailable:
            raise
        except (Error, OSError) as error:
            self._meter.problem(path, error)

    def _ours(self) -> AsyncIterator[Entry]:
        return walk(self._disk, self._tree, partial(self._unreadable, is_source=self._is_put), self._unnamed)

    def _unnamed(self, path: str) -> None:
        # At the end that is made like the other it is left alone.
        if self._is_put:
            self._meter.problem(path, OSError(errno.EILSEQ, "a file of the server may not have this name"))

    def _unreadable(self, path: str, error: OSError, *, is_source: bool) -> None:
        self._meter.problem(path, error)
        self._unread = self._unread or is_source

    async def _theirs(self) -> AsyncIterator[Entry]:
        """The listing of the server, gone on with where it was cut off."""
        last: Entry | None = None

        async def rest() -> AsyncIterator[Entry]:
            nonlocal last
            async with aclosing(cast("Any", self._client.list(self._remote, recursive=True))) as entries:
                async for entry in entries:
                    if last is None or _parts(entry) > _parts(last):
                        yield entry
                        last = entry

        tries = 0
        while True:
            before = last
            try:
                async for found in rest():
                    entry = structs.replace(found, path=found.path[len(self._prefix) :])
                    if not entry.is_readable:
                        error = PermissionError(errno.EACCES, "the server cannot read this directory")
                        self._unreadable(entry.path, error, is_source=not self._is_put)
                    yield entry
            except Error as cut:
                tries = 0 if last is not before else tries + 1
                if tries >= 10 or not self._client.is_cut_off(cut):
                    raise
                await self._client.reconnected(tries + 1)
            else:
                return

    async def _compare_digests(self) -> None:
        while some := await self._compare.take(1):
            (entry,) = some
            try:
                theirs = await self._client.persist(
                    partial(self._client.verify, self._prefix + entry.path), self._meter
                )
                ours = await self._client.digest_of(self._tree, entry.path, theirs.block_size)
            except Unavailable:
                raise
            except (Error, OSError, ValueError) as error:
                self._meter.problem(entry.path, error)
                continue
            if ours.digest == theirs.digest:
                self._meter.skipped += 1
            else:
                await self._copy(entry)

    async def _compare_small_digests(self) -> None:
        digest = self._client.digest
        while some := await self._compare_small.take(_PIECE):
            paths = [entry.path for entry in some]
            there = [self._prefix + path for path in paths]
            ask = partial(self._client.files.verify_many, there, digest)
            theirs = await self._client.persist(ask, self._meter)
            ours = await self._disk.run(small_digests, self._tree, paths, digest)
            if len(theirs) != len(ours):
                raise BadTransfer("the server has digests of more or fewer files than it was asked for")
            for entry, one, other in zip(some, ours, theirs, strict=True):
                if one and one == other:
                    self._meter.skipped += 1
                else:
                    # If there is no digest because there is no file any more, the copy finds out.
                    await self._copy(entry)

    async def _remove_extra(self) -> None:
        if self._unread:
            # What is in a directory that could not be read would be taken for what is not there.
            return
        for entry in reversed(self._extra):
            try:
                if self._dry_run is not None:
                    self._dry_run(Change(Action.REMOVE, entry.path, entry.size))
                elif self._is_put:
                    await self._client.persist(partial(self._client.remove, self._prefix + entry.path), self._meter)
                else:
                    await self._disk.run(self._tree.remove, entry.path)
            except Unavailable:
                raise
            except (Error, OSError) as error:
                self._meter.problem(entry.path, error)
            else:
                self._meter.removed += 1

    # Large files, one by one.

    async def _copy_large(self) -> None:
        while some := await self._large.take(1):
            await self._copy_one(some[0].path)

    async def _copy_one(self, path: str) -> None:
        try:
            if self._is_put:
                await self._client.put_file(self._tree, path, self._prefix + path, self._meter)
            else:
                await self._client.get_file(self._prefix + path, self._tree, path, self._meter)
        except Unavailable:
            raise
        except (Error, OSError) as error:
            self._meter.problem(path, error)

    # Small files, many in one stream.

    async def _copy_small(self) -> None:
        # Those that were taken and have no outcome yet, in order: they are copied again when the stream is cut off.
        waiting: deque[Entry] = deque()
        copied = 0

        def count() -> int:
            return copied

        def done(entry: Entry, outcome: Outcome) -> None:
            nonlocal copied
            copied += 1
            if outcome is Outcome.STORED:
                self._meter.fresh += entry.size
                self._meter.octets += entry.size
                self._meter.done(entry.path, entry.size)
            else:
                self._meter.problem(entry.path, _REASONS[outcome]())

        while True:
            some = await self._small.take(1) if not waiting else []
            waiting.extend(some)
            if not waiting:
                return
            run = self._put_small if self._is_put else self._get_small
            await self._client.persist(partial(run, waiting, done), self._meter, count)

    async def _pieces(self, again: list[Entry], waiting: deque[Entry]) -> AsyncIterator[list[Entry]]:
        """Those that are to be copied again, and then new ones, which are noted as waiting."""
        while again:
            piece, again[:] = again[:_PIECE], again[_PIECE:]
            yield piece
        while piece := await self._small.take(_PIECE):
            waiting.extend(piece)
            yield piece

    async def _put_small(self, waiting: deque[Entry], done: Callable[[Entry, Outcome], None]) -> None:
        singly: list[Entry] = []
        sent: deque[Entry] = deque()
        digest, pace = self._client.digest, self._client.pace

        async def small() -> AsyncIterator[list[SmallFile]]:
            async for piece in self._pieces(list(waiting), waiting):
                entries = iter(piece)
                reading = read_ahead(self._disk, self._tree, [entry.path for entry in piece], digest)
                async with aclosing(cast("Any", reading)) as parts:
                    async for files in parts:
                        found: list[SmallFile] = []
                        for file, entry in zip(files, entries, strict=False):
                            if isinstance(file, Missing):
                                singly.append(entry)
                                waiting.remove(entry)
                                continue
                            sent.append(entry)
                            path = self._prefix + file.path
                            found.append(SmallFile(path, file.mtime_ns, file.mode, file.digest, file.data))
                        for together in in_items(found):
                            octets = sum(len(file.data) for file in together)
                            if pace.is_limited:
                                await pace.take(octets)
                            self._meter.move(octets)
                            yield together

        try:
            async with aclosing(cast("Any", self._client.files.write_many(small(), digest))) as answers:
                async for outcomes in answers:
                    for outcome in outcomes:
                        if not sent:
                            raise BadTransfer("the server answers for more files than were sent")
                        entry = sent.popleft()
                        waiting.remove(entry)
                        done(entry, outcome)
            if sent:
                raise BadTransfer("the server leaves answers out")
        finally:
            for entry in singly:
                await self._large.add(entry)

    async def _get_small(self, waiting: deque[Entry], done: Callable[[Entry, Outcome], None]) -> None:
        digest, pace = self._client.digest, self._client.pace
        writer = await self._disk.open(BatchWriter, self._tree, digest)
        batches = Batches(self._disk, writer)
        asked: deque[Entry] = deque()
        staged: deque[Entry] = deque()
        room = Bell()

        async def paths() -> AsyncIterator[list[str]]:
            async for piece in self._pieces(list(waiting), waiting):
                asked.extend(piece)
                yield [self._prefix + entry.path for entry in piece]
                while len(asked) > _ASKED:
                    await room.wait()

        async def fill() -> None:
            try:
                async with aclosing(cast("Any", self._client.files.read_many(paths(), digest))) as files:
                    async for some in files:
                        own: list[SmallFile] = []
                        for file in some:
                            if not asked or file.path != self._prefix + asked[0].path:
                                raise BadTransfer("the server sends another file than was asked for")
                            entry = asked.popleft()
                            if isinstance(file, Missing):
                                waiting.remove(entry)
                                await self._large.add(entry)
                                continue
                            staged.append(entry)
                            own.append(SmallFile(entry.path, file.mtime_ns, file.mode, file.digest, file.data))
                        room.ring()
                        octets = sum(len(file.data) for file in own)
                        self._meter.move(octets)
                        if pace.is_limited:
                            await pace.take(octets)
                        if (full := batches.feed(own)) is not None:
                            await full
                if asked:
                    raise BadTransfer("the server leaves files out")
            except BaseException as error:
                batches.fail(error)
            else:
                batches.end()

        filling = Deferred.fromCoroutine(fill())
        try:
            async with aclosing(cast("Any", batches.outcomes())) as settled:
                async for outcomes in settled:
                    for outcome in outcomes:
                        entry = staged.popleft()
                        waiting.remove(entry)
                        done(entry, outcome)
        finally:
            room.fail(CancelledError())
            filling.cancel()


def _parts(entry: Entry) -> list[str]:
    return entry.path.split("/")


def _order(source: Entry | None, target: Entry | None) -> int:
    """Which comes first: below 0 the source, above 0 the target, 0 both."""
    if source is None or target is None:
        return -1 if target is None else 1
    one, other = _parts(source), _parts(target)
    return -1 if one < other else 1 if one > other else 0
