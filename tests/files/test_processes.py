"""A real ``twistd -n pf-files``, and ends that are killed in the midst of a copy."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread

from protoframe import Backoff
from protoframe.files import FileClient
from protoframe.servers.files import Options
from tests.files.support import MIB, content, leftovers, write
from tests.processes import environment, free_port, server

#: How often the server is killed, and the client.
KILLS = int(os.environ.get("PROTOFRAME_KILLS", "1"))
#: A client that puts keeps nothing, and its server, which does, is killed by another test: once in a while will do.
WAYS = ("put", "get") if "PROTOFRAME_KILLS" in os.environ else ("get",)


def options(root, port, *more):
    return ("pf-files", "--root", str(root), "--listen", f"tcp:{port}:interface=127.0.0.1", *more)


def test_log_names_the_contract(tmp_path):
    (tmp_path / "root").mkdir()
    port = free_port()
    with server(tmp_path, *options(tmp_path / "root", port)) as running:
        assert running.wait_for_log(r"serving (\w+) at ")[1] == "Files"


async def copy_through_killed_servers(tmp_path):
    """Copies a file to servers that are killed, and one that is not."""
    root = tmp_path / "root"
    root.mkdir()
    size = 16 * MIB
    source = write(tmp_path / "file", content(size))
    port = free_port()
    stack = ExitStack()
    running = [stack.enter_context(server(tmp_path, *options(root, port)))]
    thresholds = [size * number // (KILLS + 1) for number in range(1, KILLS + 1)]

    def watch(progress):
        if thresholds and progress.octets >= thresholds[0] and running[-1].process.poll() is None:
            thresholds.pop(0)
            running[-1].process.kill()
            deferToThread(restart)

    def restart():
        running[-1].process.wait()
        (tmp_path / "twistd.pid").unlink(missing_ok=True)
        running.append(stack.enter_context(server(tmp_path, *options(root, port))))

    with stack:
        backoff = Backoff(first=0.05, longest=0.5)
        where = f"tcp:127.0.0.1:{port}"
        async with FileClient(
            reactor, where, backoff=backoff, tries=200, bandwidth=10 * size / (2 * (KILLS + 1)), observer=watch
        ) as client:
            summary = await client.put(str(source), "file")
        assert thresholds == []
        assert summary.interruptions >= KILLS
        assert (root / "file").read_bytes() == source.read_bytes()
        assert summary.moved_again < 0.05 * size
        assert leftovers(root) == []
        assert running[-1].terminate() == 0


def copy_through_killed_clients(served, directory, way):
    """Copies a file by clients that are killed, and one that is not."""
    size = 16 * MIB
    data = content(size)
    there = served.root / "killed" / way
    source, target = (directory / way, there) if way == "put" else (there, directory / way)
    write(source, data)
    target.parent.mkdir(exist_ok=True)
    given = (str(source), "killed/put") if way == "put" else ("killed/get", str(target))

    def start(bandwidth):
        command = [sys.executable, "-m", "tests.files.killed_client", served.where["tcp"], way, *given]
        return subprocess.Popen(
            [*command, str(bandwidth)], stdout=subprocess.PIPE, text=True, env=environment(), bufsize=1
        )

    # So that a kill is due no sooner than progress is told twice.
    bandwidth = 10 * size / (2 * (KILLS + 2))
    begins = []
    for number in range(1, KILLS + 1):
        with start(bandwidth) as process:
            for line in process.stdout:
                assert not line.startswith("done")
                if int(line) >= size * number // (KILLS + 2):
                    begins.append(int(line))
                    break
            process.kill()
        assert len(begins) == number
        assert not target.exists()
    with start(1e9) as process:
        last = process.stdout.read().split()
    assert target.read_bytes() == data
    # What the last one had to move is what those before it had not.
    assert int(last[-1]) <= size - begins[-1] + 0.05 * size


@pytest_twisted.ensureDeferred
async def test_copies_go_on_through_killed_servers_and_clients(served, tmp_path):
    # At once: most of what they cost is the start of interpreters.
    through_clients = [deferToThread(copy_through_killed_clients, served, tmp_path, way) for way in WAYS]
    await gatherResults([Deferred.fromCoroutine(copy_through_killed_servers(tmp_path)), *through_clients])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--root: say which directory"),
        (("--root", "/absent"), "--root: /absent is no directory"),
        (("--root", ".", "--quota", "much"), "--quota: expected a number of bytes"),
        (("--root", ".", "--keep-partials", "-1"), "--keep-partials: expected a number of hours"),
        (("--root", ".", "--allow", "x"), "--allow: expected PERMISSION=DIR"),
        (("--root", ".", "--allow", "x=../y"), "--allow: expected PERMISSION=DIR"),
    ],
)
def test_wrong_options_are_one_line(arguments, complaint, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", said)
    with pytest.raises(SystemExit) as ended:
        Options().parseOptions(arguments)
    assert ended.value.code == 2
    assert complaint in said.getvalue()
    assert said.getvalue().count("\n") == 1


def test_options_say_what_is_served(tmp_path):
    options = Options()
    options.parseOptions(["--root", str(tmp_path), "--quota", "2G", "--max-file", "5k", "--allow", "staff=a/b:ro"])
    assert (options["root"], options["quota"], options["max-file"]) == (str(tmp_path), 2 << 30, 5 << 10)
    (rule,) = options["allow"]
    assert (rule.permission, rule.parts, rule.read_only) == ("staff", ("a", "b"), True)
