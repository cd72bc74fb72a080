"""A disk in memory that loses power: what SQLite wrote and did not sync is kept, torn or lost, as chance has it.

It knows what a file system promises about writes, syncs and names, and keeps a log of all that was asked of it, from
which the disk can be had as any moment's cut may have left it. It does not know what is in the files, nor who writes.

The model, each point the harsher of what real ones do:

- A write is durable after a sync of its file. Until then each of its sectors of 512 octets is or is not on the disk,
  whatever became of earlier and later ones. No octet outside the write's range is harmed ("powersafe overwrite").
- A file may be longer for a write that was lost; what is there then is zeros or garbage.
- A name that was made or removed is durable after a sync of the directory: at the first sync of a journal or a WAL, as
  SQLite's own layer for Unix does it, or a deletion that asks for it. Until then each name is as after any of its
  changes, independently of the others and of what was written. There is one directory.
- A sync that fails has lost the file's writes for good, and the cache does not know: reads still see them, and later
  syncs succeed without them (Linux). Only what is written anew afterwards can become durable.
- A disk without room takes the part of a write that fits.

Not modelled: writes that return errors other than that, sectors that rot, a sync that lies, and memory-mapped files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from random import Random
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import quote

from tests import sqlite_vfs

SECTOR = sqlite_vfs.SECTOR


class Write(NamedTuple):
    """Octets were written to a file."""

    file: int
    offset: int
    data: bytes


class Truncate(NamedTuple):
    """A file was made shorter or longer."""

    file: int
    size: int


class Sync(NamedTuple):
    """A file was synced."""

    file: int


class Lose(NamedTuple):
    """A sync of a file failed.

    :ivar seed: for what of it reached the disk all the same; without one, nothing did.
    """

    file: int
    seed: int | None


class Name(NamedTuple):
    """A path came to stand for a file, or for none."""

    path: str
    file: int | None


class SyncNames(NamedTuple):
    """The directory was synced."""


class Mark(NamedTuple):
    """The test noted something."""

    value: object


Operation = Write | Truncate | Sync | Lose | Name | SyncNames | Mark


class Cut(Enum):
    """What becomes of that which was not synced."""

    #: It is lost.
    NOTHING = "nothing"
    #: It is kept.
    EVERYTHING = "everything"
    #: What came before some moment is kept, and the write of that moment is torn.
    PREFIX = "prefix"
    #: Each operation is kept, torn or lost, by itself.
    SUBSET = "subset"


class Replay:
    """A disk's log, carried out up to some position: what is durable then, and what is pending.

    :ivar position: how many operations were carried out.
    :ivar marks: the values of the marks among them.
    """

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self.position = 0
        self.marks: list[object] = []
        self._durable = {number: bytearray(data) for number, data in enumerate(contents.values())}
        self._names = {path: number for number, path in enumerate(contents)}
        self._pending: dict[int, list[tuple[int, Write | Truncate]]] = {}
        self._renamed: dict[str, list[tuple[int, int | None]]] = {}

    def carry_out(self, operation: Operation) -> None:
        """Goes one operation on."""
        self.position += 1
        if isinstance(operation, Write | Truncate):
            self._pending.setdefault(operation.file, []).append((self.position, operation))
        elif isinstance(operation, Sync):
            pending = self._pending.pop(operation.file, ())
            _settle(self._durable.setdefault(operation.file, bytearray()), pending, _Survivors(Cut.EVERYTHING))
        elif isinstance(operation, Lose):
            pending = self._pending.pop(operation.file, ())
            survivors = _Survivors(Cut.NOTHING)
            if operation.seed is not None:
                survivors = _Survivors(Cut.SUBSET, Random(operation.seed))
            _settle(self._durable.setdefault(operation.file, bytearray()), pending, survivors)
        elif isinstance(operation, Name):
            self._renamed.setdefault(operation.path, []).append((self.position, operation.file))
        elif isinstance(operation, SyncNames):
            for path, changes in self._renamed.items():
                self._rename(self._names, path, changes[-1][1])
            self._renamed.clear()
        else:
            self.marks.append(operation.value)

    def cut(self, random: Random, how: Cut | None = None) -> Disk:
        """The disk as it may be found after a power cut at this position; by default, any kind of cut."""
        if how is None:
            how = random.choice((*Cut, Cut.PREFIX, Cut.SUBSET, Cut.SUBSET, Cut.SUBSET))
        survivors = _Survivors(how, random, self._moments() if how is Cut.PREFIX else ())
        names = dict(self._names)
        for path, changes in self._renamed.items():
            kept = [file for position, file in changes if survivors.precedes(position)]
            if how is Cut.SUBSET:
                kept = kept[: random.randint(0, len(kept))]
            if kept:
                self._rename(names, path, kept[-1])
        contents = {}
        for path, number in names.items():
            content = self._durable.get(number, bytearray()).copy()
            _settle(content, self._pending.get(number, ()), survivors)
            contents[path] = bytes(content)
        return Disk(contents)

    def _moments(self) -> list[int]:
        pending = [position for operations in self._pending.values() for position, _ in operations]
        return pending + [position for changes in self._renamed.values() for position, _ in changes]

    @staticmethod
    def _rename(names: dict[str, int], path: str, file: int | None) -> None:
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file


class _Survivors:
    """Which of the pending operations reached the disk."""

    def __init__(self, how: Cut, random: Random | None = None, moments: list[int] | tuple[()] = ()) -> None:
        self.how = how
        self.random = random = random or Random(0)
        # Most kept or most lost is as telling as half of each.
        self._kept = random.choice((0.05, 0.5, 0.95))
        self._torn = random.choice((0.0, 0.3, 1.0))
        self._last = {Cut.NOTHING: 0.0, Cut.PREFIX: random.choice(moments) if moments else 0}.get(how, float("inf"))
        self._garbage = random.random() < 0.5

    def precedes(self, position: int) -> bool:
        """Whether an operation was early enough to be kept."""
        return position <= self._last

    def kept(self, position: int) -> bool:
        """Whether an operation is kept."""
        return position <= self._last and (self.how is not Cut.SUBSET or self.random.random() < self._kept)

    def torn(self, position: int) -> bool:
        """Whether a write that is kept is so in part."""
        if self.how is Cut.SUBSET:
            return self.random.random() < self._torn
        return position == self._last

    def longer(self) -> bool:
        """Whether a file has grown by a write that is lost in part or whole."""
        return self.how is Cut.SUBSET and self.random.random() < 0.3

    def filling(self, size: int) -> bytes:
        """What is in the part of a file that was never written."""
        return self.random.randbytes(size) if self._garbage else bytes(size)


def _settle(content: bytearray, pending: list[tuple[int, Write | Truncate]] | tuple[()], survivors: _Survivors) -> None:
    """Does to a file's durable content what survives of the operations.

    They keep their order, which loses no case: where a later one is lost, the earlier one shows.
    """
    for position, operation in pending:
        if isinstance(operation, Truncate):
            if survivors.kept(position):
                _resize(content, operation.size)
            continue
        offset, data = operation.offset, operation.data
        end = offset + len(data)
        kept = survivors.kept(position)
        if kept and not survivors.torn(position):
            _put(content, offset, data)
            continue
        if end > len(content) and survivors.longer():
            content += survivors.filling(end - len(content))
        if kept:
            first = offset // SECTOR
            sectors = survivors.random.getrandbits((end - 1) // SECTOR - first + 1)
            for sector in range(first, first + sectors.bit_length()):
                if sectors >> (sector - first) & 1:
                    start = max(offset, sector * SECTOR)
                    _put(content, start, data[start - offset : (sector + 1) * SECTOR - offset])


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content += bytes(offset - len(content))
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content += bytes(size - len(content))


class _Pages:
    """A file as its readers see it, whatever is on the disk."""

    __slots__ = ("content", "handles", "number")

    def __init__(self, number: int | None, content: bytearray) -> None:
        #: None for a nameless file, which no power cut leaves.
        self.number = number
        self.content = content
        self.handles = 0


class Disk:
    """The files that SQLite has through this disk's VFS; and as a context manager, `close` at the end.

    A disk is not told apart by paths: each has a VFS of its own, and any path can be used on it.

    :param contents: files that are there, durably.
    :ivar log: all that was asked of it, with the test's marks. A position is a number of operations from the start.
    :ivar capacity: octets there is room for, or None for no bound.
    :ivar reserved: octets of it that something else takes.
    :ivar ballast: the path of a real file whose length counts as taken too, as it is at each moment.
    :ivar syncs: how many syncs of files were asked for, those that failed too.
    """

    def __init__(self, contents: Mapping[str, bytes] | None = None) -> None:
        self._contents = contents = dict(contents or {})
        self._pages = {path: _Pages(number, bytearray(data)) for number, (path, data) in enumerate(contents.items())}
        self._opened: list[_Pages] = []
        self._numbers = len(contents)
        self._replay: Replay | None = None
        self._vfs: str | None = None
        self._failing: tuple[int, float, Random | None] | None = None
        self.log: list[Operation] = []
        self.capacity: int | None = None
        self.reserved = 0
        self.ballast: str | None = None
        self.syncs = 0

    @property
    def vfs(self) -> str:
        """The name of its VFS.

        :raises OSError: there can be none here, see `sqlite_vfs.why_not`.
        """
        if self._vfs is None:
            self._vfs = sqlite_vfs.attach(self)
        return self._vfs

    def uri(self, path: str) -> str:
        """What to give to `sqlite3.connect`, with ``uri=True``."""
        return f"file:{quote(path)}?vfs={self.vfs}"

    def close(self) -> None:
        """Ends its use.

        :raises BaseExceptionGroup: something went wrong inside a callback.
        """
        if self._vfs is not None:
            sqlite_vfs.detach(self._vfs, idle=not self._opened)
            self._vfs = None
        sqlite_vfs.raise_mistakes()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def mark(self, value: object) -> None:
        """Notes in the log that something is so from now on, such as that a receipt was given."""
        self.log.append(Mark(value))

    @property
    def marks(self) -> list[object]:
        """The values of all marks."""
        return [operation.value for operation in self.log if isinstance(operation, Mark)]

    @property
    def used(self) -> int:
        """The octets that are taken, `reserved` and `ballast` among them."""
        pages = {id(pages): pages for pages in (*self._pages.values(), *self._opened)}
        taken = self.reserved + sum(len(one.content) for one in pages.values())
        if self.ballast is not None:
            with suppress(FileNotFoundError):
                taken += os.stat(self.ballast).st_size
        return taken

    def fail_sync(self, after: int = 0, times: float = float("inf"), random: Random | None = None) -> None:
        """Lets syncs fail, and lose what they were to make durable.

        :param after: how many succeed before.
        :param times: how many fail; then all is well again, except for what was lost.
        :param random: what of it gets to the disk in spite of the failure; by default, nothing.
        """
        self._failing = (after, times, random)

    def heal(self) -> None:
        """Lets syncs succeed again."""
        self._failing = None

    def write_anew(self, path: str) -> None:
        """Writes what is read of a file to it once more and syncs it, if it is there: so what a sync lost is durable.

        :raises OSError: this sync failed.
        """
        if path in self._pages:
            handle = self.open(path, create=False, journal=False)
            try:
                handle.write(handle.read(handle.size(), 0), 0)
                handle.sync()
            finally:
                handle.close()

    def replay(self, upto: int | None = None) -> Replay:
        """The log, carried out up to a position; by default, to its end.

        Going forward costs what lies between. The `Replay` is the disk's own, and the next call moves it.
        """
        upto = len(self.log) if upto is None else upto
        replay = self._replay
        if replay is None or upto < replay.position:
            replay = self._replay = Replay(self._contents)
        for operation in self.log[replay.position : upto]:
            replay.carry_out(operation)
        return replay

    def cut(self, random: Random, how: Cut | None = None) -> Disk:
        """The disk as it may be found if power is cut now."""
        return self.replay().cut(random, how)

    def cuts(self, count: int, random: Random, how: Cut | None = None) -> Iterator[tuple[int, list[object], Disk]]:
        """Cuts at positions all over the log: each position, the marks up to it, and the disk as it may be found."""
        for position in sorted(random.choices(range(len(self.log) + 1), k=count)):
            replay = self.replay(position)
            with replay.cut(random, how) as disk:
                yield position, replay.marks.copy(), disk

    # What `sqlite_vfs.Storage` asks for.

    def open(self, path: str | None, *, create: bool, journal: bool) -> Handle:
        """Opens a file."""
        if path is None:
            pages = _Pages(None, bytearray())
        elif path in self._pages:
            pages = self._pages[path]
        elif create:
            pages = self._pages[path] = _Pages(self._numbers, bytearray())
            self.log.append(Name(path, self._numbers))
            self._numbers += 1
        else:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        self._opened.append(pages)
        return Handle(self, pages, journal=journal)

    def delete(self, path: str, *, sync: bool) -> None:
        """Removes a name; those who have the file open keep it."""
        if path not in self._pages:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        del self._pages[path]
        self.log.append(Name(path, None))
        if sync:
            self.log.append(SyncNames())

    def exists(self, path: str) -> bool:
        """Whether there is a file of that name."""
        return path in self._pages

    # What a handle asks for.

    def room(self, growth: int) -> int:
        """How much of a growth there is room for."""
        return growth if self.capacity is None else max(0, min(growth, self.capacity - self.used))

    def sync_fails(self) -> bool:
        """Whether the sync that is asked for now is to fail, with what `lost` says."""
        self.syncs += 1
        if self._failing is None:
            return False
        after, times, random = self._failing
        self._failing = (after - 1, times, random) if after else (0, times - 1, random)
        if not after and times < 1:
            self._failing = None
        return not after and times >= 1

    def lost(self, file: int) -> Lose:
        """The entry in the log for a sync that failed."""
        random = self._failing[2] if self._failing else None
        return Lose(file, random.getrandbits(32) if random else None)

    def closed(self, pages: _Pages) -> None:
        """A handle is gone."""
        self._opened.remove(pages)


class Handle:
    """An open file of a `Disk`."""

    __slots__ = ("_disk", "_journal", "_log", "_pages")

    def __init__(self, disk: Disk, pages: _Pages, *, journal: bool) -> None:
        self._disk = disk
        self._log = disk.log
        self._pages = pages
        self._journal = journal

    def read(self, size: int, offset: int) -> bytes:
        """What is there, synced or not."""
        return bytes(self._pages.content[offset : offset + size])

    def write(self, data: bytes, offset: int) -> None:
        """Writes; with ``ENOSPC`` the part for which there is room."""
        pages = self._pages
        growth = offset + len(data) - len(pages.content)
        short = growth - self._disk.room(growth) if growth > 0 else 0
        if short:
            data = data[: max(0, len(data) - short)]
        if data:
            _put(pages.content, offset, data)
            if pages.number is not None:
                self._log.append(Write(pages.number, offset, data))
        if short:
            raise OSError(errno.ENOSPC, "no space left on the disk")

    def truncate(self, size: int) -> None:
        """Makes the file `size` octets long."""
        growth = size - len(self._pages.content)
        if growth > 0 and self._disk.room(growth) < growth:
            raise OSError(errno.ENOSPC, "no space left on the disk")
        _resize(self._pages.content, size)
        if self._pages.number is not None:
            self._log.append(Truncate(self._pages.number, size))

    def sync(self) -> None:
        """Makes what was written durable, and the names too at the first sync of a journal."""
        number = self._pages.number
        if number is None:
            return
        if self._disk.sync_fails():
            self._log.append(self._disk.lost(number))
            raise OSError(errno.EIO, "the sync failed, and what was written is lost")
        self._log.append(Sync(number))
        if self._journal:
            self._journal = False
            self._log.append(SyncNames())

    def size(self) -> int:
        """The length in octets."""
        return len(self._pages.content)

    def close(self) -> None:
        """Ends the use of this handle."""
        self._disk.closed(self._pages)
