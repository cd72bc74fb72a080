"""Power cuts, failing syncs and a full disk under the queue's store: what it has answered is so afterwards.

What the store was asked for and has answered is marked in the disk's log. At any cut a message with a receipt is there,
whole and once, until somebody asked to settle it; one that was settled is gone; what was not answered is there or not.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from queue import SimpleQueue
from random import Random
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from protoframe.queue import Message, Settings, StoreFailed, StoreFull
from protoframe.servers.queue import disk as disk_module
from protoframe.servers.queue import sqlite as sqlite_module
from protoframe.servers.queue.ballast import Ballast
from protoframe.servers.queue.disk import DiskStore
from protoframe.servers.queue.store import Action, IStoreListener, Verdict
from tests import sqlite_vfs
from tests.power_cut import Cut, Disk

CUTS = int(os.environ.get("PROTOFRAME_CUTS", "250"))
PATIENCE = 30.0
LEASE = 30.0


class Turns(Clock):
    """A reactor of virtual time that takes what the store's thread calls when it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: SimpleQueue[Any] = SimpleQueue()

    def callFromThread(self, function: Any, *arguments: Any) -> None:
        self._calls.put((function, arguments))

    def wait(self, deferred: Deferred[Any]) -> Any:
        """What a Deferred fires with; what it fails with is raised."""
        results: list[Any] = []
        deferred.addBoth(results.append)
        self.advance(0)
        while not results:
            function, arguments = self._calls.get(timeout=PATIENCE)
            function(*arguments)
            self.advance(0)
        if isinstance(results[0], Failure):
            results[0].raiseException()
        return results[0]


@implementer(IStoreListener)
class Listener:
    def __init__(self) -> None:
        self.failures: list[Exception] = []

    def ready(self, queue, group):
        pass

    def lost(self, queue, group, sequences):
        pass

    def gone(self, queue):
        pass

    def failed(self, error):
        self.failures.append(error)


class DiskBallast(Ballast):
    """A ballast on the simulated disk."""

    def __init__(self, disk: Disk, size: int) -> None:
        super().__init__("", size)
        self._disk = disk

    def make(self) -> bool:
        self._disk.reserved = 0
        if self.free() < self.size:
            return False
        self._disk.reserved = self.size
        return True

    def drop(self) -> None:
        self._disk.reserved = 0

    def remake(self) -> bool:
        return self.free() >= 2 * self.size and self.make()

    def free(self) -> int:
        return 2**40 if self._disk.capacity is None else self._disk.capacity - self._disk.used


@contextlib.contextmanager
def files_of(disk: Disk) -> Iterator[None]:
    """Has the store write its log anew on the simulated disk, which it does beside SQLite."""
    before = sqlite_module.write_anew
    sqlite_module.write_anew = disk.write_anew
    try:
        yield
    finally:
        sqlite_module.write_anew = before


def directory_for(test: SynchronousTestCase) -> str:
    directory = tempfile.TemporaryDirectory()
    test.addCleanup(directory.cleanup)
    return directory.name


