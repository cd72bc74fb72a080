"""Rows in an SQLite database: its schema, its statements, and how it is opened so that a commit is on the disk.

Knows SQLite; not the rules of queues, nor threads.  One connection, of one thread at a time, does everything, and it
alone has the database: no other process can use it meanwhile.
"""

from __future__ import annotations

import errno
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec.structs import astuple

from protoframe.queue import Settings
from protoframe.servers.queue.rows import LEASED, READY, SEQUENCE_BITS, GroupRecord, QueueRecord, Row, Waits

__all__ = ["CHECKPOINT_PAGES", "PAGE", "SQLiteRows"]

#: "pfq1": what `file` and others tell the database by.
APPLICATION_ID = 0x70667131
#: Octets of a page, and pages in the write-ahead log from which on they are copied into the database.
PAGE, CHECKPOINT_PAGES = 4096, 8192
#: Octets before each page in the log, and before all (https://sqlite.org/fileformat2.html, section 4.1).
_FRAME_HEADER, _LOG_HEADER = 24, 32
#: Octets that are written at a time where there is nothing to be written.
_ZEROS = 2**20
#: KiB of pages that are kept in memory.
_CACHE = 32 * 1024
#: Rows that one statement deals with, the most first.
_CHUNKS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)

_SCHEMA = """
CREATE TABLE queue (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    settings BLOB NOT NULL,
    created REAL NOT NULL
);
CREATE TABLE consumer_group (
    id INTEGER PRIMARY KEY,
    queue INTEGER,
    name TEXT NOT NULL,
    ready INTEGER NOT NULL DEFAULT 0,
    delayed INTEGER NOT NULL DEFAULT 0,
    leased INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    leased_bytes INTEGER NOT NULL DEFAULT 0,
    sequence INTEGER NOT NULL
);
CREATE INDEX consumer_group_removed ON consumer_group (id) WHERE queue IS NULL;
CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    consumer_group INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    state INTEGER NOT NULL,
    due REAL,
    leases INTEGER NOT NULL,
    unseen INTEGER NOT NULL,
    unseen_at INTEGER NOT NULL,
    expires REAL,
    key TEXT,
    size INTEGER NOT NULL,
    published REAL NOT NULL,
    properties BLOB,
    body BLOB NOT NULL
);
CREATE INDEX message_state ON message (consumer_group, state, rank);
CREATE INDEX message_due ON message (due) WHERE due IS NOT NULL;
CREATE INDEX message_expires ON message (expires) WHERE expires IS NOT NULL AND state <> 1;
CREATE INDEX message_key ON message (consumer_group, key) WHERE key IS NOT NULL AND state <> 1;
CREATE TABLE dedup (
    queue INTEGER NOT NULL,
    key TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    expires REAL NOT NULL,
    PRIMARY KEY (queue, key)
) WITHOUT ROWID;
CREATE INDEX dedup_expires ON dedup (expires);
"""

#: What turns a database of one version of the schema into one of the next, from the first on.
_MIGRATIONS: tuple[str, ...] = (_SCHEMA,)

_COLUMNS = "id, consumer_group, rank, state, due, leases, unseen, unseen_at, expires, key, size, published, properties"
_VALUES = "(" + ", ".join("?" * 14) + ")"
#: The highest number of a group, with which its messages' numbers still are SQLite's: 64 bits, and a sign.
_LAST_GROUP = (1 << 63 - SEQUENCE_BITS) - 1

_encode_settings = msgspec.json.Encoder().encode
_decode_settings = msgspec.json.Decoder(Settings).decode


