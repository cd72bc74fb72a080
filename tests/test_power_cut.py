"""The simulated power cut has teeth: it finds the losses that SQLite documents, and none where SQLite promises none.

The workload here knows plain `sqlite3` alone. Each of its transactions is acknowledged in the log once its commit has
returned; so at any cut the database must be as after the last acknowledged transaction, or as after the one that ran.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
import threading
from collections import Counter
from contextlib import closing
from random import Random

from twisted.trial.unittest import SynchronousTestCase

from tests import sqlite_vfs
from tests.power_cut import Cut, Disk, Sync

#: How many cuts each workload has to bear; positions and losses are drawn for each.
CUTS = int(os.environ.get("PROTOFRAME_CUTS", "600"))
PATH = "/queue/messages.db"

#: Rows by key; None while there is no table.
Rows = dict[int, bytes] | None


def connect(disk: Disk, journal: str = "WAL", synchronous: str = "FULL") -> sqlite3.Connection:
    database = sqlite3.connect(disk.uri(PATH), uri=True, isolation_level=None)
    if journal == "WAL":
        # Otherwise it would zero the journal, and not delete it.
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
    assert database.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal.lower(),)
    database.execute(f"PRAGMA synchronous={synchronous}")
    # Checkpoints are to be among what is cut.
    database.execute("PRAGMA wal_autocheckpoint=12")
    return database


def rows(database: sqlite3.Connection) -> Rows:
    if database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
        return None
    return dict(database.execute("SELECT key, payload FROM messages"))


def work(disk: Disk, database: sqlite3.Connection, random: Random, transactions: int = 120) -> list[Rows]:
    """Publishes and consumes; gives what there was at first and after each transaction."""
    states = [rows(database)]
    if states[0] is None:
        database.execute("CREATE TABLE messages (key INTEGER PRIMARY KEY, payload BLOB NOT NULL)")
        states.append({})
        disk.mark(1)
    now = dict(states[-1] or {})
    while len(states) <= transactions:
        database.execute("BEGIN IMMEDIATE")
        for _ in range(random.randint(1, 4)):
            key = max(now, default=0) + 1
            now[key] = random.randbytes(random.choice((20, 200, 900, 6000)))
            database.execute("INSERT INTO messages VALUES (?, ?)", (key, now[key]))
        for key in sorted(now)[: random.choice((0, 0, 1, 2, 6))]:
            del now[key]
            database.execute("DELETE FROM messages WHERE key = ?", (key,))
        database.execute("COMMIT")
        states.append(now.copy())
        disk.mark(len(states) - 1)
    return states


def recovered(disk: Disk) -> Rows | str:
    """What a program finds that starts again on a disk after a cut; or "broken"."""
    try:
        with closing(sqlite3.connect(disk.uri(PATH), uri=True, isolation_level=None)) as database:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")
            if database.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                return "broken"
            return rows(database)
    except sqlite3.DatabaseError:
        return "broken"


def last(marks: list[object]) -> int:
    """How many transactions were acknowledged."""
    return int(str(marks[-1])) if marks else 0


def verdict(found: Rows | str, states: list[Rows], acknowledged: int) -> str:
    """Whether what was acknowledged was "kept"; if not, "lost" if it is as it once was, or "broken"."""
    if found in states[acknowledged : acknowledged + 2]:
        return "kept"
    return "lost" if found in states else "broken"


def verdicts(disk: Disk, states: list[Rows], random: Random, count: int = CUTS) -> Counter[str]:
    """Cuts power all over the run."""
    return Counter(verdict(recovered(after), states, last(marks)) for _, marks, after in disk.cuts(count, random))


def run(journal: str, synchronous: str, count: int = CUTS) -> Counter[str]:
    """Runs the workload once, and cuts power all over it."""
    random = Random(f"{journal} {synchronous}")
    with Disk() as disk:
        with closing(connect(disk, journal, synchronous)) as database:
            states = work(disk, database, random)
        return verdicts(disk, states, random, count)


def publish(disk: Disk, database: sqlite3.Connection, states: list[Rows]) -> str:
    """Publishes one message, and acknowledges it; gives the error if that fails."""
    now = dict(states[-1] or {})
    now[max(now, default=0) + 1] = bytes(1000)
    try:
        database.execute("INSERT INTO messages VALUES (?, ?)", (max(now), bytes(1000)))
    except sqlite3.OperationalError as error:
        return str(error)
    states.append(now)
    disk.mark(len(states) - 1)
    return ""


def publish_until_error(disk: Disk, database: sqlite3.Connection, states: list[Rows]) -> str:
    return next(filter(None, (publish(disk, database, states) for _ in range(1000))))


class WithVfs(SynchronousTestCase):
    skip = sqlite_vfs.why_not() or None


class CutsTests(WithVfs):
    def test_what_was_committed_with_full_syncs_outlives_every_cut(self):
        for journal, synchronous in ("WAL", "FULL"), ("TRUNCATE", "FULL"), ("PERSIST", "FULL"), ("DELETE", "EXTRA"):
            self.assertEqual(run(journal, synchronous), {"kept": CUTS}, journal)

    def test_commits_that_a_wal_does_not_sync_are_found_lost_and_the_database_whole(self):
        found = run("WAL", "NORMAL")
        self.assertGreater(found["lost"], CUTS / 10)
        self.assertEqual(found["broken"], 0)

    def test_without_syncs_losses_and_broken_databases_are_found(self):
        for journal in "WAL", "TRUNCATE":
            found = run(journal, "OFF", 300)
            self.assertGreater(found["lost"], 20)
            self.assertGreater(found["broken"], 20)

    def test_a_journal_whose_removal_is_not_synced_undoes_a_commit(self):
        # SQLite says so of DELETE with FULL; EXTRA is for that.
        found = run("DELETE", "FULL", 300)
        self.assertGreater(found["lost"], 10)
        self.assertEqual(found["broken"], 0)

    def test_a_cut_during_the_recovery_from_a_cut_loses_nothing_either(self):
        for journal in "WAL", "TRUNCATE":
            random = Random(journal)
            with Disk() as disk:
                with closing(connect(disk, journal)) as database:
                    states = work(disk, database, random)
                for _, marks, after in disk.cuts(CUTS // 5, random):
                    found = recovered(after)
                    self.assertEqual(verdict(found, states, last(marks)), "kept")
                    for _, _, again in after.cuts(4, random):
                        self.assertEqual(recovered(again), found)

    def test_a_writer_in_a_thread_is_cut_as_well(self):
        random = Random("thread")
        states: list[Rows] = []

        def write() -> None:
            with closing(connect(disk)) as database:
                states.extend(work(disk, database, random))

        with Disk() as disk:
            thread = threading.Thread(target=write)
            thread.start()
            thread.join(60)
            self.assertEqual(verdicts(disk, states, random, 200), {"kept": 200})


class SyncFailureTests(WithVfs):
    def test_a_commit_whose_sync_fails_raises_and_what_was_acknowledged_stays(self):
        for journal in "WAL", "TRUNCATE":
            random = Random(journal)
            with Disk() as disk, closing(connect(disk, journal)) as database:
                states = work(disk, database, random, 20)
                disk.fail_sync(after=random.randrange(8))
                self.assertEqual(publish_until_error(disk, database, states), "disk I/O error")
                acknowledged = len(states) - 1
                with self.assertRaises(sqlite3.OperationalError):
                    database.execute("INSERT INTO messages VALUES (1000000, x'00')")
                self.assertEqual(last(disk.marks), acknowledged)
                for how in Cut:
                    with disk.cut(random, how) as after:
                        self.assertEqual(recovered(after), states[acknowledged])

    def test_who_tries_a_failed_commit_again_loses_nothing(self):
        # On the same connection SQLite writes anew what it could not sync.
        for seed in range(max(20, CUTS // 50)):
            random = Random(seed)
            with Disk() as disk:
                with closing(connect(disk)) as database:
                    states = work(disk, database, random, 15)
                    for _ in range(3):
                        disk.fail_sync(random.randrange(9), random.randint(1, 3), random.choice((None, random)))
                        for _ in range(12):
                            publish(disk, database, states)
                found = verdicts(disk, states, random, 30)
                self.assertEqual(found, {"kept": 30}, seed)

    def after_a_failure(self, *, anew: bool, checkpoint: bool) -> tuple[Counter[str], str]:
        """A program whose sync failed is killed and started again, and the machine goes on.

        The system's cache shows it a log that is whole; on the disk it is not.

        :return: what cuts find until something is acknowledged, and then.
        """
        random = Random(7)
        with Disk() as disk, closing(connect(disk)) as killed:
            states = work(disk, killed, random, 60)
            killed.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            # The log has few pages that are synced, and after them many that are not.
            self.assertEqual(publish(disk, killed, states), "")
            disk.fail_sync(times=1)
            with self.assertRaises(sqlite3.OperationalError):
                killed.execute("DELETE FROM messages WHERE key % 2")
            failed = len(disk.log)
            if anew:
                disk.write_anew(PATH + "-wal")
            with closing(connect(disk)) as database:
                database.execute("PRAGMA wal_autocheckpoint=0")
                states.append(rows(database))
                if checkpoint:
                    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                found: Counter[str] = Counter()
                for position in range(failed, len(disk.log) + 1):
                    for _ in range(5):
                        with disk.replay(position).cut(random) as after:
                            found[verdict(recovered(after), states, len(states) - 2)] += 1
                self.assertEqual(publish(disk, database, states), "")
                with disk.cut(random, Cut.NOTHING) as after:
                    return found, verdict(recovered(after), states, len(states) - 1)

    def test_a_log_that_was_lost_before_a_start_takes_with_it_what_follows(self):
        _, then = self.after_a_failure(anew=False, checkpoint=False)
        self.assertEqual(then, "lost")

    def test_a_checkpoint_at_the_start_saves_what_follows_but_a_cut_meanwhile_breaks_the_database(self):
        # It writes to the database what is in the log as it is read, and a cut leaves the log as it is on the disk.
        found, then = self.after_a_failure(anew=False, checkpoint=True)
        self.assertEqual(then, "kept")
        self.assertGreater(found["broken"], 0)

    def test_a_log_that_is_written_anew_before_a_start_is_safe_at_every_moment(self):
        for checkpoint in False, True:
            found, then = self.after_a_failure(anew=True, checkpoint=checkpoint)
            self.assertEqual((set(found), then), ({"kept"}, "kept"))


class CapacityTests(WithVfs):
    def test_a_full_disk_refuses_loses_nothing_and_works_again_when_there_is_room(self):
        random = Random("full")
        with Disk() as disk:
            with closing(connect(disk)) as database:
                states = work(disk, database, random, 20)
                # As with a ballast file: what is given up is enough to drain, and is taken again once there is room.
                disk.reserved = 100_000
                disk.capacity = disk.used + 20_000
                self.assertEqual(publish_until_error(disk, database, states), "database or disk is full")
                self.assertEqual(publish(disk, database, states), "database or disk is full")
                self.assertEqual(rows(database), states[-1])
                self.assertLessEqual(disk.used, disk.capacity)
                disk.reserved = 0
                database.execute("DELETE FROM messages")
                states.append({})
                disk.mark(len(states) - 1)
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                disk.reserved = 100_000
                self.assertEqual(publish(disk, database, states), "")
            self.assertEqual(verdicts(disk, states, random, 300), {"kept": 300})

    def test_a_real_file_takes_room_as_long_as_it_is_there(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        path = os.path.join(directory.name, "ballast")
        with Disk() as disk, closing(connect(disk)) as database:
            states = work(disk, database, Random(), 5)
            with open(path, "wb") as ballast:
                ballast.truncate(50_000)
            disk.ballast = path
            disk.capacity = disk.used
            self.assertEqual(publish_until_error(disk, database, states), "database or disk is full")
            os.remove(path)
            self.assertEqual(publish(disk, database, states), "")


class VfsTests(WithVfs):
    def test_what_goes_wrong_inside_a_callback_is_raised_when_the_disk_is_closed(self):
        disk = Disk()
        with closing(connect(disk)) as database:
            disk.room = lambda growth: 1 // 0  # type: ignore[method-assign]
            with self.assertRaises(sqlite3.OperationalError):
                database.execute("CREATE TABLE messages (key INTEGER)")
        with self.assertRaises(BaseExceptionGroup) as caught:
            disk.close()
        self.assertTrue(caught.exception.subgroup(ZeroDivisionError))

    def test_a_connection_that_outlives_its_disk_keeps_off_the_next(self):
        disk = Disk()
        database = connect(disk)
        database.execute("CREATE TABLE messages (key INTEGER)")
        disk.close()
        with Disk() as following, closing(connect(following)) as other:
            other.execute("CREATE TABLE other (key INTEGER)")
            asked = len(following.log)
            database.close()
            self.assertEqual(len(following.log), asked)
            self.assertTrue(following.exists(PATH + "-wal"))
            other.execute("INSERT INTO other VALUES (1)")

    def test_files_without_a_name_serve_what_sqlite_puts_aside(self):
        with Disk() as disk, closing(connect(disk)) as database:
            states = work(disk, database, Random(), 30)
            database.execute("PRAGMA temp_store=FILE")
            database.execute("PRAGMA cache_size=2")
            database.execute("CREATE TEMP TABLE aside AS SELECT * FROM messages ORDER BY payload")
            database.execute("VACUUM")
            self.assertEqual(rows(database), states[-1])


class DiskTests(SynchronousTestCase):
    """The model by itself, without SQLite."""

    def contents(self, disk: Disk, path: str = "a") -> bytes | None:
        if not disk.exists(path):
            return None
        handle = disk.open(path, create=False, journal=False)
        return handle.read(handle.size(), 0)

    def test_what_is_read_is_what_was_written_and_a_cut_leaves_what_was_synced(self):
        disk = Disk({"a": b"old"})
        handle = disk.open("a", create=False, journal=False)
        handle.write(b"new", 0)
        self.assertEqual(handle.read(10, 0), b"new")
        self.assertEqual(self.contents(disk.cut(Random(), Cut.NOTHING)), b"old")
        self.assertEqual(self.contents(disk.cut(Random(), Cut.EVERYTHING)), b"new")
        handle.sync()
        for seed in range(100):
            self.assertEqual(self.contents(disk.cut(Random(seed))), b"new")

    def test_a_write_is_torn_between_its_sectors_alone_and_harms_nothing_beside_it(self):
        disk = Disk({"a": b"-" * 4096})
        disk.open("a", create=False, journal=False).write(b"x" * 2000, 100)
        found = {self.contents(disk.cut(Random(seed), Cut.SUBSET)) or b"" for seed in range(1000)}
        self.assertEqual(
            {data[start:end] for data in found for start, end in ((0, 100), (2100, 4096))}, {b"-" * 100, b"-" * 1996}
        )
        sectors = [(100, 512), (512, 1024), (1024, 1536), (1536, 2048), (2048, 2100)]
        for start, end in sectors:
            self.assertEqual({data[start:end] for data in found}, {b"-" * (end - start), b"x" * (end - start)})
        self.assertEqual(len(found), 2 ** len(sectors))

    def test_a_later_write_may_be_kept_and_an_earlier_one_lost_but_not_if_a_prefix_is_kept(self):
        disk = Disk({"a": b"-" * 1024})
        handle = disk.open("a", create=False, journal=False)
        handle.write(b"1" * 512, 0)
        handle.write(b"2" * 512, 512)
        kinds = {
            how: {(self.contents(disk.cut(Random(seed), how)) or b"")[::512] for seed in range(200)}
            for how in (Cut.SUBSET, Cut.PREFIX)
        }
        self.assertEqual(kinds, {Cut.SUBSET: {b"--", b"1-", b"-2", b"12"}, Cut.PREFIX: {b"--", b"1-", b"12"}})

    def test_a_file_may_have_grown_without_its_data(self):
        disk = Disk({"a": b""})
        disk.open("a", create=False, journal=False).write(b"x" * 512, 0)
        found = {self.contents(disk.cut(Random(seed), Cut.SUBSET)) for seed in range(300)}
        self.assertLessEqual({b"", b"x" * 512, bytes(512)}, found)
        self.assertGreater(len(found), 3)

    def test_a_truncation_is_durable_after_a_sync(self):
        disk = Disk({"a": b"x" * 1000})
        handle = disk.open("a", create=False, journal=False)
        handle.truncate(10)
        self.assertEqual(handle.size(), 10)
        self.assertEqual({len(self.contents(disk.cut(Random(seed))) or b"") for seed in range(50)}, {10, 1000})
        handle.sync()
        self.assertEqual({len(self.contents(disk.cut(Random(seed))) or b"") for seed in range(50)}, {10})

    def test_a_new_name_is_durable_once_the_directory_is_synced(self):
        disk = Disk()
        database = disk.open("a", create=True, journal=False)
        database.write(b"x", 0)
        database.sync()
        self.assertEqual({self.contents(disk.cut(Random(seed))) for seed in range(50)}, {None, b"x"})
        disk.open("a-wal", create=True, journal=True).sync()
        for seed in range(50):
            after = disk.cut(Random(seed))
            self.assertEqual((self.contents(after), self.contents(after, "a-wal")), (b"x", b""))

    def test_a_removed_name_may_come_back_unless_the_removal_was_synced(self):
        for sync, expected in ((False, {None, b"x"}), (True, {None})):
            disk = Disk({"a": b"x"})
            disk.delete("a", sync=sync)
            self.assertFalse(disk.exists("a"))
            self.assertEqual({self.contents(disk.cut(Random(seed))) for seed in range(50)}, expected)

    def test_what_a_failed_sync_lost_is_read_and_never_durable(self):
        disk = Disk({"a": b"-" * 1024})
        handle = disk.open("a", create=False, journal=False)
        handle.write(b"x" * 512, 0)
        disk.fail_sync(times=1)
        with self.assertRaises(OSError) as caught:
            handle.sync()
        self.assertEqual(caught.exception.errno, errno.EIO)
        handle.write(b"y" * 512, 512)
        handle.sync()
        self.assertEqual(handle.read(1024, 0), b"x" * 512 + b"y" * 512)
        self.assertEqual(self.contents(disk.cut(Random())), b"-" * 512 + b"y" * 512)
        handle.write(b"x" * 512, 0)
        handle.sync()
        self.assertEqual(self.contents(disk.cut(Random())), b"x" * 512 + b"y" * 512)

    def test_syncs_fail_as_often_as_they_are_told_to(self):
        def fails(handle) -> bool:
            try:
                handle.sync()
            except OSError:
                return True
            return False

        disk = Disk({"a": b""})
        handle = disk.open("a", create=False, journal=False)
        disk.fail_sync(after=2, times=2)
        self.assertEqual([fails(handle) for _ in range(6)], [False, False, True, True, False, False])
        disk.fail_sync()
        self.assertEqual([fails(handle) for _ in range(3)], [True, True, True])
        disk.heal()
        self.assertFalse(fails(handle))
        self.assertEqual(disk.syncs, 10)

    def test_a_full_disk_takes_what_it_has_room_for(self):
        disk = Disk({"a": b"-" * 100})
        handle = disk.open("a", create=False, journal=False)
        disk.capacity = 150
        disk.reserved = 20
        with self.assertRaises(OSError) as caught:
            handle.write(b"x" * 60, 90)
        self.assertEqual(caught.exception.errno, errno.ENOSPC)
        self.assertEqual(handle.read(1000, 90), b"x" * 40)
        handle.write(b"y" * 130, 0)
        disk.reserved = 0
        handle.write(b"x" * 20, 130)
        self.assertEqual(disk.used, 150)

    def test_any_position_of_the_log_is_replayed_alike_whichever_came_before(self):
        disk = Disk({"a": b""})
        handle = disk.open("a", create=False, journal=False)
        for number in range(20):
            handle.write(bytes([number]), number)
            handle.sync()
            disk.mark(number)
        sizes = []
        for position in (60, 0, 31, 30, 29, 60):
            replay = disk.replay(position)
            self.assertEqual(replay.marks, list(range(position // 3)))
            sizes.append(len(self.contents(replay.cut(Random(), Cut.NOTHING)) or b""))
        self.assertEqual(sizes, [20, 0, 10, 10, 10, 20])
        self.assertEqual(sum(isinstance(operation, Sync) for operation in disk.log), 20)
