"""``pf queue``: real processes against a real server; what is printed is acknowledged, and nothing else is."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import gatherResults
from twisted.internet.threads import deferToThread

from protoframe.queue import Message, QueueClient
from tests.processes import PATIENCE, environment, free_port, server

PF = [sys.executable, "-m", "protoframe.cli", "queue"]


def serving(directory: Path, port: int) -> Any:
    listen = f"tcp:{port}:interface=127.0.0.1"
    return server(directory, "pf-queue", "--data", str(directory / "data"), "--listen", listen)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with serving(tmp_path_factory.mktemp("queue"), port):
        yield f"tcp:127.0.0.1:{port}"


@asynccontextmanager
async def queue_at(where: str, name: str, *bodies: bytes, **settings: Any) -> AsyncIterator[QueueClient]:
    """A client, and a queue that has such messages."""
    async with QueueClient(reactor, where) as client:
        await client.declare(name, **settings)
        if bodies:
            await client.publish_batch(name, [Message(body=body) for body in bodies])
        yield client


def queue(*words: str, status: int = 0, stdin: bytes = b"") -> Any:
    """Fires with the standard output of a command that must end so; where it fails, with the line that says why."""
    return deferToThread(run, words, status, stdin)


def run(words: tuple[str, ...], status: int, stdin: bytes) -> str:
    done = subprocess.run(
        [*PF, *words], input=stdin, capture_output=True, timeout=PATIENCE, env=environment(), check=False
    )
    assert done.returncode == status, done.stderr.decode()
    if status:
        assert done.stderr.startswith(b"pf: ")
        assert done.stderr.count(b"\n") == 1
        return done.stderr.decode()
    assert done.stderr == b""
    return done.stdout.decode()


async def depth(client: QueueClient, name: str) -> int:
    return (await client.statistics(name)).depth


@pytest_twisted.ensureDeferred
async def test_a_queue_is_declared_filled_looked_at_and_deleted(where: str, tmp_path: Path) -> None:
    groups = ("--group", "x", "--group", "y")
    assert await queue("declare", where, "a.orders", "--lease", "5", *groups) == "a.orders: created\n"
    (tmp_path / "body").write_bytes(b"\xff\n\0")
    again, different, published = await gatherResults(
        [
            queue("declare", where, "a.orders", "--lease", "5", *groups, "--json"),
            queue("declare", where, "a.orders", "--lease", "6", *groups, status=70),
            queue("publish", where, "a.orders", "one", f"@{tmp_path / 'body'}", "--header", "k=v", "--subject", "s.t"),
        ]
    )
    assert json.loads(again) == {"queue": "a.orders", "created": False}
    assert "--replace" in different
    assert published == "2 messages are durable\n"
    peeked, shown, listed, stated = await gatherResults(
        [
            queue("peek", where, "a.orders", "--group", "x", "--json"),
            queue("peek", where, "a.orders", "--group", "x"),
            queue("ls", where, "a."),
            queue("stats", where, "a.orders"),
        ]
    )
    lines = [json.loads(line) for line in peeked.splitlines()]
    assert [line["state"] for line in lines] == ["ready", "ready"]
    assert (lines[0]["body"], lines[0]["headers"], lines[0]["subject"]) == ("one", {"k": "v"}, "s.t")
    assert base64.b64decode(lines[1]["body_base64"]) == b"\xff\n\0"
    assert shown.splitlines()[1].split()[-2:] == ["s.t", "one"]
    # What a terminal could act on is written as an escape.
    assert shown.splitlines()[2].endswith("\\n\\x00")
    head, row = listed.splitlines()
    assert head.split() == ["queue", "ready", "delayed", "leased", "consumers", "bytes", "published/s", "acked/s"]
    assert row.split()[:5] == ["a.orders", "4", "0", "0", "0"]
    assert "lease=5, groups=x+y" in stated
    assert await queue("purge", where, "a.orders", "--group", "x") == "a.orders: 2 messages removed\n"
    assert "NotEmpty" in await queue("delete", where, "a.orders", "--only-unused", status=73)
    assert await queue("delete", where, "a.orders", "--json") == '{"queue": "a.orders", "removed": 2}\n'


@pytest_twisted.ensureDeferred
async def test_lines_of_standard_input_are_messages_and_come_out_again(where: str) -> None:
    lines = b"".join(b"%d\n" % number for number in range(5000)) + b"\nlast"
    async with queue_at(where, "lines", dedup_window=60) as client:
        assert (
            await queue("publish", where, "lines", "-", "--dedup", "run1", stdin=lines) == "5002 messages are durable\n"
        )
        again = await queue("publish", where, "lines", "-", "--dedup", "run1", "--json", stdin=lines)
        assert json.loads(again) == {"queue": "lines", "durable": 5002, "duplicates": 5002}
        assert await queue("consume", where, "lines", "--max", "2") == "0\n1\n"
        assert (await client.statistics("lines")).groups[0].delivered == 2
        rest = await queue("consume", where, "lines", "--idle", "0.3", "--prefetch", "1000")
        assert rest.encode() == lines.partition(b"1\n")[2] + b"\n"
        assert await depth(client, "lines") == 0


@pytest_twisted.ensureDeferred
async def test_a_message_as_json_has_everything(where: str) -> None:
    async with queue_at(where, "json") as client:
        await client.publish("json", "größer".encode(), subject="a", headers={"k": "v"}, key="key", priority=3)
        (line,) = (await queue("consume", where, "json", "--max", "1", "--json")).splitlines()
    fields = json.loads(line)
    assert fields.pop("published") > 1e9
    assert fields == {
        "sequence": 1,
        "body": "größer",
        "lease": 1,
        "attempt": 1,
        "redelivered": False,
        "expires": None,
        "subject": "a",
        "headers": {"k": "v"},
        "key": "key",
        "priority": 3,
        "dead": None,
    }


@pytest_twisted.ensureDeferred
async def test_what_fails_says_so_and_how_many_are_durable(where: str) -> None:
    async with queue_at(where, "small", max_messages=1500) as client:
        text = await queue("publish", where, "small", "-", stdin=b"x\n" * 3000, status=72)
        durable = int(text.partition(" messages are durable")[0].rpartition(" of ")[0].rpartition(" ")[2])
        assert "QueueFull" in text
        assert await depth(client, "small") == durable > 0
    commands: list[tuple[str, Any]] = [
        ("line 1 has more than", queue("publish", where, "small", "-", stdin=b"x" * 5_000_000, status=2)),
        ("is no k=v", queue("publish", where, "small", "x", "--header", "k", status=2)),
        ("no such file", queue("publish", where, "small", "@/nonexistent", status=2)),
        ("0 of 1 messages are durable; try: pf queue ls", queue("publish", where, "nosuch", "x", status=69)),
        ("NoSuchQueue", queue("consume", where, "nosuch", status=69)),
        ("could not connect", queue("ls", f"tcp:127.0.0.1:{free_port()}", status=7)),
    ]
    for expected, command in commands:
        assert expected in await command


class Running:
    """A ``pf queue`` that runs, and whose lines are read as they come."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [*PF, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), bufsize=0
        )
        assert self.process.stdout is not None
        self._out = self.process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self.process.kill()
        self.process.wait()

    def line(self) -> Any:
        return deferToThread(self._out.readline)

    def close(self) -> None:
        self._out.close()

    def end(self) -> Any:
        return deferToThread(self.process.wait, PATIENCE)


