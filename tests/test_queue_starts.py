"""How queue servers start, and what they refuse: real processes, and what is on standard error of those that do not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import pytest_twisted
import trustme
from twisted.internet import reactor
from twisted.internet.endpoints import quoteStringArgument
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread

from protoframe import ConnectionLost, Error, GoingAway, connect
from protoframe.queue import Delivery, Message, Queue
from protoframe.servers.queue.disk import DiskStore
from tests.processes import PATIENCE, environment, free_port, run_twistd, server, twistd
from tests.queue_load import queue_server

LISTEN = ("--listen", "tcp:0:interface=127.0.0.1", "--ballast", "64K")


def refusal(directory: Path, data: Path) -> str:
    """What a server says that cannot use its directory: a line."""
    done = run_twistd("-n", "--pidfile=", "pf-queue", "--data", str(data), *LISTEN, cwd=directory)
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert "Traceback" not in done.stdout, done.stdout
    return line


def test_without_a_directory_it_says_how_to_name_one(tmp_path: Path) -> None:
    done = run_twistd("-n", "pf-queue", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "twistd: say where the queues are: --data DIRECTORY; see: twistd pf-queue --help\n"


@pytest_twisted.ensureDeferred
async def test_data_that_cannot_be_used_is_one_line_and_stays_as_it_is(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with queue_server(tmp_path, data, "--ballast", "64K") as (running, queue):
        await queue.declare("q")
        for _ in range(3):
            await queue.publish_batch("q", [Message(body=os.urandom(500), subject="a.b") for _ in range(500)])
        in_use = await deferToThread(refusal, tmp_path, data)
        # It goes on.
        assert (await queue.statistics("q")).depth == 1500
        assert await deferToThread(running.terminate) == 0
    assert in_use == f"twistd: {data}/queue.sqlite3: another process uses it"

    good = (data / "queue.sqlite3").read_bytes()
    cases: dict[str, tuple[Path, str]] = {}

    def case(name: str, octets: bytes, text: str) -> None:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "queue.sqlite3").write_bytes(octets)
        cases[name] = (directory, text)

    case("damaged", good[: 4096 * 9] + b"\xa5" * 4096 * 40 + good[4096 * 49 :], "it is damaged: ")
    case("cut", good[: len(good) // 2], "database disk image is malformed")
    case("text", b"Dear diary,\n" * 1000, "file is not a database")
    for name, pragma, text in [
        ("later", "user_version = 1000", "it was written by a later version of protoframe, with schema 1000"),
        ("other", "application_id = 7", "this is another program's database"),
    ]:
        case(name, good, text)
        database = sqlite3.connect(tmp_path / name / "queue.sqlite3")
        database.execute(f"PRAGMA {pragma}")
        database.close()
    (tmp_path / "file").write_text("no directory")
    cases["file"] = (tmp_path / "file", "File exists")
    (tmp_path / "directory" / "queue.sqlite3").mkdir(parents=True)
    cases["directory"] = (tmp_path / "directory", "unable to open database file")

    before = {
        name: (path / "queue.sqlite3").read_bytes()
        for name, (path, _) in cases.items()
        if (path / "queue.sqlite3").is_file()
    }
    nobody: Any = None
    for path, text in cases.values():
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(text)}[^\n]*$"):
            DiskStore(Clock(), time.time, str(path)).open(nobody)
    # The same of whole servers, as many as there is time for.
    for name in ("damaged", "file"):
        path, text = cases[name]
        said = await deferToThread(refusal, tmp_path, path)
        assert said.startswith(f"twistd: {path}"), said
        assert text in said
    assert before == {name: (cases[name][0] / "queue.sqlite3").read_bytes() for name in before}


def test_a_directory_without_permission_is_one_line(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o500)
    command = [twistd(), "-n", "--pidfile=", "pf-queue", "--data", str(data), *LISTEN]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root is allowed everything, and there is no setpriv")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stderr) == (1, f"twistd: {data}/queue.sqlite3: unable to open database file\n")


@pytest_twisted.ensureDeferred
async def test_a_consumer_that_does_not_read_holds_up_no_end(tmp_path: Path) -> None:
    async with queue_server(tmp_path, tmp_path / "data", "--drain", "300") as (running, queue):
        await queue.declare("q")
        await queue.publish_batch("q", [Message(body=bytes(100_000)) for _ in range(30)])
        stream = queue.consume("q")
        first = await anext(stream)
        assert (first.attempt, first.redelivered) == (1, False)
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert await deferToThread(running.process.wait, PATIENCE) == 0
        assert time.monotonic() - began < 5
        taken = [first]
        ended: Error | None = None
        try:
            async for delivery in stream:
                taken.append(delivery)
        except Error as error:
            ended = error
        assert isinstance(ended, ConnectionLost | GoingAway), ended
    async with queue_server(tmp_path, tmp_path / "data") as (_, queue):
        again: list[Delivery] = []
        async for delivery in queue.consume("q"):
            again.append(delivery)
            if len(again) == 30:
                break
        assert [delivery.sequence for delivery in again] == list(range(1, 31))
        assert all(delivery.redelivered and delivery.attempt == 2 for delivery in again[: len(taken)])


@pytest_twisted.ensureDeferred
async def test_a_daemon_serves_and_ends(tmp_path: Path) -> None:
    port = free_port()
    where = f"tcp:127.0.0.1:{port}"
    # From where it is started, and not from where a daemon is.
    words = ["pf-queue", "--data", "data", "--listen", f"tcp:{port}:interface=127.0.0.1", "--ballast", "64K"]
    logs = ["--pidfile", "d.pid", "--logfile", "d.log"]

    def start() -> int:
        done = run_twistd(*logs, *words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done
        return int((tmp_path / "d.pid").read_text())

    process = await deferToThread(start)
    try:
        async with connect(reactor, where, Queue) as queue:
            assert await queue.declare("q")
            assert (await queue.publish("q", b"one")).sequence == 1
            # One that has the same data is told on the terminal from which it was started.
            second = ["--pidfile", "e.pid", "--logfile", "e.log", "pf-queue", "--data", "data", *LISTEN]
            done = await deferToThread(lambda: run_twistd(*second, cwd=tmp_path))
            assert done.returncode == 1
            assert "another process uses it" in done.stderr
            assert "Traceback" not in done.stderr
            assert not (tmp_path / "e.pid").exists()
    finally:
        os.kill(process, signal.SIGTERM)
    limit = time.monotonic() + PATIENCE
    while (tmp_path / "d.pid").exists():
        assert time.monotonic() < limit
        await deferToThread(time.sleep, 0.01)
    assert "Traceback" not in (tmp_path / "d.log").read_text()
    async with queue_server(tmp_path, tmp_path / "data") as (_, queue):
        assert (await queue.statistics("q")).depth == 1


@pytest_twisted.ensureDeferred
async def test_the_conversation_is_the_same_over_each_transport(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    leaf = authority.issue_cert("localhost", "127.0.0.1")
    leaf.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    here = quoteStringArgument(str(tmp_path))
    plain, private = free_port(), free_port()
    places = [
        f"tcp:{plain}:interface=127.0.0.1",
        f"udp:{plain}:interface=127.0.0.1",
        f"tls:{private}:interface=127.0.0.1:privateKey={here}/key.pem:certKey={here}/cert.pem",
        f"unix:{here}/q.sock",
    ]
    words = ["pf-queue", "--data", str(tmp_path / "data"), "--ballast", "64K"]
    for place in places:
        words += ["--listen", place]
    running = server(tmp_path, *words)
    started = await deferToThread(running.__enter__)
    try:
        ends = {
            "tcp": f"tcp:127.0.0.1:{plain}",
            "udp": f"udp:127.0.0.1:{plain}",
            "tls": f"tls:localhost:{private}:trustRoots={here}/ca.pem",
            "unix": f"unix:{here}/q.sock",
        }
        said = {name: await conversation(where, name) for name, where in ends.items()}
        assert said["udp"] == said["tls"] == said["unix"] == said["tcp"]
        assert "Traceback" not in started.log
    finally:
        await deferToThread(running.__exit__, None, None, None)


async def conversation(where: str, name: str) -> list[Any]:
    """What there is to be seen, without times."""
    said: list[Any] = []
    async with connect(reactor, where, Queue) as queue:
        said.append(await queue.declare(name))
        said.append(await queue.publish(name, bytes(100_000), subject="large"))
        said.append(await queue.publish_batch(name, [Message(body=bytes([number % 256])) for number in range(1000)]))
        with pytest.raises(Error) as caught:
            await queue.publish("nowhere", b"")
        said.append((type(caught.value), caught.value.message))
        tags = []
        # The credit is less than what there is: more comes as room is made.
        async for delivery in queue.consume(name, prefetch=10):
            said.append((delivery.sequence, delivery.body, delivery.attempt, delivery.subject, delivery.lease))
            tags.append(delivery.tag)
            if len(tags) == 10:
                said.append(await queue.acknowledge(name, tags))
                tags = []
            if delivery.sequence == 995:
                break
        statistics = await queue.statistics(name)
        said.append((statistics.depth, statistics.published))
        # They are given back when the server has learnt that nobody takes them.
        while (await queue.statistics(name)).groups[0].consumers:
            pass
        again = queue.consume(name)
        said += [(delivery.sequence, delivery.redelivered) for delivery in [await anext(again) for _ in range(11)]]
        await again.aclose()
        said.append(await queue.delete(name))
    return said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")
def test_the_directory_belongs_to_whom_the_server_becomes() -> None:
    # Not below pytest's, which are root's alone.
    with TemporaryDirectory() as made:
        home = Path(made)
        home.chmod(0o777)
        owners = owners_of_data(home)
    assert owners == {65534}


def owners_of_data(home: Path) -> set[int]:
    """Whose the data is of a server that becomes nobody."""
    with server(home, "--uid", "65534", "pf-queue", "--data", str(home / "data"), *LISTEN) as running:
        assert running.terminate() == 0
    return {path.stat().st_uid for path in [home / "data", *(home / "data").iterdir()]}
