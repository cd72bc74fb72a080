"""A directory tree that nothing gets out of: each step below the root is from a descriptor, and follows no link.

Knows the file system, by calls that block; not who asks, nor what is permitted.  Whoever swaps a directory for a
symbolic link meanwhile gains nothing: a step either finds a directory itself, or fails.  Only regular files and
directories are ever opened.  Failures are `OSError`, as the system gives them; a name that may not be is `Refused`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from protoframe.files._contract import Entry, Kind
from protoframe.files._names import HIDDEN, is_hidden, is_name, split_path

__all__ = ["Directories", "Refused", "Tree", "entry_of", "open_regular"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
#: How often the hidden directory may be gone again at once.
_TRIES = 100
#: Descriptors of directories that a batch of files holds open.
_MOST_OPENED = 64


class Refused(FileNotFoundError):
    """There is nothing that may be had under this name."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.ENOENT, "no such file or directory", path)


class Tree:
    """A directory and what is below.

    :param root: where it is; links in this path are followed, once.
    :raises OSError: it cannot be opened.
    :ivar fd: its descriptor.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._partials: int | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Lets it go; the hidden directory goes too if nothing is in it, and nobody else uses it."""
        with self._lock:
            if self._partials is not None:
                # Whoever uses it holds a shared lock: another process, or another tree of this one.
                with suppress(OSError):
                    fcntl.flock(self._partials, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if self._is_in_place(self._partials):
                        os.rmdir(HIDDEN, dir_fd=self.fd)
                os.close(self._partials)
                self._partials = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def partials(self) -> int:
        """The descriptor of the hidden directory, which is made if need be: anew too, where somebody has removed it.

        The descriptor stays the same as long as the tree is open.
        """
        with self._lock:
            if self._partials is None:
                self._partials = self._open_partials()
            elif not self._is_in_place(self._partials):
                fd = self._open_partials()
                try:
                    # Whoever holds the number goes on with the new directory.
                    os.dup2(fd, self._partials, inheritable=False)
                finally:
                    os.close(fd)
            return self._partials

    def _open_partials(self) -> int:
        for _ in range(_TRIES):
            with suppress(FileExistsError):
                os.mkdir(HIDDEN, 0o700, dir_fd=self.fd)
            try:
                fd = os.open(HIDDEN, _DIRECTORY, dir_fd=self.fd)
            except FileNotFoundError:
                # Somebody has removed it between the two.
                continue
            # Where there are no such locks nobody gets the exclusive one either, and it stays.
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH)
            # It may have been removed until the lock was there.
            if self._is_in_place(fd):
                return fd
            os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "somebody removes it again and again", HIDDEN)

    def _is_in_place(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(HIDDEN, dir_fd=self.fd, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def directory(self, parts: Sequence[str]) -> int:
        """Opens a directory; the caller closes the descriptor."""
        fd = os.dup(self.fd)
        for part in parts:
            try:
                below = os.open(part, _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    @contextmanager
    def parent(self, path: str) -> Iterator[tuple[int, str]]:
        """The directory that something is in, as a descriptor, and its name there.

        :raises Refused: the path may not come from outside, or is the root.
        """
        parts = split_path(path)
        if not parts:
            raise Refused(path)
        fd = self.directory(parts[:-1])
        try:
            yield fd, parts[-1]
        finally:
            os.close(fd)

    def stat(self, path: str) -> Entry:
        """What is at a path."""
        if not path:
            return _must(path, entry_of(path, os.fstat(self.fd)))
        with self.parent(path) as (fd, name):
            return _must(path, entry_of(path, os.stat(name, dir_fd=fd, follow_symlinks=False)))

    def open_file(self, path: str) -> int:
        """Opens a regular file for reading; the caller closes the descriptor."""
        with self.parent(path) as (fd, name):
            return open_regular(fd, name)

    def names(self, path: str, refused: list[str] | None = None) -> list[Entry]:
        """What is in a directory, by name; without links, devices and names that may not be.

        :param refused: gets the paths of files and directories whose names may not be, as texts that can be written.
        """
        parts = split_path(path)
        if parts is None:
            raise Refused(path)
        prefix = path + "/" if path else ""
        entries = []
        fd = self.directory(parts)
        try:
            with os.scandir(fd) as found:
                for one in found:
                    if not (one.is_file(follow_symlinks=False) or one.is_dir(follow_symlinks=False)):
                        continue
                    if not is_name(one.name):
                        if refused is not None and one.name != HIDDEN:
                            refused.append(prefix + os.fsencode(one.name).decode("utf-8", "backslashreplace"))
                        continue
                    try:
                        status = one.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        # Gone meanwhile; any other failure means that it is there, and must not be left out.
                        continue
                    entry = entry_of(prefix + one.name, status)
                    if entry is not None:
                        entries.append(entry)
        finally:
            os.close(fd)
        entries.sort(key=lambda entry: entry.path)
        if refused:
            refused.sort()
        return entries

    def mkdir(self, path: str, *, parents: bool = False, mode: int = 0o777) -> None:
        """Makes a directory, durably."""
        parts = split_path(path)
        if parts is None or (not parts and not parents):
            raise Refused(path)
        fd = os.dup(self.fd)
        try:
            for number, part in enumerate(parts, 1):
                last = number == len(parts)
                if last or parents:
                    try:
                        os.mkdir(part, mode if last else 0o777, dir_fd=fd)
                    except FileExistsError:
                        if not parents:
                            raise
                    else:
                        os.fsync(fd)
                below = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
        finally:
            os.close(fd)

    def remove(self, path: str) -> Entry:
        """Removes a file, or a directory that is empty; what it was."""
        with self.parent(path) as (fd, name):
            entry = _must(path, entry_of(path, os.stat(name, dir_fd=fd, follow_symlinks=False)))
            if entry.kind is Kind.DIRECTORY:
                os.rmdir(name, dir_fd=fd)
            else:
                os.unlink(name, dir_fd=fd)
            os.fsync(fd)
            return entry

    def rename(self, path: str, to: str) -> int:
        """Renames a file or a directory; how many bytes the file had that it replaced."""
        with self.parent(path) as (fd, name), self.parent(to) as (to_fd, to_name):
            _must(path, entry_of(path, os.stat(name, dir_fd=fd, follow_symlinks=False)))
            replaced = size_at(to_fd, to_name)
            os.rename(name, to_name, src_dir_fd=fd, dst_dir_fd=to_fd)
            os.fsync(to_fd)
            os.fsync(fd)
            return replaced or 0

    def usage(self) -> int:
        """Bytes of all regular files below the root, unfinished ones left out."""
        return self._usage_of(os.dup(self.fd))

    def _usage_of(self, fd: int) -> int:
        total = 0
        try:
            with os.scandir(fd) as found:
                entries = list(found)
            for one in entries:
                # What goes meanwhile takes no room.
                with suppress(OSError):
                    if one.is_file(follow_symlinks=False):
                        total += one.stat(follow_symlinks=False).st_size
                    elif one.is_dir(follow_symlinks=False) and not is_hidden(one.name):
                        total += self._usage_of(os.open(one.name, _DIRECTORY, dir_fd=fd))
        finally:
            os.close(fd)
        return total


class Directories:
    """Descriptors of the directories that a batch of files is in: each is found once.

    They are few at a time: when there are more all are closed, and what was handed out is good no more.

    :param make: whether those that are missing are made; their parents are among ``used`` then.
    :ivar used: the paths of all.
    """

    def __init__(self, tree: Tree, *, make: bool = False) -> None:
        self._tree = tree
        self._make = make
        self._opened: dict[str, int] = {}
        self.used: set[str] = set()

    def has(self, path: str) -> bool:
        """Whether `parent` leaves open what is: what it handed out before."""
        return len(self._opened) < _MOST_OPENED or path.rpartition("/")[0] in self._opened

    def parent(self, path: str) -> tuple[int, str]:
        """The directory that something is in, and its name there.

        :raises Refused: the path may not come from outside.
        """
        directory, _, name = path.rpartition("/")
        fd = self._opened.get(directory)
        parts = split_path(path) if fd is None else split_path(name)
        if not parts:
            raise Refused(path)
        if fd is None:
            if len(self._opened) >= _MOST_OPENED:
                self.close()
            fd = self._open(parts[:-1]) if self._make else self._tree.directory(parts[:-1])
            self._opened[directory] = fd
            self.used.add(directory)
        return fd, name

    def _open(self, parts: list[str]) -> int:
        """A directory, made where it is missing."""
        try:
            return self._tree.directory(parts)
        except FileNotFoundError:
            if not parts:
                raise
        above = "/".join(parts[:-1])
        fd = self._opened.get(above)
        if fd is None:
            fd = self._opened[above] = self._open(parts[:-1])
            self.used.add(above)
        with suppress(FileExistsError):
            os.mkdir(parts[-1], 0o777, dir_fd=fd)
        return os.open(parts[-1], _DIRECTORY, dir_fd=fd)

    def close(self) -> None:
        """Lets them go."""
        for fd in self._opened.values():
            os.close(fd)
        self._opened.clear()


def open_regular(fd: int, name: str) -> int:
    """Opens a regular file in a directory for reading; nothing else is opened, whatever takes its place meanwhile.

    :raises FileNotFoundError: it is something else.
    """
    # To open a device may do something already: it is looked at before as well.
    if not stat.S_ISREG(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
        raise Refused(name)
    opened = os.open(name, _FILE, dir_fd=fd)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise Refused(name)
    return opened


def size_at(fd: int, name: str) -> int | None:
    """Bytes of the regular file that would be replaced; ``None`` where nothing is there.

    :raises FileNotFoundError: something else is there.
    """
    try:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise Refused(name)
    return status.st_size


def entry_of(path: str, status: os.stat_result) -> Entry | None:
    """What something is; ``None`` for what is never shown."""
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return Entry(path, Kind.FILE, status.st_size, status.st_mtime_ns, mode & 0o777)
    if stat.S_ISDIR(mode):
        return Entry(path, Kind.DIRECTORY, 0, status.st_mtime_ns, mode & 0o777)
    return None


def _must(path: str, entry: Entry | None) -> Entry:
    if entry is None:
        raise Refused(path)
    return entry
