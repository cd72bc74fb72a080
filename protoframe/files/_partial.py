"""An unfinished copy at the end that gets it: its data, its journal, and how it comes to its place.

Knows two files in the hidden directory of a tree, by calls that block.  Both receiving ends use it: a server that is
written to, and a client that reads.  What the journal says counts only when it was verified from the disk.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from protoframe.files._blocks import (
    DIGEST_SIZE,
    RECORD,
    BlockMap,
    digest_function,
    journal_attempt,
    journal_block,
    journal_header,
    read_journal,
    runs,
    transfer_key,
    zero_digest,
)
from protoframe.files._contract import BadTransfer, Block, Holes, Same, Sent, Source, Superseded
from protoframe.files._system import OpenWatch, Trail
from protoframe.files._tree import Tree, open_regular, size_at

__all__ = ["Partial", "clean_partials", "unfinished"]

#: Bytes that are read back in one piece of work, at the least if there are so many.
_CHECKED = 8 * 1024 * 1024
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Partial:
    """An unfinished copy, new or gone on with.  Its methods may be called from any thread; one waits for another.

    :param tree: where the copy is to be.
    :param path: at which path.
    :raises Superseded: another process, or another copy of this one, is at it.
    :raises BadTransfer: no file is as the source says.
    :raises DigestUnavailable: this end cannot compute the digest.
    :raises OSError: there is no room, or no such place.
    :ivar blocks: which blocks are there.
    :ivar attempts: how often the copy was begun, this time included.
    :ivar unchecked: bytes that were written and not read back yet.
    """

    def __init__(self, tree: Tree, path: str, source: Source) -> None:
        self._function = digest_function(source.digest)
        try:
            self.blocks = BlockMap(source.size, source.block_size)
        except ValueError as error:
            raise BadTransfer(str(error)) from None
        self.source = source
        self.path = path
        self.key = transfer_key(path, source)
        self.attempts = 1
        self._zero = zero_digest(self._function, source.block_size)
        self._tree = tree
        self._directory = tree.partials()
        self._lock = threading.Lock()
        # Pieces of work that use the descriptors now: they are not closed under them.
        self._users = 0
        self._is_idle = threading.Condition(self._lock)
        self._is_closed = False
        # Runs of blocks that were written and not read back yet.
        self._unchecked: deque[tuple[int, int]] = deque()
        self.unchecked = 0
        self._watch: OpenWatch | None = None
        self._journal = _open_own(self.key + ".journal", self._directory)
        self._data = -1
        try:
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Superseded("this copy is being made already") from None
            self._data = _open_own(self.key + ".part", self._directory)
            self._trail = Trail(self._data)
            with suppress(OSError):
                self._watch = OpenWatch(self._data)
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        size = os.fstat(self._journal).st_size
        octets = os.pread(self._journal, size, 0) if size else b""
        attempts = read_journal(self.key, octets, self.blocks)
        if attempts and os.fstat(self._data).st_size == self.source.size:
            self.attempts = attempts + 1
            # A torn record at the end would put all that follow out of place.
            os.ftruncate(self._journal, size - size % RECORD.size)
        else:
            self.blocks = BlockMap(self.source.size, self.source.block_size)
            os.ftruncate(self._journal, 0)
            os.ftruncate(self._data, 0)
            os.pwrite(self._journal, journal_header(self.key), 0)
        os.lseek(self._journal, 0, os.SEEK_END)
        os.ftruncate(self._data, self.source.size)
        self._note(journal_attempt(self.key, self.attempts))
        if not attempts:
            with suppress(OSError):
                self._seed()

    def _seed(self) -> None:
        """Begins with what is in the place already, if that seems to be the same: a receipt may have got lost."""
        with self._tree.parent(self.path) as (directory, name):
            fd = open_regular(directory, name)
        try:
            status = os.fstat(fd)
            if (status.st_size, status.st_mtime_ns) != (self.source.size, self.source.mtime_ns):
                return
            blocks = self.blocks
            for index in range(blocks.count):
                data = os.pread(fd, blocks.block_size, index * blocks.block_size)
                if len(data) == blocks.length(index):
                    digest = self._function(data)
                    if digest != self._zero:
                        _write_at(self._data, [data], index * blocks.block_size)
                    blocks.add(index, digest)
                    self._note(journal_block(self.key, index, digest))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Lets it go, to be gone on with, when what uses it has ended."""
        with self._lock:
            self._is_closed = True
            while self._users:
                self._is_idle.wait()
            if self._watch is not None:
                self._watch.close()
            for fd in (self._data, self._journal):
                if fd >= 0:
                    os.close(fd)
            self._data = self._journal = -1

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            self._check_open()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._is_idle.notify_all()

    def discard(self) -> None:
        """Removes it."""
        with self._lock:
            self._remove(".part", ".journal")
        self.close()

    def check(self) -> list[int]:
        """Reads back some of what was written, and drops blocks that are not what was noted; which they are.

        It is read while it is in memory, and need not stay there afterwards.
        """
        bad = []
        octets = 0
        size = self.blocks.block_size
        with self._in_use():
            while octets < _CHECKED:
                with self._lock:
                    if not self._unchecked:
                        break
                    first, count = self._unchecked.popleft()
                    self.unchecked -= count * size
                bad += self._wrong(first, count)
                self._trail.add(first * size, count * size)
                octets += count * size
        return self._drop(bad)

    def recheck(self, first: int, count: int) -> None:
        """Reads blocks that are there from the disk, and drops those that are not what was noted."""
        with self._in_use():
            self._drop(self._wrong(first, min(count, self.blocks.count - first)))

    def may_be_changed(self) -> bool:
        """Whether somebody may have changed what was read back already: who has opened the file while it was copied."""
        return self._watch is None or self._watch.happened()

    def _wrong(self, first: int, count: int) -> list[int]:
        """Those of a run of blocks that are noted to be there, and are not what was noted."""
        blocks = self.blocks
        wrong = []
        for index in range(first, first + count):
            if blocks.has(index):
                expected = blocks.digest(index)
                if not self._is_sparse_zero(expected, index):
                    data = os.pread(self._data, blocks.block_size, index * blocks.block_size)
                    if self._function(data) != expected:
                        wrong.append(index)
        return wrong

    def _drop(self, wrong: list[int]) -> list[int]:
        with self._lock:
            for index in wrong:
                self.blocks.drop(index)
        return wrong

    def _is_sparse_zero(self, expected: bytes, index: int) -> bool:
        """Whether a block is, as it should be, within a hole: that is looked at faster than it is read."""
        if expected != self._zero:
            return False
        at = index * self.blocks.block_size
        try:
            return os.lseek(self._data, at, os.SEEK_DATA) >= at + self.blocks.length(index)
        except OSError:
            return True

    def take(self, items: Sequence[Sent]) -> tuple[list[int], int]:
        """Deals with what came: which blocks are wanted again, and how many bytes of blocks these were.

        :raises BadTransfer: this is no part of the file.
        """
        again: list[int] = []
        came = [item for item in items if isinstance(item, Block)]
        for block in came:
            if not 0 <= block.index < self.blocks.count or len(block.data) != self.blocks.length(block.index):
                raise BadTransfer(f"no block {block.index} has {len(block.data)} bytes")
        with self._in_use():
            octets, done = 0, 0
            written = runs(block.index for block in came)
            for _, count in written:
                octets += self._write(came[done : done + count])
                done += count
            with self._lock:
                for item in items:
                    if isinstance(item, Same):
                        again += self._compare(item)
                    elif isinstance(item, Holes):
                        self._take_holes(item)
                    elif not isinstance(item, Block):
                        raise BadTransfer(f"a {type(item).__name__} is no part of a file")
                records = []
                for block in came:
                    # What comes again and again is noted once.
                    if not (self.blocks.has(block.index) and self.blocks.digest(block.index) == block.digest):
                        self.blocks.add(block.index, block.digest)
                        records.append(journal_block(self.key, block.index, block.digest))
                for run in written:
                    self._is_to_be_checked(*run)
                if records:
                    self._note(b"".join(records))
        return again, octets

    def _write(self, run: list[Block]) -> int:
        """Writes blocks down that follow one another; how many bytes that were.

        Whether they came right is seen when they are read from the disk, which is done with every block anyway: one is
        then found wrong wherever that happened, and to compute its digest here too would be to pay twice.
        """
        return _write_at(self._data, [block.data for block in run], run[0].index * self.blocks.block_size)

    def _is_to_be_checked(self, first: int, count: int) -> None:
        # The last block counts as others do: many small pieces of work may not hide behind few bytes.
        self._unchecked.append((first, count))
        self.unchecked += count * self.blocks.block_size

    def _compare(self, same: Same) -> list[int]:
        blocks = self.blocks
        count, rest = divmod(len(same.digests), DIGEST_SIZE)
        if rest or not 0 <= same.first <= blocks.count - count:
            raise BadTransfer("there are no such blocks")
        wrong = []
        for number in range(count):
            index = same.first + number
            digest = same.digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]
            if not blocks.has(index) or blocks.digest(index) != digest:
                blocks.drop(index)
                wrong.append(index)
        return wrong

    def _take_holes(self, holes: Holes) -> None:
        blocks = self.blocks
        end = holes.first + holes.count
        if not (0 <= holes.first < end <= blocks.count):
            raise BadTransfer("there are no such blocks")
        self._clear(holes.first, end)
        blocks.add_run(holes.first, holes.count, self._zero)
        last = blocks.count - 1
        if end - 1 == last and blocks.length(last) != blocks.block_size:
            blocks.add(last, zero_digest(self._function, blocks.length(last)))

    def _clear(self, first: int, end: int) -> None:
        """Writes zeros wherever there is data, of an earlier attempt, or that came wrong; what is a hole stays one."""
        blocks = self.blocks
        size = blocks.block_size
        while first < end:
            try:
                first = os.lseek(self._data, first * size, os.SEEK_DATA) // size
            except OSError:
                # There is nothing but a hole from here on.
                return
            if first < end:
                _write_at(self._data, [bytes(blocks.length(first))], first * size)
                self._is_to_be_checked(first, 1)
                first += 1

    def sync(self) -> None:
        """Makes the data durable, with the times and the mode of the source."""
        with self._in_use():
            os.fchmod(self._data, self.source.mode & 0o777)
            os.utime(self._data, ns=(self.source.mtime_ns, self.source.mtime_ns))
            os.fsync(self._data)

    def root(self) -> bytes:
        """The digest of the whole; all blocks must be there."""
        return self.blocks.root(self._function)

    def commit(self, before: Callable[[int], None] | None = None) -> int:
        """Puts the file, which must be synced and verified, into its place; how many bytes the one before had there.

        :param before: called with that number, when nothing else can go wrong any more but the last step.
        """
        with self._lock, self._tree.parent(self.path) as (fd, name):
            self._check_open()
            replaced = size_at(fd, name) or 0
            if before is not None:
                before(replaced)
            os.rename(self.key + ".part", name, src_dir_fd=self._directory, dst_dir_fd=fd)
            os.fsync(fd)
            self._remove(".journal")
            return replaced

    def _note(self, records: bytes) -> None:
        os.write(self._journal, records)

    def _remove(self, *suffixes: str) -> None:
        for suffix in suffixes:
            with suppress(FileNotFoundError):
                os.unlink(self.key + suffix, dir_fd=self._directory)

    def _check_open(self) -> None:
        if self._is_closed:
            raise Superseded("this copy was begun anew")


