"""Small files that come in a stream, by themselves: what becomes of them where nobody waits any more."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.trial.unittest import SynchronousTestCase

from protoframe.files import _small
from protoframe.files._batches import Batches
from protoframe.files._contract import Digest, SmallFile
from protoframe.files._small import BatchWriter
from protoframe.files._tree import Tree


class SlowDisk:
    """Does at once what is asked for, but for `stage`, the result of which comes when `finish` is called."""

    def __init__(self) -> None:
        self._slow: list[tuple[Deferred[Any], Any]] = []

    def run(self, function: Any, *arguments: Any) -> Deferred[Any]:
        done: Deferred[Any] = execute(function, *arguments)
        if function.__name__ != "stage":
            return done
        late: Deferred[Any] = Deferred()
        done.addBoth(lambda result: self._slow.append((late, result)))
        return late

    def finish(self) -> None:
        for late, result in self._slow:
            late.callback(result)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Leaving(SynchronousTestCase):
    is_unnamed = True

    def test_files_that_were_being_written_down_are_removed_and_given_back(self) -> None:
        directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, directory)
        tree = Tree(directory)
        self.addCleanup(tree.close)
        given_back: list[int] = []
        disk: Any = SlowDisk()
        batches = Batches(disk, BatchWriter(tree, Digest.SHA256, None, given_back.append))
        data = b"x" * 100
        batches.feed([SmallFile("file", 10**18, 0o644, hashlib.sha256(data).digest(), data)])
        waiting: Deferred[Any] = Deferred.fromCoroutine(anext(batches.outcomes()))  # type: ignore[arg-type]
        held = open_files()
        waiting.cancel()
        # Until nothing is written any more the tree is in use.
        self.assertEqual(open_files(), held)
        disk.finish()
        self.failureResultOf(waiting, CancelledError)
        self.assertEqual((os.listdir(tree.partials()), given_back), ([], [100]))
        self.assertEqual(open_files(), held - self.is_unnamed)


class LeavingNames(Leaving):
    """The same where a file system has no files without a name."""

    is_unnamed = False

    def setUp(self) -> None:
        self.patch(_small, "_UNNAMED", 0)
