"""What Python lacks of Linux's calls, and what is done where there is no such call.

Knows descriptors and names; nothing of copies.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections import deque
from contextlib import suppress
from typing import Any

__all__ = [
    "FULL",
    "OpenWatch",
    "Trail",
    "keep_memory",
    "raise_open_files",
    "rename_to_new",
    "sync_filesystem",
]

#: The numbers of errors that say that there is no room.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_libc = ctypes.CDLL(None, use_errno=True)
_syncfs = getattr(_libc, "syncfs", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
#: Bytes of a file that stay in memory.
_KEPT = 64 * 1024 * 1024

_inotify_init1 = getattr(_libc, "inotify_init1", None)
_inotify_add_watch = getattr(_libc, "inotify_add_watch", None)
if _inotify_add_watch is not None:
    _inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
_IN_OPEN = 0x20

_renameat2 = getattr(_libc, "renameat2", None)
if _renameat2 is not None:
    _renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_RENAME_NOREPLACE = 1

_mallopt = getattr(_libc, "mallopt", None)
#: glibc's numbers: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX; and what each is set to.
_MALLOC = {-3: 32 << 20, -1: 128 << 20, -2: 4 << 20, -8: 1}


def keep_memory() -> None:
    """Has the process keep the memory of its blocks, rather than give it back and have it cleared and mapped anew.

    That would take more time than to read, send and verify them.  It is a setting of the whole process, for glibc; what
    is kept is no more than what was in use at once.
    """
    if _mallopt is not None:
        for name, value in _MALLOC.items():
            _mallopt(name, value)


def raise_open_files(reactor: Any, most: int = 16384) -> None:
    """Lets a program that is ours open more files than it may by default, if it may have that; for small files.

    :param reactor: nothing is done for one that uses ``select``, which knows no more than 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted and "select" not in type(reactor).__module__:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def sync_filesystem(fd: int) -> bool:
    """Makes everything on a file system durable, in one go; ``False`` where this system cannot.

    :raises OSError: something could not be written.
    """
    if _syncfs is None:
        return False
    if _syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return True


def rename_to_new(name: str, directory: int, to: str, to_directory: int) -> bool:
    """Renames a file where nothing has the new name; ``False`` where something has, or where this system cannot.

    :raises OSError: it is not there, or cannot be renamed.
    """
    if _renameat2 is None:
        return False
    if _renameat2(directory, os.fsencode(name), to_directory, os.fsencode(to), _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EEXIST, errno.EINVAL, errno.ENOSYS}:
        return False
    raise OSError(number, os.strerror(number), to)


class Trail:
    """What a file that is being written leaves in memory: no more than 64 MiB, however large it becomes.

    The kernel is asked to write each part to the disk at once, so that little is left for ``fsync``, and to drop it
    when 64 MiB were written after it.  Then the same memory is used for what comes: to have more given takes longer
    than to copy into it, several times as long on a virtual machine whose host takes free memory back; and what others
    have in the cache stays there.

    :param fd: the file, open as long as this is used.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._parts: deque[tuple[int, int]] = deque()
        self._octets = 0

    def add(self, offset: int, length: int) -> None:
        """A part was written, and need not be in memory any more; waits for the disk, where that is slower.

        :raises OSError: a part before could not be written.
        """
        if _sync_file_range is None:
            return
        _sync_file_range(self._fd, offset, length, _WRITE)
        self._parts.append((offset, length))
        self._octets += length
        while self._octets > _KEPT:
            offset, length = self._parts.popleft()
            self._octets -= length
            if _sync_file_range(self._fd, offset, length, _WAIT_BEFORE | _WRITE | _WAIT_AFTER) != 0:
                number = ctypes.get_errno()
                if number not in {errno.EINVAL, errno.ENOSYS, errno.ESPIPE}:
                    # The next ``fsync`` may say nothing of it.
                    raise OSError(number, os.strerror(number))
            elif hasattr(os, "posix_fadvise"):
                with suppress(OSError):
                    os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)


class OpenWatch:
    """Tells whether somebody else has opened a file, and may have changed it.

    Who had it open before is not seen, nor who is on another machine.

    :param fd: the file.
    :raises OSError: this system cannot tell.
    """

    def __init__(self, fd: int) -> None:
        self._happened = False
        self._fd = -1
        if _inotify_init1 is None or _inotify_add_watch is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._fd = _inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0 or _inotify_add_watch(self._fd, b"/proc/self/fd/%d" % fd, _IN_OPEN) < 0:
            number = ctypes.get_errno()
            self.close()
            raise OSError(number, os.strerror(number))

    def happened(self) -> bool:
        """Whether somebody has, since it is watched."""
        if not self._happened:
            with suppress(BlockingIOError):
                os.read(self._fd, 4096)
                self._happened = True
        return self._happened

    def close(self) -> None:
        """Watches no longer."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
