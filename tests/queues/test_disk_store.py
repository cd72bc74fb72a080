"""The store on disk, with its thread: what is committed together, what a call that fails harms, and how it ends."""

from __future__ import annotations

import queue
import shutil
import sqlite3
import tempfile
from unittest import mock

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from protoframe.queue import Message, NoSuchQueue, Settings, StoreFailed
from protoframe.servers.queue.disk import DiskStore
from protoframe.servers.queue.sqlite import SQLiteRows
from protoframe.servers.queue.store import Action, Verdict


class Reactor(Clock):
    """Virtual time; what the thread has done is done here when the test asks for it."""

    def __init__(self):
        super().__init__()
        self.done = queue.SimpleQueue()

    def callFromThread(self, function, *arguments):
        self.done.put((function, arguments))

    def turn(self):
        self.advance(0)
        function, arguments = self.done.get(timeout=30)
        function(*arguments)


class Listener:
    def __init__(self):
        self.failures = []

    def ready(self, queue, group):
        pass

    def lost(self, queue, group, tags):
        pass

    def failed(self, error):
        self.failures.append(error)


class DiskStoreTests(SynchronousTestCase):
    def setUp(self):
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)
        self.listener = Listener()
        self.store = None
        self.addCleanup(self.close)
        self.open()
        self.do(self.store.declare("q", Settings(), False))

    def open(self):
        self.reactor = Reactor()
        self.store = DiskStore(self.reactor, lambda: 1000.0, self.directory)
        return self.store.open(self.listener)

    def close(self):
        if self.store is not None:
            closing = self.store.close()
            while not closing.called:
                self.reactor.turn()
            self.store = None

    def do(self, answer):
        while not answer.called:
            self.reactor.turn()
        return self.successResultOf(answer)

    def publish(self, name="q"):
        return self.store.publish(name, [Message(body=b"x")])

    def test_calls_of_one_turn_share_a_commit(self):
        with mock.patch.object(SQLiteRows, "commit", autospec=True, side_effect=SQLiteRows.commit) as commit:
            answers = [self.publish() for _ in range(50)]
            self.reactor.turn()
        self.assertEqual([self.successResultOf(one)[0].sequence for one in answers], list(range(1, 51)))
        self.assertEqual(commit.call_count, 1)
        self.assertEqual(self.store.pending_bytes, 0)

    def test_a_call_that_is_refused_does_not_undo_its_neighbours(self):
        one, refused, other = self.publish(), self.publish("nowhere"), self.publish()
        self.reactor.turn()
        self.failureResultOf(refused, NoSuchQueue)
        self.assertEqual([self.successResultOf(each)[0].sequence for each in (one, other)], [1, 2])

    def test_a_call_that_fails_harms_itself_alone(self):
        one, other = self.publish(), None
        bad = self.store.publish("q", [Message(body=b"x", subject="\ud800")])
        other = self.publish()
        self.reactor.turn()
        self.failureResultOf(bad, UnicodeEncodeError)
        self.assertEqual([self.successResultOf(each)[0].sequence for each in (one, other)], [1, 2])
        self.assertEqual(self.do(self.store.statistics("q")).depth, 2)

    def test_what_neighbours_of_a_call_that_fails_have_to_tell_is_told(self):
        self.do(self.publish())
        (delivery,) = self.do(self.store.take("q", "", 1, 100, None, None)).deliveries
        self.listener.ready = lambda *where: told.append(where)
        told = []
        self.store.settle("q", "", [delivery.tag], Verdict(Action.AGAIN))
        bad = self.store.publish("q", [Message(body=b"x", subject="\ud800")])
        self.reactor.turn()
        self.failureResultOf(bad, UnicodeEncodeError)
        self.assertEqual(told, [("q", "")])

    def test_a_disk_that_fails_ends_the_store_and_nobody_is_told_that_anything_was_done(self):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        with mock.patch.object(SQLiteRows, "commit", side_effect=error):
            answers = [self.publish(), self.publish("nowhere")]
            self.reactor.advance(0)
            answers.append(self.publish())
            self.reactor.turn()
        answers.append(self.publish())
        for answer in answers:
            self.failureResultOf(answer, StoreFailed)
        self.assertEqual(len(self.listener.failures), 1)
        self.assertEqual(self.store.pending_bytes, 0)

    def test_what_was_asked_for_is_done_before_the_end_and_is_there_afterwards(self):
        answers = [self.publish() for _ in range(3)]
        self.close()
        for answer in answers:
            self.successResultOf(answer)
        self.assertEqual([name for name, _ in self.open()], ["q"])
        self.assertEqual(self.do(self.store.statistics("q")).depth, 3)
        self.assertEqual(self.do(self.publish())[0].sequence, 4)
