"""Conversations over UDP, over real sockets and with real programs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.protocol import Factory as TwistedFactory
from twisted.trial.unittest import SynchronousTestCase

from protoframe import (
    ConnectFailed,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    Factory,
    Limits,
    Protocol,
    Token,
    TokenAuthenticator,
    connect,
    current_call,
    listen,
    request,
    timeout,
)
from protoframe._datagram import DatagramCarrier
from protoframe.core.frames import Kind
from tests.processes import ROOT, Server, environment, free_port, pf, run_twistd, server


class Echo(Protocol["Caller"]):
    @request
    async def echo(self, data: bytes) -> bytes:
        return data

    @request
    async def whence(self) -> str:
        return f"{current_call().address.type} {current_call().address.host}"

    @request
    async def count(self, most: int) -> AsyncIterator[int]:
        for number in range(most):
            yield number

    @request
    async def through(self, numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        async for number in numbers:
            yield number + 1

    @request
    async def ask(self) -> str:
        return await self.peer.name()

    @request
    async def never(self) -> None:
        await Deferred()


class Caller(Protocol[Echo]):
    @request
    async def name(self) -> str:
        return "the caller"


@pytest_twisted.ensureDeferred
async def test_all_kinds_of_calls_go_over_it(pf_loopback: Any) -> None:
    where = await pf_loopback.serve(Echo, "udp")
    echo = await pf_loopback.connect(where, Echo, serving=Caller)
    assert await echo.whence() == "UDP 127.0.0.1"
    data = os.urandom(700_000)
    assert await echo.echo(data) == data
    assert [number async for number in echo.count(20_000)] == list(range(20_000))

    async def numbers() -> AsyncIterator[int]:
        for number in range(5000):
            yield number

    assert [number async for number in echo.through(numbers())] == list(range(1, 5001))
    assert await echo.ask() == "the caller"
    assert await gatherResults([echo.echo(bytes([number])) for number in range(200)]) == [
        bytes([number]) for number in range(200)
    ]
    with timeout(0.1), pytest.raises(DeadlineExceeded):
        await echo.never()


@pytest_twisted.ensureDeferred
async def test_names_and_ipv6_addresses_lead_there() -> None:
    for interface, host, seen in ((r"\:\:1", "[::1]", "::1"), ("127.0.0.1", "localhost", "127.0.0.1")):
        port = await listen(reactor, f"udp:0:interface={interface}", Factory(Echo))
        try:
            async with connect(reactor, f"udp:{host}:{port.getHost().port}", Echo) as echo:
                assert await echo.whence() == f"UDP {seen}"
        finally:
            await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_where_nothing_listens_connecting_fails_at_once() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ConnectFailed, match=r"^udp:127.0.0.1:\d+: connection refused"):
        await connect(reactor, f"udp:127.0.0.1:{number}", Echo)
    assert time.monotonic() - began < 2.0


@pytest_twisted.ensureDeferred
async def test_what_answers_nothing_or_nonsense_takes_the_time_that_it_may() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.3 s"):
            await connect(reactor, f"udp:127.0.0.1:{mute.getsockname()[1]}", Echo, limits=Limits(handshake_timeout=0.3))


@pytest_twisted.ensureDeferred
async def test_connecting_can_be_given_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        opening = Deferred.fromCoroutine(_open(f"udp:127.0.0.1:{mute.getsockname()[1]}"))
        opening.cancel()
        failures: list[Any] = []
        opening.addErrback(failures.append)
        assert len(failures) == 1


async def _open(where: str) -> Any:
    return await connect(reactor, where, Echo)


@pytest_twisted.ensureDeferred
async def test_a_token_is_asked_for_here_too(pf_loopback: Any, tmp_path: Path) -> None:
    secret = Token("0123456789abcdef0123456789abcdef", "a test")
    (tmp_path / "tokens").write_text("ann 0123456789abcdef0123456789abcdef\n")
    (tmp_path / "tokens").chmod(0o600)
    authenticator = TokenAuthenticator.from_file(tmp_path / "tokens")
    where = await pf_loopback.serve(Factory(Echo, authenticator=authenticator), "udp")
    echo = await pf_loopback.connect(where, Echo, token=secret)
    assert await echo.echo(b"x") == b"x"
    with pytest.raises(Error) as refused:
        await pf_loopback.connect(where, Echo)
    assert type(refused.value).__name__ == "Unauthenticated"


@pytest_twisted.ensureDeferred
async def test_a_server_that_closes_ends_what_its_clients_wait_for(pf_loopback: Any) -> None:
    factory = Factory(Echo)
    where = await pf_loopback.serve(factory, "udp")
    echo = await pf_loopback.connect(where, Echo)
    waiting = echo.never()
    await echo.echo(b"x")
    for connection in factory.connections:
        await connection.close()
    with pytest.raises(ConnectionLost):
        await waiting


def test_what_is_wrong_with_a_place_is_said() -> None:
    for where, text in (
        ("udp", "it takes a port"),
        ("udp:http", "'http' is no port number"),
        ("udp:99999", "port 99999 is above 65535"),
        ("udp:1:2", "'2' is a part too many"),
        ("udp:1:interface=nowhere", "no IP address"),
        ("udp:1:mtu=3", "there is no part mtu="),
        ("udp:systemd=x", "systemd=x is no number"),
        ("udp:1:systemd=0", "it takes a port, or systemd="),
    ):
        failures: list[Any] = []
        listen(reactor, where, Factory(Echo)).addErrback(failures.append)
        with pytest.raises(ValueError, match=text):
            failures[0].raiseException()
    for where, text in (
        ("udp:host", "the port is missing"),
        ("udp:host:x", "'x' is no port number"),
        ("udp::1", "the host is empty"),
        ("udp:host:1:2", "'2' is a part too many"),
    ):
        with pytest.raises(ValueError, match=text):
            connect(reactor, where, Echo)
    failures = []
    listen(reactor, "udp:0", TwistedFactory()).addErrback(failures.append)
    with pytest.raises(TypeError, match=r"protoframe\.Factory"):
        failures[0].raiseException()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    port = free_port()
    directory = tmp_path_factory.mktemp("both")
    places = [f"{kind}:{port}:interface=127.0.0.1" for kind in ("tcp", "udp")]
    with server(directory, "pf-upper", "--listen", places[0], "--listen", places[1]) as running:
        running.wait_for_log(r"serving Speech at udp:")
        yield running, port


@pytest.mark.slow
def test_the_same_commands_work_over_either(both: tuple[Server, int], tmp_path: Path) -> None:
    _, port = both
    for arguments in (
        ("call", "WHERE", "Speech.upper", "text=hello"),
        ("call", "WHERE", "Speech.spell", "word=abc"),
        ("call", "WHERE", "Speech.shout", 'lines:=["a", "b"]'),
        ("call", "WHERE", "Speech.upper", f"text={'x' * 50_000}"),
        ("list", "WHERE"),
        ("describe", "WHERE", "Speech.upper"),
    ):
        answers = []
        for kind in ("tcp", "udp"):
            done = pf(*[f"{kind}:127.0.0.1:{port}" if one == "WHERE" else one for one in arguments])
            answers.append((done.returncode, done.stdout, done.stderr.replace("udp:", "tcp:")))
        assert answers[0] == answers[1]
        assert answers[0][0] == 0
    large = tmp_path / "large"
    large.write_bytes(b"x" * 5_000_000)
    assert pf("call", f"udp:127.0.0.1:{port}", "Speech.upper", f"text@{large}").returncode == 72
    assert pf("ping", f"udp:127.0.0.1:{port}").stdout.endswith(" ms\n")
    assert pf("call", f"udp:127.0.0.1:{free_port()}", "Speech.upper", "text=x").returncode == 7


@pytest.mark.slow
def test_a_busy_port_is_one_line_and_the_server_does_not_run(both: tuple[Server, int], tmp_path: Path) -> None:
    _, port = both
    done = run_twistd("-n", "--pidfile=", "pf-upper", "--listen", f"udp:{port}:interface=127.0.0.1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"twistd: cannot listen at udp:{port}:interface=127.0.0.1: the address is in use\n"
    done = run_twistd("-n", "--pidfile=", "pf-upper", "--listen", "udp:http", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_at_the_end_of_a_server_what_runs_is_finished(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "pf-upper", "--listen", f"udp:{port}:interface=127.0.0.1") as running:
        calling = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "protoframe.cli",
                "call",
                f"udp:127.0.0.1:{port}",
                "Speech.spell",
                "word=abc",
                "pause:=0.5",
            ],
            stdout=subprocess.PIPE,
            env=environment(),
        )
        assert calling.stdout is not None
        assert calling.stdout.readline() == b'"a"\n'
        running.process.terminate()
        assert calling.stdout.read() == b'"b"\n"c"\n'
        assert calling.wait(20) == 0
        calling.stdout.close()
        assert running.process.wait(20) == 0


SLOWLY = ("word=abc", "pause:=0.5")

#: Passes a socket on as systemd does.
ACTIVATE = """
import os, socket, sys
opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
opened.bind(("127.0.0.1", int(sys.argv[1])))
os.dup2(opened.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="protoframe")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.slow
def test_a_socket_of_systemds_is_served(tmp_path: Path) -> None:
    port = free_port()
    twistd = str(Path(sys.executable).with_name("twistd"))
    arguments = ["-n", "--pidfile=", "--logfile", str(tmp_path / "log"), "pf-upper", "--listen"]
    with (tmp_path / "stderr").open("wb") as stderr:
        running = subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, str(port), twistd, *arguments, "udp:systemd=0"],
            cwd=tmp_path,
            env=environment(),
            stderr=stderr,
        )
    try:
        done = pf("call", "--timeout", "20", f"udp:127.0.0.1:{port}", "Speech.upper", "text=hello")
        assert (done.stdout, done.returncode) == ('"HELLO"\n', 0), (tmp_path / "stderr").read_text()
    finally:
        running.terminate()
        assert running.wait(20) == 0
    done = run_twistd("-n", "--pidfile=", "pf-upper", "--listen", "udp:systemd=0", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "systemd has opened 0 sockets" in done.stderr
    assert ROOT.is_dir()


class Lanes(SynchronousTestCase):
    """The octets of a call that go in order, until it is answered."""

    def test_only_the_answer_to_a_call_of_this_end_ends_what_it_sends(self) -> None:
        for parity, own, theirs in ((0, 8, 9), (1, 9, 8)):
            ended: list[int] = []
            carrier: Any = DatagramCarrier.__new__(DatagramCarrier)
            outflow = SimpleNamespace(end_lane=ended.append)
            carrier.association = SimpleNamespace(outflow=outflow, parity=parity)
            kinds = (Kind.RESPONSE, Kind.ERROR, Kind.END)
            # An END of a call of the peer's ends what the peer sends with it; what answers it goes on.
            carrier._end_lanes([(kind, 0, theirs, b"") for kind in kinds])
            self.assertEqual(ended, [])
            carrier._end_lanes([(kind, 0, own, b"") for kind in kinds])
            carrier._end_lanes([(Kind.RESPONSE, 1, own, b""), (Kind.ITEM, 0, own, b"")])
            self.assertEqual(ended, [own] * 3)
