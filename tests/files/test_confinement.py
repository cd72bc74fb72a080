"""Nothing outside of the root, whatever the name, and whatever happens meanwhile."""

from __future__ import annotations

import os
import threading
import time

import pytest
import pytest_twisted

from protoframe import Error
from protoframe.files import Digest, Missing, NoSuchPath, Outcome, SmallFile, Source
from protoframe.files._blocks import digest_function
from protoframe.files._names import is_name, split_path
from protoframe.files._tree import Tree
from tests.files.hostile import hostile_names
from tests.files.support import contents, ends, write
from tests.processes import PATIENCE

#: Of how many verbs one is tried with a name, and how often a directory that is swapped is stepped into.
EVERY = 1 if "PROTOFRAME_SEEDS" in os.environ else 4
ROUNDS = 10 * int(os.environ.get("PROTOFRAME_SEEDS", "150"))
SHA256 = Digest.SHA256


async def nothing(*items):
    for item in items:
        yield item


async def fault(awaited):
    """The error of a call or a stream, as it came over the wire."""
    try:
        if hasattr(awaited, "__aiter__"):
            async for _ in awaited:
                pass
        else:
            await awaited
    except Error as error:
        return type(error), error.message, error.detail, error.status
    return None


def verbs(files, path):
    source = Source(3, 1, 0o644, 16384)
    return {
        "stat": lambda: files.stat(path),
        "list": lambda: files.list(path),
        "read": lambda: files.read(path, SHA256, nothing()),
        "write": lambda: files.write(path, source, nothing()),
        "verify": lambda: files.verify(path),
        "remove": lambda: files.remove(path),
        "rename": lambda: files.rename(path, "elsewhere"),
        "rename to": lambda: files.rename("good/file", path),
        "mkdir": lambda: files.mkdir(path, parents=True),
    }


def small(path, data=b"x"):
    return SmallFile(path, 1, 0o644, digest_function(SHA256)(data), data)


def test_corpus_is_large_and_every_name_is_refused():
    names = hostile_names()
    assert len(names) >= 500
    assert [name for name in names if split_path(name) is not None] == []


@pytest.mark.parametrize(
    "name", ["a", "A b", "é", "日本語", ".hidden", "a.b..c", "x" * 255, "👩\u200d💻", "-rf", "con", "a:b"]
)
def test_ordinary_names_are_taken(name):
    assert is_name(name)


@pytest_twisted.ensureDeferred
async def test_hostile_names_are_refused_alike_and_nothing_outside_is_touched(tmp_path):
    secret = write(tmp_path / "secret", b"sentinel")
    write(tmp_path / "outside" / "file", b"sentinel")
    before = contents(tmp_path / "outside"), secret.stat().st_mtime_ns
    async with ends(tmp_path) as both:
        write(both.root / "good" / "file", b"good")
        files = both.client.files
        expected = await fault(files.stat("absent"))
        assert expected is not None
        assert expected[0] is NoSuchPath
        names = hostile_names()
        for number, name in enumerate(names):
            # So that each verb has its turn with each trick, of which there are many names.
            for verb, call in list(verbs(files, name).items())[number % EVERY :: EVERY]:
                assert await fault(call()) == expected, (verb, name)
        got = [one async for some in files.read_many(nothing(names[:500], names[500:]), SHA256) for one in some]
        assert got == [Missing(name) for name in names]
        assert set(await files.verify_many(names[:1000])) == {b""}
        outcomes = [
            one
            async for some in files.write_many(nothing([*map(small, names[:500])], [*map(small, names[500:])]), SHA256)
            for one in some
        ]
        assert set(outcomes) == {Outcome.REFUSED}
        assert len(outcomes) == len(names)
        assert contents(both.root) == {"good/file": b"good"}
    assert (contents(tmp_path / "outside"), secret.stat().st_mtime_ns) == before
    assert sorted(os.listdir(tmp_path)) == ["local", "outside", "root", "secret"]


@pytest_twisted.ensureDeferred
async def test_links_devices_and_pipes_are_not_there(tmp_path):
    write(tmp_path / "outside" / "file", b"sentinel")
    async with ends(tmp_path) as both:
        os.symlink(tmp_path / "outside", both.root / "link")
        os.symlink("/etc/passwd", both.root / "passwd")
        os.symlink("loop", both.root / "loop")
        os.mkfifo(both.root / "pipe")
        write(both.root / "good" / "file", b"good")
        write(both.root / "closed" / "file", b"")
        files = both.client.files
        expected = await fault(files.stat("absent"))
        for name in ["link", "link/file", "passwd", "loop", "pipe", "good/file/x"]:
            for verb, call in verbs(files, name).items():
                assert await fault(call()) == expected, (verb, name)
        assert [entry.path async for entry in files.list("")] == ["closed", "good"]
        outcomes = [
            one async for some in files.write_many(nothing([small("link/new"), small("pipe")]), SHA256) for one in some
        ]
        assert outcomes == [Outcome.REFUSED, Outcome.REFUSED]
        assert contents(tmp_path / "outside") == {"file": b"sentinel"}


def test_directory_that_is_swapped_with_a_link_leads_nowhere(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    write(root / "d" / "file", b"inside")
    write(outside / "file", b"outside")
    link = tmp_path / "root" / "link"
    os.symlink(outside, link)
    tree = Tree(str(root))
    over = threading.Event()

    def swap():
        while not over.is_set():
            os.rename(root / "d", root / "real")
            os.rename(root / "link", root / "d")
            os.rename(root / "d", root / "link")
            os.rename(root / "real", root / "d")

    swapping = threading.Thread(target=swap)
    swapping.start()
    found, missed = 0, 0
    rounds, until = 0, time.monotonic() + PATIENCE
    try:
        # On a busy machine the other thread may not have come to its turn: both have to be seen.
        while rounds < ROUNDS or (not (found and missed) and time.monotonic() < until):
            rounds += 1
            try:
                fd = tree.open_file("d/file")
            except OSError:
                missed += 1
                continue
            try:
                assert os.read(fd, 20) == b"inside"
            finally:
                os.close(fd)
            found += 1
            try:
                tree.mkdir("d/new")
                tree.remove("d/new")
            except OSError:
                missed += 1
    finally:
        over.set()
        swapping.join()
        tree.close()
    assert found
    assert missed
    assert contents(outside) == {"file": b"outside"}
    assert os.listdir(outside) == ["file"]
