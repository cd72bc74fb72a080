"""The store on disk: one thread that writes, and commits what has come meanwhile in one go.

Knows threads, a full disk and a broken one; what is done is `protoframe.servers.queue.rules`'s, and how it gets to the
disk `protoframe.servers.queue.sqlite`'s.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any

import msgspec
from twisted.internet.defer import Deferred, fail
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from protoframe import Error
from protoframe.queue import Message, Receipt, Settings, StoreFailed, StoreFull
from protoframe.servers.queue.ballast import Ballast
from protoframe.servers.queue.ruled import Happened, RuledStore
from protoframe.servers.queue.rules import Rules
from protoframe.servers.queue.sqlite import CHECKPOINT_PAGES, PAGE, SQLiteRows
from protoframe.servers.queue.store import IStore, IStoreListener

__all__ = ["BALLAST", "DATABASE", "DiskStore"]

_log = Logger(namespace="protoframe.queue")

#: The database's name in the data directory.
DATABASE = "queue.sqlite3"
#: And the ballast's.
BALLAST = "ballast"
#: Calls that are committed together at most, and octets of bodies, but for the first.
_MOST_AT_ONCE, _MOST_BYTES = 5000, 8 * 1024 * 1024
#: Seconds from one look whether a full disk has room again to the next.
_LOOK_AGAIN = 1.0
#: Seconds between two times that room is given back.
_TEND_EVERY = 1.0
#: Pages that a look gives back to the file system, if there are so many without content; what is left behind, in bytes.
_SHRINK_PAGES, _SPARE = 2048, 64 * 1024 * 1024
#: Pages of the log at least; octets that are left for it where there is no ballast.
_LEAST_PAGES, _ENOUGH = 64, 64 * 1024 * 1024
#: Octets that a message takes in memory, about, beside its body.
_OVERHEAD = 512
#: What SQLite says of a disk that cannot be relied on any more: what was written may be there or not.
_BROKEN = frozenset(
    (
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
    )
)


class _Call:
    """A call that is to be done.

    :ivar needs_room: whether it is refused while the disk is full.
    """

    __slots__ = ("arguments", "deferred", "error", "function", "needs_room", "result", "size")

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], *, needs_room: bool = False, size: int = 0
    ) -> None:
        self.function = function
        self.arguments = arguments
        self.needs_room = needs_room
        self.size = size
        self.deferred: Deferred[Any] = Deferred()
        self.result: Any = None
        self.error: Exception | None = None


@implementer(IStore)
class DiskStore(RuledStore):
    """Keeps queues in a directory.

    What is called in one turn of the reactor, or while the disk is busy, is committed together, and is answered when
    the disk has it.  A disk that is full refuses what would take room, and has a ballast to give up for all else.  One
    that fails, as by a sync of which nobody knows what it has written, ends the store: nothing is answered any more.

    :param reactor: whose thread calls, and is answered.
    :param clock: gives the time, in seconds since the epoch.
    :param directory: where the data is; it is made.
    :param ballast: the file that is given up when the disk is full.
    :param check: whether the database is looked through for damage: ``none``, ``quick`` or ``full``.
    :param vfs: the SQLite VFS that it is opened with; the default one where empty.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        directory: str,
        *,
        ballast: Ballast | None = None,
        check: str = "quick",
        vfs: str = "",
    ) -> None:
        super().__init__(reactor, clock)
        self._directory = directory
        self._check = check
        self._vfs = vfs
        self._ballast = ballast if ballast is not None else Ballast(os.path.join(directory, BALLAST), 0)
        # What is in the log takes as much room again in the database, before any can be made: what the ballast has must
        # be enough for it, and for the transactions that make room.
        room = self._ballast.size or _ENOUGH
        self._log_pages = max(_LEAST_PAGES, min(CHECKPOINT_PAGES, room // 2 // PAGE))
        self._most_bytes = min(_MOST_BYTES, room // 8)
        self._thread: Thread | None = None
        self._inbox: SimpleQueue[list[_Call] | None] = SimpleQueue()
        self._calls: list[_Call] = []
        self._handing_over: Any = None
        self._is_busy = False
        self._is_closed = False
        self._failure: StoreFailed | None = None
        self._looking: Any = None
        self._closing: Deferred[None] | None = None
        self.pending_bytes = 0
        # In the thread alone, while it runs.
        self._database: SQLiteRows | None = None
        self._is_full = False
        self._tended = 0.0

    def open(self, listener: IStoreListener) -> list[tuple[str, Settings]]:
        """Begins; the queues that are there.

        :raises ValueError: the directory or the database cannot be used; the text says why, on one line.
        """
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self._directory}: {error.strerror}") from None
        self._listener = listener
        try:
            try:
                self._take_up()
            except sqlite3.Error as error:
                if not _is_full(error):
                    raise
                # To take up what is there needs room too.
                self._run_full()
                self._take_up()
        except (OSError, sqlite3.Error, msgspec.MsgspecError) as error:
            raise ValueError(f"{self._directory}: {error}") from None
        self._thread = Thread(target=self._run, name="queue store", daemon=True)
        self._thread.start()
        self._wake_at(self._rules.next_due)
        return [(queue.name, queue.settings) for queue in self._rules.queues.values()]

    def _take_up(self) -> None:
        database = SQLiteRows(
            os.path.join(self._directory, DATABASE), check=self._check, log_pages=self._log_pages, vfs=self._vfs
        )
        try:
            if not self._is_full and not self._ballast.make():
                self._run_full()
            if not self._is_full:
                database.fill_log()
            self._rules = Rules(database, self._clock)
            self._rules.load()
        except (OSError, sqlite3.Error, msgspec.MsgspecError):
            database.close()
            raise
        self._database = database

    def close(self) -> Deferred[None]:
        """Does what it was asked for, and ends."""
        self._is_closed = True
        self._stop()
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        closing = self._closing = Deferred()
        self._hand_over()
        if not self._is_busy:
            self._end_thread()
        return closing

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()
            self._thread = None
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.callback(None)

    # In the reactor's thread.

    def publish(self, queue: str, messages: Sequence[Message]) -> Deferred[list[Receipt]]:
        size = sum(len(message.body) for message in messages) + _OVERHEAD * len(messages)
        return self._call(_Call(self._rules.publish, (queue, messages), needs_room=True, size=size))

    def declare(self, queue: str, settings: Settings, replace: bool) -> Deferred[bool]:
        return self._call(_Call(self._rules.declare, (queue, settings, replace), needs_room=True))

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
        return self._call(_Call(function, arguments))

    def _call(self, call: _Call) -> Deferred[Any]:
        if self._failure is not None or self._is_closed:
            return fail(self._failure or StoreFailed("the store is closed"))
        self._calls.append(call)
        self.pending_bytes += call.size
        if not self._is_busy and self._handing_over is None:
            # In the reactor's next turn: what comes in this one goes with it.
            self._handing_over = self._reactor.callLater(0, self._hand_over)
        return call.deferred

    def _hand_over(self) -> None:
        if self._handing_over is not None:
            if self._handing_over.active():
                self._handing_over.cancel()
            self._handing_over = None
        if self._calls and not self._is_busy:
            self._is_busy = True
            count = self._together()
            calls, self._calls = self._calls[:count], self._calls[count:]
            self._inbox.put(calls)

    def _together(self) -> int:
        """How many of the calls that wait are committed together."""
        octets = 0
        for count, call in enumerate(self._calls[:_MOST_AT_ONCE]):
            octets += call.size
            if octets > self._most_bytes and count:
                return count
        return _MOST_AT_ONCE

    def _done(self, calls: list[_Call], happened: Happened, is_full: bool) -> None:
        """What was done in the thread, answered."""
        self._is_busy = False
        if self._failure is None:
            self._hand_over()
        for call in calls:
            self.pending_bytes -= call.size
        for call in calls:
            if call.error is None:
                call.deferred.callback(call.result)
            else:
                call.deferred.errback(Failure(call.error))
        self._wake_at(happened.next_due)
        happened.tell(self._listener)
        if is_full and self._looking is None and not self._is_closed:
            self._looking = self._reactor.callLater(_LOOK_AGAIN, self._look)
        if self._closing is not None and not self._is_busy:
            self._end_thread()

    def _look(self) -> None:
        self._looking = None
        # For want of anything else to do: each time that something was done there is a look.
        self._submit(int).addErrback(lambda _: None)

    def _broken(self, calls: list[_Call], error: BaseException) -> None:
        self._is_busy = False
        text = f"the store failed: {error}"
        self._failure = StoreFailed(text)
        self._stop()
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        waiting, self._calls = self._calls, []
        self.pending_bytes = 0
        for call in [*calls, *waiting]:
            if not call.deferred.called:
                call.deferred.errback(Failure(StoreFailed(text)))
        self._listener.failed(self._failure)
        if self._closing is not None:
            self._end_thread()

    # In the store's thread.

    def _run(self) -> None:
        database = self._database
        while database is not None:
            calls = self._inbox.get()
            if calls is None:
                database.close()
                break
            try:
                self._perform(calls)
                self._tend(database)
            except Exception as error:
                self._reactor.callFromThread(self._broken, calls, error)
                # It is not closed in order: that would write, to a disk that cannot be relied on.
                self._inbox.get()
                break
            self._reactor.callFromThread(self._done, calls, Happened(self._rules), self._is_full)

    def _perform(self, calls: list[_Call]) -> None:
        """Does calls, all of them in one transaction; each in one of its own where one of them cannot be done.

        :raises sqlite3.Error: the disk fails; nobody is told that anything was done.
        """
        try:
            self._transact(calls)
        except Exception as error:
            self._undo(error)
        else:
            return
        for call in calls:
            try:
                self._transact([call])
            except Exception as error:
                self._undo(error)
                call.error = _full() if self._is_full and isinstance(error, sqlite3.Error) else error

    def _transact(self, calls: list[_Call]) -> None:
        rules = self._rules
        rules.begin()
        for call in calls:
            call.result = call.error = None
            if call.needs_room and self._is_full:
                call.error = _full()
                continue
            try:
                call.result = call.function(*call.arguments)
            except Error as error:
                # It was refused, before it changed anything.
                call.error = error
        rules.commit()

    def _undo(self, error: Exception) -> None:
        """Undoes a transaction.

        :raises sqlite3.Error: the disk fails.
        """
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BROKEN:
            raise error
        self._rules.rollback()
        if _is_full(error):
            self._run_full()

    def _run_full(self) -> None:
        """The disk is full: what needs no room goes on."""
        if not self._is_full:
            self._is_full = True
            self._ballast.drop()
            text = "the disk of {directory} is full: nothing more is stored until there is room"
            _log.error(text, directory=self._directory)

    def _tend(self, database: SQLiteRows) -> None:
        """Gives room that is not used back to the file system, now and then, and looks whether a full disk has some."""
        now = monotonic()
        if now < self._tended + _TEND_EVERY:
            return
        self._tended = now
        try:
            if self._is_full or database.unused_bytes() > _SPARE:
                step = min(_SHRINK_PAGES, self._log_pages // 4)
                for _ in range(0, _SHRINK_PAGES, step):
                    database.shrink(step)
            if self._is_full:
                database.checkpoint()
                self._is_full = not self._ballast.remake()
                if not self._is_full:
                    _log.info("the disk of {directory} has room again", directory=self._directory)
        except sqlite3.Error as error:
            self._undo(error)


def _is_full(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def _full() -> StoreFull:
    return StoreFull("the server's disk is full")