class Run:
    """A store on a simulated disk, and who uses it."""

    def __init__(self, test: SynchronousTestCase, disk: Disk, random: Random) -> None:
        self.directory = directory_for(test)
        self.disk = disk
        self.random = random
        # A store that failed is left as it is: a connection that is let go of closes, and writes.
        self.stores: list[DiskStore] = []
        self.published = 0
        self.start()

    def start(self, ballast: int = 0) -> None:
        """Has the store opened; one that failed is left as a killed process would leave it."""
        self.turns = Turns()
        self.listener = Listener()
        self.store = opened(self.turns, self.directory, self.disk, self.listener, DiskBallast(self.disk, ballast))
        self.stores.append(self.store)
        self.wait(self.store.declare("jobs", Settings(lease=LEASE), replace=True))

    def wait(self, deferred: Deferred[Any]) -> Any:
        return self.turns.wait(deferred)

    def publish(self, most: int = 3) -> Deferred[Any]:
        """Publishes messages; receipts are marked."""
        messages = []
        for _ in range(self.random.randint(1, most)):
            self.published += 1
            messages.append(Message(body=body(self.published, self.random.choice((10, 300, 2000, 9000)))))

        def receipts(found: Any) -> None:
            pairs = [(receipt.sequence, message.body) for receipt, message in zip(found, messages, strict=True)]
            self.disk.mark(("published", pairs))

        return self.store.publish("jobs", messages).addCallback(receipts)

    def take(self, count: int, again: float = 0.2) -> int:
        """Takes messages; settles most of them, and gives others back."""
        taken = self.wait(self.store.take("jobs", "", count, 2**20, None, None)).deliveries
        back = [delivery.tag for delivery in taken if self.random.random() < again]
        done = [delivery.tag for delivery in taken if delivery.tag not in back]
        if back:
            self.wait(self.store.settle("jobs", "", back, Verdict(Action.AGAIN)))
        if done:
            sequences = [tag.sequence for tag in done]
            self.disk.mark(("settling", sequences))
            self.wait(self.store.settle("jobs", "", done, Verdict(Action.DONE)))
            self.disk.mark(("settled", sequences))
        return len(taken)

    def work(self, rounds: int) -> None:
        for _ in range(rounds):
            calls = [self.publish() for _ in range(self.random.randint(1, 3))]
            for call in calls:
                self.wait(call)
            if self.random.random() < 0.7:
                self.take(self.random.randint(1, 8))

    def close(self) -> None:
        self.wait(self.store.close())


def opened(turns: Turns, directory: str, disk: Disk, listener: Listener, ballast: Ballast) -> DiskStore:
    store = DiskStore(turns, turns.seconds, directory, ballast=ballast, check="full", vfs=disk.vfs)
    with files_of(disk):
        store.open(listener)
    return store


def body(number: int, size: int) -> bytes:
    return f"{number}:".encode() + Random(number).randbytes(size)


def found(directory: str, disk: Disk) -> tuple[list[tuple[int, bytes]], int]:
    """What a store that starts on this disk delivers, and the number of the next message."""
    turns = Turns()
    turns.advance(10 * LEASE)
    store = opened(turns, directory, disk, Listener(), DiskBallast(disk, 0))
    try:
        turns.wait(store.declare("jobs", Settings(lease=LEASE), replace=True))
        # What was with a consumer at the cut comes back.
        turns.advance(1)
        there: list[tuple[int, bytes]] = []
        while taken := turns.wait(store.take("jobs", "", 1000, 2**30, None, None)).deliveries:
            there += [(delivery.sequence, delivery.body) for delivery in taken]
        (receipt,) = turns.wait(store.publish("jobs", [Message(body=b"next")]))
        return there, receipt.sequence
    finally:
        turns.wait(store.close())


def wrong(there: list[tuple[int, bytes]], following: int, marks: list[Any]) -> str:
    """What is not as it was answered, if anything."""
    published: dict[int, bytes] = {}
    settling: set[int] = set()
    settled: set[int] = set()
    for kind, values in marks:
        if kind == "published":
            published.update(values)
        else:
            (settling if kind == "settling" else settled).update(values)
    contents = dict(there)
    if len(contents) != len(there):
        return f"twice: {[sequence for sequence, _ in there]}"
    if missing := published.keys() - settling - contents.keys():
        return f"lost: {sorted(missing)}"
    if returned := settled & contents.keys():
        return f"back: {sorted(returned)}"
    for sequence, content in there:
        number, _, rest = content.partition(b":")
        if rest != Random(int(number)).randbytes(len(rest)) or published.get(sequence, content) != content:
            return f"another body: {sequence}"
    if following <= max([*published, *contents], default=0):
        return f"a number again: {following}"
    return ""


class WriteAnewTests(SynchronousTestCase):
    def test_a_file_that_is_written_anew_is_as_it_was_and_one_that_is_not_there_is_not_made(self):
        path = os.path.join(directory_for(self), "file")
        sqlite_module.write_anew(path)
        self.assertFalse(os.path.exists(path))
        content = Random(1).randbytes(2**21 + 5)
        with open(path, "wb") as file:
            file.write(content)
        sqlite_module.write_anew(path)
        with open(path, "rb") as file:
            self.assertEqual(file.read(), content)


