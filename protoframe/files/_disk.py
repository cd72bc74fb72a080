"""Disk work, away from the reactor: threads for it, and what Python lacks of Linux's calls.

Knows functions that block; not what they do.  Without threads they run at once, which is for simulated time.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.python.failure import Failure

__all__ = ["FULL", "Disk", "keep_memory", "rename_to_new", "start_writeback", "sync_filesystem"]


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T")
C = TypeVar("C", bound=_Closable)

#: The numbers of errors that say that there is no room.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_libc = ctypes.CDLL(None, use_errno=True)
_syncfs = getattr(_libc, "syncfs", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_SYNC_FILE_RANGE_WRITE = 2

_renameat2 = getattr(_libc, "renameat2", None)
if _renameat2 is not None:
    _renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_RENAME_NOREPLACE = 1

_mallopt = getattr(_libc, "mallopt", None)
#: glibc's numbers: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX; and what each is set to.
_MALLOC = {-3: 64 << 20, -1: 128 << 20, -2: 4 << 20, -8: 1}


def keep_memory() -> None:
    """Has the process keep the memory of its blocks, rather than give it back and have it cleared and mapped anew.

    That would take more time than to read, send and verify them.  It is a setting of the whole process, for glibc; what
    is kept is no more than what was in use at once.
    """
    if _mallopt is not None:
        for name, value in _MALLOC.items():
            _mallopt(name, value)


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


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Has the kernel begin to write a part of a file to the disk, so that less is left for ``fsync``."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


class Disk:
    """Threads that do disk work.

    What waits for a thread is bounded by those who ask: each copy has two or three pieces of work there at a time.

    :param reactor: where results are told.
    :param threads: how many; 0 runs everything at once, in the caller's.
    """

    def __init__(self, reactor: Any, threads: int = 4) -> None:
        keep_memory()
        self._reactor = reactor
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pf-files") if threads else None
        # Pieces of work that have not ended.
        self._under_way = 0
        self._closing: Deferred[None] | None = None
        self.threads = threads

    def run(self, function: Callable[..., T], *arguments: Any) -> Deferred[T]:
        """Calls a function in a thread.  Cancelling gives up waiting: what has begun goes on."""
        pool = self._pool
        if pool is None:
            return execute(function, *arguments)
        done: Deferred[T] = Deferred()
        tell = self._reactor.callFromThread
        self._under_way += 1

        def work() -> None:
            result: Any
            try:
                result = function(*arguments)
            except BaseException:
                result = Failure()
            tell(self._fire, done, result)

        pool.submit(work)
        return done

    async def open(self, function: Callable[..., C], *arguments: Any) -> C:
        """As `run`, for what is to be closed; cancelling waits until it is closed again."""
        opened: Deferred[C] = Deferred()
        let_go: Deferred[None] = Deferred()

        def done(result: Any) -> None:
            if not opened.called:
                opened.callback(result)
            elif isinstance(result, Failure):
                let_go.callback(None)
            else:
                self.run(result.close).chainDeferred(let_go)

        self.run(function, *arguments).addBoth(done)
        try:
            return await opened
        except CancelledError:
            await let_go
            raise

    def close(self) -> Deferred[None]:
        """Lets the threads go, when what was begun has ended, and what follows from that; fires then.

        What comes later is done at once, in the caller's thread.
        """
        closing = self._closing = Deferred()
        self._close_if_idle()
        return closing

    def _fire(self, done: Deferred[Any], result: Any) -> None:
        # One that was cancelled takes, and drops, one result more.
        done.callback(result)
        self._under_way -= 1
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._closing is not None and not self._under_way:
            closing, self._closing = self._closing, None
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None
            closing.callback(None)
