"""A file that takes room on a disk, to be given up when there is none left.

SQLite cannot even delete from a database when the disk is full: what is deleted is written to its log first.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

__all__ = ["Ballast"]

#: What has to be free, without a ballast, before a disk does not count as full any more.
_ENOUGH = 4 * 1024 * 1024


class Ballast:
    """The file.

    :param path: where it is.
    :param size: octets; 0 for none.
    """

    def __init__(self, path: str, size: int) -> None:
        self.size = size
        self._path = path

    def make(self) -> bool:
        """Has it be there; whether there was room for it.

        :raises OSError: it could not be made for another reason.
        """
        if not self.size:
            return self.free() >= _ENOUGH
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(file, self.size)
                os.posix_fallocate(file, 0, self.size)
            finally:
                os.close(file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.drop()
            return False
        return True

    def drop(self) -> None:
        """Gives it up."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)

    def remake(self) -> bool:
        """Has it be there again, if there is room for it, and for as much again; whether there is."""
        return self.free() >= max(2 * self.size, _ENOUGH) and self.make()

    def free(self) -> int:
        """Octets of the file system that may be used."""
        system = os.statvfs(os.path.dirname(self._path) or ".")
        return system.f_bavail * system.f_frsize