class PowerTests(SynchronousTestCase):
    skip = sqlite_vfs.why_not() or None

    def setUp(self) -> None:
        # So that what is cut has checkpoints in it.
        self.patch(sqlite_module, "CHECKPOINT_PAGES", 40)

    def check_cuts(self, run: Run, count: int) -> None:
        for position, marks, after in run.disk.cuts(count, run.random):
            self.assertEqual(wrong(*found(run.directory, after), marks), "", position)

    def check_cut_now(self, run: Run) -> None:
        with run.disk.cut(run.random, Cut.NOTHING) as after:
            self.assertEqual(wrong(*found(run.directory, after), run.disk.marks), "")

    def test_what_was_answered_outlives_every_cut(self):
        with Disk() as disk:
            run = Run(self, disk, Random("cuts"))
            run.work(60)
            run.close()
            self.check_cuts(run, CUTS)

    def test_a_store_that_does_not_sync_would_be_found_out(self):
        with Disk() as disk:
            run = Run(self, disk, Random("no sync"))
            run.store._database._execute("PRAGMA synchronous = NORMAL")
            run.work(20)
            run.close()
            with self.assertRaises(self.failureException):
                self.check_cuts(run, 200)

    def test_a_publish_whose_sync_fails_has_no_receipt_and_after_a_new_start_all_receipts_hold(self):
        for seed in range(max(8, CUTS // 50)):
            with Disk() as disk:
                run = Run(self, disk, Random(seed))
                run.work(5)
                # Of what is lost nothing is on the disk, or some of it.
                disk.fail_sync(run.random.randrange(12), random=run.random.choice((None, run.random)))
                with self.assertRaises(StoreFailed):
                    run.work(1000)
                self.assertEqual(len(run.listener.failures), 1)
                answered = len(disk.marks)
                disk.heal()
                with self.assertRaises(StoreFailed):
                    run.wait(run.publish())
                self.assertEqual(len(disk.marks), answered)
                # The process starts again, and the machine does not: its cache shows what was lost.
                failed = len(disk.log)
                run.start()
                run.wait(run.publish())
                for position in range(failed, len(disk.log) + 1):
                    replay = disk.replay(position)
                    with replay.cut(run.random) as after:
                        self.assertEqual(wrong(*found(run.directory, after), replay.marks), "", (seed, position))
                run.work(5)
                self.check_cut_now(run)
                run.close()
                self.check_cuts(run, 10)

    def test_a_sync_that_fails_once_loses_nothing_that_was_answered_whether_the_store_ends_or_not(self):
        # SQLite says nothing of a checkpoint by itself that failed, and does it again.
        for seed in range(max(8, CUTS // 50)):
            with Disk() as disk:
                run = Run(self, disk, Random(seed))
                disk.fail_sync(run.random.randrange(80), times=1)
                with contextlib.suppress(StoreFailed):
                    run.work(20)
                self.check_cut_now(run)
                self.check_cuts(run, 10)

    def test_a_full_disk_refuses_to_publish_and_drains_and_takes_messages_again_when_there_is_room(self):
        turned = Turns()
        self.patch(disk_module, "monotonic", turned.seconds)
        with Disk() as disk:
            run = Run(self, disk, Random("full"))
            run.close()
            run.start(ballast=400_000)
            disk.capacity = disk.used + 500_000
            with self.assertRaises(StoreFull) as caught:
                for _ in range(1000):
                    run.wait(run.publish())
            self.assertIn("full", str(caught.exception))
            self.assertEqual(disk.reserved, 0)
            with self.assertRaises(StoreFull):
                run.wait(run.publish())
            while run.take(20, again=0.1):
                pass
            # The store looks each second whether there is room.
            for _ in range(100):
                turned.advance(2)
                run.turns.advance(2)
                run.wait(run.store.statistics("jobs"))
                if disk.reserved:
                    break
            self.assertEqual(disk.reserved, 400_000)
            self.assertEqual(run.listener.failures, [])
            run.wait(run.publish())
            run.close()
            disk.capacity = None
            self.check_cuts(run, 100)
        self.flushLoggedErrors()
