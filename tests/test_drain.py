"""How servers end: real ``twistd`` processes that are sent signals while they have work, and what their callers see."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.python import usage

from protoframe import (
    ConnectFailed,
    ConnectionLost,
    Factory,
    GoingAway,
    LogCalls,
    Protocol,
    TokenAuthenticator,
    connect,
    request,
)
from protoframe.service import ServerOptions, ServerService
from tests.processes import PATIENCE, Server, environment, run_twistd, server

WORK = """
from collections.abc import AsyncIterator
from protoframe import Protocol, request
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

log = Logger()
began = 0


class Work(Protocol):
    @request
    async def take(self, seconds: float) -> float:
        from twisted.internet import reactor

        global began
        began += 1
        await deferLater(reactor, seconds)
        return seconds

    @request
    async def begun(self) -> int:
        return began

    @request
    async def never(self) -> None:
        global began
        began += 1
        try:
            await Deferred()
        finally:
            log.info("never ended")

    @request
    async def count(self, most: int, pause: float) -> AsyncIterator[int]:
        from twisted.internet import reactor

        for number in range(most):
            await deferLater(reactor, pause)
            yield number

    @request
    async def add(self, numbers: AsyncIterator[int]) -> int:
        total = 0
        async for number in numbers:
            total += number
        return total
"""


class Work(Protocol):
    """What is served, as callers declare it."""

    @request
    async def take(self, seconds: float) -> float: ...

    @request
    async def begun(self) -> int: ...

    @request
    async def never(self) -> None: ...

    @request
    async def count(self, most: int, pause: float) -> AsyncIterator[int]: ...

    @request
    async def add(self, numbers: AsyncIterator[int]) -> int: ...


@pytest.fixture
def where(tmp_path: Path) -> str:
    (tmp_path / "work.py").write_text(WORK)
    return f"unix:{tmp_path / 'w.sock'}"


@pytest.fixture
def running(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with so many seconds to drain."""
    arguments = ["pf-serve", "--protocol", "work:Work", "--listen", where, "--drain", str(request.param)]
    with server(tmp_path, *arguments) as started:
        yield started


async def status_of(running: Server) -> int:
    """The exit status; the reactor of the tests goes on meanwhile."""
    status: int = await deferToThread(running.process.wait, PATIENCE)
    return status


@pytest.mark.parametrize("running", [20], indirect=True)
@pytest_twisted.ensureDeferred
async def test_what_runs_at_sigterm_ends_and_nothing_new_begins(running: Server, where: str) -> None:
    async with connect(reactor, where, Work) as work:
        calls = [work.take(0.2 + 0.8 * number / 49) for number in range(50)]
        assert await work.begun() == 50
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        refused = []
        while len(refused) < 5:
            assert time.monotonic() - began < PATIENCE
            try:
                assert await work.begun() == 50
            except GoingAway as error:
                refused.append(error.may_have_run)
            await deferLater(reactor, 0.01)
        with pytest.raises(ConnectFailed) as caught:
            await connect(reactor, where, Work)
        assert (refused, caught.value.may_have_run) == ([False] * 5, False)
        taken = await gatherResults([Deferred.fromCoroutine(_awaited(one)) for one in calls], consumeErrors=True)
        assert taken == [0.2 + 0.8 * number / 49 for number in range(50)]
        assert await status_of(running) == 0
        assert 0.9 < time.monotonic() - began < 10
    assert not (Path(where.removeprefix("unix:")).parent / "twistd.pid").exists()
    assert "1 connections have 20 s to end" in running.log
    assert "Traceback" not in running.log


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


@pytest.mark.parametrize("running", [20], indirect=True)
@pytest_twisted.ensureDeferred
async def test_streams_in_flight_go_on_to_their_end(running: Server, where: str) -> None:
    go_on: Deferred[None] = Deferred()

    async def numbers() -> AsyncIterator[int]:
        yield 1
        await go_on
        for number in range(2, 101):
            yield number

    async with connect(reactor, where, Work) as work:
        total = work.add(numbers())
        counted = []
        async for number in work.count(10, 0.05):
            counted.append(number)
            if number == 1:
                running.process.send_signal(signal.SIGTERM)
        assert counted == list(range(10))
        assert running.process.poll() is None
        go_on.callback(None)
        assert await total == 5050
        assert await status_of(running) == 0


