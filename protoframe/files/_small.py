"""Small files, many at a time: read whole, and written so that a whole batch becomes durable in one go.

Knows a tree, by calls that block.  Each file is written under a name in the hidden directory and read back from there;
then the file system is synced once, each is renamed to its place, and each directory is synced once.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress

from protoframe.files._blocks import digest_function
from protoframe.files._contract import Digest, Missing, Outcome, SmallFile
from protoframe.files._system import FULL, rename_to_new, sync_filesystem
from protoframe.files._tree import Directories, Tree, open_regular, size_at

__all__ = ["SMALL", "BatchWriter", "read_small"]

#: Bytes that a small file has at most.
SMALL = 64 * 1024

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_numbers = itertools.count()

Judge = Callable[[SmallFile], Outcome | None]
Staged = list[tuple[SmallFile, str | Outcome]]


def read_small(tree: Tree, paths: Iterable[str], digest: Digest) -> list[SmallFile | Missing]:
    """Small files, each as it was at one moment."""
    function = digest_function(digest)
    found: list[SmallFile | Missing] = []
    directories = Directories(tree)
    try:
        for path in paths:
            found.append(_read(directories, path, function) or Missing(path))
    finally:
        directories.close()
    return found


def _read(directories: Directories, path: str, function: Callable[[bytes], bytes]) -> SmallFile | None:
    try:
        fd = open_regular(*directories.parent(path))
    except OSError:
        return None
    try:
        before = os.fstat(fd)
        if before.st_size > SMALL:
            return None
        data = os.read(fd, SMALL + 1)
        after = os.fstat(fd)
    except OSError:
        return None
    finally:
        os.close(fd)
    if len(data) != before.st_size or (before.st_mtime_ns, before.st_ctime_ns, before.st_size) != (
        after.st_mtime_ns,
        after.st_ctime_ns,
        after.st_size,
    ):
        return None
    return SmallFile(path, before.st_mtime_ns, stat.S_IMODE(before.st_mode) & 0o777, function(data), data)


class BatchWriter:
    """Writes small files, a batch at a time.  `sync` may run while other files are staged or put in their places.

    :param tree: where they are to be.
    :param digest: how they are verified.
    :param judge: called with each file before it is written; an outcome refuses it.
    :param replaced: called with the bytes of each file that gives way, or is refused after it was judged.
    :raises DigestUnavailable: this end cannot compute the digest.
    """

    def __init__(
        self,
        tree: Tree,
        digest: Digest,
        judge: Judge | None = None,
        replaced: Callable[[int], None] | None = None,
    ) -> None:
        self._tree = tree
        self._function = digest_function(digest)
        self._judge = judge
        self._replaced = replaced
        self._directory = tree.partials()
        self._prefix = f"s{os.urandom(6).hex()}-"
        # Those of which the process's mask takes nothing away.
        self._kept_modes: set[int] = set()

    def stage(self, files: Iterable[SmallFile]) -> Staged:
        """Writes files down, and verifies them, under other names than theirs.

        :raises OSError: there is no directory for that.
        """
        # It is made anew if somebody has removed it since the last ones.
        self._directory = self._tree.partials()
        return [(file, self._write(file)) for file in files]

    def _write(self, file: SmallFile) -> str | Outcome:
        size = len(file.data)
        if size > SMALL:
            return Outcome.TOO_LARGE
        if self._function(file.data) != file.digest:
            return Outcome.CORRUPT
        if self._judge is not None:
            verdict = self._judge(file)
            if verdict is not None:
                return verdict
        name = f"{self._prefix}{next(_numbers):x}"
        try:
            mode = file.mode & 0o777
            fd = os.open(name, _NEW, mode, dir_fd=self._directory)
            try:
                if mode not in self._kept_modes:
                    if os.fstat(fd).st_mode & 0o777 == mode:
                        self._kept_modes.add(mode)
                    else:
                        os.fchmod(fd, mode)
                whole = os.write(fd, file.data) == size
                if whole and self._function(os.pread(fd, size + 1, 0)) == file.digest:
                    os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
                    return name
            finally:
                os.close(fd)
        except (OSError, OverflowError) as error:
            self._drop(name, size)
            # Not everything that fails is a full disk: for any other reason it cannot be written there.
            return Outcome.NO_SPACE if isinstance(error, OSError) and error.errno in FULL else Outcome.REFUSED
        self._drop(name, size)
        return Outcome.CORRUPT if whole else Outcome.NO_SPACE

    def place(self, staged: Staged) -> list[Outcome]:
        """Puts files, which must be durable, into their places, durably; what became of each.

        Of two with one name the last is to stay: batches are placed one after another.

        :raises OSError: not all places are known to be durable.
        """
        outcomes: list[Outcome] = []
        directories = Directories(self._tree, make=True)
        try:
            for file, name in staged:
                outcomes.append(self._place(directories, file, name) if isinstance(name, str) else name)
            for fd in directories.opened.values():
                os.fsync(fd)
        finally:
            directories.close()
            if len(outcomes) < len(staged):
                self.abandon(staged[len(outcomes) :])
        return outcomes

    def abandon(self, staged: Staged) -> None:
        """Removes what was written down."""
        for file, name in staged:
            if isinstance(name, str):
                self._drop(name, len(file.data))

    def sync(self, staged: Staged) -> None:
        """Makes files durable, under the names that they have.

        :raises OSError: nothing is known to be durable.
        """
        names = [name for _, name in staged if isinstance(name, str)]
        if len(names) > 4 and sync_filesystem(self._tree.fd):
            return
        for name in names:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _place(self, directories: Directories, file: SmallFile, name: str) -> Outcome:
        try:
            fd, last = directories.parent(file.path)
            if rename_to_new(name, self._directory, last, fd):
                return Outcome.STORED
            before = size_at(fd, last)
            os.rename(name, last, src_dir_fd=self._directory, dst_dir_fd=fd)
        except OSError:
            self._drop(name, len(file.data))
            return Outcome.REFUSED
        if before and self._replaced is not None:
            self._replaced(before)
        return Outcome.STORED

    def _drop(self, name: str, size: int) -> None:
        with suppress(OSError):
            os.unlink(name, dir_fd=self._directory)
        if self._replaced is not None:
            self._replaced(size)
