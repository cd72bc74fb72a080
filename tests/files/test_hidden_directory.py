"""The directory of unfinished copies, which a server and the clients at its own directory have in common."""

from __future__ import annotations

import os
import shutil

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from protoframe import Error
from protoframe.files import BadTransfer, Direction, _small
from protoframe.files._batches import Batches
from protoframe.files._partial import Partial
from protoframe.files._small import BatchWriter
from protoframe.files._tree import Tree
from tests.files.support import MIB, content, contents, ends, leftovers, write

HIDDEN = ".pf-files"


def test_the_last_of_those_who_use_it_removes_it(tmp_path):
    one, other = Tree(str(tmp_path)), Tree(str(tmp_path))
    one.partials()
    other.partials()
    one.close()
    assert os.listdir(tmp_path) == [HIDDEN]
    other.close()
    assert os.listdir(tmp_path) == []


def test_one_that_was_removed_is_made_anew_under_the_same_descriptor(tmp_path):
    tree = Tree(str(tmp_path))
    fd = tree.partials()
    os.rmdir(tmp_path / HIDDEN)
    assert tree.partials() == fd
    assert os.path.samestat(os.fstat(fd), os.stat(tmp_path / HIDDEN))
    assert not os.get_inheritable(fd)
    # It is locked as the first was.
    other = Tree(str(tmp_path))
    other.partials()
    other.close()
    assert os.listdir(tmp_path) == [HIDDEN]
    tree.close()
    assert os.listdir(tmp_path) == []


def test_one_that_is_of_somebody_else_by_now_is_not_removed(tmp_path):
    tree = Tree(str(tmp_path))
    tree.partials()
    os.rename(tmp_path / HIDDEN, tmp_path / "aside")
    os.mkdir(tmp_path / HIDDEN)
    tree.close()
    assert sorted(os.listdir(tmp_path)) == [HIDDEN, "aside"]


def test_root_that_is_gone_is_an_error(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    tree = Tree(str(root))
    root.rmdir()
    with pytest.raises(FileNotFoundError):
        tree.partials()
    tree.close()


@pytest.mark.parametrize("size", [10, MIB // 4])
@pytest.mark.parametrize("removed_by", ["client", "somebody"])
@pytest_twisted.ensureDeferred
async def test_server_is_written_to_after_a_client_has_got_into_its_directory(tmp_path, size, removed_by):
    async with ends(tmp_path) as both:
        write(both.local / "tree" / "file", content(size))
        await both.client.put(str(both.local / "tree"), "first")
        if removed_by == "client":
            await both.client.get("first/file", str(both.root / "got"))
            await both.client.sync(str(both.root), "first", direction=Direction.GET)
        else:
            shutil.rmtree(both.root / HIDDEN)
        await both.client.put(str(both.local / "tree" / "file"), "alone")
        summary = await both.client.put(str(both.local / "tree"), "again")
        assert (summary.files, summary.problems) == (1, [])
        found = contents(both.root)
        assert found["alone"] == found["again/file"] == content(size)
    assert leftovers(tmp_path / "root") == []
    assert not (tmp_path / "root" / HIDDEN).exists()


@pytest_twisted.ensureDeferred
async def test_copy_the_unfinished_one_of_which_is_removed_fails(tmp_path, monkeypatch):
    commit = Partial.commit

    def removed(self, before=None):
        shutil.rmtree(tmp_path / "root" / HIDDEN)
        return commit(self, before)

    monkeypatch.setattr(Partial, "commit", removed)
    async with ends(tmp_path) as both:
        source = write(both.local / "file", content(MIB))
        with pytest.raises(Error):
            await both.client.put(str(source), "file")
        assert contents(both.root) == {}
        monkeypatch.setattr(Partial, "commit", commit)
        await both.client.put(str(source), "file")
        assert contents(both.root) == {"file": content(MIB)}


@pytest.mark.parametrize("is_unnamed", [True, False])
@pytest.mark.parametrize("count", [1, 20])
@pytest_twisted.ensureDeferred
async def test_small_files_are_in_place_or_told_when_what_they_are_written_in_is_removed(
    tmp_path, monkeypatch, count, is_unnamed
):
    if not is_unnamed:
        monkeypatch.setattr(_small, "_UNNAMED", 0)
    sync = BatchWriter.sync

    def removed(self, staged):
        shutil.rmtree(tmp_path / "root" / HIDDEN, ignore_errors=True)
        return sync(self, staged)

    monkeypatch.setattr(BatchWriter, "sync", removed)
    async with ends(tmp_path) as both:
        for number in range(count):
            write(both.local / "tree" / f"{number}", b"x")
        try:
            summary = await both.client.put(str(both.local / "tree"), "")
        except Error:
            stored = 0
        else:
            stored = summary.files
            assert summary.failed == count - stored
            assert {problem.error for problem in summary.problems} <= {"NoSuchPath"}
        assert len(contents(both.root)) == stored
        # A file without a name is in no directory; but more cannot be begun while there is none.
        if count == 1 or not is_unnamed:
            assert stored == (count if is_unnamed else 0)


@pytest_twisted.ensureDeferred
async def test_server_that_answers_for_fewer_small_files_than_it_took_is_no_success(tmp_path, monkeypatch):
    async def silent(self):
        while not self._ended:
            await self._bell.wait()
        for outcome in ():
            yield outcome

    monkeypatch.setattr(Batches, "outcomes", silent)
    async with ends(tmp_path) as both:
        write(both.local / "tree" / "file", b"x")
        copying = both.client.put(str(both.local / "tree"), "")
        with pytest.raises(BadTransfer):
            await Deferred.fromCoroutine(copying).addTimeout(10, reactor)
