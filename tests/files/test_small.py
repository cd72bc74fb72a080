"""Small files by themselves, in each of the ways in which they are written and read: the same becomes of them."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
import sysconfig

import pytest

from protoframe.files import Digest, Missing, Outcome, SmallFile, _small
from protoframe.files._small import BatchWriter, read_small
from protoframe.files._tree import Tree

TIME = 1_600_000_000_123_456_789


@pytest.fixture(params=["native", "unnamed", "named"])
def way(request, monkeypatch):
    """Compiled code, and calls from Python: for files without a name, and with one."""
    if request.param != "native":
        monkeypatch.setattr(_small, "_native", None)
    elif _small._native is None:
        pytest.skip("it was not built")
    if request.param == "named":
        monkeypatch.setattr(_small, "_UNNAMED", 0)
    return request.param


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "root").mkdir()
    before = _small._descriptors._held
    made = Tree(str(tmp_path / "root"))
    yield made
    made.close()
    # Nothing is counted that is not held any more.
    assert _small._descriptors._held == before


@pytest.fixture
def make_writer(tree, way):
    made = []

    def make(judge=None, replaced=None):
        made.append(BatchWriter(tree, Digest.SHA256, judge, replaced))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


@pytest.fixture
def writer(make_writer):
    return make_writer()


def small(path, data=b"content", *, mode=0o644, mtime_ns=TIME, digest=None):
    return SmallFile(path, mtime_ns, mode, digest or hashlib.sha256(data).digest(), data)


def store(writer, *files):
    staged = writer.stage(files)
    writer.sync(staged)
    outcomes = writer.place(staged)
    writer.sync([])
    return outcomes


def in_hidden(tree):
    return os.listdir(tree.partials())


def test_it_is_built_where_it_can_be():
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("there is no compiler")
    assert _small._native is not None


def test_files_are_as_they_were_sent(tree, writer, tmp_path):
    files = [small(f"d{number % 3}/e/{number}", os.urandom(number * 100), mode=0o600 + number) for number in range(40)]
    files.append(small("largest", bytes(_small.SMALL), mtime_ns=0))
    umask = os.umask(0o077)
    try:
        assert store(writer, *files) == [Outcome.STORED] * 41
    finally:
        os.umask(umask)
    for file in files:
        path = tmp_path / "root" / file.path
        status = path.stat()
        assert path.read_bytes() == file.data
        assert (status.st_mtime_ns, status.st_mode & 0o7777, status.st_nlink) == (file.mtime_ns, file.mode, 1)
    assert in_hidden(tree) == []


def test_file_that_is_there_is_replaced_and_of_two_with_one_name_the_last_stays(tree, make_writer, tmp_path):
    given_back = []
    writer = make_writer(replaced=given_back.append)
    there = tmp_path / "root" / "there"
    there.write_bytes(b"before")
    assert (
        store(writer, small("there", b"1"), small("new", b"22"), small("new", b"333"), small("there", b"4444"))
        == [0] * 4
    )
    assert (there.read_bytes(), (tmp_path / "root" / "new").read_bytes()) == (b"4444", b"333")
    assert sorted(given_back) == [1, 2, 6]
    assert in_hidden(tree) == []


def test_last_of_two_with_one_name_stays_although_the_name_becomes_free(tree, writer, way, tmp_path, monkeypatch):
    there = tmp_path / "root" / "there"
    there.write_bytes(b"before")
    if way == "native":
        name_files = _small._native.name_files

        def names(files):
            result = name_files(files)
            there.unlink(missing_ok=True)
            return result

        monkeypatch.setattr(_small._native, "name_files", names)
    assert store(writer, small("there", b"first"), small("there", b"last")) == [0, 0]
    assert there.read_bytes() == b"last"


def test_what_cannot_be_is_refused_and_nothing_of_it_stays(tree, make_writer, tmp_path):
    (tmp_path / "root" / "directory").mkdir()
    (tmp_path / "root" / "file").write_bytes(b"")
    given_back = []
    writer = make_writer(lambda file: Outcome.READ_ONLY if file.path == "mine" else None, given_back.append)
    before = len(os.listdir("/proc/self/fd"))
    outcomes = store(
        writer,
        small("good"),
        small("directory"),
        small("file/below"),
        small("../outside"),
        small("late", mtime_ns=1 << 100),
        small("early", mtime_ns=-(1 << 100)),
        small("wrong", digest=bytes(32)),
        small("large", bytes(_small.SMALL + 1)),
        small("mine"),
        small("also good"),
    )
    refused = Outcome.REFUSED
    assert outcomes == [0, *[refused] * 5, Outcome.CORRUPT, Outcome.TOO_LARGE, Outcome.READ_ONLY, 0]
    assert sorted(os.listdir(tmp_path / "root")) == [".pf-files", "also good", "directory", "file", "good"]
    assert os.listdir(tmp_path) == ["root"]
    # What was judged, and is not in place.
    assert given_back == [7] * 5
    assert in_hidden(tree) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_are_given_up_leave_nothing(tree, make_writer):
    given_back = []
    writer = make_writer(replaced=given_back.append)
    before = len(os.listdir("/proc/self/fd"))
    staged = writer.stage([small("a"), small("b"), small("c", digest=bytes(32))])
    assert len(os.listdir("/proc/self/fd")) - before + len(in_hidden(tree)) == 2
    writer.abandon(staged)
    assert (len(os.listdir("/proc/self/fd")), in_hidden(tree), given_back) == (before, [], [7, 7])


def test_as_many_descriptors_are_held_as_there_are_and_other_files_have_names(tree, writer, way, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * opened, limits[1]))
    try:
        files = [small(f"{number}", b"%d" % number) for number in range(3 * opened)]
        staged = writer.stage(files)
        assert len(in_hidden(tree)) == (3 * opened if way == "named" else opened)
        writer.sync(staged)
        assert writer.place(staged) == [Outcome.STORED] * (3 * opened)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all((tmp_path / "root" / file.path).read_bytes() == file.data for file in files)


def test_few_directories_are_open_at_once_however_many_there_are(tree, writer, way, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = [small(f"{number}/{number % 2}/file", b"%d" % number) for number in range(300)]
    staged = writer.stage(files)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 80, limits[1]))
    try:
        assert writer.place(staged) == [Outcome.STORED] * 300
        writer.sync([])
        found = read_small(tree, [file.path for file in files], Digest.SHA256)
        assert found == files
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_that_no_more_files_may_be_open_is_no_refusal(tree, way, make_writer, tmp_path):
    given_back = []
    writer = make_writer(replaced=given_back.append)
    staged = writer.stage([small("d/a"), small("d/b")])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            writer.place(staged)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert given_back == [7, 7]
    assert in_hidden(tree) == []


@pytest.mark.parametrize(("number", "is_told"), [(errno.ENOENT, False), (errno.EMFILE, True), (errno.EIO, True)])
def test_directory_that_cannot_be_made_durable_is_told_but_for_one_that_is_gone(
    tree, writer, monkeypatch, number, is_told
):
    staged = writer.stage([small("d/a")])
    writer.sync(staged)
    writer.place(staged)

    def fail(self, parts):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Tree, "directory", fail)
    if is_told:
        with pytest.raises(OSError, match=os.strerror(number)):
            writer.sync([])
    else:
        writer.sync([])


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (errno.EMFILE, Outcome.STORED),
        (errno.EOPNOTSUPP, Outcome.STORED),
        (errno.ENOSPC, Outcome.NO_SPACE),
        (errno.EDQUOT, Outcome.NO_SPACE),
        (errno.EACCES, Outcome.REFUSED),
    ],
)
def test_file_that_cannot_be_without_a_name_gets_one_and_other_failures_are_told(
    tree, writer, way, monkeypatch, number, outcome
):
    opened = os.open

    def fail(path, flags, *arguments, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE or way == "named":
            raise OSError(number, os.strerror(number))
        return opened(path, flags, *arguments, **options)

    if way == "named" and outcome is Outcome.STORED:
        return
    if way == "native":
        monkeypatch.setattr(_small._native, "write_files", lambda directory, files: [-number] * len(files))
    else:
        monkeypatch.setattr(os, "open", fail)
    staged = writer.stage([small("a"), small("b")])
    monkeypatch.undo()
    assert writer.place(staged) == [outcome] * 2
    assert in_hidden(tree) == []


def test_what_is_not_read_back_as_it_was_written_is_corrupt(tree, writer, way, monkeypatch):
    if way == "native":
        differs = _small._native.DIFFERS
        monkeypatch.setattr(_small._native, "write_files", lambda directory, files: [differs] * len(files))
    else:
        monkeypatch.setattr(os, "pread", lambda fd, length, at: b"Content")
    assert store(writer, small("a"), small("b")) == [Outcome.CORRUPT] * 2
    assert in_hidden(tree) == []


def test_files_are_read_as_they_are_and_what_cannot_be_had_is_missing(tree, way, tmp_path):
    root = tmp_path / "root"
    (root / "d").mkdir()
    contents = {"d/a": b"", "d/b": os.urandom(5000), "c": os.urandom(_small.SMALL)}
    for path, data in contents.items():
        (root / path).write_bytes(data)
        os.chmod(root / path, 0o4640)
        os.utime(root / path, ns=(1, TIME))
    # As far away as is more nanoseconds than 63 bits are.
    os.utime(root / "c", ns=(1, 9_900_000_000 * 10**9))
    (root / "large").write_bytes(bytes(_small.SMALL + 1))
    os.symlink("c", root / "link")
    os.mkfifo(root / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    paths = ["d/a", "absent", "d/b", "large", "link", "pipe", "d", "absent/x", "../root/c", "c"]
    found = read_small(tree, paths, Digest.SHA256)
    assert [one.path for one in found] == paths
    for one in found:
        data = contents.get(one.path)
        mtime_ns = 9_900_000_000 * 10**9 if one.path == "c" else TIME
        expected = Missing(one.path) if data is None else small(one.path, data, mode=0o640, mtime_ns=mtime_ns)
        assert one == expected
    assert read_small(tree, [], Digest.SHA256) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["write_files", "name_files", "read_files"])
@pytest.mark.parametrize("wrong", [None, (), [1], [()], [("a",)], [(1, 2, 3, 4)], [(1.5, b"")], [("a", b"a", b"\0")]])
def test_wrong_arguments_are_refused(name, wrong):
    if _small._native is None:
        pytest.skip("it was not built")
    arguments = {"write_files": (-1, wrong), "name_files": (wrong,), "read_files": (wrong, 5)}[name]
    with pytest.raises((TypeError, ValueError)):
        getattr(_small._native, name)(*arguments)
