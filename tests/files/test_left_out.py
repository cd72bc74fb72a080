"""What of a tree is not copied is told, and is never taken for what is not there."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext

import msgspec
import pytest
import pytest_twisted
from zope.interface import implementer

from protoframe import IAuthenticator, Identity
from protoframe.files import Direction
from protoframe.files._tree import Tree
from protoframe.servers.files import Access, parse_rule
from tests.files.support import contents, ends, write


def close_directory(monkeypatch, tree, path, number=errno.EACCES):
    """Has a directory of a tree fail to be listed, whoever runs the tests."""
    names = Tree.names

    def closed(self, wanted, *rest):
        if self.root == str(tree) and wanted == path:
            raise OSError(number, os.strerror(number), path)
        return names(self, wanted, *rest)

    monkeypatch.setattr(Tree, "names", closed)


@pytest.mark.parametrize("is_dry", [False, True])
@pytest_twisted.ensureDeferred
async def test_pull_that_deletes_keeps_what_is_below_a_directory_that_the_server_cannot_read(
    tmp_path, monkeypatch, is_dry
):
    async with ends(tmp_path) as both:
        for place in (both.root / "tree", both.local / "tree"):
            write(place / "closed" / "deep" / "file", b"kept")
            write(place / "open" / "file", b"same")
        write(both.root / "tree" / "new", b"new")
        write(both.local / "tree" / "extra", b"extra")
        close_directory(monkeypatch, both.root, "tree/closed")
        changes = []
        summary = await both.client.sync(
            str(both.local / "tree"),
            "tree",
            direction=Direction.GET,
            delete=True,
            dry_run=changes.append if is_dry else None,
        )
        assert [(problem.path, problem.error) for problem in summary.problems] == [("closed", "PermissionError")]
        assert summary.removed == 0
        assert [change for change in changes if change.action.value == "remove"] == []
        assert contents(both.local / "tree")["closed/deep/file"] == b"kept"
        assert ("new" in contents(both.local / "tree")) is not is_dry


@pytest_twisted.ensureDeferred
async def test_put_tells_of_a_directory_of_the_server_that_cannot_be_read_and_removes_the_rest(tmp_path, monkeypatch):
    async with ends(tmp_path) as both:
        write(both.local / "tree" / "file", b"x")
        write(both.root / "tree" / "closed" / "file", b"x")
        write(both.root / "tree" / "extra", b"x")
        close_directory(monkeypatch, both.root, "tree/closed")
        summary = await both.client.sync(str(both.local / "tree"), "tree", delete=True)
        assert [problem.path for problem in summary.problems] == ["closed", "closed"]
        assert contents(both.root / "tree") == {"file": b"x", "closed/file": b"x"}


@pytest_twisted.ensureDeferred
async def test_listing_marks_a_directory_that_cannot_be_read_and_no_other(tmp_path, monkeypatch):
    async with ends(tmp_path) as both:
        for name in ("closed/file", "gone/file", "open/file"):
            write(both.root / name, b"x")
        close_directory(monkeypatch, both.root, "closed")
        close_directory(monkeypatch, both.root, "gone", errno.ENOENT)
        found = [(entry.path, entry.is_readable) async for entry in both.client.list(recursive=True)]
        assert found == [("closed", False), ("gone", True), ("open", True), ("open/file", True)]


def test_directory_that_can_be_listed_and_not_entered_is_not_taken_for_empty(tmp_path, monkeypatch):
    class Closed:
        name = "file"

        def is_file(self, *, follow_symlinks):
            return True

        def stat(self, *, follow_symlinks):
            raise PermissionError(errno.EACCES, "permission denied")

    tree = Tree(str(tmp_path))
    monkeypatch.setattr(os, "scandir", lambda fd: nullcontext([Closed()]))
    with pytest.raises(PermissionError):
        tree.names("")
    tree.close()


@pytest_twisted.ensureDeferred
async def test_pull_that_deletes_takes_what_is_closed_to_the_caller_for_what_is_not_there(tmp_path):
    @implementer(IAuthenticator)
    class Everybody:
        async def authenticate(self, shown):
            return Identity("ann", frozenset({"all"}))

    for end in ("root", "local"):
        for name in ("own/secret", "shared"):
            write(tmp_path / end / "tree" / name, b"x")
    access = Access([parse_rule("all=."), parse_rule("boss=tree/own")])
    async with ends(tmp_path, access=access, authenticator=Everybody()) as both:
        summary = await both.client.sync(str(both.local / "tree"), "tree", direction=Direction.GET, delete=True)
        assert (summary.problems, summary.removed) == ([], 2)
        assert contents(both.local / "tree") == {"shared": b"x"}


@pytest.mark.parametrize("is_sync", [False, True])
@pytest_twisted.ensureDeferred
async def test_names_that_may_not_travel_are_problems_and_the_rest_is_copied(tmp_path, is_sync):
    async with ends(tmp_path) as both:
        tree = both.local / "tree"
        write(tree / "d" / "a\\b", b"x")
        write(tree / "d" / "good", b"good")
        write(tree / "x\u202ey" / "file", b"x")
        (tree / ".pf-files").mkdir()
        (tree / "li\\nk").symlink_to("good")
        os.mkdir(os.fsencode(tree) + b"/\xff\xfe")
        copy = both.client.sync if is_sync else both.client.put
        summary = await copy(str(tree), "")
        assert contents(both.root) == {"d/good": b"good"}
        assert (summary.files, summary.failed) == (1, 3)
        assert sorted(problem.path for problem in summary.problems) == ["\\xff\\xfe", "d/a\\b", "x\u202ey"]
        assert {problem.status for problem in summary.problems} == {None}
        msgspec.json.encode(summary.problems)
        # The other way they are nobody's business.
        summary = await both.client.sync(str(tree), "", direction=Direction.GET, delete=True)
        assert (summary.problems, summary.removed) == ([], 0)
        assert sorted(os.listdir(tree / "d")) == ["a\\b", "good"]
