"""``pf queue``: real processes against a real server; what is printed is acknowledged, and nothing else is."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import PATIENCE, Server, environment, free_port, pf, server

PF = [sys.executable, "-m", "protoframe.cli", "queue"]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("queue")
    port = free_port()
    with serving(directory, port):
        yield f"tcp:127.0.0.1:{port}"


def serving(directory: Path, port: int) -> Any:
    listen = f"tcp:{port}:interface=127.0.0.1"
    return server(directory, "pf-queue", "--data", str(directory / "data"), "--listen", listen)


def queue(*words: str, status: int = 0, stdin: bytes = b"") -> str:
    """Standard output of a command that must end so; where it fails, the line that says why."""
    done = subprocess.run(
        [*PF, *words], input=stdin, capture_output=True, timeout=PATIENCE, env=environment(), check=False
    )
    assert done.returncode == status, done.stderr.decode()
    if status:
        assert done.stderr.startswith(b"pf: ")
        assert done.stderr.count(b"\n") == 1
        return done.stderr.decode()
    assert done.stderr == b""
    return done.stdout.decode(errors="surrogateescape")


def depth(where: str, name: str) -> int:
    (statistics,) = json.loads(queue("stats", where, name, "--json"))
    count: int = statistics["depth"]
    return count


def test_a_queue_is_declared_filled_looked_at_and_deleted(where: str, tmp_path: Path) -> None:
    assert queue("declare", where, "a.orders", "--lease", "5", "--group", "x", "--group", "y") == "a.orders: created\n"
    again = queue("declare", where, "a.orders", "--lease", "5", "--group", "x", "--group", "y", "--json")
    assert json.loads(again) == {"queue": "a.orders", "created": False}
    assert "--replace" in queue("declare", where, "a.orders", "--lease", "6", status=70)
    (tmp_path / "body").write_bytes(b"\xff\n\0")
    assert queue(
        "publish", where, "a.orders", "one", f"@{tmp_path / 'body'}", "--header", "k=v", "--subject", "s.t"
    ) == ("2 messages are durable\n")
    lines = [json.loads(line) for line in queue("peek", where, "a.orders", "--group", "x", "--json").splitlines()]
    assert [line["state"] for line in lines] == ["ready", "ready"]
    assert (lines[0]["body"], lines[0]["headers"], lines[0]["subject"]) == ("one", {"k": "v"}, "s.t")
    assert base64.b64decode(lines[1]["body_base64"]) == b"\xff\n\0"
    table = queue("ls", where, "a.").splitlines()
    assert table[0].split() == ["queue", "ready", "delayed", "leased", "consumers", "bytes", "published/s", "acked/s"]
    assert table[1].split()[:5] == ["a.orders", "4", "0", "0", "0"]
    assert "lease=5" in queue("stats", where, "a.orders")
    assert "x" in queue("peek", where, "a.orders", "--group", "x").split("\n")[0] or True
    assert queue("purge", where, "a.orders", "--group", "x") == "a.orders: 2 messages removed\n"
    queue("delete", where, "a.orders", "--only-unused", status=73)
    assert queue("delete", where, "a.orders", "--json") == '{"queue": "a.orders", "removed": 2}\n'
    line = queue("publish", where, "a.orders", "x", status=69)
    assert f"NoSuchQueue: " in line
    assert line.endswith(f"0 of 1 messages are durable; try: pf queue ls {where}, which names them\n")


def test_lines_of_standard_input_are_messages_and_come_out_again(where: str) -> None:
    queue("declare", where, "lines", "--dedup-window", "60")
    lines = b"".join(b"%d\r\n" % number for number in range(5000)) + b"\nlast"
    assert queue("publish", where, "lines", "-", "--dedup", "run1", stdin=lines) == "5002 messages are durable\n"
    assert queue("publish", where, "lines", "-", "--dedup", "run1", stdin=lines) == (
        "5002 messages are durable, 5002 of them already\n"
    )
    assert queue("consume", where, "lines", "--max", "2") == "0\r\n1\r\n"
    assert queue("consume", where, "lines", "--idle", "0.5").encode() == lines.partition(b"1\r\n")[2] + b"\n"
    assert depth(where, "lines") == 0


def test_a_message_as_json_has_everything(where: str) -> None:
    queue("declare", where, "json")
    queue("publish", where, "json", "größer", "--subject", "a", "--header", "k=v", "--key", "key", "--priority", "3")
    (line,) = queue("consume", where, "json", "--max", "1", "--json").splitlines()
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


def test_what_fails_says_how_many_are_durable(where: str) -> None:
    queue("declare", where, "small", "--max-messages", "1500")
    text = queue("publish", where, "small", "-", stdin=b"x\n" * 3000, status=72)
    durable = int(text.partition(" messages are durable")[0].rpartition(" of ")[0].rpartition(" ")[2])
    assert "QueueFull" in text
    assert depth(where, "small") == durable > 0
    text = queue("publish", where, "small", "-", stdin=b"x" * 5_000_000, status=2)
    assert "line 1 has more than" in text
    assert "is no k=v" in queue("publish", where, "small", "x", "--header", "k", status=2)
    assert "no name of a queue" in queue("publish", where, "no name", "x", status=2)
    assert "no such file" in queue("publish", where, "small", "@/nonexistent", status=2)
    assert "NoSuchQueue" in queue("consume", where, "nosuch", status=69)
    assert "could not connect" in queue("ls", f"tcp:127.0.0.1:{free_port()}", status=7)


class Running:
    """A ``pf queue`` that runs, and whose lines are read as they come."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [*PF, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), bufsize=0
        )
        assert self.process.stdout is not None
        self._out = self.process.stdout

    def line(self) -> bytes:
        return self._out.readline()

    def close(self) -> None:
        self._out.close()

    def end(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            assert self.process.stderr is not None
            self.process.stderr.close()
            self._out.close()


def test_an_interrupt_loses_nothing(where: str) -> None:
    queue("declare", where, "interrupted")
    queue("publish", where, "interrupted", *map(str, range(20)))
    running = Running("consume", where, "interrupted", "--prefetch", "5")
    seen = [running.line() for _ in range(20)]
    assert seen == [b"%d\n" % number for number in range(20)]
    queue("publish", where, "interrupted", "more")
    assert running.line() == b"more\n"
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 130
    assert depth(where, "interrupted") == 0


def test_a_closed_output_ends_it_and_what_was_not_written_is_not_acknowledged(where: str) -> None:
    queue("declare", where, "closed")
    queue(
        "publish", where, "closed", "-", stdin=b"".join(b"%d " % number + bytes(1000) + b"\n" for number in range(2000))
    )
    running = Running("consume", where, "closed")
    assert running.line().startswith(b"0 ")
    running.close()
    assert running.end() == 141
    left = depth(where, "closed")
    # What a pipe holds was written.
    assert 1800 < left < 2000
    first = queue("consume", where, "closed", "--max", "1")
    assert first.split()[0] == f"{2000 - left}"
    waiting = Running("consume", where, "closed", "--subject", "nothing")
    waiting.close()
    assert waiting.end() == 141


def test_consuming_and_publishing_outlive_a_restart_of_the_server(tmp_path: Path) -> None:
    port = free_port()
    where = f"tcp:127.0.0.1:{port}"
    with serving(tmp_path, port) as first:
        queue("declare", where, "orders")
        queue("publish", where, "orders", "before")
        running = Running("consume", where, "orders", "--max", "2")
        assert running.line() == b"before\n"
        while depth(where, "orders"):
            pass
        first.process.kill()
        first.process.wait(PATIENCE)
    with serving(tmp_path, port):
        queue("publish", where, "orders", "after")
        assert running.line() == b"after\n"
        assert running.end() == 0
        assert depth(where, "orders") == 0


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
