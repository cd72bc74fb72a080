"""Copies over real TCP: whole, resumed, repaired, refused; never half a file under its final name."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import deferLater
from zope.interface import implementer

from protoframe import Backoff, IAuthenticator, Identity, Internal, Unavailable
from protoframe.files import (
    BadTransfer,
    Block,
    CorruptCopy,
    Digest,
    DigestUnavailable,
    Direction,
    FileClient,
    FileTooLarge,
    NoSuchPath,
    OverQuota,
    ReadOnly,
    SmallFile,
    Source,
    SourceChanged,
    _batches,
    _partial,
    _progress,
    _system,
)
from protoframe.files._blocks import BlockMap, digest_function
from protoframe.files._partial import Partial, clean_partials
from protoframe.files._small import BatchWriter
from protoframe.files._source import SourceFile
from protoframe.files._system import rename_to_new
from protoframe.files._tree import Tree
from protoframe.files._trees import TreeCopy
from protoframe.servers.files import Access, _service, parse_rule
from tests.files.support import MIB, content, contents, ends, leftovers, write

#: How often a connection is lost in one copy; of more than twenty nothing is promised.
LOST = min(20, int(os.environ.get("PROTOFRAME_KILLS", "5")))
QUICK = {"backoff": Backoff(first=0.001, longest=0.01)}


def both_ways(function):
    return pytest.mark.parametrize("way", ["put", "get"])(pytest_twisted.ensureDeferred(function))


class Case:
    """One file and the end that it goes to."""

    def __init__(self, both, way, size, name="file"):
        self.both = both
        self.data = content(size)
        self.source = write((both.local if way == "put" else both.root) / "from" / name, self.data)
        self.there = (both.root if way == "put" else both.local) / name
        self.receiving = both.root if way == "put" else both.local
        self.arguments = (str(self.source), name) if way == "put" else (f"from/{name}", str(self.there))
        self.copy = getattr(both.client, way)

    async def run(self):
        return await self.copy(*self.arguments)


@pytest.mark.parametrize("size", [0, 1, 16384, 16385, 65536, 3 * MIB + 7])
@both_ways
async def test_copy_is_the_same_with_its_time_and_mode(tmp_path, way, size):
    async with ends(tmp_path) as both:
        case = Case(both, way, size)
        os.chmod(case.source, 0o640)
        os.utime(case.source, ns=(1, 1_600_000_000_123_456_789))
        summary = await case.run()
        assert case.there.read_bytes() == case.data
        status = case.there.stat()
        assert (status.st_mtime_ns, status.st_mode & 0o777) == (1_600_000_000_123_456_789, 0o640)
        assert (summary.files, summary.octets, summary.moved, summary.moved_again) == (1, size, size, 0)
        assert leftovers(case.receiving) == []


@both_ways
async def test_lost_connections_cost_less_than_five_hundredths(tmp_path, way, monkeypatch):
    size = min(16, 2 * LOST) * MIB
    async with ends(tmp_path, client=QUICK) as both:
        case = Case(both, way, size)
        cuts = [size * number // (LOST + 1) for number in range(1, LOST + 1)]
        stored = 0
        attempts = []
        lock = threading.Lock()
        take = Partial.take

        def counted(self, items):
            nonlocal stored
            result = take(self, items)
            with lock:
                stored += result[1]
                # Each attempt once.
                if cuts and stored >= cuts[0] and self not in attempts:
                    del cuts[0]
                    attempts.append(self)
                    reactor.callFromThread(both.cut)
            return result

        monkeypatch.setattr(Partial, "take", counted)
        summary = await case.run()
        assert case.there.read_bytes() == case.data
        assert cuts == []
        assert summary.interruptions == LOST
        assert summary.moved >= size
        assert summary.moved - size == summary.moved_again < 0.05 * size
        assert leftovers(case.receiving) == []


@both_ways
async def test_block_that_comes_wrong_is_sent_again_alone(tmp_path, way, monkeypatch):
    stretch = SourceFile.stretch
    flipped = []

    def flip(self, first, wanted, octets):
        items, index = stretch(self, first, wanted, octets)
        for number, item in enumerate(items):
            if isinstance(item, Block) and item.index == 70:
                flipped.append(item.index)
                items[number] = Block(70, item.digest, bytes([item.data[0] ^ 1]) + item.data[1:])
        return items, index

    monkeypatch.setattr(SourceFile, "stretch", flip)
    async with ends(tmp_path) as both:
        case = Case(both, way, 4 * MIB)
        summary = await case.run()
        assert flipped == [70]
        assert case.there.read_bytes() == case.data
        assert summary.moved == 4 * MIB + 16384


@pytest.mark.parametrize("is_watched", [True, False])
@both_ways
async def test_bit_that_somebody_flips_on_the_receiving_disk_is_repaired(tmp_path, way, monkeypatch, is_watched):
    """Although the block was read back before, and found right."""
    if not is_watched:
        monkeypatch.setattr(_system, "_inotify_init1", None)
    async with ends(tmp_path) as both:
        case = Case(both, way, 8 * MIB)
        take = Partial.take
        flipped = []

        def flip(self, items):
            if not flipped and self.blocks.has(5):
                while self.unchecked:
                    time.sleep(0.001)
                (part,) = (case.receiving / ".pf-files").glob("*.part")
                with part.open("r+b") as file:
                    file.seek(5 * 16384 + 9)
                    file.write(bytes([case.data[5 * 16384 + 9] ^ 64]))
                flipped.append(5)
            return take(self, items)

        monkeypatch.setattr(Partial, "take", flip)
        summary = await case.run()
        assert flipped == [5]
        assert case.there.read_bytes() == case.data
        assert summary.moved == 8 * MIB + 16384


@both_ways
async def test_what_nobody_else_has_opened_is_read_back_once(tmp_path, way, monkeypatch):
    wrong = Partial._wrong
    read = []
    monkeypatch.setattr(Partial, "_wrong", lambda self, first, count: read.append(count) or wrong(self, first, count))
    async with ends(tmp_path) as both:
        await Case(both, way, 8 * MIB).run()
    assert sum(read) == 8 * MIB // 16384


def _writes_wrong(times, monkeypatch):
    """Has a bit of block 5 written wrong so many times; the list has an item for each."""
    write_at = _partial._write_at
    wrong = []

    def spoil(fd, pieces, at):
        octets = write_at(fd, pieces, at)
        if at <= 5 * 16384 < at + octets and len(wrong) < times:
            os.pwrite(fd, bytes([os.pread(fd, 1, 5 * 16384)[0] ^ 2]), 5 * 16384)
            wrong.append(at)
        return octets

    monkeypatch.setattr(_partial, "_write_at", spoil)
    return wrong


@both_ways
async def test_bit_that_is_written_wrong_is_repaired(tmp_path, way, monkeypatch):
    wrong = _writes_wrong(2, monkeypatch)
    async with ends(tmp_path) as both:
        case = Case(both, way, 4 * MIB)
        summary = await case.run()
        assert len(wrong) == 2
        assert case.there.read_bytes() == case.data
        assert summary.moved == 4 * MIB + 2 * 16384


@both_ways
async def test_disk_that_never_keeps_what_is_written_is_reported_and_nothing_delivered(tmp_path, way, monkeypatch):
    _writes_wrong(1 << 30, monkeypatch)
    async with ends(tmp_path) as both:
        case = Case(both, way, MIB)
        with pytest.raises(CorruptCopy):
            await case.run()
        assert not case.there.exists()
        assert leftovers(case.receiving) == []


@both_ways
async def test_bit_that_flips_in_an_unfinished_copy_is_repaired_when_it_goes_on(tmp_path, way, monkeypatch):
    async with ends(tmp_path, client={**QUICK, "tries": 1}) as both:
        case = Case(both, way, 4 * MIB)
        take = Partial.take
        monkeypatch.setattr(Partial, "take", lambda self, items: _cut_after(both, take(self, items), self, MIB))
        with pytest.raises(Unavailable):
            await case.run()
        monkeypatch.setattr(Partial, "take", take)
        assert not case.there.exists()
    (part,) = (case.receiving / ".pf-files").glob("*.part")
    with part.open("r+b") as file:
        file.seek(20_000)
        file.write(bytes([case.data[20_000] ^ 1]))
    # Both ends are started anew.
    async with ends(tmp_path) as both:
        summary = await getattr(both.client, way)(*case.arguments)
        assert case.there.read_bytes() == case.data
        assert 0 < summary.moved < 3.3 * MIB
        assert leftovers(case.receiving) == []


@both_ways
async def test_unfinished_copy_may_be_gone_on_with_as_soon_as_both_ends_have_stopped(tmp_path, way, monkeypatch):
    write_down, goes_on = Partial._write, threading.Event()

    def wait(self, run):
        reactor.callFromThread(both.cut)
        reactor.callFromThread(reactor.callLater, 0.3, goes_on.set)
        assert goes_on.wait(30)
        return write_down(self, run)

    async with ends(tmp_path, client={**QUICK, "tries": 1}) as both:
        case = Case(both, way, 4 * MIB)
        monkeypatch.setattr(Partial, "_write", wait)
        with pytest.raises(Unavailable):
            await case.run()
        monkeypatch.setattr(Partial, "_write", write_down)
    # What was being written when the connection was lost is written, and counts.
    assert goes_on.is_set()
    async with ends(tmp_path) as both:
        summary = await getattr(both.client, way)(*case.arguments)
        assert case.there.read_bytes() == case.data
        assert 0 < summary.moved < 4 * MIB


@both_ways
async def test_copy_that_is_given_up_while_it_is_opened_is_let_go(tmp_path, way, monkeypatch):
    begin, begins, goes_on = Partial._begin, Deferred(), threading.Event()

    def wait(self):
        reactor.callFromThread(begins.callback, None)
        assert goes_on.wait(30)
        begin(self)

    async with ends(tmp_path) as both:
        case = Case(both, way, MIB)
        monkeypatch.setattr(Partial, "_begin", wait)
        copying = ensureDeferred(case.run())
        await begins
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(Partial, "_begin", begin)
        copying.cancel()
        if way == "put":
            with pytest.raises(CancelledError):
                await copying
            # The server knows by now, and waits until it can let it go.
            await both.client.stat("")
            again = ensureDeferred(case.run())
            goes_on.set()
            await again
        else:
            over = []
            copying.addBoth(over.append)
            await both.client.stat("")
            assert over == []
            goes_on.set()
            await copying
            assert over[0].check(CancelledError)
            await case.run()
        assert case.there.read_bytes() == case.data
        assert len(os.listdir("/proc/self/fd")) < before


@pytest_twisted.ensureDeferred
async def test_put_that_is_cancelled_and_then_cut_off_is_let_go_and_counted_once(tmp_path, monkeypatch):
    write_down, begins, goes_on = Partial._write, Deferred(), threading.Event()

    def wait(self, run):
        if not goes_on.is_set():
            reactor.callFromThread(lambda: begins.called or begins.callback(None))
            assert goes_on.wait(30)
        return write_down(self, run)

    monkeypatch.setattr(Partial, "_write", wait)
    async with ends(tmp_path, quota=100 * MIB) as both:
        case = Case(both, "put", 3 * MIB)
        copying = ensureDeferred(case.run())
        await begins
        copying.cancel()
        with pytest.raises(CancelledError):
            await copying
        # The server has heard of that, and waits for what is being written, when the connection goes as well.
        await both.client.stat("")
        both.cut()
        again = ensureDeferred(case.run())
        await both.client.stat("")
        goes_on.set()
        await again
        assert case.there.read_bytes() == case.data
        assert (both.factory.copies, both.factory.kept, both.factory.quota.used) == ({}, {}, 3 * MIB)


@both_ways
async def test_tree_that_is_given_up_is_not_copied_any_further(tmp_path, way):
    async with ends(tmp_path) as both:
        source, target = (both.local, both.root) if way == "put" else (both.root, both.local)
        for number in range(3000):
            write(source / "tree" / str(number % 7) / str(number), b"x" * 1000)
        there = target / "copy"
        arguments = (str(source / "tree"), "copy") if way == "put" else ("tree", str(there))
        before = len(os.listdir("/proc/self/fd"))
        copying = ensureDeferred(getattr(both.client, way)(*arguments))
        while not there.exists() or len(contents(there)) < 10:
            await deferLater(reactor, 0.002)
        copying.cancel()
        with pytest.raises(CancelledError):
            await copying
        # What the server has still to do it has done when it is asked for something else.
        await both.client.stat("")
        while leftovers(both.root) or both.factory.disk._under_way:
            await deferLater(reactor, 0.002)
        found = contents(there)
        assert len(found) < 3000
        await deferLater(reactor, 0.1)
        assert contents(there) == found
        assert len(os.listdir("/proc/self/fd")) <= before + 8
        assert leftovers(both.local) == []


def test_unfinished_copy_that_has_the_mode_of_its_source_is_gone_on_with_and_removed(tmp_path, monkeypatch):
    opened = os.open

    def denied(name, flags, *arguments, **options):
        # As it is for anybody but root.
        found = [one for one in (tmp_path / ".pf-files").iterdir() if one.name == name]
        if found and not found[0].stat().st_mode & 0o600 and not flags & os.O_PATH:
            raise PermissionError(name)
        return opened(name, flags, *arguments, **options)

    tree = Tree(str(tmp_path))
    source = Source(5, 5, 0o044, 16384)
    partial = Partial(tree, "x", source)
    partial.sync()
    partial.close()
    monkeypatch.setattr(os, "open", denied)
    partial = Partial(tree, "x", source)
    assert partial.attempts == 2
    partial.sync()
    partial.close()
    assert clean_partials(tree, -3600) == 2
    tree.close()
    assert leftovers(tmp_path) == []


@both_ways
async def test_source_that_is_given_up_while_it_is_opened_is_closed(tmp_path, way, monkeypatch):
    begin, begins, goes_on = SourceFile._begin, Deferred(), threading.Event()

    def wait(self, *arguments):
        reactor.callFromThread(begins.callback, None)
        assert goes_on.wait(30)
        begin(self, *arguments)

    async with ends(tmp_path) as both:
        case = Case(both, way, MIB)
        monkeypatch.setattr(SourceFile, "_begin", wait)
        copying = ensureDeferred(case.run())
        await begins
        assert _is_open(case.source)
        copying.cancel()
        # The server knows by now as well.
        await both.client.stat("")
        goes_on.set()
        with pytest.raises(CancelledError):
            await copying
    assert not _is_open(case.source)


@pytest_twisted.ensureDeferred
async def test_what_fails_of_a_tree_is_raised_while_its_other_parts_still_run(tmp_path, monkeypatch):
    def fail(self, staged):
        raise OSError(errno.EIO, "the disk is gone")

    listing = TreeCopy._list

    async def never_listed(self, *, differing):
        await listing(self, differing=differing)
        await Deferred()

    monkeypatch.setattr(TreeCopy, "_list", never_listed)
    monkeypatch.setattr(BatchWriter, "sync", fail)
    async with ends(tmp_path) as both:
        for number in range(2000):
            write(both.local / "tree" / f"{number}", b"x")
        with pytest.raises(Internal):
            await both.client.put(str(both.local / "tree"), "")
        assert leftovers(both.root) == []


@pytest_twisted.ensureDeferred
async def test_more_small_files_in_an_item_than_may_be_are_refused(tmp_path):
    async def too_many(item):
        yield [item] * 1025

    async with ends(tmp_path) as both:
        files = both.client.files
        with pytest.raises(BadTransfer):
            assert [one async for one in files.read_many(too_many("x"), Digest.SHA256)] == []
        small = SmallFile("x", 0, 0o644, hashlib.sha256(b"").digest(), b"")
        with pytest.raises(BadTransfer):
            assert [one async for one in files.write_many(too_many(small), Digest.SHA256)] == []
        assert leftovers(both.root) == []


def _is_open(path):
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return str(path) in [os.readlink(link) for link in links if os.path.lexists(link)]


def _cut_after(both, result, partial, octets):
    if partial.blocks.size - partial.blocks.missing_size() >= octets:
        reactor.callFromThread(both.cut)
    return result


@both_ways
async def test_source_that_changes_during_the_copy_is_told_and_nothing_delivered(tmp_path, way, monkeypatch):
    whole = SourceFile.whole
    async with ends(tmp_path) as both:
        case = Case(both, way, MIB)

        def change(self):
            with case.source.open("r+b") as file:
                file.write(b"changed")
            return whole(self)

        monkeypatch.setattr(SourceFile, "whole", change)
        with pytest.raises(SourceChanged):
            await case.run()
        assert not case.there.exists()


@both_ways
async def test_another_source_does_not_go_on_with_an_unfinished_copy(tmp_path, way, monkeypatch):
    async with ends(tmp_path, client={**QUICK, "tries": 1}) as both:
        case = Case(both, way, 2 * MIB)
        take = Partial.take
        monkeypatch.setattr(Partial, "take", lambda self, items: _cut_after(both, take(self, items), self, MIB))
        with pytest.raises(Unavailable):
            await case.run()
        monkeypatch.setattr(Partial, "take", take)
        case.source.write_bytes(content(2 * MIB, seed=9))
        os.utime(case.source, ns=(5, 5))
    async with ends(tmp_path) as both:
        summary = await getattr(both.client, way)(*case.arguments)
        assert case.there.read_bytes() == content(2 * MIB, seed=9)
        assert summary.moved == 2 * MIB


@both_ways
async def test_holes_are_neither_sent_nor_written(tmp_path, way):
    size = 6 * 1024 * MIB + 12345
    async with ends(tmp_path) as both:
        case = Case(both, way, 0)
        with case.source.open("r+b") as file:
            file.truncate(size)
            for at in (0, 3 * 1024 * MIB, 5 * 1024 * MIB + 1):
                file.seek(at)
                file.write(b"here")
        summary = await case.run()
        assert summary.octets == size
        assert summary.moved <= 5 * 2 * MIB
        status = case.there.stat()
        assert status.st_size == size
        assert status.st_blocks * 512 <= 10 * MIB
        with case.there.open("rb") as file:
            for at in (0, 3 * 1024 * MIB, 5 * 1024 * MIB + 1):
                file.seek(at)
                assert file.read(5) == b"here\0"


async def copy_tree(both, way):
    local = str(both.local / "tree")
    return await (both.client.put(local, "tree") if way == "put" else both.client.get("tree", local))


def make_tree(root, count):
    for number in range(count):
        write(root / f"d{number % 5}" / f"e{number % 3}" / f"f{number}", content(number, seed=number))
    write(root / "d1.5" / "large", content(200_000))
    write(root / "d1" / "é", b"x")
    (root / "empty").mkdir()
    return contents(root)


@both_ways
async def test_tree_is_copied_and_then_only_what_differs(tmp_path, way):
    async with ends(tmp_path) as both:
        source, target = (both.local, both.root) if way == "put" else (both.root, both.local)
        every = make_tree(source / "tree", 100)
        summary = await copy_tree(both, way)
        assert contents(target / "tree") == every
        assert (target / "tree" / "empty").is_dir()
        assert (summary.files, summary.failed) == (len(every), 0)

        async def sync(**options):
            return await both.client.sync(str(both.local / "tree"), "tree", direction=Direction(way), **options)

        assert (await sync()).skipped == len(every)
        write(source / "tree" / "d2" / "new", b"new")
        (source / "tree" / "d1.5" / "large").unlink()
        (source / "tree" / "d1.5").rmdir()
        same_size = write(source / "tree" / "d0" / "e0" / "f30", bytes(30))
        os.utime(same_size, ns=(1, (target / "tree" / "d0" / "e0" / "f30").stat().st_mtime_ns))
        summary = await sync(delete=True)
        assert (summary.files, summary.removed, summary.skipped) == (1, 2, len(every) - 1)
        assert contents(target / "tree") != contents(source / "tree")
        summary = await sync(by_digest=True)
        assert summary.files == 1
        assert contents(target / "tree") == contents(source / "tree")
        assert leftovers(target) == leftovers(target / "tree") == []


@both_ways
async def test_tree_goes_on_after_lost_connections(tmp_path, way, monkeypatch):
    # In pieces of 128: as the sending end reads the second, third and fourth.
    read_small = _batches.read_small
    calls = []

    async with ends(tmp_path, client=QUICK) as both:
        source, target = (both.local, both.root) if way == "put" else (both.root, both.local)
        every = make_tree(source / "tree", 520)

        def cut(*arguments):
            calls.append(1)
            if len(calls) in {2, 3, 4}:
                reactor.callFromThread(both.cut)
            return read_small(*arguments)

        monkeypatch.setattr(_batches, "read_small", cut)
        summary = await copy_tree(both, way)
        assert contents(target / "tree") == every
        assert summary.failed == 0
        assert summary.interruptions >= 1


@both_ways
async def test_many_small_files_are_compared_by_their_contents_in_few_calls(tmp_path, way, monkeypatch):
    calls = []
    digests = _service.small_digests

    def counted(tree, paths, digest):
        calls.append(len(paths))
        return digests(tree, paths, digest)

    monkeypatch.setattr(_service, "small_digests", counted)
    async with ends(tmp_path) as both:
        source, target = (both.local, both.root) if way == "put" else (both.root, both.local)
        for number in range(140):
            data = content(number * 300, seed=number)
            for end in (source, target):
                file = write(end / "tree" / f"{number:03}", data)
                os.utime(file, ns=(5, 5))
        # The same size and time, and other contents: a small file, and one of several blocks.
        for name in ("003", "130"):
            file = target / "tree" / name
            file.write_bytes(bytes(file.stat().st_size))
            os.utime(file, ns=(5, 5))
        local = str(both.local / "tree")
        summary = await both.client.sync(local, "tree", direction=Direction(way), by_digest=True)
        assert (summary.files, summary.skipped, summary.failed) == (2, 138, 0)
        assert contents(target / "tree") == contents(source / "tree")
        assert sum(calls) == 140
        assert len(calls) <= 10


@pytest_twisted.ensureDeferred
async def test_digest_of_a_small_file_is_that_of_any_file(tmp_path):
    async with ends(tmp_path) as both:
        for size in (0, 1, 16384, 16385, 65536, 65537):
            write(both.root / f"{size}", content(size))
        there = [str(size) for size in (0, 1, 16384, 16385, 65536)]
        found = await both.client.files.verify_many([*there, "65537", "absent", "0"])
        assert found == [*[(await both.client.verify(path)).digest for path in there], b"", b"", found[0]]
        with pytest.raises(BadTransfer):
            await both.client.files.verify_many(["x"] * 1025)


@pytest_twisted.ensureDeferred
async def test_quota_and_size_limit_hold_and_are_given_back(tmp_path):
    async with ends(tmp_path, quota=300_000, max_file=200_000) as both:
        write(both.local / "large", content(200_001))
        write(both.local / "half", content(160_000))
        with pytest.raises(FileTooLarge) as large:
            await both.client.put(str(both.local / "large"), "x")
        assert large.value.limit == 200_000
        await both.client.put(str(both.local / "half"), "one")
        with pytest.raises(OverQuota) as over:
            await both.client.put(str(both.local / "half"), "two")
        assert over.value.left == 140_000
        for number in range(10):
            write(both.local / "many" / str(number), content(20_000, seed=number))
        summary = await both.client.put(str(both.local / "many"), "many")
        assert (summary.files, summary.failed) == (7, 3)
        assert {problem.error for problem in summary.problems} == {"OverQuota"}
        await both.client.remove("one")
        await both.client.put(str(both.local / "half"), "two")
        assert both.factory.quota.used == 300_000 == sum(map(len, contents(both.root).values()))


@pytest_twisted.ensureDeferred
async def test_unfinished_copy_counts_against_the_quota_until_it_is_done(tmp_path, monkeypatch):
    async with ends(tmp_path, client={**QUICK, "tries": 1}, quota=3 * MIB) as both:
        case = Case(both, "put", 2 * MIB)
        take = Partial.take
        monkeypatch.setattr(Partial, "take", lambda self, items: _cut_after(both, take(self, items), self, MIB))
        with pytest.raises(Unavailable):
            await case.run()
        monkeypatch.setattr(Partial, "take", take)
    # Another server, which finds it there.
    async with ends(tmp_path, client=QUICK, quota=3 * MIB) as both:
        assert both.factory.quota.used == 2 * MIB
        other = write(both.local / "other", content(2 * MIB, seed=3))
        with pytest.raises(OverQuota):
            await both.client.put(str(other), "other")
        await both.client.put(*case.arguments)
        assert both.factory.quota.used == 2 * MIB
        assert contents(both.root) == {"file": case.data}


@pytest_twisted.ensureDeferred
async def test_read_only_server_writes_nothing(tmp_path):
    write(tmp_path / "root" / "d" / "file", b"x")
    async with ends(tmp_path, access=Access(read_only=True)) as both:
        files = both.client.files
        source = write(both.local / "file", b"y")
        for call in (
            both.client.put(str(source), "d/file"),
            files.remove("d/file"),
            files.mkdir("e"),
            files.rename("d", "e"),
        ):
            with pytest.raises(ReadOnly):
                await call
        write(both.local / "t" / "file", b"y")
        assert (await both.client.sync(str(both.local / "t"), "")).problems[0].error == "ReadOnly"
        await both.client.get("d/file", str(both.local / "got"))
        assert sorted(os.listdir(both.root)) == ["d"]
        assert contents(both.root) == {"d/file": b"x"}


def test_access_is_what_the_innermost_rule_says():
    access = Access(
        [parse_rule("staff=."), parse_rule("all=pub:ro"), parse_rule("staff=pub"), parse_rule("boss=pub/own")]
    )
    assert access.may_read(["x"], {"staff"})
    assert not access.may_read(["x"], {"all"})
    assert access.may_read(["pub", "x"], {"all"})
    assert not access.may_read(["pub", "own", "x"], {"staff", "all"})
    with pytest.raises(ReadOnly):
        access.check(["pub"], {"all"}, write=True)
    access.check(["pub"], {"staff"}, write=True)
    with pytest.raises(NoSuchPath, match="no such path"):
        access.check(["pub", "own"], {"all"}, write=True)
    assert access.is_guarded(["pub"])
    assert not access.is_guarded(["pub", "x"])


@pytest_twisted.ensureDeferred
async def test_what_is_not_permitted_is_not_there(tmp_path):
    @implementer(IAuthenticator)
    class Everybody:
        async def authenticate(self, shown):
            return Identity("ann", frozenset({"all"}))

    for name in ("pub/a", "pub/own/b", "c"):
        write(tmp_path / "root" / name, b"x")
    access = Access([parse_rule("all=pub"), parse_rule("boss=pub/own"), parse_rule("boss=.")])
    async with ends(tmp_path, access=access, authenticator=Everybody()) as both:
        files = both.client.files
        assert [entry.path async for entry in files.list("pub", recursive=True)] == ["pub/a"]
        errors = set()
        for path in ("c", "absent", "", "pub/own", "pub/own/b", "pub/own/absent", "pub/absent"):
            with pytest.raises(NoSuchPath) as caught:
                await files.stat(path)
            errors.add((caught.value.message, repr(caught.value.detail)))
        assert len(errors) == 1
        assert [bool(one) for one in await files.verify_many(["c", "pub/own/b", "pub/a"])] == [False, False, True]
        for call in (
            files.rename("pub", "pub/x"),
            files.remove("pub/own/b"),
            files.mkdir("d"),
            files.rename("pub/a", "a"),
        ):
            with pytest.raises(NoSuchPath):
                await call
        assert sorted(contents(both.root)) == ["c", "pub/a", "pub/own/b"]


def test_old_unfinished_copies_are_removed_and_others_kept(tmp_path):
    tree = Tree(str(tmp_path))
    partial = Partial(tree, "x", Source(5, 5, 0o600, 16384))
    assert clean_partials(tree, 3600) == 0
    # Older than the future: all, but for the journal that is locked.
    assert clean_partials(tree, -3600) == 1
    partial.close()
    assert clean_partials(tree, -3600) == 1
    tree.close()
    assert leftovers(tmp_path) == []


@pytest_twisted.ensureDeferred
async def test_bandwidth_bounds_the_rate_and_progress_is_told(tmp_path):
    told = []
    async with ends(tmp_path, client={"bandwidth": 4 * MIB, "observer": told.append}) as both:
        source = write(both.local / "file", content(MIB))
        summary = await both.client.put(str(source), "file")
        assert summary.seconds > 0.2
        assert [one.octets for one in told] == sorted(one.octets for one in told)
        assert told[-1].octets == told[-1].octets_total == MIB
        assert any(one.seconds_left is not None and 0 < one.rate < 8 * MIB for one in told)


@both_ways
async def test_what_is_there_when_a_copy_is_given_up_is_what_was_told_last(tmp_path, way, monkeypatch):
    monkeypatch.setattr(_progress, "_REPORT", 0.0)
    told = []

    def tell(progress):
        told.append(progress.octets)
        if progress.octets:
            reactor.callLater(0, copying.cancel)

    async with ends(tmp_path, client={"bandwidth": MIB, "observer": tell}) as both:
        copying = ensureDeferred(Case(both, way, 4 * MIB).run())
        with pytest.raises(CancelledError):
            await copying
    assert told[-1] == max(told) > 0


@both_ways
async def test_blake3_verifies_as_well(tmp_path, way):
    async with ends(tmp_path, client={"digest": Digest.BLAKE3}) as both:
        case = Case(both, way, 4 * MIB + 5)
        await case.run()
        assert case.there.read_bytes() == case.data
        # As the authors of BLAKE3 have it for nothing at all, and not SHA-256 under another name.
        digest = digest_function(Digest.BLAKE3)
        assert digest(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        blocks = BlockMap(len(case.data), 16384)
        for index in range(blocks.count):
            blocks.add(index, digest(case.data[index * 16384 : (index + 1) * 16384]))
        verified = await both.client.files.verify("file" if way == "put" else "from/file", Digest.BLAKE3)
        assert (verified.digest, verified.block_size) == (blocks.root(digest), 16384)


@pytest_twisted.ensureDeferred
async def test_digest_that_the_server_lacks_is_told(tmp_path, monkeypatch):
    async with ends(tmp_path, client={"digest": Digest.BLAKE3}) as both:
        source = write(both.local / "file", b"x" * 100_000)
        await both.client.put(str(source), "file")
        monkeypatch.setitem(__import__("sys").modules, "blake3", None)
        with pytest.raises(DigestUnavailable):
            await both.client.files.verify("file", Digest.BLAKE3)


def test_client_refuses_numbers_out_of_bounds():
    with pytest.raises(ValueError, match="at_once"):
        FileClient(reactor, "tcp:127.0.0.1:1", at_once=0)


@pytest.mark.parametrize("mask", [0o000, 0o077])
@both_ways
async def test_small_files_have_their_modes_whatever_the_mask_of_the_process_is(tmp_path, way, mask):
    before = os.umask(mask)
    try:
        async with ends(tmp_path) as both:
            source, target = (both.local, both.root) if way == "put" else (both.root, both.local)
            modes = {f"{number}": mode for number, mode in enumerate([0o644, 0o600, 0o755, 0o644, 0o755, 0o666])}
            for name, mode in modes.items():
                write(source / "tree" / name, b"x").chmod(mode)
            await copy_tree(both, way)
            assert {name: (target / "tree" / name).stat().st_mode & 0o777 for name in modes} == modes
    finally:
        os.umask(before)


@both_ways
async def test_small_files_replace_others_where_the_system_cannot_rename_without_replacing(tmp_path, way, monkeypatch):
    monkeypatch.setattr(_system, "_renameat2", None)
    async with ends(tmp_path) as both:
        source, target = (both.local, both.root) if way == "put" else (both.root, both.local)
        for contents_now in (b"old", b"new one"):
            for number in range(20):
                write(source / "tree" / f"{number}", contents_now)
            summary = await copy_tree(both, way)
            assert (summary.files, summary.failed) == (20, 0)
            assert set(contents(target / "tree").values()) == {contents_now}


def test_rename_to_what_is_new_replaces_nothing(tmp_path):
    write(tmp_path / "one", b"1")
    write(tmp_path / "two", b"2")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert not rename_to_new("one", fd, "two", fd)
        assert contents(tmp_path) == {"one": b"1", "two": b"2"}
        assert rename_to_new("one", fd, "three", fd)
        assert contents(tmp_path) == {"two": b"2", "three": b"1"}
        with pytest.raises(FileNotFoundError, match="four"):
            rename_to_new("one", fd, "four", fd)
    finally:
        os.close(fd)
