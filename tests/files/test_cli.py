"""``pf put``, ``get``, ``sync`` and the rest: what they do, print and exit with.

Most run in the process of the tests, whose reactor takes the place of their own; carriers and interrupts are those of
real processes.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from contextlib import asynccontextmanager, suppress

import greenlet
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from protoframe import Error, listen
from protoframe.cli import main, running
from protoframe.cli.files_copy import _Copy
from protoframe.cli.files_session import duration, server_path, size
from protoframe.cli.options import Settings
from protoframe.cli.problems import Problem
from protoframe.files import Progress
from protoframe.files._source import SourceFile
from protoframe.files._tree import Tree
from protoframe.servers.files import Access, FilesFactory
from tests.files.support import MIB, content, contents, leftovers, write
from tests.processes import PATIENCE, environment, free_port

PF = [sys.executable, "-m", "protoframe.cli"]
QUARTER = MIB // 4


@pytest.fixture
def pf(monkeypatch, capfd):
    """Runs a command, over the reactor that runs already: fires with its exit status, and what it printed."""

    def run(session, target, settings, progress=None):
        waiting = Deferred.fromCoroutine(session(reactor))
        outcome = []
        waiting.addBoth(outcome.append)
        if not outcome:
            # The command waits, and the reactor goes on.
            waiting.addBoth(lambda _: here.switch())
            here = greenlet.getcurrent()
            here.parent.switch()
        if isinstance(outcome[0], Failure):
            try:
                outcome[0].raiseException()
            except Error as error:
                raise running.refused(error, target, settings) from None
        return outcome[0]

    monkeypatch.setattr(running, "run", run)

    def command(*words):
        capfd.readouterr()
        ended = Deferred()

        def work():
            status = main._run([str(word) for word in words])
            # The test goes on in the reactor's greenlet, not in this one.
            reactor.callLater(0, ended.callback, (status, *capfd.readouterr()))

        greenlet.greenlet(work).switch()
        return ended

    return command


def done(result):
    status, out, err = result
    assert (status, err) == (0, "")
    return out


def summary(result):
    (line,) = done(result).splitlines()
    return json.loads(line)


def fault(result, status):
    assert result[0] == status, result
    assert result[2].startswith("pf: ")
    assert result[2].count("\n") == 1
    return result[2]


@asynccontextmanager
async def serving(root, **options):
    """A server in this process: its address, and its factory."""
    root.mkdir(exist_ok=True)
    made = FilesFactory(reactor, str(root), **options)
    port = await listen(reactor, "tcp:0:interface=127.0.0.1", made)
    try:
        yield f"tcp:127.0.0.1:{port.getHost().port}", made
    finally:
        await port.stopListening()
        await made.drain(0)
        await made.close()


def make_tree(root):
    write(root / "large", content(300_000))
    write(root / "d" / "small", b"small")
    write(root / "d" / "é", b"")
    (root / "empty").mkdir()
    return contents(root)


@pytest.mark.parametrize("kind", ["tcp", "tls", "udp"])
@pytest_twisted.ensureDeferred
async def test_trees_are_copied_both_ways_over(pf, served, tmp_path, kind):
    every = make_tree(tmp_path / "tree")
    put = summary(await pf("put", served.where[kind], tmp_path / "tree", kind, "--json"))
    assert (put["files"], put["failed"], put["problems"]) == (3, 0, [])
    assert done(await pf("get", served.where[kind], kind, tmp_path / "got", "--quiet")) == ""
    assert contents(served.root / kind) == contents(tmp_path / "got") == every
    assert (tmp_path / "got" / "empty").is_dir()


@pytest_twisted.ensureDeferred
async def test_file_goes_there_and_back_and_its_whole_digest_is_told(pf, served, tmp_path):
    where, at = served.where["tcp"], served.root / "there"
    source = write(tmp_path / "file", content(200_000))
    put = summary(await pf("put", where, source, "there/new", "--json"))
    assert (put["files"], put["octets"], put["moved"], put["failed"], put["problems"]) == (1, 200_000, 200_000, 0, [])
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", put["digest"])
    assert done(await pf("verify", where, "there/new", source)) == f"{put['digest']}  there/new\n"
    # A directory that is there, and one with a slash behind it, are copied into.
    assert put["digest"] in done(await pf("put", where, source, "there"))
    assert done(await pf("put", where, source, "there/deeper/", "--quiet")) == ""
    assert sorted(contents(at)) == ["deeper/file", "file", "new"]
    got = summary(await pf("get", where, "there/new", tmp_path / "got", "--json", "--digest", "sha256"))
    assert got["digest"] == put["digest"]
    assert done(await pf("get", where, "there/new", f"{tmp_path}/")).startswith("there/new: 195.3 KiB in ")
    assert contents(tmp_path) == dict.fromkeys(["file", "got", "new"], source.read_bytes())
    write(at / "new", content(200_000, seed=2))
    assert "differs from there/new" in fault(await pf("verify", where, "there/new", source), 1)
    same = json.loads((await pf("verify", where, "there/new", source, "--json"))[1])
    assert (same["same"], same["size"], same["block_size"]) == (False, 200_000, 16384)


@pytest_twisted.ensureDeferred
async def test_checksum_finds_what_size_and_time_hide(pf, served, tmp_path):
    where, at = served.where["tcp"], served.root / "checksum"
    source = write(tmp_path / "tree" / "file", b"abc")
    for name in (source, at / "file"):
        write(name, b"abc" if name == source else b"abd")
        os.utime(name, ns=(5, 5))
    assert summary(await pf("put", where, tmp_path / "tree", "checksum", "--json"))["skipped"] == 1
    assert (at / "file").read_bytes() == b"abd"
    assert summary(await pf("put", where, tmp_path / "tree", "checksum", "--json", "--checksum"))["files"] == 1
    assert (at / "file").read_bytes() == b"abc"
    one = summary(await pf("put", where, source, "checksum/file", "--checksum", "--json"))
    assert (one["files"], one["skipped"], one["digest"][:7]) == (0, 1, "sha256:")
    assert "is the same already" in done(await pf("get", where, "checksum/file", source, "-c"))


@pytest_twisted.ensureDeferred
async def test_sync_says_what_it_would_do_does_it_and_has_nothing_left_to_do(pf, served, tmp_path):
    where, at, here = served.where["tcp"], served.root / "sync", tmp_path / "tree"
    every = make_tree(here)
    assert done(await pf("sync", where, here, "sync", "--dry-run")).splitlines() == [
        "mkdir d",
        "copy d/small",
        "copy d/é",
        "mkdir empty",
        "copy large",
        "3 files, 293.0 KiB, would be copied",
    ]
    assert not at.exists()
    assert done(await pf("sync", where, here, "sync", "--quiet")) == ""
    assert contents(at) == every
    (here / "d" / "é").unlink()
    write(here / "new", b"new")
    lines = [
        json.loads(line)
        for line in done(await pf("sync", where, here, "sync", "-n", "--delete", "--json")).splitlines()
    ]
    assert [(line["action"], line["path"]) for line in lines[:-1]] == [("copy", "new"), ("remove", "d/é")]
    assert (lines[-1]["files"], lines[-1]["removed"], lines[-1]["skipped"]) == (1, 1, 2)
    text = done(await pf("sync", where, here, "sync", "--delete"))
    assert text.startswith("1 file, 3 B in ")
    assert text.endswith("2 were the same already, 1 removed\n")
    assert contents(at) == contents(here)
    assert done(await pf("sync", where, here, "sync", "--delete", "-n")) == "0 files, 0 B, would be copied\n"
    write(at / "d" / "theirs", b"1")
    assert done(await pf("sync", where, here, "sync", "--pull", "-n")).splitlines()[0] == "copy d/theirs"
    assert (
        done(await pf("sync", where, tmp_path / "absent", "sync", "--pull", "-n"))
        .splitlines()[-1]
        .startswith("4 files")
    )
    assert not (tmp_path / "absent").exists()
    done(await pf("sync", where, here, "sync", "--pull"))
    assert contents(here) == contents(at)


@pytest_twisted.ensureDeferred
async def test_nothing_is_removed_where_a_directory_of_the_source_cannot_be_read(pf, served, tmp_path, monkeypatch):
    where, at = served.where["tcp"], served.root / "unread"
    every = make_tree(tmp_path / "tree")
    done(await pf("put", where, tmp_path / "tree", "unread"))
    write(at / "extra", b"x")
    names = Tree.names

    def fail(self, path, *rest):
        if path == "d":
            raise OSError(5, "Input/output error")
        return names(self, path, *rest)

    monkeypatch.setattr(Tree, "names", fail)
    status, _, err = await pf("sync", where, tmp_path / "tree", "unread", "--delete", "--quiet")
    assert status == 1
    assert err.splitlines()[0] == "pf: d: OSError: Input/output error"
    assert contents(at) == {**every, "extra": b"x"}


@pytest_twisted.ensureDeferred
async def test_name_that_may_not_travel_is_told_and_the_rest_is_there(pf, tmp_path):
    write(tmp_path / "tree" / "a\\b", b"x")
    (tmp_path / "tree" / os.fsdecode(b"\xff")).mkdir()
    write(tmp_path / "tree" / "good", b"good")
    async with serving(tmp_path / "root") as (where, _):
        status, out, err = await pf("put", where, tmp_path / "tree", "t", "--json")
        assert status == 1
        assert json.loads(out)["failed"] == 2
        # Each directory's by their names.
        assert [line.split(": ")[1] for line in err.splitlines()[:2]] == ["\\xff", "a\\b"]
        assert contents(tmp_path / "root") == {"t/good": b"good"}


@pytest_twisted.ensureDeferred
async def test_pull_that_deletes_fails_and_removes_nothing_where_the_server_cannot_read(pf, tmp_path, monkeypatch):
    every = make_tree(tmp_path / "tree")
    make_tree(tmp_path / "root")
    write(tmp_path / "tree" / "extra", b"x")
    names = Tree.names

    def closed(self, path, *rest):
        if path == "d" and self.root == str(tmp_path / "root"):
            raise PermissionError(13, "Permission denied")
        return names(self, path, *rest)

    monkeypatch.setattr(Tree, "names", closed)
    async with serving(tmp_path / "root") as (where, _):
        status, _, err = await pf("sync", where, tmp_path / "tree", ".", "--pull", "--delete", "--quiet")
        assert status == 1
        assert err.splitlines()[0] == "pf: d: PermissionError: the server cannot read this directory"
        assert contents(tmp_path / "tree") == {**every, "extra": b"x"}


@pytest_twisted.ensureDeferred
async def test_listing_tells_of_directories_that_the_server_cannot_read(pf, tmp_path, monkeypatch):
    make_tree(tmp_path / "root")
    names = Tree.names

    def closed(self, path, *rest):
        if path in {"d", "empty"}:
            raise PermissionError(13, "Permission denied")
        return names(self, path, *rest)

    monkeypatch.setattr(Tree, "names", closed)
    async with serving(tmp_path / "root") as (where, _):
        status, out, err = await pf("ls", where, "--recursive", "--json")
        assert status == 1
        assert err.splitlines() == [f"pf: {name}: the server cannot read this directory" for name in ("d", "empty")]
        marks = {entry["path"]: entry.get("is_readable", True) for entry in map(json.loads, out.splitlines())}
        assert marks == {"d": False, "empty": False, "large": True}
        assert len(done(await pf("ls", where)).splitlines()) == 3


@pytest_twisted.ensureDeferred
async def test_what_of_a_tree_cannot_be_copied_is_told_and_the_rest_is_there(pf, tmp_path):
    for number in range(5):
        write(tmp_path / "tree" / str(number), content(20_000, seed=number))
    async with serving(tmp_path / "root", quota=70_000) as (where, _):
        status, out, err = await pf("put", where, tmp_path / "tree", "t")
        assert status == 64 + 8
        assert re.fullmatch(r"3 files, .*, 2 failed\n", out)
        *problems, last = err.splitlines()
        assert all(re.fullmatch(r"pf: \d: OverQuota: the files .*", line) for line in problems)
        assert len(problems) == 2
        assert last.startswith("pf: 2 problems; everything else is copied; try: ")
        assert len(contents(tmp_path / "root")) == 3
        status, out, _ = await pf("put", where, tmp_path / "tree", "t", "--json")
        assert (status, json.loads(out)["failed"], json.loads(out)["skipped"]) == (72, 2, 3)
        large = write(tmp_path / "large", content(100_000))
        assert "OverQuota: the files here would take too many bytes (left=10000)" in fault(
            await pf("put", where, large, "x"), 72
        )


@pytest_twisted.ensureDeferred
async def test_failures_are_one_line_and_a_status(pf, served, tmp_path, monkeypatch):
    where = served.where["tcp"]
    source = write(tmp_path / "file", b"x" * 100_000)
    absent = tmp_path / "absent"
    for words, status, text in (
        (("put", where, absent, "x"), 1, f"{absent}: no such file or directory"),
        (("get", where, "nosuch", absent), 69, f"NoSuchPath: no such path; try: pf ls {where}"),
        (("sync", where, source, "x"), 1, "not a directory"),
        (("sync", where, tmp_path, "nosuch", "--pull"), 69, "NoSuchPath"),
        (("put", where, source, "a/../../b"), 2, "is no path of a server"),
        (("rm", where, "/"), 2, "is the root of the server"),
        (("put", where, source, "x", "--bwlimit", "fast"), 2, "expected octets a second"),
        (("put", where, source, "x", "--bwlimit", "0"), 2, "expected octets a second"),
        (("put", where, source, "x", "-j", "0"), 2, "1<=x<=64"),
        (("put", "tcp:localhost", source, "x"), 2, "tcp:host:port"),
        (("ls", f"tcp:127.0.0.1:{free_port()}"), 7, "could not connect"),
        (("verify", where, "nosuch", absent), 1, "no such file"),
        (("mkdir", where, "no/such"), 69, "--parents"),
    ):
        assert text in fault(await pf(*words), status)
    assert not absent.exists()
    monkeypatch.setitem(sys.modules, "blake3", None)
    assert "try: pip install 'protoframe[blake3]'" in fault(
        await pf("put", where, source, "x", "--digest", "blake3"), 1
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    done(await pf("put", where, source, "full"))
    monkeypatch.setattr("protoframe.files._partial._write_at", full)
    monkeypatch.setattr("os.pwrite", full)
    assert f"{absent}: no space left on device" in fault(await pf("get", where, "full", absent), 1)


@pytest_twisted.ensureDeferred
async def test_file_that_changes_meanwhile_is_told_and_not_delivered(pf, served, tmp_path, monkeypatch):
    source = write(tmp_path / "file", content(MIB))
    whole = SourceFile.whole

    def change(self):
        with source.open("r+b") as file:
            file.write(b"changed")
        return whole(self)

    monkeypatch.setattr(SourceFile, "whole", change)
    assert "SourceChanged" in fault(await pf("put", served.where["tcp"], source, "changing"), 74)
    assert not (served.root / "changing").exists()


@pytest_twisted.ensureDeferred
async def test_read_only_server_is_read(pf, tmp_path):
    source = write(tmp_path / "file", b"y")
    write(tmp_path / "root" / "d" / "file", b"x")
    async with serving(tmp_path / "root", access=Access(read_only=True)) as (where, _):
        for words in (("put", where, source, "d/file"), ("rm", where, "d/file"), ("mkdir", where, "e")):
            assert "ReadOnly: nothing can be written here" in fault(await pf(*words), 73)
        assert "ReadOnly" in fault(await pf("mv", where, "d", "e"), 73)
        done(await pf("get", where, "d/file", tmp_path / "got"))
    assert contents(tmp_path / "root") == {"d/file": b"x"}


class Counting(dict):
    """The copies that a server is getting.

    :ivar most: how many there were at once.
    """

    most = 0

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.most = max(self.most, len(self))


@pytest.mark.parametrize("jobs", [1, 2])
@pytest_twisted.ensureDeferred
async def test_so_many_files_are_copied_at_once_as_there_are_jobs(pf, tmp_path, jobs):
    for number in range(6):
        write(tmp_path / "tree" / str(number), content(MIB // 2, seed=number))
    async with serving(tmp_path / "root") as (where, factory):
        factory.copies = Counting()
        assert summary(await pf("put", where, tmp_path / "tree", "t", "-j", jobs, "--json"))["files"] == 6
        assert factory.copies.most == jobs


@pytest_twisted.ensureDeferred
async def test_bandwidth_is_what_was_asked_for(pf, served, tmp_path):
    write(served.root / "limited", content(QUARTER))
    one = summary(await pf("get", served.where["tcp"], "limited", tmp_path / "got", "--bwlimit", "1m", "--json"))
    assert one["moved"] == QUARTER
    assert 0.7 * MIB < one["moved"] / one["seconds"] < 1.3 * MIB


@pytest_twisted.ensureDeferred
async def test_what_is_there_is_listed_moved_and_removed(pf, served, tmp_path):
    where, at = served.where["tcp"], served.root / "list"
    every = make_tree(at)
    os.utime(at / "d" / "small", ns=(0, 10**18))
    os.chmod(at / "d" / "small", 0o640)
    rows = done(await pf("ls", where, "list")).splitlines()
    assert [row.split()[-1] for row in rows] == ["list/d/", "list/empty/", "list/large"]
    assert rows[2].startswith("-rw-")
    assert rows[2].split()[1] == "300000"
    assert [json.loads(line) for line in done(await pf("ls", where, "list/d/small", "--json")).splitlines()] == [
        {"path": "list/d/small", "kind": "file", "size": 5, "mtime_ns": 10**18, "mode": 0o640}
    ]
    below = done(await pf("ls", where, "/list/", "-r", "--json")).splitlines()
    assert [json.loads(line)["path"] for line in below] == [
        f"list/{name}" for name in ["d", "d/small", "d/é", "empty", "large"]
    ]
    assert done(await pf("mkdir", where, "list/a/b", "--parents")) == ""
    done(await pf("mv", where, "list/large", "list/a/b"))
    assert json.loads(done(await pf("mv", where, "list/d/small", "list/tiny", "--json")))["to"] == "list/tiny"
    assert contents(at) == {"a/b/large": every["large"], "d/é": b"", "tiny": b"small"}
    assert "NotEmpty" in fault(await pf("rm", where, "list/a"), 73)
    assert done(await pf("rm", where, "list/a", "list/tiny", "--recursive")) == "4 removed\n"
    assert contents(at) == {"d/é": b""}


@pytest_twisted.ensureDeferred
async def test_interrupt_shows_what_is_there_and_the_same_command_goes_on(pf, served, tmp_path):
    data = content(16 * MIB)
    write(tmp_path / "file", data)
    write(served.root / "interrupted" / "there", data)
    copies = (
        (("put", str(tmp_path / "file"), "interrupted/new"), served.root / "interrupted" / "new"),
        (("get", "interrupted/there", str(tmp_path / "got")), tmp_path / "got"),
    )

    def copy(verb, *words, target):
        command = [*PF, verb, served.where["tcp"], *words]
        terminal, far_end = pty.openpty()
        termios.tcsetwinsize(far_end, (24, 100))
        variables = environment(TERM="xterm")
        with subprocess.Popen([*command, "--bwlimit", "8M"], stderr=far_end, env=variables) as process:
            os.close(far_end)
            shown = ""
            # Progress has the size, the rate and the time that is left.
            while not re.search(r"\d MiB of 16\.0 MiB, \d+\.\d MiB/s, 0:0\d left", shown):
                shown += os.read(terminal, 1000).decode()
            process.send_signal(signal.SIGINT)
            says = re.compile(r"pf: interrupted; (\d+\.\d) MiB of 16\.0 MiB are copied; try: the same command again")
            with suppress(OSError):
                # The terminal fails when nobody has its other end any more.
                while (said := says.search(shown)) is None:
                    shown += os.read(terminal, 1000).decode()
            assert said is not None, shown
            assert process.wait(PATIENCE) == 130
        os.close(terminal)
        assert not target.exists()
        return float(said[1])

    results = await gatherResults([deferToThread(copy, *words, target=target) for words, target in copies])
    for said, ((verb, *words), target) in zip(results, copies, strict=True):
        assert said > 0.3
        moved = summary(await pf(verb, served.where["tcp"], *words, "--json"))["moved"]
        # What was there is not moved again.
        assert moved < (16 - said + 0.6) * MIB
        assert target.read_bytes() == data
        assert leftovers(target.parent) == []


def told(**values):
    return Progress(
        **{
            "path": "x",
            "files": 0,
            "files_total": None,
            "octets": 0,
            "octets_total": None,
            "rate": 0.0,
            "seconds_left": None,
            **values,
        }
    )


def test_progress_is_told_in_words(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("protoframe.cli.files_copy.time.monotonic", lambda: now[0])
    copy = _Copy(Settings(), "sha256", 4, None)
    assert copy.line() is None
    copy._told(told(files=3, octets=2048, rate=1024.0))
    assert copy.line() == "3 files, 2.0 KiB, 1.0 KiB/s"
    copy._told(told(files=3, files_total=1000, octets=2048, octets_total=MIB, rate=1024.0, seconds_left=3661.2))
    assert copy.line() == "3 of 1,000 files, 2.0 KiB of 1.0 MiB, 1.0 KiB/s, 1:01:02 left"
    now[0] += 5
    assert copy.line() == "3 of 1,000 files, 2.0 KiB of 1.0 MiB, nothing for 5 s"


def test_sizes_and_times_are_written_for_people():
    assert [size(octets) for octets in (0, 1023, 1024, 1024**2 - 1, 5 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.0 MiB",
        "5.0 TiB",
    ]
    assert [duration(seconds) for seconds in (0.2, 59.5, 3600)] == ["0:01", "1:00", "1:00:00"]


def test_paths_are_those_below_the_root():
    assert [server_path(text) for text in ("", "/", ".", "/a//b/", "./a/.")] == ["", "", "", "a/b", "a"]
    for text in ("..", "a/../b", "a\0", ".pf-files"):
        with pytest.raises(Problem):
            server_path(text)


def test_help_loads_no_twisted():
    code = (
        "import sys\nfrom protoframe.cli.main import main\n"
        "for name in ('put', 'get', 'sync', 'ls', 'rm', 'mv', 'mkdir', 'verify'):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "sys.exit('twisted' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment(), check=False, timeout=30
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.count(b"Exit status:") == 8