@pytest_twisted.ensureDeferred
async def test_an_interrupt_loses_nothing(where: str) -> None:
    bodies = [b"%d" % number for number in range(20)]
    async with queue_at(where, "interrupted", *bodies) as client:
        with Running("consume", where, "interrupted", "--prefetch", "5") as running:
            assert [(await running.line()).strip() for _ in bodies] == bodies
            while await depth(client, "interrupted"):
                pass
            running.process.send_signal(signal.SIGINT)
            assert await running.end() == 130
        await client.publish("interrupted", b"later")
        assert await depth(client, "interrupted") == 1


@pytest_twisted.ensureDeferred
async def test_a_closed_output_ends_it_and_what_was_not_written_is_not_acknowledged(where: str) -> None:
    bodies = [b"%d " % number + bytes(1000) for number in range(2000)]
    async with queue_at(where, "closed", *bodies) as client:
        with (
            Running("consume", where, "closed") as running,
            Running("consume", where, "closed", "--subject", "x") as idle,
        ):
            assert (await running.line()).startswith(b"0 ")
            running.close()
            assert await running.end() == 141
            idle.close()
            assert await idle.end() == 141
        left = await depth(client, "closed")
        # What a pipe holds was written.
        assert 1800 < left < 2000
        (first,) = [waiting async for waiting in client.peek("closed", count=1)]
        assert first.message.body.startswith(b"%d " % (2000 - left))


@pytest_twisted.ensureDeferred
async def test_consuming_outlives_a_server_that_is_killed_and_started_again(tmp_path: Path) -> None:
    port = free_port()
    where = f"tcp:127.0.0.1:{port}"
    first = serving(tmp_path, port)
    process = (await deferToThread(first.__enter__)).process
    try:
        async with queue_at(where, "orders", b"before") as client:
            with Running("consume", where, "orders", "--max", "2") as running:
                assert await running.line() == b"before\n"
                while await depth(client, "orders"):
                    pass
                process.kill()
                process.wait(PATIENCE)
                second = serving(tmp_path, port)
                await deferToThread(second.__enter__)
                try:
                    await client.publish("orders", b"after", dedup="key")
                    assert await running.line() == b"after\n"
                    assert await running.end() == 0
                    assert await depth(client, "orders") == 0
                finally:
                    await client.stopService()
                    await deferToThread(second.__exit__, None, None, None)
    finally:
        first.__exit__(None, None, None)


def test_help_loads_no_twisted() -> None:
    code = (
        "import sys\nfrom protoframe.cli.main import main\n"
        "try: main(['queue', '--help'])\n"
        "except SystemExit as end: sys.exit('twisted' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=False, timeout=30)
    assert done.returncode == 0
    for command in ("ls", "declare", "publish", "consume", "peek", "purge", "stats", "delete"):
        assert f"  {command} ".encode() in done.stdout
