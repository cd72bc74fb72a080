"""A file layer for SQLite in Python: registers VFSes, by ctypes, in the very library that `sqlite3` uses.

It knows SQLite's C structures and result codes, and hands each call to a `Storage`, which speaks of files and raises
`OSError`. It does not know where those files are, nor what becomes of them. There is no shared memory, so WAL wants
``PRAGMA locking_mode=EXCLUSIVE`` before anything else; and locks are granted to all who ask, so one connection at a
time has a database open.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import sqlite3
import time
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from typing import Any
from typing import Protocol as Interface

OK, IOERR, FULL, CANTOPEN, NOTFOUND = 0, 10, 13, 14, 12
IOERR_READ, IOERR_SHORT_READ, IOERR_WRITE, IOERR_FSYNC = 266, 522, 778, 1034
IOERR_TRUNCATE, IOERR_DELETE, IOERR_DELETE_NOENT = 1546, 2570, 5898

OPEN_CREATE, OPEN_DELETE_ON_CLOSE = 0x4, 0x8
#: A main journal, a super-journal or a WAL: at its first sync the unix VFS syncs the directory too.
OPEN_JOURNAL = 0x800 | 0x4000 | 0x80000
ACCESS_EXISTS = 0
#: What `Storage` has to promise: a write harms no octet outside its range.
IOCAP_POWERSAFE_OVERWRITE = 0x1000
SECTOR = 512
LONGEST_PATH = 1024


class File(Interface):
    """An open file.

    Octets and offsets are as in ``pread`` and ``pwrite``; whatever cannot be done raises `OSError`.
    """

    def read(self, size: int, offset: int) -> bytes:
        """What is there, and less than `size` octets at the end of the file."""

    def write(self, data: bytes, offset: int) -> None:
        """Writes all of `data`; with ``ENOSPC``, as much of it as there is room for."""

    def truncate(self, size: int) -> None:
        """Makes the file `size` octets long."""

    def sync(self) -> None:
        """Returns when what was written is durable."""

    def size(self) -> int:
        """The length in octets."""

    def close(self) -> None:
        """Ends the use of this handle."""


class Storage(Interface):
    """Where the files of one VFS are."""

    def open(self, path: str | None, *, create: bool, journal: bool) -> File:
        """Opens a file, or a nameless one that is gone once closed.

        :param journal: the first sync has to make the file's name durable too.
        """

    def delete(self, path: str, *, sync: bool) -> None:
        """Removes a name; `sync` asks for that to be durable on return."""

    def exists(self, path: str) -> bool:
        """Whether there is a file of that name."""


class _Methods(ctypes.Structure):
    """``sqlite3_io_methods``, version 1."""

    _fields_ = [("iVersion", c_int)] + [
        (name, c_void_p)
        for name in (
            *("xClose", "xRead", "xWrite", "xTruncate", "xSync", "xFileSize", "xLock", "xUnlock"),
            *("xCheckReservedLock", "xFileControl", "xSectorSize", "xDeviceCharacteristics"),
        )
    ]


class _Vfs(ctypes.Structure):
    """``sqlite3_vfs``, version 1."""

    _fields_ = [
        *(("iVersion", c_int), ("szOsFile", c_int), ("mxPathname", c_int)),
        *(("pNext", c_void_p), ("zName", c_char_p), ("pAppData", c_void_p)),
        *(("xOpen", c_void_p), ("xDelete", c_void_p), ("xAccess", c_void_p), ("xFullPathname", c_void_p)),
        *(("xDlOpen", c_void_p), ("xDlError", c_void_p), ("xDlSym", c_void_p), ("xDlClose", c_void_p)),
        *(("xRandomness", c_void_p), ("xSleep", c_void_p), ("xCurrentTime", c_void_p), ("xGetLastError", c_void_p)),
    ]


#: What went wrong inside callbacks, other than an `OSError`: a test that leaves anything here has failed.
_mistakes: list[BaseException] = []
#: SQLite calls these as long as the process lives.
_callbacks: list[object] = []
#: Open files, by the address of SQLite's ``sqlite3_file``.
_files: dict[int, File] = {}
#: By their number: the structure, which SQLite keeps in its list for ever, and who has it now.
_vfses: list[_Vfs] = []
_storages: dict[int, Storage] = {}
_free: list[int] = []


def raise_mistakes() -> None:
    """Raises what callbacks have raised and could not let through SQLite, as an `ExceptionGroup`."""
    if _mistakes:
        mistakes = _mistakes.copy()
        _mistakes.clear()
        raise BaseExceptionGroup("raised under SQLite, in its file layer", mistakes)


def _callback(*types: Any, otherwise: int = IOERR) -> Callable[[Callable[..., int]], int]:
    """Makes a C function that returns an ``int``, and gives its address.

    :param otherwise: returned for an `OSError`; a full disk and a mistake have codes of their own.
    """

    def decorate(function: Callable[..., int]) -> int:
        @functools.wraps(function)
        def called(*arguments: Any) -> int:
            try:
                return function(*arguments)
            except OSError as error:
                return FULL if error.errno == errno.ENOSPC else otherwise
            except BaseException as error:
                _mistakes.append(error)
                return IOERR

        made = ctypes.CFUNCTYPE(c_int, *types)(called)
        _callbacks.append(made)
        address = ctypes.cast(made, c_void_p).value
        assert address is not None
        return address

    return decorate


@_callback(c_void_p)
def _close(file: int) -> int:
    _files.pop(file).close()
    return OK


@_callback(c_void_p, c_void_p, c_int, c_int64, otherwise=IOERR_READ)
def _read(file: int, into: int, size: int, offset: int) -> int:
    data = _files[file].read(size, offset)
    ctypes.memmove(into, data, len(data))
    if len(data) == size:
        return OK
    ctypes.memset(into + len(data), 0, size - len(data))
    return IOERR_SHORT_READ


@_callback(c_void_p, c_void_p, c_int, c_int64, otherwise=IOERR_WRITE)
def _write(file: int, source: int, size: int, offset: int) -> int:
    _files[file].write(ctypes.string_at(source, size), offset)
    return OK


@_callback(c_void_p, c_int64, otherwise=IOERR_TRUNCATE)
def _truncate(file: int, size: int) -> int:
    _files[file].truncate(size)
    return OK


@_callback(c_void_p, c_int, otherwise=IOERR_FSYNC)
def _sync(file: int, flags: int) -> int:
    _files[file].sync()
    return OK


@_callback(c_void_p, c_void_p)
def _file_size(file: int, result: int) -> int:
    c_int64.from_address(result).value = _files[file].size()
    return OK


@_callback(c_void_p, c_int)
def _lock(file: int, level: int) -> int:
    return OK


@_callback(c_void_p, c_void_p)
def _check_reserved_lock(file: int, result: int) -> int:
    c_int.from_address(result).value = 0
    return OK


@_callback(c_void_p, c_int, c_void_p)
def _file_control(file: int, operation: int, argument: int | None) -> int:
    return NOTFOUND


@_callback(c_void_p)
def _sector_size(file: int) -> int:
    return SECTOR


@_callback(c_void_p)
def _device_characteristics(file: int) -> int:
    return IOCAP_POWERSAFE_OVERWRITE


_methods = _Methods(
    *(1, _close, _read, _write, _truncate, _sync, _file_size, _lock, _lock),
    *(_check_reserved_lock, _file_control, _sector_size, _device_characteristics),
)


def _storage(vfs: int) -> Storage:
    number = _Vfs.from_address(vfs).pAppData or 0
    if number not in _storages:
        raise FileNotFoundError(errno.ENOENT, "the storage of this VFS was closed")
    return _storages[number]


@_callback(c_void_p, c_char_p, c_void_p, c_int, c_void_p, otherwise=CANTOPEN)
def _open(vfs: int, path: bytes | None, file: int, flags: int, flags_out: int | None) -> int:
    # Without methods SQLite does not close what was not opened.
    methods = c_void_p.from_address(file)
    methods.value = None
    if flags & OPEN_DELETE_ON_CLOSE:
        path = None
    _files[file] = _storage(vfs).open(
        None if path is None else path.decode(), create=bool(flags & OPEN_CREATE), journal=bool(flags & OPEN_JOURNAL)
    )
    methods.value = ctypes.addressof(_methods)
    if flags_out:
        c_int.from_address(flags_out).value = flags
    return OK


@_callback(c_void_p, c_char_p, c_int, otherwise=IOERR_DELETE)
def _delete(vfs: int, path: bytes, sync: int) -> int:
    try:
        _storage(vfs).delete(path.decode(), sync=bool(sync))
    except FileNotFoundError:
        return IOERR_DELETE_NOENT
    return OK


@_callback(c_void_p, c_char_p, c_int, c_void_p)
def _access(vfs: int, path: bytes, flags: int, result: int) -> int:
    c_int.from_address(result).value = int(_storage(vfs).exists(path.decode()))
    return OK


@_callback(c_void_p, c_char_p, c_int, c_void_p, otherwise=CANTOPEN)
def _full_pathname(vfs: int, path: bytes, size: int, result: int) -> int:
    if len(path) >= size:
        raise OSError(errno.ENAMETOOLONG, "the path is too long")
    ctypes.memmove(result, path + b"\0", len(path) + 1)
    return OK


@_callback(c_void_p, c_int, c_void_p)
def _randomness(vfs: int, size: int, into: int) -> int:
    # SQLite takes its seed from the default VFS, and asks no other.
    return 0


@_callback(c_void_p, c_int)
def _sleep(vfs: int, microseconds: int) -> int:
    return microseconds


@_callback(c_void_p, c_void_p)
def _current_time(vfs: int, result: int) -> int:
    c_double.from_address(result).value = time.time() / 86400 + 2440587.5
    return OK


@_callback(c_void_p, c_int, c_void_p)
def _get_last_error(vfs: int, size: int, into: int | None) -> int:
    return OK


def attach(storage: Storage) -> str:
    """Gives a storage a VFS, and returns the name to connect with: ``file:/path?vfs=NAME``.

    :raises OSError: SQLite's own functions cannot be reached here, see `why_not`.
    """
    library = _library()
    if library is None:
        raise OSError(errno.ENOSYS, why_not())
    if not _free:
        _free.append(_register(library))
    number = _free.pop()
    _storages[number] = storage
    return f"python-{number}"


def detach(name: str, *, idle: bool) -> None:
    """Takes the VFS from its storage: files that are open stay so, and no more are opened.

    :param idle: no file is open, so that the VFS may be another storage's. Otherwise a connection still has it, and
        would find that other's files.
    """
    number = int(name.removeprefix("python-"))
    del _storages[number]
    if idle:
        _free.append(number)


def why_not() -> str:
    """Why there can be no VFS in this interpreter, or nothing if there can."""
    return "" if _library() else "the SQLite of this interpreter has hidden its sqlite3_vfs_register"


def _register(library: ctypes.CDLL) -> int:
    number = len(_vfses)
    vfs = _Vfs(
        *(1, ctypes.sizeof(c_void_p), LONGEST_PATH, None, f"python-{number}".encode(), number),
        *(_open, _delete, _access, _full_pathname, None, None, None, None),
        *(_randomness, _sleep, _current_time, _get_last_error),
    )
    _vfses.append(vfs)
    library.sqlite3_vfs_register(ctypes.byref(vfs), 0)
    return number


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library that `sqlite3` runs on: tried out, since another copy of SQLite has another list of VFSes."""
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
            library.sqlite3_vfs_register.argtypes = [c_void_p, c_int]
        except (OSError, AttributeError):
            continue
        number = _register(library)
        try:
            # Nobody has it, so opening fails; but where the VFS is not known at all, it fails with a different word.
            sqlite3.connect(f"file:/probe?vfs=python-{number}", uri=True).close()
        except sqlite3.OperationalError as error:
            if "no such vfs" in str(error):
                continue
        _free.append(number)
        return library
    return None


def _candidates() -> Iterator[str | None]:
    """What may export SQLite's functions.

    In turn: the extension module, which finds those of its dependencies and its own if SQLite is linked in statically;
    the program, which the module may be part of; and whatever else is loaded that has a name like it.
    """
    module: Any = __import__("_sqlite3")
    if hasattr(module, "__file__"):
        yield module.__file__
    yield None
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            loaded = {fields[5].strip() for line in maps if len(fields := line.split(maxsplit=5)) == 6}
    except OSError:
        return
    yield from sorted(path for path in loaded if "sqlite" in path or "libpython" in path)