def write_anew(path: str) -> None:
    """Writes to a file, if it is there, what is read of it, and syncs it: then it is on the disk as it is read.

    :raises OSError: it cannot be written, or not synced.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        offset = 0
        while part := os.pread(file, 2**20, offset):
            offset += os.pwrite(file, part, offset)
        os.fsync(file)
    finally:
        os.close(file)


class SQLiteRows:
    """Rows in a database.

    :param path: where it is; it is made where there is none.
    :param check: whether it is looked through for damage: ``none``, ``quick`` or ``full``.
    :param log_pages: pages in the log from which on they are copied into the database.
    :param vfs: the name of the SQLite VFS that it is opened with; the default one where empty.
    :raises ValueError: it cannot be used; the text says why, on one line.
    :raises sqlite3.Error: the disk is full.
    """

    def __init__(self, path: str, *, check: str = "quick", log_pages: int = CHECKPOINT_PAGES, vfs: str = "") -> None:
        where = f"file:{_quoted(path)}" + (f"?vfs={vfs}" if vfs else "")
        try:
            self._database = sqlite3.connect(
                where, uri=True, isolation_level=None, check_same_thread=False, timeout=1.0, cached_statements=256
            )
        except sqlite3.Error as error:
            raise ValueError(f"{path}: {error}") from None
        self._log = f"{path}-wal"
        self._log_bytes = log_pages * (PAGE + _FRAME_HEADER) + _LOG_HEADER
        self._execute: Callable[..., sqlite3.Cursor] = self._database.execute
        try:
            self._open(path, check, log_pages)
        except sqlite3.Error as error:
            self._database.close()
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_FULL:
                raise
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise ValueError(f"{path}: another process uses it") from None
            raise ValueError(f"{path}: {error}") from None
        except OSError as error:
            self._database.close()
            raise ValueError(f"{path}-wal: {error.strerror}") from None
        except ValueError:
            self._database.close()
            raise

    def _open(self, path: str, check: str, log_pages: int) -> None:
        # Exclusive: the log's index is in this process's memory, and there is no other that could do a checkpoint.
        self._execute("PRAGMA locking_mode = EXCLUSIVE")
        version, application = self._number("user_version"), self._number("application_id")
        tables = self._execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        # Before anything is written to what may be somebody else's.
        if tables and application != APPLICATION_ID:
            raise ValueError(f"{path}: this is another program's database")
        if version > len(_MIGRATIONS):
            raise ValueError(f"{path}: it was written by a later version of protoframe, with schema {version}")
        if not tables:
            self._execute(f"PRAGMA page_size = {PAGE}")
            # It is written even if it is the same.
            self._execute("PRAGMA auto_vacuum = INCREMENTAL")
        for pragma in (
            "journal_mode = WAL",
            # The log is synced at each commit, so that what is committed outlives a loss of power.
            "synchronous = FULL",
            f"wal_autocheckpoint = {log_pages}",
            f"cache_size = -{_CACHE}",
            "temp_store = MEMORY",
            "trusted_schema = OFF",
        ):
            self._execute(f"PRAGMA {pragma}")
        self._execute("BEGIN IMMEDIATE")
        # From here on this process alone writes.  A sync that failed may have left the log in the system's cache alone;
        # to copy it into the database as it is read would break the database, if power is cut before the log is synced.
        write_anew(f"{path}-wal")
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            for statement in filter(str.strip, script.split(";")):
                self._execute(statement)
            self._execute(f"PRAGMA user_version = {number}")
        if application != APPLICATION_ID:
            # As above; a disk that is full has no room for it.
            self._execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._execute("COMMIT")
        self.checkpoint()
        if check != "none":
            found = self._execute(f"PRAGMA {'quick_check' if check == 'quick' else 'integrity_check'}(1)").fetchone()[0]
            if found != "ok":
                raise ValueError(f"{path}: it is damaged: {' '.join(str(found).split())}")

    def _number(self, pragma: str) -> int:
        number: int = self._execute(f"PRAGMA {pragma}").fetchone()[0]
        return number

    def close(self) -> None:
        """Closes the database; the log is copied into it."""
        self._database.close()

    # The file.

    def checkpoint(self) -> None:
        """Copies the log into the database, and makes it empty."""
        self._execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def fill_log(self) -> None:
        """Makes the log as long as it will be, before anything is committed.

        A sync of what is written within a file takes half as long as one of what makes it longer.  Where there is no
        room for it, it grows with what is written.

        :raises OSError: it cannot be written.
        """
        try:
            file = os.open(self._log, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            # Another VFS has it elsewhere.
            return
        try:
            at = begin = os.fstat(file).st_size
            while at < self._log_bytes:
                at += os.pwrite(file, bytes(min(_ZEROS, self._log_bytes - at)), at)
            os.fsync(file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.ftruncate(file, begin)
        finally:
            os.close(file)

    def unused_bytes(self) -> int:
        """What the file has in pages without content."""
        return self._number("freelist_count") * self._number("page_size")

    def shrink(self, pages: int) -> None:
        """Gives pages without content back to the file system.  Not in a transaction."""
        # Not `execute`: that ends at the first page, for the statement has rows, but no columns.
        self._database.executescript(f"PRAGMA incremental_vacuum({pages})")

    # Transactions.

    def begin(self) -> None:
        self._execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._execute("COMMIT")

    def rollback(self) -> None:
        if self._database.in_transaction:
            self._execute("ROLLBACK")

    # Queues and groups.

    def load(self) -> list[QueueRecord]:
        queues = {}
        for number, name, settings, created in self._execute("SELECT id, name, settings, created FROM queue"):
            queues[number] = QueueRecord(number, name, _decode_settings(settings), created, {})
        fields = "id, name, ready, delayed, leased, bytes, leased_bytes, sequence"
        for queue, *values in self._execute(f"SELECT queue, {fields} FROM consumer_group WHERE queue IS NOT NULL"):
            group = GroupRecord(*values)
            queues[queue].groups[group.name] = group
        return list(queues.values())

    def add_queue(self, name: str, settings: Settings, created: float) -> int:
        values = (name, _encode_settings(settings), created)
        number = self._execute("INSERT INTO queue (name, settings, created) VALUES (?, ?, ?)", values).lastrowid
        return number or 0

    def change_queue(self, queue: int, settings: Settings) -> None:
        self._execute("UPDATE queue SET settings = ? WHERE id = ?", (_encode_settings(settings), queue))

    def remove_queue(self, queue: int) -> None:
        self._execute("DELETE FROM dedup WHERE queue = ?", (queue,))
        self._execute("DELETE FROM queue WHERE id = ?", (queue,))

    def add_group(self, queue: int, name: str, sequence: int) -> int:
        # Numbers of groups that are gone, with their messages, are used again, when there are no others.
        last = self._execute("SELECT max(id) FROM consumer_group").fetchone()[0] or 0
        if last >= _LAST_GROUP:
            gap = (
                "SELECT min(id) FROM (SELECT 0 AS id UNION ALL SELECT id FROM consumer_group) AS one"
                " WHERE NOT EXISTS (SELECT 1 FROM consumer_group WHERE id = one.id + 1)"
            )
            last = self._execute(gap).fetchone()[0]
        statement = "INSERT INTO consumer_group (id, queue, name, sequence) VALUES (?, ?, ?, ?)"
        self._execute(statement, (last + 1, queue, name, sequence))
        return int(last) + 1

    def save_group(self, group: GroupRecord) -> None:
        self._execute(
            "UPDATE consumer_group SET ready = ?, delayed = ?, leased = ?, bytes = ?, leased_bytes = ?, sequence = ?"
            " WHERE id = ?",
            (
                group.ready,
                group.delayed,
                group.leased,
                group.bytes,
                group.leased_bytes,
                group.sequence,
                group.id,
            ),
        )

    def remove_group(self, group: int) -> None:
        # Its messages are no use to anybody, but to remove a million of them at once would hold up all else.
        self._execute("UPDATE consumer_group SET queue = NULL WHERE id = ?", (group,))

    def collect(self, most: int) -> bool:
        removed = self._execute("SELECT id FROM consumer_group WHERE queue IS NULL LIMIT 1").fetchone()
        if removed is None:
            return False
        first, last = removed[0] << SEQUENCE_BITS, (removed[0] + 1 << SEQUENCE_BITS) - 1
        found = self._execute("SELECT id FROM message WHERE id BETWEEN ? AND ? LIMIT ?", (first, last, most)).fetchall()
        self.delete([identifier for (identifier,) in found])
        if len(found) < most:
            self._execute("DELETE FROM consumer_group WHERE id = ?", removed)
        return True

    # Messages.

    def insert(self, rows: Sequence[Row]) -> None:
        at = 0
        for size in _CHUNKS:
            while len(rows) - at >= size:
                values: list[Any] = []
                for row in rows[at : at + size]:
                    values += astuple(row)
                self._execute(_INSERT[size], values)
                at += size

    def get(self, ids: Sequence[int]) -> list[Row]:
        found: list[Row] = []
        for part, marks in _parts(ids):
            rows = self._execute(f"SELECT {_COLUMNS} FROM message WHERE id IN ({marks})", part)
            found += [Row(*row) for row in rows]
        return found

    def body(self, identifier: int) -> bytes:
        body: bytes = self._execute("SELECT body FROM message WHERE id = ?", (identifier,)).fetchone()[0]
        return body

    def delete(self, ids: Sequence[int]) -> None:
        for part, marks in _parts(ids):
            self._execute(f"DELETE FROM message WHERE id IN ({marks})", part)

    def lease(self, ids: Sequence[int], due: float) -> None:
        for part, marks in _parts(ids):
            statement = f"UPDATE message SET state = {LEASED}, due = ?, leases = leases + 1 WHERE id IN ({marks})"
            self._execute(statement, (due, *part))

    def change(self, ids: Sequence[int], state: int, due: float | None, *, unseen: bool = False) -> None:
        counted = ", unseen = unseen + (unseen_at <> leases), unseen_at = leases" if unseen else ""
        for part, marks in _parts(ids):
            statement = f"UPDATE message SET state = ?, due = ?{counted} WHERE id IN ({marks})"
            self._execute(statement, (state, due, *part))

    def ready(self, group: int) -> Iterator[Row]:
        statement = (
            f"SELECT {_COLUMNS}, body FROM message WHERE consumer_group = ? AND state = {READY} ORDER BY rank, id"
        )
        return (Row(*row) for row in self._execute(statement, (group,)))

    def waits(self, group: int, after: tuple[int, int], most: int) -> list[Waits]:
        found = self._behind("rank, id, expires, properties", group, READY, after, most)
        return [Waits(*values) for values in found]

    def oldest(self, group: int, most: int) -> list[Row]:
        first, last = group << SEQUENCE_BITS, (group + 1 << SEQUENCE_BITS) - 1
        statement = f"SELECT {_COLUMNS} FROM message WHERE id BETWEEN ? AND ? AND state <> {LEASED} ORDER BY id LIMIT ?"
        return [Row(*row) for row in self._execute(statement, (first, last, most))]

    def by_key(self, group: int, keys: Sequence[str]) -> list[Row]:
        found: list[Row] = []
        for part, marks in _parts(list(set(keys))):
            statement = (
                f"SELECT {_COLUMNS} FROM message WHERE consumer_group = ? AND key IN ({marks})"
                f" AND key IS NOT NULL AND state <> {LEASED}"
            )
            found += [Row(*row) for row in self._execute(statement, (group, *part))]
        return found

    def in_state(self, group: int, state: int, after: tuple[int, int], most: int) -> list[Row]:
        return [Row(*row) for row in self._behind(_COLUMNS, group, state, after, most)]

    def _behind(self, columns: str, group: int, state: int, after: tuple[int, int], most: int) -> list[Any]:
        """Of the rows in a state, in the order of rank and number, those behind a place."""
        rank, number = after
        where = "consumer_group = ? AND state = ?"
        same = f"SELECT {columns} FROM message WHERE {where} AND rank = ? AND id > ? ORDER BY id LIMIT ?"
        found = self._execute(same, (group, state, rank, number, most)).fetchall()
        if len(found) < most:
            later = f"SELECT {columns} FROM message WHERE {where} AND rank > ? ORDER BY rank, id LIMIT ?"
            found += self._execute(later, (group, state, rank, most - len(found))).fetchall()
        return found

    def first_published(self, group: int) -> float | None:
        first, last = group << SEQUENCE_BITS, (group + 1 << SEQUENCE_BITS) - 1
        statement = "SELECT published FROM message WHERE id BETWEEN ? AND ? ORDER BY id LIMIT 1"
        found = self._execute(statement, (first, last)).fetchone()
        return None if found is None else found[0]

    def due(self, now: float, most: int) -> list[Row]:
        statement = f"SELECT {_COLUMNS} FROM message WHERE due IS NOT NULL AND due <= ? ORDER BY due LIMIT ?"
        return [Row(*row) for row in self._execute(statement, (now, most))]

    def expired(self, now: float, most: int) -> list[Row]:
        statement = (
            f"SELECT {_COLUMNS} FROM message"
            f" WHERE expires IS NOT NULL AND state <> {LEASED} AND expires <= ? ORDER BY expires LIMIT ?"
        )
        return [Row(*row) for row in self._execute(statement, (now, most))]

    def next_due(self) -> float:
        if self._execute("SELECT 1 FROM consumer_group WHERE queue IS NULL LIMIT 1").fetchone() is not None:
            return -math.inf
        due = self._execute("SELECT min(due) FROM message WHERE due IS NOT NULL").fetchone()[0]
        expires = self._execute(
            f"SELECT min(expires) FROM message WHERE expires IS NOT NULL AND state <> {LEASED}"
        ).fetchone()[0]
        return min(math.inf if time is None else time for time in (due, expires))

    # Deduplication keys.

    def known(self, queue: int, keys: Sequence[str], now: float) -> dict[str, int]:
        found: dict[str, int] = {}
        for part, marks in _parts(list(set(keys))):
            statement = f"SELECT key, sequence FROM dedup WHERE queue = ? AND expires > ? AND key IN ({marks})"
            found.update(self._execute(statement, (queue, now, *part)).fetchall())
        return found

    def remember(self, queue: int, keys: Iterable[tuple[str, int]], expires: float) -> None:
        self._database.executemany(
            "INSERT OR REPLACE INTO dedup (queue, key, sequence, expires) VALUES (?, ?, ?, ?)",
            [(queue, key, sequence, expires) for key, sequence in keys],
        )

    def forget(self, now: float, most: int) -> float:
        statement = "SELECT queue, key FROM dedup WHERE expires <= ? ORDER BY expires LIMIT ?"
        old = self._execute(statement, (now, most)).fetchall()
        self._database.executemany("DELETE FROM dedup WHERE queue = ? AND key = ?", old)
        first = self._execute("SELECT min(expires) FROM dedup").fetchone()[0]
        return math.inf if first is None else first


_INSERT = {size: "INSERT INTO message VALUES " + ", ".join([_VALUES] * size) for size in _CHUNKS}


def _parts(values: Sequence[Any]) -> Iterator[tuple[Sequence[Any], str]]:
    """Parts of values for ``IN``, with marks for each: of few lengths, so that their statements are prepared once."""
    at = 0
    while at < len(values):
        left = len(values) - at
        size = next((chunk for chunk in reversed(_CHUNKS) if chunk >= left), _CHUNKS[0])
        part = list(values[at : at + size])
        part += part[-1:] * (size - len(part))
        yield part, _MARKS[size]
        at += size


_MARKS = {size: ", ".join("?" * size) for size in _CHUNKS}


def _quoted(path: str) -> str:
    """A path within a URI, as SQLite reads it."""
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