@pytest.mark.parametrize("running", [1], indirect=True)
@pytest_twisted.ensureDeferred
async def test_what_does_not_end_in_time_is_cancelled(running: Server, where: str) -> None:
    async with connect(reactor, where, Work) as work:
        endless = work.never()
        await work.begun()
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionLost) as caught:
            await endless
        assert caught.value.may_have_run
        assert await status_of(running) == 0
        assert 0.9 < time.monotonic() - began < 6
    assert "never ended" in running.log


@pytest.mark.parametrize("running", [300], indirect=True)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest_twisted.ensureDeferred
async def test_a_second_signal_cuts_the_time_short(running: Server, where: str, second: signal.Signals) -> None:
    async with connect(reactor, where, Work) as work:
        endless = work.never()
        await work.begun()
        running.process.send_signal(signal.SIGTERM)
        await deferToThread(running.wait_for_log, "have 300 s to end")
        began = time.monotonic()
        running.process.send_signal(second)
        with pytest.raises(ConnectionLost):
            await endless
        assert await status_of(running) == 0
        assert time.monotonic() - began < 5
    assert "never ended" in running.log
    assert "Traceback" not in running.log


@pytest.mark.parametrize("running", [20], indirect=True)
@pytest_twisted.ensureDeferred
async def test_sigint_drains_too_and_shells_see_that_it_was_sigint(running: Server, where: str) -> None:
    async with connect(reactor, where, Work) as work:
        call = work.take(0.3)
        await work.begun()
        running.process.send_signal(signal.SIGINT)
        assert await call == 0.3
        assert await status_of(running) == -signal.SIGINT


@pytest.mark.parametrize("running", [300], indirect=True)
@pytest_twisted.ensureDeferred
async def test_without_calls_it_ends_at_once(running: Server, where: str) -> None:
    connecting = connect(reactor, where, Work)
    await connecting
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    await connecting.connection.closed
    assert await status_of(running) == 0
    assert time.monotonic() - began < 3


def test_a_daemon_drains_and_removes_its_pidfile(tmp_path: Path) -> None:
    path = tmp_path / "d.sock"
    done = run_twistd("pf-upper", "--listen", f"unix:{path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    process = int((tmp_path / "twistd.pid").read_text())
    words = ["call", f"unix:{path}", "Speech.spell", "word=abcd", "pause:=0.2"]
    with subprocess.Popen(
        [sys.executable, "-m", "protoframe.cli", *words], stdout=subprocess.PIPE, env=environment()
    ) as caller:
        assert caller.stdout is not None
        first = caller.stdout.readline()
        subprocess.run(["kill", str(process)], check=True)
        rest, _ = caller.communicate(timeout=PATIENCE)
    assert first + rest == b'"a"\n"b"\n"c"\n"d"\n'
    limit = time.monotonic() + PATIENCE
    while (tmp_path / "twistd.pid").exists():
        assert time.monotonic() < limit
    assert not path.exists()


class TestService:
    def options(self, *words: str) -> ServerOptions:
        options = ServerOptions()
        options.parseOptions(words)
        return options

    @pytest_twisted.ensureDeferred
    async def test_handlers_of_signals_are_as_before_when_it_has_stopped(self, tmp_path: Path) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        service = ServerService(Factory(Work), self.options("--listen", f"unix:{tmp_path / 'x.sock'}"))
        service.startService()
        await service.stopService()
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before

    def test_calls_are_logged_once(self) -> None:
        for factory in (Factory(Work), Factory(Work, interceptors=[LogCalls()])):
            ServerService(factory, self.options("--log-calls"))
            assert len(factory.interceptors) == 1
            assert isinstance(factory.interceptors[0], LogCalls)

    def test_the_authenticator_of_a_factory_stays(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PROTOFRAME_TOKENS", "ann 0123456789abcdef")
        own = TokenAuthenticator.from_environment()
        factory = Factory(Work, authenticator=own)
        ServerService(factory, self.options())
        assert factory.authenticator is own
        open_to_all = Factory(Work)
        ServerService(open_to_all, self.options())
        assert isinstance(open_to_all.authenticator, TokenAuthenticator)

    @pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon", "1e9", ""])
    def test_a_time_to_drain_is_a_number_that_one_can_wait_for(self, seconds: str) -> None:
        with pytest.raises(usage.UsageError, match="--drain: expected"):
            usage.Options.parseOptions(ServerOptions(), ["--drain", seconds])
        assert self.options("--drain", "0")["drain"] == 0
