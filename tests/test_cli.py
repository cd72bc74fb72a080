"""The command line ``pf``: real processes, real sockets; what they print, and what they exit with."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import trustme
from twisted.internet.task import Clock

import protoframe
from protoframe import errors
from protoframe.cli import arguments, call, completing, items, output, problems, schemas
from protoframe.core.frames import serialize_preface

PF = [sys.executable, "-m", "protoframe.cli"]
SUPPORT = Path(__file__).with_name("support_cli.py")

#: Seconds that nothing here should take; who waits longer has failed.
PATIENCE = 20.0


def environment(**more: str) -> dict[str, str]:
    """What a process is started with: nothing of the user's that ``pf`` looks at."""
    hidden = ("PROTOFRAME_", "NO_COLOR", "_PF_COMPLETE", "COMP_", "TERM", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return {**inherited, "PYTHONPATH": str(Path(protoframe.__file__).parent.parent), "TERM": "xterm", **more}


class Done(NamedTuple):
    """A ``pf`` that has ended."""

    status: int
    out: str
    err: str


def pf(*words: str | bytes, stdin: bytes = b"", **more: str) -> Done:
    done = subprocess.run(
        [*PF, *words], input=stdin, capture_output=True, env=environment(**more), timeout=PATIENCE, check=False
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def pf_each(commands: Iterable[Sequence[str | bytes]]) -> list[Done]:
    """Several at a time: most of what one costs is the start of an interpreter."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda words: pf(*words), commands))


def at_once(*runs: Callable[[], str]) -> list[str]:
    """As `pf_each`, of anything."""
    with ThreadPoolExecutor(4) as pool:
        return [done.result() for done in [pool.submit(run) for run in runs]]


def error_line(done: Done, status: int) -> str:
    """The one line that a failure is said in."""
    assert done.err.startswith("pf: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err.replace("\\nTraceback", "")
    assert all(character.isprintable() for character in done.err[:-1])
    assert done.status == status, done.err
    assert done.out == ""
    return done.err[:-1]


def result(done: Done) -> Any:
    """What was printed: one line of JSON, and nothing else."""
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("\n")
    assert done.out.count("\n") == 1
    return json.loads(done.out)


class Server:
    """The server of `support_cli`, and what it says."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SUPPORT), str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        self._rest = b""
        self.where: dict[str, str] = json.loads(self.line())
        self.tcp = self.where["tcp"]

    def line(self) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            octets = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            assert octets, "the server says nothing"
            self._rest += octets
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def wait_for(self, text: str) -> None:
        while self.line() != text:
            pass

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pf")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(made / "authority.pem"))
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(str(made / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(made / "chain.pem"))
    return made


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    started = Server(directory)
    yield started
    started.kill()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that takes connections, and where nobody ever says a word."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(PATIENCE)
        yield made


@contextlib.contextmanager
def peer(speak: Callable[[socket.socket], object]) -> Iterator[str]:
    """Something that listens, takes one connection and is not a protoframe server."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(PATIENCE)

        def accept() -> None:
            connection, _ = made.accept()
            with connection:
                speak(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield where_of(made)
        finally:
            thread.join()


def where_of(listener: socket.socket) -> str:
    return f"tcp:127.0.0.1:{listener.getsockname()[1]}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as made:
        return where_of(made)


class TestHelp:
    @pytest.mark.parametrize(
        "words", [["--help"], ["--version"], ["call", "--help"], ["bench", "--help"], ["completion", "bash"]]
    )
    def test_neither_twisted_nor_msgspec_is_imported(self, words: list[str]) -> None:
        script = (
            "import sys\n"
            "from protoframe.cli.main import main\n"
            "try: main(sys.argv[1:])\n"
            "except SystemExit as end: print(end.code, 'twisted' in sys.modules, 'msgspec' in sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, env=environment(), check=True
        )
        assert done.stdout.decode().splitlines()[-1] == "0 False False"

    def test_each_command_shows_an_example_and_the_statuses(self) -> None:
        commands = ["call", "list", "describe", "ping", "bench", "health"]
        for command, done in zip(commands, pf_each([command, "-h"] for command in commands), strict=True):
            assert done.status == 0
            assert f"pf {command} " in done.out.partition("Example")[2]
            assert "28   timed out" in done.out

    def test_the_version_is_the_package_s(self) -> None:
        assert pf("--version").out == f"pf (protoframe) {protoframe.__version__}\n"

    def test_nothing_typed_is_a_usage_error(self) -> None:
        assert error_line(pf(), 2) == "pf: missing command; try: pf --help"


class TestCall:
    def test_a_result_is_a_line_of_json(self, server: Server) -> None:
        assert pf("call", server.tcp, "Desk.echo", "text=hello") == Done(0, '"hello"\n', "")

    def test_a_unix_socket_serves_as_well(self, server: Server) -> None:
        assert result(pf("call", server.where["unix"], "Desk.nothing")) is None

    def test_tls_is_spoken_where_the_certificate_is_trusted(self, server: Server, directory: Path) -> None:
        trusted = directory / "trusted"
        trusted.mkdir()
        shutil.copy(directory / "authority.pem", trusted)
        where = f"{server.where['tls']}:trustRoots={trusted}"
        assert result(pf("call", where, "Desk.echo", "text=secret")) == "secret"
        refused = pf("call", server.where["tls"], "Desk.echo", "text=secret")
        assert "an authority that is not trusted here" in error_line(refused, 7)

    def test_arguments_become_what_the_method_takes(self, server: Server) -> None:
        cases: list[tuple[str, list[str], object]] = [
            ("echo", ["text=a=b:=c@d"], "a=b:=c@d"),
            ("echo", ["text="], ""),
            ("echo", ["text=-v"], "-v"),
            ("echo", ["--", "text=--json"], "--json"),
            ("echo", ["text=grüße 😀\n\t\"'\\"], "grüße 😀\n\t\"'\\"),
            ("echo", ['text:="\\u00e9"'], "é"),
            ("shift", ["at=2024-02-28T12:00:00Z", "days:=-2"], "2024-02-26T12:00:00Z"),
            ("paint", ["colour=red", "glossy:=true"], "RED True"),
            ("order", ['item:={"name": "pen",\n "tags": ["a"]}'], [{"name": "pen", "price": 0.5, "tags": ["a"]}]),
            ("keys", ['names:={"7": "a", "-1": "b"}'], [-1, 7]),
            ("reverse", ["content=AQID"], "AwIB"),
        ]
        commands = [["call", server.tcp, f"Desk.{method}", *words] for method, words, _ in cases]
        for (_, _, expected), done in zip(cases, pf_each(commands), strict=True):
            assert result(done) == expected

    def test_options_may_follow_the_arguments(self, server: Server) -> None:
        assert result(pf("call", server.tcp, "Desk.echo", "text=a", "--timeout", "5", "--json", "-q")) == "a"

    def test_a_file_is_bytes_where_bytes_are_taken_and_text_where_not(self, server: Server, tmp_path: Path) -> None:
        binary, text = tmp_path / "binary", tmp_path / "text"
        binary.write_bytes(b"\x00\xff")
        text.write_text("grüße\n")
        assert result(pf("call", server.tcp, "Desk.reverse", f"content@{binary}")) == "/wA="
        assert result(pf("call", server.tcp, "Desk.measure", f"content@{text}")) == 8
        assert result(pf("call", server.tcp, "Desk.echo", f"text@{text}")) == "grüße\n"
        assert "not UTF-8" in error_line(pf("call", server.tcp, "Desk.echo", f"text@{binary}"), 2)

    def test_without_a_description_text_is_text_and_the_rest_bytes(self, server: Server, tmp_path: Path) -> None:
        binary = tmp_path / "binary"
        binary.write_bytes(b"\x00\xff")
        assert result(pf("call", server.where["mute"], "Desk.reverse", f"content@{binary}")) == "/wA="
        assert result(pf("call", server.where["mute"], "Desk.echo", "text@-", stdin=b"hello")) == "hello"

    def test_standard_input_is_a_file(self, server: Server) -> None:
        assert result(pf("call", server.tcp, "Desk.reverse", "content@-", stdin=b"\xffA")) == "Qf8="

    def test_a_large_value_arrives_whole(self, server: Server, tmp_path: Path) -> None:
        file = tmp_path / "large"
        file.write_bytes(b"x" * 3_000_000)
        assert result(pf("call", server.tcp, "Desk.measure", f"content@{file}")) == 3_000_000
        assert len(result(pf("call", server.tcp, "Desk.letters", "count:=6000000"))) == 6_000_000

    def test_a_value_larger_than_the_server_takes_is_told_so(self, server: Server, tmp_path: Path) -> None:
        file = tmp_path / "large"
        file.write_bytes(b"x" * 5_000_000)
        assert "MessageTooLarge" in error_line(pf("call", server.tcp, "Desk.echo", f"text@{file}"), 72)


class TestUsage:
    def test_what_cannot_be_is_said_in_a_line(self) -> None:
        where = "tcp:127.0.0.1:1"
        cases: list[tuple[list[str | bytes], str]] = [
            (["call"], "missing argument 'WHERE'; try: pf call --help"),
            (["calls"], "no such command 'calls'"),
            (["call", where, "A.b", "--nosuch"], "--nosuch"),
            (
                ["call", "127.0.0.1:12000", "A.b"],
                "127.0.0.1:12000 does not say how to connect; try: tcp:127.0.0.1:12000",
            ),
            (["call", "udp:127.0.0.1", "A.b"], "'udp:127.0.0.1' is no place to connect to: the port is missing"),
            (["call", "udp:127.0.0.1:1:x", "A.b"], "'x' is a part too many"),
            (["call", "", "A.b"], "WHERE is empty"),
            (["call", "tcp:127.0.0.1", "A.b"], "'tcp:127.0.0.1' is no place to connect to"),
            (["call", "tcp:127.0.0.1:99999", "A.b"], "99999"),
            (["call", "gopher:x", "A.b"], "gopher"),
            (["call", b"tcp:\xff:1", "A.b"], "WHERE is not UTF-8"),
            (["call", where, "upper"], "'upper' is no Protocol.method; try: pf list tcp:127.0.0.1:1"),
            (["call", where, "Speech."], "'Speech.' is no Protocol.method"),
            (["call", where, "A." + "b" * 300], "more than 255 octets"),
            (["call", where, "A.b", "x"], "'x' is no argument; try: k=text, k:=json or k@file"),
            (["call", where, "A.b", "x:=nope"], "x:=nope is not JSON"),
            (["call", where, "A.b", "x=1", "x:=1"], "argument x is given twice"),
            (["call", where, "A.b", "x@-", "y@-"], "cannot both read standard input"),
            (["call", where, "A.b", "x@/nonexistent"], "x@/nonexistent: no such file or directory"),
            (["call", where, "A.b", "x@/"], "x@/: is a directory"),
            (["list", where, "--timeout", "nan"], "above 0, got nan"),
            (["list", where, "--timeout", "0"], "above 0, got 0"),
            (["list", where, "--timeout", "-1"], "above 0, got -1"),
            (["list", where, "--timeout", "inf"], "above 0, got inf"),
            (["list", where, "--timeout", "1e9"], "0 to 1000000 seconds"),
            (["list", where, "--timeout", "soon"], "'soon'"),
            (["ping", where, "--count", "0"], "--count"),
            (["ping", where, "--interval", "-1"], "--interval"),
            (["completion", "tcsh"], "'tcsh'"),
        ]
        for (_, text), done in zip(cases, pf_each(words for words, _ in cases), strict=True):
            assert text in error_line(done, 2)

    def test_a_file_that_is_too_large_is_refused_unread(self, server: Server, tmp_path: Path) -> None:
        file = tmp_path / "sparse"
        with file.open("wb") as opened:
            opened.truncate(arguments.LONGEST_FILE + 1)
        for where in (server.tcp, server.where["mute"]):
            done = pf("call", where, "Desk.echo", f"text@{file}")
            assert f"text@{file}: more than 1073741824 bytes" in error_line(done, 2)


class TestConnecting:
    def test_a_closed_port_is_7(self) -> None:
        where = closed_port()
        for done in pf_each([["call", where, "Desk.echo"], ["list", where], ["describe", where], ["ping", where]]):
            text = f"{where}: could not connect: connection refused; try: check the address"
            assert text in error_line(done, 7)

    def test_a_socket_that_is_not_there_is_7(self, tmp_path: Path) -> None:
        assert "no such file or directory" in error_line(pf("ping", f"unix:{tmp_path}/none"), 7)

    def test_a_server_that_speaks_something_else_is_7(self) -> None:
        with peer(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as where:
            assert "HTTP" in error_line(pf("call", where, "Desk.echo"), 7)

    def test_a_server_that_hangs_up_is_7(self) -> None:
        with peer(lambda _: None) as where:
            assert "could not connect" in error_line(pf("ping", where), 7)

    def test_a_server_of_another_version_is_7(self) -> None:
        def speak(connection: socket.socket) -> None:
            connection.sendall(serialize_preface(200, 201))
            while connection.recv(4096):
                pass

        with peer(speak) as where:
            assert "version" in error_line(pf("list", where), 7)


class TestTimeout:
    def test_a_server_that_never_says_hello_is_28(self, listener: socket.socket) -> None:
        began = time.monotonic()
        line = error_line(pf("call", where_of(listener), "Desk.echo", "--timeout", "1"), 28)
        assert time.monotonic() - began < 2.5
        assert "could not connect within 1 s; try: a longer --timeout" in line

    def test_a_method_that_never_answers_is_28(self, server: Server) -> None:
        line = error_line(pf("call", server.tcp, "Desk.never", "--timeout", "0.5"), 28)
        assert line.startswith(f"pf: Desk.never at {server.tcp}: timed out after 0.5 s")
        server.wait_for("never cancelled")

    def test_a_deadline_that_the_server_speaks_of_is_28(self, server: Server) -> None:
        assert "the train has gone" in error_line(pf("call", server.tcp, "Desk.late"), 28)

    def test_a_ping_without_an_answer_is_28(self, server: Server) -> None:
        def relay(connection: socket.socket) -> None:
            # Past the handshake, what the client says goes nowhere.
            host, port = server.tcp.removeprefix("tcp:").split(":")
            with socket.create_connection((host, int(port))) as other:
                other.sendall(connection.recv(4096))
                connection.sendall(other.recv(4096))
                while connection.recv(4096):
                    pass

        with peer(relay) as where:
            assert "timed out after 0.7 s" in error_line(pf("ping", where, "--timeout", "0.7"), 28)

    def test_the_flag_goes_before_the_environment(self, listener: socket.socket) -> None:
        where = where_of(listener)
        assert "within 0.3 s" in error_line(pf("ping", where, PROTOFRAME_TIMEOUT="0.3"), 28)
        assert "within 0.2 s" in error_line(pf("ping", where, "--timeout", "0.2", PROTOFRAME_TIMEOUT="60"), 28)
        assert "above 0, got nan" in error_line(pf("ping", where, PROTOFRAME_TIMEOUT="nan"), 2)


class TestRemoteErrors:
    def test_an_error_says_what_where_and_what_next(self, server: Server) -> None:
        cases = [
            (["Desk.nosuch"], 76, "there is no method Desk.nosuch; try: pf list WHERE"),
            (["No.such"], 76, "there is no method No.such; try: pf list WHERE"),
            (["Desk.echo"], 67, "InvalidArgument: $.text: missing; try: pf describe WHERE Desk.echo"),
            (["Desk.echo", "text:=3"], 67, "InvalidArgument: $.text: expected str, got int"),
            (["Desk.paint", "colour=mauve"], 67, "mauve"),
            (
                ["Desk.refuse", "reason=tired"],
                66,
                'Refused: not today (reason="tired", limit=3); try: pf describe WHERE',
            ),
            (["Desk.fail"], 66, "Error: nothing special"),
            (["Desk.find"], 69, "NotFound: no such thing"),
            (["Desk.crash"], 77, "Internal: "),
        ]
        commands = [["call", server.tcp, *words] for words, _, _ in cases]
        for (words, status, text), done in zip(cases, pf_each(commands), strict=True):
            line = error_line(done, status)
            assert line.startswith(f"pf: {words[0]} at {server.tcp}: ")
            assert text.replace("WHERE", server.tcp) in line
            assert "secret" not in line

    def test_what_the_peer_says_stays_on_its_line_and_does_not_drive_the_terminal(self, server: Server) -> None:
        line = error_line(pf("call", server.tcp, "Desk.insult"), 66)
        assert r"no \x1b[31mred\nTraceback\r\x07\x9b1m \u202eevil\u2028end" in line

    def test_a_server_that_dies_in_the_middle_is_78(self, tmp_path: Path) -> None:
        server = Server(tmp_path)
        with started("call", server.tcp, "Desk.never") as process:
            server.wait_for("never began")
            server.kill()
            line = error_line(ended(process), 78)
        assert "(the call may have run)" in line


@contextlib.contextmanager
def started(*words: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A ``pf`` that runs."""
    with subprocess.Popen(
        [*PF, *words], **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **more}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[bytes]) -> Done:
    out, err = process.communicate(timeout=PATIENCE)
    return Done(process.returncode, out.decode(), err.decode())


class TestStreams:
    def test_items_are_lines_in_their_order(self, server: Server) -> None:
        wheres = {5000: server.tcp, 2: server.where["mute"], 0: server.tcp}
        commands = [["call", where, "Desk.numbers", f"count:={count}"] for count, where in wheres.items()]
        for count, done in zip(wheres, pf_each(commands), strict=True):
            assert done == Done(0, "".join(f"{number}\n" for number in range(count)), "")

    def test_items_are_written_as_they_come_and_an_interrupt_leaves_the_stream(self, server: Server) -> None:
        with started("call", server.tcp, "Desk.drip") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b'"one"\n'
            process.send_signal(signal.SIGINT)
            assert ended(process) == Done(130, "", "pf: interrupted\n")
        server.wait_for("drip left")

    def test_an_error_comes_behind_the_items_before_it(self, server: Server) -> None:
        done = pf("call", server.tcp, "Desk.tire", "count:=2")
        assert [json.loads(line)["name"] for line in done.out.splitlines()] == ["item 0", "item 1"]
        line = error_line(done._replace(out=""), 66)
        assert 'Refused: enough (reason="tired", limit=2)' in line

    def test_a_timeout_that_is_given_holds_for_the_whole_stream(self, server: Server) -> None:
        done = pf("call", server.tcp, "Desk.drip", "--timeout", "0.7")
        assert done.out == '"one"\n'
        assert "timed out after 0.7 s" in error_line(done._replace(out=""), 28)
        server.wait_for("drip left")

    def test_a_reader_that_goes_away_ends_it_though_nothing_comes(self, server: Server) -> None:
        script = f'"$0" -m protoframe.cli call {server.tcp} Desk.drip | head -1; echo "${{PIPESTATUS[0]}}"'
        done = subprocess.run(
            ["bash", "-c", script, sys.executable],
            capture_output=True,
            env=environment(),
            timeout=PATIENCE,
            check=False,
        )
        assert (done.stdout, done.stderr) == (b'"one"\n141\n', b"")
        server.wait_for("drip left")

    def test_lines_of_a_file_are_sent_as_items(self, server: Server, tmp_path: Path) -> None:
        file, items_file = tmp_path / "numbers", tmp_path / "items"
        file.write_text("1\n\n 2 \r\n" + "3\n" * 20_000 + "4")
        items_file.write_text('{"name": "pen"}\n{"name": "ink"}\n')
        added, empty, repeated = pf_each(
            [
                ["call", server.tcp, "Desk.add", f"numbers@{file}", "to:=10"],
                ["call", server.tcp, "Desk.add", "numbers@-"],
                ["call", server.tcp, "Desk.repeat", f"items@{items_file}"],
            ]
        )
        assert (result(added), result(empty)) == (60_017, 0)
        assert repeated.out == '"pen"\n"ink"\n'
        assert result(pf("call", server.tcp, "Desk.add", "numbers@-", stdin=file.read_bytes())) == 60_007

    def test_elements_of_an_array_are_sent_as_items(self, server: Server) -> None:
        given, refused = pf_each(
            ["call", server.tcp, "Desk.add", *more] for more in (["numbers:=[1, 2]"], ["numbers=1", "to@-"])
        )
        assert result(given) == 3
        assert "try: numbers@FILE" in error_line(refused, 2)

    def test_standard_input_is_read_as_it_comes(self, server: Server) -> None:
        with started("call", server.tcp, "Desk.repeat", "items@-", stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for name in (b"pen", b"ink"):
                process.stdin.write(b'{"name": "%s"}\n' % name)
                process.stdin.flush()
                assert process.stdout.readline() == b'"%s"\n' % name
            assert ended(process) == Done(0, "", "")

    def test_an_interrupt_does_not_wait_for_standard_input(self, server: Server) -> None:
        with started("call", server.tcp, "Desk.repeat", "items@-", stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b'{"name": "pen"}\n')
            process.stdin.flush()
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130

    def test_a_bad_line_is_told_with_its_file_and_number(self, server: Server, tmp_path: Path) -> None:
        cases = [("1\n\nx\n2\n", 3), ("1\n[1", 2), ("1 2\n", 1), ("1\nNaN\n", 2)]
        for number, (text, _) in enumerate(cases):
            (tmp_path / str(number)).write_text(text)
        answers = pf_each(["call", server.tcp, "Desk.add", f"numbers@{tmp_path}/{number}"] for number in range(4))
        for number, ((_, line), done) in enumerate(zip(cases, answers, strict=True)):
            assert f"pf: numbers@{tmp_path}/{number}: line {line} is not JSON: " in error_line(done, 2)

    def test_a_server_that_does_not_describe_itself_is_said_to_be_the_reason(
        self, server: Server, tmp_path: Path
    ) -> None:
        (tmp_path / "numbers").write_text("1\n")
        words = [f"numbers@{tmp_path}/numbers", "numbers:=[1]"]
        for done in pf_each(["call", server.where["mute"], "Desk.add", word] for word in words):
            line = error_line(done, 73)
            assert "takes a stream (numbers)" in line
            assert "describe themselves" in line


class TestInterrupt:
    def test_during_a_call_it_is_130_and_the_server_is_told(self, server: Server) -> None:
        with started("call", server.tcp, "Desk.never", "--timeout", "100") as process:
            server.wait_for("never began")
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert error_line(ended(process), 130) == "pf: interrupted"
            assert time.monotonic() - began < 2.0
        server.wait_for("never cancelled")

    def test_while_connecting_it_is_130(self, listener: socket.socket) -> None:
        with started("list", where_of(listener), "--timeout", "100") as process:
            connection, _ = listener.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                error_line(ended(process), 130)

    def test_a_ping_that_is_interrupted_sums_up(self, server: Server) -> None:
        with started("ping", server.tcp, "--count", "1000", "--interval", "100") as process:
            assert process.stdout is not None
            first = process.stdout.readline().decode()
            process.send_signal(signal.SIGINT)
            done = ended(process)
        assert first.endswith(" ms\n")
        assert (done.status, done.err) == (130, "pf: interrupted\n")

    def test_sigterm_ends_it_at_once(self, listener: socket.socket) -> None:
        with started("list", where_of(listener), "--timeout", "100") as process:
            connection, _ = listener.accept()
            with connection:
                process.send_signal(signal.SIGTERM)
                assert ended(process) == Done(-signal.SIGTERM, "", "")


class TestOutput:
    @pytest.mark.parametrize("words", [["list"], ["call", "Desk.nothing"], ["ping"], ["--help"]])
    def test_a_reader_that_went_away_makes_no_noise(self, server: Server, words: list[str]) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        more = words[:1] if words[0].startswith("-") else [words[0], server.tcp, *words[1:]]
        with started(*more, stdout=writing) as process:
            os.close(writing)
            _, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (141, b"")

    def test_a_full_disk_is_said_in_a_line(self, server: Server) -> None:
        with open("/dev/full", "wb") as full, started("call", server.tcp, "Desk.nothing", stdout=full) as process:
            _, err = process.communicate(timeout=PATIENCE)
        assert (
            error_line(Done(process.returncode, "", err.decode()), 1) == "pf: standard output: No space left on device"
        )

    def test_closed_streams_are_no_crash(self, server: Server) -> None:
        script = f'"$0" -m protoframe.cli call {server.tcp} Desk.nothing'
        for streams, status, text in ((">&-", 1, b"pf: standard output is closed\n"), (">&- 2>&-", 1, b"")):
            done = subprocess.run(
                ["sh", "-c", f"{script} {streams}", sys.executable], capture_output=True, env=environment(), check=False
            )
            assert (done.returncode, done.stdout, done.stderr) == (status, b"", text)

    def test_json_is_utf_8_whatever_the_locale(self, server: Server) -> None:
        done = pf("call", server.tcp, "Desk.echo", 'text:="gr\\u00fc\\u00dfe"', PYTHONIOENCODING="ascii")
        assert done.out == '"grüße"\n'

    def test_colour_is_for_terminals_that_were_not_asked_to_do_without(self, server: Server) -> None:
        words = ["list", server.tcp]
        coloured, *plain = at_once(
            lambda: on_terminal(words, stream="stdout"),
            lambda: on_terminal(words, stream="stdout", NO_COLOR="1"),
            lambda: on_terminal(words, stream="stdout", TERM="dumb"),
            lambda: pf(*words).out,
        )
        assert "\x1b[1mDesk\x1b[0m" in coloured
        for text in plain:
            assert text.startswith("Desk  Answers")
            assert "\x1b" not in text
        assert on_terminal(["list", "nowhere"], stream="stderr").startswith("\x1b[1;31mpf:\x1b[0m 'nowhere'")

    def test_a_terminal_is_not_driven_by_a_result(self, server: Server) -> None:
        words = ["call", server.tcp, "Desk.echo", 'text:="\\u009b1m\\u202e"']
        assert on_terminal(words, stream="stdout").strip() == r'"\u009b1m\u202e"'
        assert pf(*words).out == '"\x9b1m\u202e"\n'

    def test_progress_is_for_terminals_and_not_when_quiet(self, server: Server) -> None:
        words = ["call", server.tcp, "Desk.never", "--timeout", "0.8"]
        shown, *quiet = at_once(
            lambda: on_terminal(words, stream="stderr"),
            lambda: on_terminal([*words, "--quiet"], stream="stderr"),
            lambda: on_terminal(words, stream="stderr", PROTOFRAME_QUIET="1"),
        )
        assert f"waiting for Desk.never at {server.tcp}" in shown
        assert "\r\x1b[K\x1b[1;31mpf:" in shown
        for text in quiet:
            assert text.startswith("\x1b[1;31mpf:")
            assert "waiting" not in text


def on_terminal(words: list[str], *, stream: str, **more: str) -> str:
    """What ``pf`` writes to a stream that is a terminal, its width being unlimited."""
    terminal, far_end = pty.openpty()
    text = b""
    with started(*words, env=environment(COLUMNS="200", **more), **{stream: far_end}) as process:
        os.close(far_end)
        with contextlib.suppress(OSError):
            # Linux says EIO where the far end is closed.
            while octets := os.read(terminal, 65536):
                text += octets
        os.close(terminal)
        process.communicate(timeout=PATIENCE)
    return text.decode().replace("\r\n", "\n")


class TestList:
    def test_methods_are_aligned_under_their_protocol(self, server: Server) -> None:
        done = pf("list", server.tcp)
        lines = done.out.splitlines()
        assert (done.status, done.err) == (0, "")
        assert lines[0] == "Desk  Answers to the tests."
        echo = next(line for line in lines if line.startswith("  echo(text: str) -> str  "))
        measure = next(line for line in lines if line.startswith("  never() -> str  "))
        assert echo.index("The text as it came.") == measure.index("Does not answer.")

    def test_json_is_an_array_of_descriptions(self, server: Server) -> None:
        (desk,) = result(pf("list", "--json", server.tcp))
        assert desk["name"] == "Desk"
        assert desk["methods"][0]["name"] == "echo"
        assert result(pf("list", server.tcp, PROTOFRAME_JSON="1")) == [desk]

    def test_the_flag_goes_before_the_environment(self, server: Server) -> None:
        assert pf("list", "--no-json", server.tcp, PROTOFRAME_JSON="1").out.startswith("Desk  ")

    def test_a_server_that_does_not_describe_itself_is_76(self, server: Server) -> None:
        for done in pf_each([command, server.where["mute"]] for command in ("list", "describe")):
            assert "this server does not describe itself; try: pf call" in error_line(done, 76)


class TestDescribe:
    def test_a_method_is_described_for_people(self, server: Server) -> None:
        done = pf("describe", server.tcp, "Desk.order")
        assert (done.status, done.err) == (0, "")
        assert done.out == (
            "Desk.order(item: Item, count: int = 1) -> list[Item]\n"
            "  So many of an item.\n"
            "  Parameters\n"
            "    item   Item  required\n"
            "    count  int   default 1\n"
            "  Result\n"
            "    list[Item]\n"
            "  Options\n"
            "    idempotent  no\n"
            "    timeout     30 s where the caller sets none\n"
            "    max_size    10000 bytes\n"
            "\n"
            "Types\n"
            "  Item\n"
            "    name   str        required\n"
            "    price  float      default 0.5\n"
            "    tags   list[str]  default []\n"
        )

    def test_streams_oneway_and_permissions_are_shown(self, server: Server) -> None:
        repeat, tell, listing = pf_each(
            [
                ["describe", server.tcp, "Desk.repeat"],
                ["describe", server.tcp, "Desk.tell"],
                ["list", server.tcp],
            ]
        )
        assert repeat.out.startswith("Desk.repeat(items: AsyncIterator[Item]) -> AsyncIterator[str]\n")
        assert "    items  AsyncIterator[Item]  required\n  Result\n    AsyncIterator[str]\n" in repeat.out
        assert "Types\n  Item\n" in repeat.out
        assert tell.out.endswith(
            "    max_size     as the connection allows\n    oneway       yes\n    permissions  tell\n"
        )
        assert re.search(r"\n  tell\(text: str\) -> None +\[oneway; permission: tell\] Takes note\.\n", listing.out)
        assert "oneway" not in repeat.out
        assert result(pf("describe", "--json", server.tcp, "Desk.repeat"))["parameters"][0]["stream"] is True

    @pytest.mark.parametrize("method", ["refuse", "insult"])
    def test_errors_are_described_with_their_fields(self, server: Server, method: str) -> None:
        text = pf("describe", server.tcp, f"Desk.{method}").out
        errors_text = text.partition("  Errors\n")[2].partition("  Options\n")[0]
        assert [line.split() for line in errors_text.splitlines()] == [
            ["Refused", "(status", "2,", "exit", "66)"],
            ["The", "desk", "does", "not", "want", "to."],
            ["reason", "str", "required"],
            ["limit", "int", "required"],
        ]

    def test_a_protocol_and_all_of_them(self, server: Server) -> None:
        text = pf("describe", server.tcp, "Desk").out
        assert text.startswith("Desk\n  Answers to the tests.\n\n  And has")
        assert "Desk.never() -> str" in text
        assert pf("describe", server.tcp).out == text

    def test_json_has_the_schemas_and_what_they_refer_to(self, server: Server) -> None:
        method = result(pf("describe", "--json", server.tcp, "Desk.order"))
        assert (method["protocol"], method["name"]) == ("Desk", "order")
        assert method["arguments_schema"]["properties"]["item"] == {"$ref": "#/$defs/Item"}
        assert list(method["definitions"]) == ["Item"]
        desk = result(pf("describe", "--json", server.tcp, "Desk"))
        assert set(desk["definitions"]) == {"Item", "Colour"}
        assert result(pf("describe", "--json", server.tcp)) == [desk]

    def test_an_unknown_name_is_said_in_a_line(self, server: Server) -> None:
        cases = [
            ("Nope", 69, "no Protocol Nope is served there; try: pf list"),
            ("Nope.echo", 69, "no Protocol Nope is served there; try: pf list"),
            ("Desk.nope", 76, "there is no method Desk.nope; try: pf describe"),
        ]
        answers = pf_each(["describe", server.tcp, name] for name, _, _ in cases)
        for (_, status, text), done in zip(cases, answers, strict=True):
            assert text in error_line(done, status)


class TestPing:
    def test_once_prints_the_round_trip(self, server: Server) -> None:
        done = pf("ping", server.tcp)
        assert re.fullmatch(rf"{server.tcp}: \d+\.\d{{3}} ms\n", done.out)
        assert (done.status, done.err) == (0, "")

    def test_several_times_prints_each_and_a_summary(self, server: Server) -> None:
        *each, summary = pf("ping", server.tcp, "-c", "3", "-i", "0").out.splitlines()
        assert len(each) == 3
        assert summary.startswith("3 of 3 answered; round trip min ")
        (alone,) = pf("ping", server.tcp, "-c", "3", "-i", "0", "--quiet").out.splitlines()
        assert alone.startswith("3 of 3 answered")

    def test_json_is_one_object(self, server: Server) -> None:
        summary = result(pf("ping", "--json", "-c", "2", "-i", "0", server.tcp))
        assert (summary["where"], summary["sent"], summary["answered"]) == (server.tcp, 2, 2)
        assert summary["min"] == min(summary["milliseconds"]) <= summary["mean"] <= summary["max"]


class TestHealth:
    def test_it_says_whether_calls_are_taken_by_its_status_too(self, server: Server) -> None:
        done = pf("health", server.tcp)
        assert (done.out, done.err, done.status) == (f"{server.tcp}: ready\n", "", 0)
        done = pf("health", server.where["mute"])
        assert (done.out, done.err, done.status) == (f"{server.where['mute']}: not ready\n", "", 1)
        assert pf("health", "--quiet", server.tcp).out == ""

    def test_protocols_can_be_asked_for_by_name(self, server: Server) -> None:
        done = pf("health", server.tcp, "Desk")
        assert (done.out, done.status) == ("Desk: ready\n", 0)
        done = pf("health", "--json", server.where["mute"], "Desk")
        assert json.loads(done.out) == {"where": server.where["mute"], "ready": False, "protocols": {"Desk": False}}
        assert done.status == 1
        assert "there is Desk" in error_line(pf("health", server.tcp, "Chair"), 69)


def bash_completes(line: str) -> list[str]:
    """What bash, with the script that ``pf completion bash`` prints, makes of a line."""
    script = f"""
        pf() {{ {" ".join(PF)} "$@"; }}
        env() {{ command env "${{@:1:3}}" {" ".join(PF)}; }}
        eval "$(pf completion bash)"
        compopt() {{ echo "compopt $*"; }}
        COMP_WORDBREAKS=$' \\t\\n"\\'@><=;|&(:' COMP_LINE=$1 COMP_POINT=${{#1}}
        _pf_completion pf
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", line],
        capture_output=True,
        env=environment(),
        timeout=PATIENCE,
        check=True,
    )
    assert done.stderr == b""
    return sorted(set(done.stdout.decode().split("\n")[:-1]))


class TestCompletion:
    def test_names_come_from_the_server(self, server: Server) -> None:
        cases: list[tuple[str, list[str]]] = [
            ("pf call WHERE Desk.e", ["Desk.echo"]),
            ("pf describe WHERE Desk.or", ["Desk.order"]),
            ("pf bench WHERE Desk.e", ["Desk.echo"]),
            ("pf bench WHERE Desk.order ", ["item:=", "count:="]),
            ("pf call WHERE Desk.order ", ["item:=", "count:="]),
            ("pf call WHERE Desk.order item:={} c", ["count:="]),
            ("pf call WHERE Desk.reverse c", ["content@"]),
            ("pf call WHERE Desk.add ", ["numbers@", "to:="]),
            ("pf call WHERE Desk.paint colour=", ["colour=green", "colour=red"]),
            ("pf call WHERE Desk.paint glossy:=t", ["glossy:=true"]),
            ("pf call WHERE Desk.echo --ti", ["--timeout"]),
            ("pf ca", ["call"]),
            ("pf call u", ["udp:", "unix:"]),
        ]

        def complete(line: str) -> Done:
            line = line.replace("WHERE", server.tcp)
            return pf(_PF_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(line.count(" ")))

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(complete, [line for line, _ in cases]))
        for (_, expected), done in zip(cases, answers, strict=True):
            assert (done.status, done.err) == (0, "")
            assert [item.partition(",")[2] for item in done.out.split()] == expected

    def test_a_server_that_cannot_be_asked_is_passed_over_in_silence(self, listener: socket.socket) -> None:
        for where in (closed_port(), where_of(listener), "udp:127.0.0.1:1", "udp:x:1"):
            began = time.monotonic()
            done = pf(_PF_COMPLETE="bash_complete", COMP_WORDS=f"pf call {where} Sp", COMP_CWORD="3")
            assert (done.status, done.out.strip(), done.err) == (0, "", "")
            assert time.monotonic() - began < 3.0

    @pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
    def test_bash_gets_what_stands_behind_its_last_word_break(self, server: Server) -> None:
        assert bash_completes(f"pf call {server.tcp} Desk.ech") == ["Desk.echo"]
        assert bash_completes(f"pf call {server.tcp} Desk.echo te") == ["compopt -o nospace", "text="]
        assert bash_completes(f"pf call {server.tcp} Desk.paint colour=r") == ["red"]
        assert bash_completes("pf call unix") == ["compopt -o nospace", "unix:"]

    def test_files_are_completed_behind_the_sign(self, tmp_path: Path) -> None:
        for name in ("a.txt", "b c.txt", ".hidden"):
            (tmp_path / name).touch()
        (tmp_path / "ab").mkdir()
        files = completing._files(f"{tmp_path}/")
        assert files == [(f"{tmp_path}/a.txt", "plain"), (f"{tmp_path}/ab/", "stem")]


class TestArguments:
    @pytest.mark.parametrize(
        ("word", "name", "value"),
        [
            ("k=v", "k", '"v"'),
            ("k=", "k", '""'),
            ("k==v", "k", '"=v"'),
            ("k=:=1", "k", '":=1"'),
            ("k=a@b", "k", '"a@b"'),
            ("k=a\nb", "k", '"a\\nb"'),
            ("größe=ü", "größe", '"ü"'),
            ("k:=1.50", "k", "1.50"),
            ("k:=12345678901234567890123", "k", "12345678901234567890123"),
            ("k:= [1,\n 2] ", "k", "[1,  2]"),
            ('k:="a=b"', "k", '"a=b"'),
            ("k:=" + "9" * 10_000, "k", "9" * 10_000),
        ],
    )
    def test_a_word_is_a_name_and_a_value(self, word: str, name: str, value: str) -> None:
        (argument,) = arguments.parse_arguments([word])
        assert (argument.name, argument.json) == (name, value)

    @pytest.mark.parametrize("word", ["k@file", "k@a=b", "k@-"])
    def test_a_file_has_no_value_yet(self, word: str) -> None:
        (argument,) = arguments.parse_arguments([word])
        assert (argument.name, argument.json, argument.path) == ("k", None, word[2:])

    @pytest.mark.parametrize(
        "word",
        [
            *["", "k", "=v", "1k=v", "-k=v", "a.b=v", "k:v", "k:=", "k:=nope", "k:=NaN", "k:=[1", "k:=1 2", "k@"],
            "k=\udcff",
            "k:=" + "[" * 100_000,
        ],
    )
    def test_what_is_no_argument_is_refused(self, word: str) -> None:
        with pytest.raises(problems.Problem) as caught:
            arguments.parse_arguments([word])
        assert caught.value.status == 2
        assert len(str(caught.value)) < 400

    def test_the_same_name_twice_is_refused_however_it_is_spelt(self) -> None:
        with pytest.raises(problems.Problem, match="twice"):
            arguments.parse_arguments(["\u212b=1", "\u00c5=2"])

    def test_the_whole_is_a_json_object(self) -> None:
        given = arguments.parse_arguments(["a=x", "b:=[1]", "c@file", "d@file", "e@file"])
        for argument in given[2:4]:
            argument.content = "ü".encode()
        given[4].content = b"\xff"
        octets = arguments.compose(given, {"c": True, "d": False}.get)
        assert json.loads(octets) == {"a": "x", "b": [1], "c": "w7w=", "d": "ü", "e": "/w=="}
        assert arguments.compose([], {}.get) == b"{}"


class TestLines:
    @staticmethod
    def read_all(octets: bytes, most: int = 65536) -> tuple[list[bytes], str]:
        """The lines of a file that gives so many octets at a time, and the problem that ended them."""
        file = io.BytesIO(octets)
        read1 = file.read1
        file.read1 = lambda size=-1: read1(min(size, most))  # type: ignore[method-assign]
        (argument,) = arguments.parse_arguments(["k@file"])
        lines = items.Lines(argument, file)
        found: list[bytes] = []
        try:
            while some := lines.read():
                found += map(bytes, some)
        except problems.Problem as problem:
            return found, problem.what
        return found, ""

    @pytest.mark.parametrize("most", [1, 2, 3, 65536])
    def test_they_are_the_same_however_they_come(self, most: int) -> None:
        assert self.read_all(b"", most) == ([], "")
        assert self.read_all(b"\n\n", most) == ([], "")
        assert self.read_all(b'1\n [2,\t3]\r\n\n"a b"', most) == ([b"1", b"[2,\t3]", b'"a b"'], "")
        found, problem = self.read_all(b'1\n2\n\n"\xff"\n3\n', most)
        assert (found, problem.partition(":")[0]) == ([b"1", b"2"], "k@file")
        assert "line 4 is not JSON" in self.read_all(b'1\n2\n\n"\xff"\n3\n', most)[1]

    def test_no_more_is_read_than_is_asked_for(self) -> None:
        file = io.BytesIO(b"123456789\n" * 100_000)
        (argument,) = arguments.parse_arguments(["k@file"])
        lines = items.Lines(argument, file)
        assert 0 < len(lines.read()) < 10_000
        assert file.tell() <= 65536

    def test_a_line_without_end_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(items, "_LONGEST_LINE", 10)
        assert self.read_all(b"1\n" + b"2" * 30, 4) == ([b"1"], "k@file: line 2 has more than 10 bytes")


class TestPatience:
    """How long `pf call` waits for the first answer, where nobody has said so."""

    def test_a_stream_is_given_more_time_and_a_plain_call_is_not(self) -> None:
        for streams, expected in ((True, []), (False, ["late"])):
            clock, events = Clock(), []

            async def answer(streams: bool = streams, events: list[str] = events) -> bool:
                events.append("asked")
                return streams

            call._Patience(clock, 10.0, answer, lambda events=events: events.append("late"))
            clock.advance(4.9)
            assert events == []
            clock.advance(0.2)
            assert events == ["asked"]
            clock.advance(5.0)
            assert events == ["asked", *expected]

    def test_an_answer_in_time_is_all_that_counts(self) -> None:
        clock = Clock()
        patience = call._Patience(clock, 10.0, lambda: pytest.fail("nobody is to be asked"), pytest.fail)
        patience.end()
        clock.advance(20.0)


class TestParts:
    @pytest.mark.parametrize("text", ["plain", "grüße 😀", "日本", "👨\u200d👩"])
    def test_text_that_does_no_harm_stays(self, text: str) -> None:
        assert problems.clean(text) == text

    def test_what_drives_a_terminal_is_escaped(self) -> None:
        assert problems.clean("\x1b]0;x\x07\n\x9b\u2066\ud800") == r"\x1b]0;x\x07\n\x9b\u2066\ud800"

    def test_width_is_in_columns(self) -> None:
        assert [output.width(text) for text in ("abc", "日本", "e\u0301")] == [3, 4, 1]
        assert output.pad("日", 4) == "日  "

    @pytest.mark.parametrize("octets", [b"", b"nope", b"[1,", b'"\xff"', b"1 2", b"[" * 100_000])
    def test_an_answer_that_is_not_json_is_an_invalid_response(self, octets: bytes) -> None:
        with pytest.raises(errors.InvalidResponse):
            items.one_line(octets)

    def test_an_answer_of_several_lines_becomes_one(self) -> None:
        assert items.one_line(b'{\n "a":\r 1}\n') == '{  "a":  1}'

    @pytest.mark.parametrize(
        ("annotation", "text"),
        [
            (str, "str"),
            (bytes, "bytes"),
            (bytes | None, "bytes | None"),
            (list[int], "list[int]"),
            (dict[str, list[float]], "dict[str, list[float]]"),
            (Any, "Any"),
        ],
    )
    def test_a_schema_reads_as_a_type(self, annotation: Any, text: str) -> None:
        schema = msgspec.json.schema(annotation)
        assert schemas.type_text(schema) == text
        assert schemas.takes_bytes(schema, {}) == ("bytes" in text)

    @pytest.mark.parametrize(
        "schema",
        [None, 1, {"$ref": 1}, {"$ref": "#/$defs/a"}, {"anyOf": 1}, {"type": []}, {"enum": 1}, {"properties": []}],
    )
    def test_a_schema_that_makes_no_sense_does_no_harm(self, schema: Any) -> None:
        circle: Mapping[str, Any] = {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}
        schemas.type_text(schema)
        schemas.fields_of(schema)
        schemas.values_of(schema, circle)
        schemas.takes_text(schema, circle)
        assert not schemas.takes_bytes(schema, circle)
        assert set(schemas.reachable([schema], circle)) <= {"a", "b"}
