"""The server of files: a directory, and what is below, to be read and written with contents verified at the ends.

Knows the command line and how the service starts and stops; what is answered is in `FilesService`.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, cast

from twisted.internet.defer import Deferred
from twisted.python import usage

from protoframe.files._system import raise_open_files
from protoframe.servers.files._access import Access, Quota, Rule, parse_rule
from protoframe.servers.files._service import KEEP_PARTIALS, MAX_FILE, FilesFactory, FilesService
from protoframe.service import ServerOptions, ServerService

__all__ = ["Access", "FilesFactory", "FilesService", "Options", "Quota", "Rule", "makeService", "parse_rule"]


class Options(ServerOptions):
    """The command line of ``twistd pf-files``."""

    longdesc = "Serves the files below a directory: read, written, resumed and verified by pf put, get, ls and sync."
    default_listen = "tcp:12200:interface=127.0.0.1"
    optFlags: ClassVar[list[list[str | None]]] = [
        *ServerOptions.optFlags,
        ["read-only", None, "Write nothing."],
    ]

    def __init__(self) -> None:
        super().__init__()
        self["root"] = None
        self["quota"] = None
        self["max-file"] = MAX_FILE
        self["allow"] = []
        self["keep-partials"] = KEEP_PARTIALS

    def opt_root(self, directory: str) -> None:
        """The directory to serve; nothing outside of it is ever touched."""
        self["root"] = directory

    def opt_quota(self, size: str) -> None:
        """Bytes that all files may have together; K, M, G and T are of 1024."""
        self["quota"] = _size("--quota", size)

    def opt_max_file(self, size: str) -> None:
        """Bytes that one file may have: 1T."""
        self["max-file"] = _size("--max-file", size)

    def opt_allow(self, rule: str) -> None:
        """PERMISSION=DIR or PERMISSION=DIR:ro: who has the permission may use a directory; may be given several times.

        Where it is given, every other directory is closed; the innermost directory that is named decides.
        """
        try:
            self["allow"].append(parse_rule(rule))
        except ValueError as error:
            raise usage.UsageError(f"--allow: {error}") from None

    def opt_keep_partials(self, hours: str) -> None:
        """Hours for which an unfinished copy is kept that nobody goes on with: 168."""
        try:
            seconds = float(hours) * 3600
        except ValueError:
            seconds = -1
        if not 0 <= seconds <= 1e9:
            raise usage.UsageError(f"--keep-partials: expected a number of hours, got {hours!r}")
        self["keep-partials"] = seconds

    def postOptions(self) -> None:
        """Checks that there is something to serve."""
        super().postOptions()
        if self["root"] is None:
            raise usage.UsageError("--root: say which directory to serve")
        if not os.path.isdir(self["root"]):
            raise usage.UsageError(f"--root: {self['root']} is no directory")
        # Opened now: the process may have another working directory, and fewer rights, when it serves.
        self["root"] = os.path.abspath(self["root"])


class FilesServerService(ServerService):
    """Serves files, and cleans up after copies that nobody goes on with."""

    def __init__(self, factory: FilesFactory, options: Options) -> None:
        super().__init__(factory, options)
        self._files = factory

    def startService(self) -> None:
        """Serves."""
        super().startService()
        self._files.start_cleaning()

    def stopService(self) -> Deferred[Any]:
        """Ends in order."""
        stopping = super().stopService()
        stopping.addBoth(lambda result: self._files.close().addCallback(lambda _: result))
        return stopping


def makeService(options: Options) -> FilesServerService:
    """The service that twistd runs."""
    from twisted.internet import reactor

    raise_open_files(reactor)
    access = Access(options["allow"], read_only=bool(options["read-only"]))
    factory = FilesFactory(
        cast("Any", reactor),
        options["root"],
        access=access,
        quota=options["quota"],
        max_file=options["max-file"],
        keep_partials=options["keep-partials"],
        reflection=not options["no-reflection"],
    )
    return FilesServerService(factory, options)


def _size(option: str, text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in set("KMGT") and text[:-1] else (text, "")
    if not number.isdecimal():
        raise usage.UsageError(f"{option}: expected a number of bytes, such as 500M, got {text!r}")
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit]
