"""Small files that come in a stream, by themselves: what becomes of them where nobody waits any more."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.trial.unittest import SynchronousTestCase

from protoframe.files import Outcome, _batches, _small
from protoframe.files._batches import Batches
from protoframe.files._contract import Digest, SmallFile
from protoframe.files._small import BatchWriter
from protoframe.files._tree import Tree

SIZE = 100


class SlowDisk:
    """Does at once what is asked for, but for what is slow, the result of which comes when `finish` is called."""

    def __init__(self, slow: str = "stage") -> None:
        self._slow: list[tuple[Deferred[Any], Any]] = []
        self._name = slow

    def run(self, function: Any, *arguments: Any) -> Deferred[Any]:
        done: Deferred[Any] = execute(function, *arguments)
        if function.__name__ != self._name:
            return done
        late: Deferred[Any] = Deferred()
        done.addBoth(lambda result: self._slow.append((late, result)))
        return late

    def finish(self, *, last_first: bool = False) -> None:
        slow, self._slow = self._slow, []
        for late, result in reversed(slow) if last_first else slow:
            late.callback(result)


def small(path: str) -> SmallFile:
    data = b"x" * SIZE
    return SmallFile(path, 10**18, 0o644, hashlib.sha256(data).digest(), data)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Leaving(SynchronousTestCase):
    """Whoever leaves, or whatever fails, nothing stays that is not in its place."""

    slow: Any

    def setUp(self) -> None:
        directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, directory)
        self.tree = Tree(directory)
        self.addCleanup(self.tree.close)
        self.tree.partials()
        self.given_back: list[int] = []
        self.before = open_files()

    def batches(self, slow: str) -> Batches:
        self.slow = SlowDisk(slow)
        return Batches(self.slow, BatchWriter(self.tree, Digest.SHA256, None, self.given_back.append))

    def next(self, batches: Batches) -> Deferred[Any]:
        self.outcomes = batches.outcomes()
        return Deferred.fromCoroutine(anext(self.outcomes))  # type: ignore[arg-type]

    def assert_nothing_stays(self, files: int) -> None:
        self.assertEqual((os.listdir(self.tree.partials()), self.given_back), ([], [SIZE] * files))
        self.assertEqual(open_files(), self.before)

    def test_files_that_are_written_down_or_made_durable_go_once_that_has_ended(self) -> None:
        for slow in ("stage", "sync"):
            for times in (1, 3):
                self.given_back.clear()
                batches = self.batches(slow)
                batches.feed([small("file")])
                waiting = self.next(batches)
                held = open_files()
                self.assertGreater(held + len(os.listdir(self.tree.partials())), self.before + 1)
                # The second time while the first is waited for.
                for _ in range(times):
                    waiting.cancel()
                # Until nothing is written any more the tree is in use.
                self.assertEqual(open_files(), held)
                self.slow.finish()
                self.failureResultOf(waiting, CancelledError)
                self.assert_nothing_stays(1)

    def test_files_that_were_written_down_behind_those_that_could_not_be_go_as_well(self) -> None:
        batches = self.batches("stage")
        stage = BatchWriter.stage

        def fail(writer: BatchWriter, files: Any) -> Any:
            if files[0].path == "0":
                raise OSError("the disk is gone")
            return stage(writer, files)

        fail.__name__ = "stage"
        self.patch(BatchWriter, "stage", fail)
        batches.feed([small(str(number)) for number in range(512)])
        waiting = self.next(batches)
        self.slow.finish(last_first=True)
        self.failureResultOf(waiting, OSError)
        self.assert_nothing_stays(256)

    def test_outcomes_of_files_that_are_too_large_come_however_many_they_are(self) -> None:
        batches = self.batches("nothing")
        data = bytes(1_000_000)
        large = SmallFile("large", 0, 0o644, hashlib.sha256(data).digest(), data)
        for _ in range(200):
            batches.feed([large])
        batches.end()

        async def all_of_them() -> list[Outcome]:
            return [outcome async for some in batches.outcomes() for outcome in some]

        self.assertEqual(self.successResultOf(Deferred.fromCoroutine(all_of_them())), [Outcome.TOO_LARGE] * 200)
        self.assert_nothing_stays(0)

    def test_no_more_are_written_down_when_nobody_takes_what_became_of_them(self) -> None:
        self.patch(_batches, "_MOST_UNTOLD", 300)
        batches = self.batches("nothing")
        waiting = None
        for number in range(2000):
            if (waiting := batches.feed([small(str(number))])) is not None:
                break
        self.assertIsNotNone(waiting)
        in_place = len(os.listdir(self.tree.fd)) - 1
        self.assertLess(in_place, 600)
        full = Deferred.fromCoroutine(waiting)  # type: ignore[arg-type]
        self.assertEqual(len(self.successResultOf(self.next(batches))), in_place)
        batches.end()
        self.successResultOf(full)
        self.successResultOf(Deferred.fromCoroutine(self.outcomes.aclose()))


class LeavingNames(Leaving):
    """The same where a file system has no files without a name."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(_small, "_UNNAMED", 0)
