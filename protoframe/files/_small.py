"""Small files, many at a time: read whole, and written so that a whole batch becomes durable in one go.

Knows a tree, by calls that block.  Each file is written without a name, or under one in the hidden directory where that
cannot be, and read back from there; then the file system is synced once, and each gets its name.  Where
`protoframe.files._native` was built it makes the calls for many files at once; what is done is the same.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from protoframe.files._blocks import digest_function
from protoframe.files._contract import Digest, Missing, Outcome, SmallFile
from protoframe.files._names import split_path
from protoframe.files._system import FULL, rename_to_new, sync_filesystem
from protoframe.files._tree import Directories, Tree, open_regular, size_at

try:
    from protoframe.files import _native
except ImportError:
    _native = None  # type: ignore[assignment]

__all__ = ["SMALL", "BatchWriter", "read_small"]

#: Bytes that a small file has at most.
SMALL = 64 * 1024

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: 0 where this system has no files without a name.
_UNNAMED = getattr(os, "O_TMPFILE", 0) and os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
#: That a file system has none, or an older kernel.
_NO_UNNAMED = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT})
#: That there is no such directory any more, or something else in its place.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
#: That no more may be open.
_NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})
#: In place of a descriptor, until there is one.
_AT_ONCE = -1
_numbers = itertools.count()

#: Files and directories of which each is synced by itself; more are synced with the whole file system.
_FEW = 8

Judge = Callable[[SmallFile], Outcome | None]
#: The path of a file and its bytes, and by which descriptor or under which name it is; or why it is refused.
Staged = list[tuple[str, int, int | str | Outcome]]


class _Descriptors:
    """How many files without a name the process may hold open: half of what it may open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = 0

    def take(self, count: int) -> int:
        """So many, or as many as there are."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        with self._lock:
            given = count if most == resource.RLIM_INFINITY else max(0, min(count, most // 2 - self._held))
            self._held += given
            return given

    def give_back(self, count: int) -> None:
        """So many are closed, or were not needed."""
        with self._lock:
            self._held -= count


_descriptors = _Descriptors()


def read_small(tree: Tree, paths: Sequence[str], digest: Digest) -> list[SmallFile | Missing]:
    """Small files, each as it was at one moment."""
    function = digest_function(digest)
    directories = Directories(tree)
    try:
        if _native is None:
            return [_read(directories, path, function) or Missing(path) for path in paths]
        return _read_at_once(directories, paths, function)
    finally:
        directories.close()


def _read_at_once(
    directories: Directories, paths: Sequence[str], function: Callable[[bytes], bytes]
) -> list[SmallFile | Missing]:
    found: list[SmallFile | Missing] = []
    group: list[tuple[int, bytes]] = []

    def read() -> None:
        for path, one in zip(
            paths[len(found) : len(found) + len(group)], _native.read_files(group, SMALL), strict=True
        ):
            if one is None:
                found.append(Missing(path))
            else:
                seconds, nanoseconds, mode, data = one
                found.append(SmallFile(path, seconds * 10**9 + nanoseconds, mode, function(data), data))
        group.clear()

    for path in paths:
        if not directories.has(path):
            read()
        # No directory has this number.
        directory, name = -1, "."
        with suppress(OSError):
            directory, name = directories.parent(path)
        group.append((directory, name.encode()))
    read()
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


def _count(staged: Staged) -> int:
    """How many descriptors are held."""
    return sum(type(held) is int and held >= 0 for _, _, held in staged)


class BatchWriter:
    """Writes small files, a batch at a time.

    `stage` may run in several threads, and while other files are synced, and others placed.

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
        # A file without a name gets one by way of its descriptor's.
        self._may_be_unnamed = bool(_UNNAMED) and os.path.exists("/proc/self/fd")
        # Where files were placed that are not known to be durable there.
        self._lock = threading.Lock()
        self._placed_in: set[str] = set()
        # Of its own: what could not be written is told once by each, and not to somebody else.
        self._file_system = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree.fd)

    def close(self) -> None:
        """Lets the tree go; nothing is written any more, and what is staged was placed or abandoned."""
        if self._file_system >= 0:
            os.close(self._file_system)
            self._file_system = -1

    def stage(self, files: Sequence[SmallFile]) -> Staged:
        """Writes files down, and verifies them, without the names that they are to have.

        :raises OSError: there is no directory for that.
        """
        # It is made anew if somebody has removed it since the last ones.
        self._directory = self._tree.partials()
        staged: Staged = []
        spare = _descriptors.take(len(files)) if self._may_be_unnamed else 0
        try:
            self._stage(files, staged, spare)
        except BaseException:
            spare -= _count(staged)
            self.abandon([one for one in staged if one[2] != _AT_ONCE])
            _descriptors.give_back(spare)
            raise
        _descriptors.give_back(spare - _count(staged))
        return staged

    def _stage(self, files: Sequence[SmallFile], staged: Staged, spare: int) -> None:
        """Writes files down, so many of them without a name at most."""
        function, judge = self._function, self._judge
        at_once: list[tuple[int, int, bytes]] = []
        for file in files:
            held: int | str | Outcome
            size = len(file.data)
            if size > SMALL:
                held = Outcome.TOO_LARGE
            elif function(file.data) != file.digest:
                held = Outcome.CORRUPT
            elif judge is not None and (verdict := judge(file)) is not None:
                held = verdict
            elif _native is not None and spare > 0 and 0 <= file.mtime_ns < 1 << 63:
                held = _AT_ONCE
                spare -= 1
                at_once.append((file.mode & 0o777, file.mtime_ns, file.data))
            else:
                held = self._write(file, spare > 0)
                spare -= type(held) is int
            staged.append((file.path, size, held))
        if at_once:
            self._write_at_once(files, staged, at_once)

    def _write_at_once(self, files: Sequence[SmallFile], staged: Staged, at_once: list[tuple[int, int, bytes]]) -> None:
        results = iter(_native.write_files(self._directory, at_once))
        for number, (path, size, held) in enumerate(staged):
            if held == _AT_ONCE:
                result = next(results)
                staged[number] = (path, size, result if result >= 0 else self._not_written(files[number], -result))

    def _not_written(self, file: SmallFile, error: int) -> str | int | Outcome:
        if error == -_native.DIFFERS:
            outcome = Outcome.CORRUPT
        elif error in FULL:
            outcome = Outcome.NO_SPACE
        elif error in _NO_UNNAMED or error in _NO_DESCRIPTOR:
            # Under a name, then.
            self._may_be_unnamed = self._may_be_unnamed and error not in _NO_UNNAMED
            return self._write(file, unnamed=False)
        else:
            outcome = Outcome.REFUSED
        self._drop(None, len(file.data))
        return outcome

    def _write(self, file: SmallFile, unnamed: bool) -> int | str | Outcome:
        data = file.data
        size = len(data)
        mode = file.mode & 0o777
        name = ""
        fd = -1
        try:
            if unnamed and self._may_be_unnamed:
                fd = self._open_unnamed(mode)
            if fd < 0:
                name = f"{self._prefix}{next(_numbers):x}"
                fd = os.open(name, _NEW, mode, dir_fd=self._directory)
            if mode not in self._kept_modes:
                self._set_mode(fd, mode)
            outcome = Outcome.CORRUPT
            if os.write(fd, data) != size:
                outcome = Outcome.NO_SPACE
            # The digest of what came is verified: what is read back has the same where it is the same.
            elif os.pread(fd, size + 1, 0) == data:
                os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
                if not name:
                    return fd
                os.close(fd)
                return name
        except (OSError, OverflowError) as error:
            # Not everything that fails is a full disk: for any other reason it cannot be written there.
            outcome = Outcome.NO_SPACE if isinstance(error, OSError) and error.errno in FULL else Outcome.REFUSED
        if fd >= 0:
            os.close(fd)
        self._drop(name or None, size)
        return outcome

    def _open_unnamed(self, mode: int) -> int:
        """A new file without a name; -1 where there is to be one."""
        try:
            return os.open(".", _UNNAMED, mode, dir_fd=self._directory)
        except OSError as error:
            if error.errno in _NO_UNNAMED:
                self._may_be_unnamed = False
            elif error.errno not in _NO_DESCRIPTOR:
                raise
            return -1

    def _set_mode(self, fd: int, mode: int) -> None:
        if os.fstat(fd).st_mode & 0o777 == mode:
            self._kept_modes.add(mode)
        else:
            os.fchmod(fd, mode)

    def sync(self, staged: Staged) -> None:
        """Makes files durable, and the names of those that were placed before.

        :raises OSError: nothing is known to be durable.
        """
        held = [one for _, _, one in staged if not isinstance(one, Outcome)]
        with self._lock:
            directories, self._placed_in = self._placed_in, set()
        is_much = len(held) + len(directories) > _FEW or any(isinstance(one, str) for one in held)
        if is_much and sync_filesystem(self._file_system):
            return
        for one in held:
            self._sync_one(one)
        for directory in directories:
            self._sync_directory(directory)

    def _sync_one(self, held: int | str) -> None:
        if isinstance(held, int):
            os.fsync(held)
            return
        fd = os.open(held, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _sync_directory(self, path: str) -> None:
        try:
            fd = self._tree.directory(split_path(path) or ())
        except OSError as error:
            if error.errno in _GONE:
                # What was in it has been moved or removed since.
                return
            raise
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def place(self, staged: Staged) -> list[Outcome]:
        """Puts files, which must be durable, into their places; what became of each.  The next `sync` makes it durable.

        Of two with one name the last is to stay: batches are placed one after another.

        :param staged: has what became of them in their place afterwards.
        :raises OSError: no more files may be open; what is not in its place is gone.
        """
        directories = Directories(self._tree, make=True)
        descriptors = _count(staged)
        try:
            group: list[tuple[int, int, bytes]] = []
            numbers: dict[str, int] = {}
            for number, (path, _, held) in enumerate(staged):
                if isinstance(held, Outcome):
                    continue
                if path in numbers or not directories.has(path) or _native is None or isinstance(held, str):
                    self._place_group(directories, staged, group, numbers)
                if _native is None or isinstance(held, str):
                    self._settle(directories, staged, number)
                    continue
                # No directory has this number.
                directory, name = -1, "."
                with suppress(OSError):
                    directory, name = directories.parent(path)
                group.append((held, directory, name.encode()))
                numbers[path] = number
            self._place_group(directories, staged, group, numbers)
        finally:
            with self._lock:
                self._placed_in |= directories.used
            directories.close()
            _descriptors.give_back(descriptors - _count(staged))
            self.abandon(staged)
        return [held for _, _, held in staged if isinstance(held, Outcome)]

    def _place_group(
        self, directories: Directories, staged: Staged, group: list[tuple[int, int, bytes]], numbers: dict[str, int]
    ) -> None:
        """Names files of different paths, which have no names yet, in one call."""
        if not group:
            return
        again: list[int] = []
        for number, result in zip(numbers.values(), _native.name_files(group), strict=True):
            if result:
                again.append(number)
            else:
                staged[number] = (*staged[number][:2], Outcome.STORED)
        group.clear()
        numbers.clear()
        for number in again:
            # Whatever is in the way, it is tried anew, and replaced or given up.
            self._settle(directories, staged, number)

    def _settle(self, directories: Directories, staged: Staged, number: int) -> None:
        path, size, held = staged[number]
        if not isinstance(held, Outcome):
            # Whatever is raised, nobody else is to deal with it.
            staged[number] = (path, size, Outcome.REFUSED)
            staged[number] = (path, size, self._place(directories, path, size, held))

    def abandon(self, staged: Staged) -> None:
        """Removes what was written down."""
        for _, size, held in staged:
            if type(held) is int:
                os.close(held)
                _descriptors.give_back(1)
            if not isinstance(held, Outcome):
                self._drop(held, size)

    def _place(self, directories: Directories, path: str, size: int, held: int | str) -> Outcome:
        name: int | str = held
        try:
            fd, last = directories.parent(path)
            if isinstance(held, int):
                try:
                    self._name(held, last, fd)
                except FileExistsError:
                    # A name that is taken is only given anew by renaming.
                    name = f"{self._prefix}{next(_numbers):x}"
                    self._name(held, name, self._directory)
                else:
                    return Outcome.STORED
            elif rename_to_new(held, self._directory, last, fd):
                return Outcome.STORED
            before = size_at(fd, last)
            os.rename(str(name), last, src_dir_fd=self._directory, dst_dir_fd=fd)
        except OSError as error:
            self._drop(name, size)
            if error.errno in _NO_DESCRIPTOR:
                raise
            return Outcome.REFUSED
        finally:
            if isinstance(held, int):
                os.close(held)
        if before and self._replaced is not None:
            self._replaced(before)
        return Outcome.STORED

    @staticmethod
    def _name(fd: int, name: str, directory: int) -> None:
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)

    def _drop(self, held: int | str | None, size: int) -> None:
        if isinstance(held, str):
            with suppress(OSError):
                os.unlink(held, dir_fd=self._directory)
        if self._replaced is not None:
            self._replaced(size)
