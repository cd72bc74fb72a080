"""What Python lacks of Linux's calls: what of a large file stays in memory, and who else has opened it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource

import pytest
from twisted.internet.selectreactor import SelectReactor

from protoframe.files import _system
from protoframe.files._system import OpenWatch, Trail, raise_open_files
from tests.files.support import MIB

_libc = ctypes.CDLL(None, use_errno=True)


def resident(fd: int, size: int) -> int:
    """Bytes of a file that are in the system's cache."""
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        at = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert _libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), found) == 0
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def test_no_more_of_a_file_stays_in_memory_than_is_said_and_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(_system, "_KEPT", 4 * MIB)
    piece = os.urandom(MIB)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        trail = Trail(fd)
        for number in range(12):
            os.pwrite(fd, piece, number * MIB)
            trail.add(number * MIB, MIB)
        if resident(fd, 12 * MIB) == 12 * MIB:
            pytest.skip("this file system keeps everything in memory")
        assert resident(fd, 12 * MIB) == 4 * MIB
        assert os.pread(fd, 12 * MIB, 0) == piece * 12
    finally:
        os.close(fd)


@pytest.mark.parametrize(("number", "is_told"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.ESPIPE, False)])
def test_part_that_could_not_be_written_is_told(tmp_path, monkeypatch, number, is_told):
    def fail(fd, offset, length, flags):
        ctypes.set_errno(number)
        return -1 if flags & _system._WAIT_AFTER else 0

    monkeypatch.setattr(_system, "_sync_file_range", fail)
    monkeypatch.setattr(_system, "_KEPT", MIB)
    trail = Trail(-1)
    trail.add(0, MIB)
    if is_told:
        with pytest.raises(OSError, match=os.strerror(number)):
            trail.add(MIB, 1)
    else:
        trail.add(MIB, 1)


def test_who_opens_a_file_is_seen_and_who_has_it_open_is_not(tmp_path):
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    watch = OpenWatch(fd)
    try:
        os.pwrite(fd, b"x", 0)
        os.rename(path, tmp_path / "other")
        assert not watch.happened()
        (tmp_path / "other").read_bytes()
        assert watch.happened()
        # It has happened for good.
        assert watch.happened()
    finally:
        watch.close()
        os.close(fd)
    watch.close()


def test_system_that_cannot_tell_says_so(monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        OpenWatch(9999)
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(_system, "_inotify_init1", None)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        OpenWatch(0)


def test_more_files_may_be_open_where_they_may_and_the_reactor_can(monkeypatch):
    limits = [256, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, found: limits.__setitem__(slice(None), found))
    raise_open_files(SelectReactor.__new__(SelectReactor))
    assert limits == [256, 4096]
    raise_open_files(object())
    assert limits == [4096, 4096]
    limits[:] = [256, resource.RLIM_INFINITY]
    raise_open_files(object())
    assert limits == [16384, resource.RLIM_INFINITY]
    for limits[:] in ([20000, 20000], [resource.RLIM_INFINITY, resource.RLIM_INFINITY]):
        before = list(limits)
        raise_open_files(object())
        assert limits == before
