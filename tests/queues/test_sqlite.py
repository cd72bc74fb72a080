"""A database that cannot be used says why, on one line, and is left as it was; and the ballast is room on the disk."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from unittest import mock

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from protoframe.queue import Message, Settings
from protoframe.servers.queue import sqlite
from protoframe.servers.queue.ballast import Ballast
from protoframe.servers.queue.disk import DATABASE, DiskStore
from protoframe.servers.queue.rows import SEQUENCE_BITS
from protoframe.servers.queue.rules import Rules
from protoframe.servers.queue.sqlite import SQLiteRows


class DatabaseTests(SynchronousTestCase):
    def setUp(self):
        directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, directory)
        self.path = os.path.join(directory, DATABASE)

    def refused(self, check="quick"):
        error = self.assertRaises(ValueError, SQLiteRows, self.path, check=check)
        self.assertNotIn("\n", str(error))
        self.assertIn(self.path, str(error))
        return str(error)

    def execute(self, *statements):
        database = sqlite3.connect(self.path)
        for statement in statements:
            database.execute(statement)
        database.commit()
        database.close()

    def filled(self, messages=2000):
        rows = SQLiteRows(self.path)
        rules = Rules(rows, lambda: 1000.0)
        rules.begin()
        rules.declare("q", Settings(), False)
        rules.publish("q", [Message(body=b"%d" % number * 20) for number in range(messages)])
        rules.commit()
        rows.close()

    def test_another_programs_database_is_refused_and_stays_as_it_is(self):
        self.execute("CREATE TABLE accounts (id)", "INSERT INTO accounts VALUES (1)")
        with open(self.path, "rb") as file:
            before = file.read()
        self.assertIn("another program's", self.refused())
        with open(self.path, "rb") as file:
            self.assertEqual(file.read(), before)
        self.assertEqual(os.listdir(os.path.dirname(self.path)), [DATABASE])

    def test_a_later_schema_is_refused(self):
        self.filled()
        self.execute("PRAGMA user_version = 99")
        self.assertIn("schema 99", self.refused())

    def test_what_is_no_database_is_refused(self):
        with open(self.path, "wb") as file:
            file.write(b"no database at all " * 1000)
        self.refused()

    def test_a_directory_is_refused(self):
        os.mkdir(self.path)
        self.refused()

    def test_a_damaged_database_is_refused_by_a_check(self):
        self.filled()
        with open(self.path, "r+b") as file:
            file.seek(4096 * 10)
            file.write(os.urandom(4096 * 10))
        self.refused()
        self.refused("full")

    def test_a_database_that_was_cut_short_is_refused(self):
        self.filled()
        os.truncate(self.path, os.path.getsize(self.path) // 2 // 4096 * 4096)
        self.refused()

    def test_settings_that_cannot_be_read_are_refused(self):
        self.filled()
        self.execute("UPDATE queue SET settings = '{\"unknown\": 1}'")
        store = DiskStore(Clock(), lambda: 1000.0, os.path.dirname(self.path))
        error = self.assertRaises(ValueError, store.open, None)
        self.assertNotIn("\n", str(error))

    def test_a_second_process_is_locked_out(self):
        rows = SQLiteRows(self.path)
        self.addCleanup(rows.close)
        script = f"from protoframe.servers.queue.sqlite import SQLiteRows\nSQLiteRows({self.path!r})"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        other = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment, check=False
        )
        self.assertIn(f"ValueError: {self.path}: another process uses it", other.stderr)

    def test_an_older_schema_is_brought_up_and_keeps_what_is_in_it(self):
        self.filled(3)
        more = (*sqlite._MIGRATIONS, "CREATE TABLE later (id); CREATE INDEX later_id ON later (id)")
        with mock.patch.object(sqlite, "_MIGRATIONS", more):
            for _ in range(2):
                rows = SQLiteRows(self.path)
                self.assertEqual(rows._number("user_version"), 2)
                self.assertEqual(rows._execute("SELECT count(*) FROM later").fetchone(), (0,))
                (queue,) = rows.load()
                self.assertEqual(queue.groups[""].ready, 3)
                rows.close()

    def test_a_migration_that_fails_changes_nothing(self):
        self.filled(3)
        more = (*sqlite._MIGRATIONS, "CREATE TABLE later (id); CREATE NONSENSE")
        with mock.patch.object(sqlite, "_MIGRATIONS", more):
            self.refused()
        rows = SQLiteRows(self.path)
        self.addCleanup(rows.close)
        self.assertEqual(rows._number("user_version"), 1)
        self.assertEqual(rows._execute("SELECT count(*) FROM sqlite_schema WHERE name = 'later'").fetchone(), (0,))

    def test_a_commit_is_synced_and_room_can_be_given_back(self):
        rows = SQLiteRows(self.path)
        self.addCleanup(rows.close)
        self.assertEqual([rows._number(name) for name in ("synchronous", "auto_vacuum")], [2, 2])
        self.assertEqual(rows._number("journal_mode"), "wal")

    def test_odd_characters_in_a_path_are_its_own(self):
        for name in ("a?b", "a#b", "a%20b", "a b"):
            path = os.path.join(os.path.dirname(self.path), name)
            SQLiteRows(path).close()
            self.assertTrue(os.path.exists(path), name)

    def test_numbers_of_groups_that_are_gone_are_used_again_when_there_are_no_others(self):
        rows = SQLiteRows(self.path)
        self.addCleanup(rows.close)
        rows.begin()
        first, second = rows.add_group(1, "a", 0), rows.add_group(1, "b", 0)
        rows._execute("UPDATE consumer_group SET id = ? WHERE id = ?", (sqlite._LAST_GROUP, second))
        self.assertEqual([rows.add_group(1, "c", 0), rows.add_group(1, "d", 0)], [first + 1, first + 2])
        self.assertLess(sqlite._LAST_GROUP + 1 << SEQUENCE_BITS, 2**63 + 1)

    def test_messages_of_a_queue_that_was_deleted_are_collected(self):
        self.filled(5000)
        rows = SQLiteRows(self.path)
        self.addCleanup(rows.close)
        rules = Rules(rows, lambda: 1000.0)
        rules.load()
        rules.begin()
        self.assertEqual(rules.delete("q", False), 5000)
        self.assertLess(rules.next_due, 1001)
        while rules.sweep():
            pass
        rules.commit()
        for table in ("message", "consumer_group", "queue"):
            self.assertEqual(rows._execute(f"SELECT count(*) FROM {table}").fetchone(), (0,), table)


class PlanTests(SynchronousTestCase):
    def test_no_statement_looks_at_all_messages_or_sorts(self):
        rows = SQLiteRows(":memory:")
        self.addCleanup(rows.close)
        statements = []
        rows._database.set_trace_callback(statements.append)
        after = (0, 5)
        rows.begin()
        list(rows.ready(1))
        rows.waits(1, after, 10)
        rows.oldest(1, 10)
        rows.by_key(1, ["a", "b"])
        rows.in_state(1, 2, after, 10)
        rows.first_published(1)
        rows.due(1.0, 10)
        rows.expired(1.0, 10)
        rows.next_due()
        rows.collect(10)
        rows.get([1, 2])
        rows.change([1, 2], 0, None)
        rows.lease([1, 2], 1.0)
        rows.delete([1, 2])
        rows.known(1, ["a", "b"], 1.0)
        rows.forget(1.0, 10)
        rows.commit()
        rows._database.set_trace_callback(None)
        asked = [one for one in statements if one.split()[0] in ("SELECT", "UPDATE", "DELETE")]
        self.assertGreater(len(asked), 15)
        for statement in asked:
            for *_, step in rows._execute(f"EXPLAIN QUERY PLAN {statement}"):
                self.assertNotIn("TEMP B-TREE", step, statement)
                self.assertTrue(step.startswith("SEARCH") or "consumer_group_removed" in step, (step, statement))


class BallastTests(SynchronousTestCase):
    def setUp(self):
        directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, directory)
        self.path = os.path.join(directory, "ballast")
        self.ballast = Ballast(self.path, 100_000)

    def test_it_takes_room_and_gives_it_up(self):
        self.assertTrue(self.ballast.make())
        self.assertGreaterEqual(os.stat(self.path).st_blocks * 512, 100_000)
        self.ballast.drop()
        self.ballast.drop()
        self.assertFalse(os.path.exists(self.path))

    def test_one_of_another_size_is_made_to_be_of_its_own(self):
        Ballast(self.path, 300_000).make()
        self.ballast.make()
        self.assertEqual(os.path.getsize(self.path), 100_000)

    def test_a_disk_without_room_for_it_is_full_and_keeps_none_of_it(self):
        with mock.patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "full")):
            self.assertFalse(self.ballast.make())
        self.assertFalse(os.path.exists(self.path))

    def test_another_error_is_told(self):
        with mock.patch("os.posix_fallocate", side_effect=OSError(errno.EIO, "broken")):
            self.assertRaises(OSError, self.ballast.make)

    def test_it_is_there_again_when_there_is_room_for_twice_as_much(self):
        with mock.patch.object(Ballast, "free", return_value=4 * 2**20 - 1):
            self.assertFalse(self.ballast.remake())
        with mock.patch.object(Ballast, "free", return_value=4 * 2**20):
            self.assertTrue(self.ballast.remake())