def clean_partials(tree: Tree, older_than: float) -> int:
    """Removes unfinished copies that nobody has gone on with for so many seconds; how many files they were."""
    removed = 0
    directory = tree.partials()
    limit = time.time() - older_than
    with os.scandir(directory) as found:
        entries = [(one.name, one.stat(follow_symlinks=False)) for one in found]
    for name, status in entries:
        # Not the time of the last write: that becomes the source's before the file goes to its place.
        if stat.S_ISREG(status.st_mode) and status.st_ctime <= limit:
            with suppress(OSError):
                fd = _open_ours(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, directory)
                try:
                    # One that is being made is locked by its journal; its data is as young as that.
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=directory)
                    removed += 1
                finally:
                    os.close(fd)
    return removed


def unfinished(tree: Tree) -> dict[str, int]:
    """The unfinished copies there are, by their keys, and the bytes of each."""
    with os.scandir(tree.partials()) as found:
        return {
            one.name.removesuffix(".part"): one.stat(follow_symlinks=False).st_size
            for one in found
            if one.name.endswith(".part") and one.is_file(follow_symlinks=False)
        }


def _open_own(name: str, directory: int) -> int:
    fd = _open_ours(name, _OPEN, directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(name)
    return fd


def _open_ours(name: str, flags: int, directory: int) -> int:
    """Opens a file of ours, also one that has the mode of its source already, which may not let us."""
    try:
        return os.open(name, flags, 0o600, dir_fd=directory)
    except PermissionError:
        _make_ours(name, directory)
        return os.open(name, flags, 0o600, dir_fd=directory)


def _make_ours(name: str, directory: int) -> None:
    """Gives the owner of a file all rights to it."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.chmod(f"/proc/self/fd/{fd}", 0o600)
    finally:
        os.close(fd)


def _write_at(fd: int, pieces: Sequence[bytes | memoryview], at: int) -> int:
    octets = sum(map(len, pieces))
    written = os.pwritev(fd, pieces, at)
    if written < octets:
        rest = memoryview(b"".join(pieces))
        while written < octets:
            written += os.pwrite(fd, rest[written:], at + written)
    return octets
