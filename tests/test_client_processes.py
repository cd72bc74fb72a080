"""A server process that is killed and started again under load: every call ends as promised.  And real name servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, succeed
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.names import dns
from twisted.names.client import Resolver
from twisted.names.common import ResolverBase
from twisted.names.server import DNSServerFactory

from protoframe import Client, ClientState, Error, Factory, Protocol, listen, request, timeout
from protoframe.servers.upper import Speech
from tests.processes import environment, free_port, server

#: How often the server is killed.
KILLS = int(os.environ.get("PROTOFRAME_KILLS", "1"))


class Journal(Protocol):
    """Writes a line to a file for each call, after a while or before."""

    @request
    async def write(self, key: str, seconds: float) -> str:
        if seconds:
            await deferLater(reactor, seconds)  # type: ignore[arg-type]
        # One write at the end of a file: whole, and there whoever is killed.
        handle = os.open(os.environ["JOURNAL"], os.O_APPEND | os.O_WRONLY | os.O_CREAT)
        os.write(handle, f"{key}\n".encode())
        os.close(handle)
        if not seconds:
            await deferLater(reactor, 0.02)  # type: ignore[arg-type]
        return key

    @request(idempotent=True)
    async def ready(self) -> bool:
        return True


class JournalFactory(Factory):
    def __init__(self) -> None:
        super().__init__(Journal)


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest_twisted.ensureDeferred
async def test_calls_survive_a_server_that_is_killed(tmp_path: Path, kind: str) -> None:
    port = free_port()
    journal = tmp_path / "journal"
    where = f"{kind}:127.0.0.1:{port}"
    arguments = ("pf-serve", "--protocol", "tests.test_client_processes:JournalFactory", "--listen")
    outcomes: dict[str, Any] = {}
    stopped = False
    back: list[float] = []

    def start(stack: contextlib.ExitStack) -> Any:
        return stack.enter_context(
            server(tmp_path, *arguments, f"{kind}:{port}:interface=127.0.0.1", variables={"JOURNAL": str(journal)})
        )

    with contextlib.ExitStack() as stack:
        running = await deferToThread(start, stack)
        client = Client(reactor, where, Journal)

        async def load(writer: int, journal_proxy: Any) -> None:
            number = 0
            while not stopped:
                key = f"{writer}.{number}"
                number += 1
                try:
                    with timeout(8.0):
                        outcomes[key] = await journal_proxy.write(key, 0.02 * (number % 2))
                except Error as error:
                    outcomes[key] = error
                    await deferLater(reactor, 0.05)  # type: ignore[arg-type]

        async with client as proxy:
            load_running = [Deferred.fromCoroutine(load(writer, proxy)) for writer in range(16)]
            for _ in range(KILLS):
                await deferLater(reactor, 0.7)  # type: ignore[arg-type]
                running.process.send_signal(signal.SIGKILL)
                running.process.wait()
                await deferLater(reactor, 1.5)  # type: ignore[arg-type]
                running = await deferToThread(start, stack)
                began = time.monotonic()
                while client.state is not ClientState.READY:
                    await deferLater(reactor, 0.01)  # type: ignore[arg-type]
                    assert time.monotonic() - began < 10
                assert await proxy.ready()
                back.append(time.monotonic() - began)
            await deferLater(reactor, 0.5)  # type: ignore[arg-type]
            stopped = True
            await gatherResults(load_running)
    written = Counter(journal.read_text().split())
    assert set(written.values()) == {1}, "a call ran twice"
    errors = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Error)}
    for key, outcome in outcomes.items():
        if not isinstance(outcome, Error):
            assert written[key] == 1, f"{key} was answered, and did not run"
        elif not outcome.may_have_run:
            assert not written[key], f"{key} was said not to have run, and did: {outcome!r}"
    assert len(outcomes) > 100
    assert len(errors) <= 16 * KILLS
    assert max(back) < 3.0, f"serving again after {back}"


ON_ASYNCIO = """
from twisted.internet import asyncioreactor
asyncioreactor.install()
from twisted.internet import reactor
from twisted.internet.task import deferLater, react
from protoframe import Client, Factory, listen, timeout
from protoframe.servers.upper import Speech

async def main(reactor):
    factory = Factory(Speech)
    port = await listen(reactor, "tcp:0:interface=127.0.0.1", factory)
    client = Client(reactor, f"tcp:127.0.0.1:{port.getHost().port}", Speech)
    with timeout(0.5):
        client.startService()
        await client.whenConnected()
    await deferLater(reactor, 0.6)
    for connection in factory.connections:
        connection.close()
    await deferLater(reactor, 0.1)
    print(await client.proxy.upper("hello"))
    await client.stopService()
    await port.stopListening()

react(lambda reactor: __import__("twisted.internet.defer").internet.defer.Deferred.fromCoroutine(main(reactor)))
"""


def test_a_deadline_that_surrounds_its_start_is_none_of_later_connections() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_ASYNCIO], env=environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("HELLO\n", "")


@pytest_twisted.ensureDeferred
async def test_the_resolver_of_this_machine_leaves_no_timer() -> None:
    before = {call for call in reactor.getDelayedCalls() if call.active()}  # type: ignore[attr-defined]
    client = Client(reactor, "srv:_speech._tcp.example.com", Speech)
    client.startService()
    await deferLater(reactor, 0.05)  # type: ignore[arg-type]
    await client.stopService()
    await deferLater(reactor, 0.05)  # type: ignore[arg-type]
    left = [call for call in reactor.getDelayedCalls() if call.active() and call not in before]  # type: ignore[attr-defined]
    # A question that was on its way ends by itself, when a name server that does not answer has had its time.
    assert not [call for call in left if getattr(call.func, "__name__", "") != "_clearFailed"]


@pytest_twisted.ensureDeferred
async def test_servers_are_found_by_the_records_of_a_real_name_server() -> None:
    factory = Factory(Speech)
    port = await listen(reactor, "tcp:0:interface=127.0.0.1", factory)

    class Authority(ResolverBase):
        """Knows one name."""

        def _lookup(self, name: bytes, cls: int, kind: int, timeout: Any) -> Any:
            if (name, kind) != (b"_speech._tcp.example.com", dns.SRV):
                return super()._lookup(name, cls, kind, timeout)
            record = dns.Record_SRV(0, 1, port.getHost().port, "127.0.0.1")
            return succeed(([dns.RRHeader(name, dns.SRV, ttl=60, payload=record)], [], []))

    protocol = dns.DNSDatagramProtocol(DNSServerFactory(clients=[Authority()]))
    names = reactor.listenUDP(0, protocol, interface="127.0.0.1")  # type: ignore[attr-defined]
    resolver = Resolver(servers=[("127.0.0.1", names.getHost().port)], reactor=reactor)
    try:
        async with Client(reactor, "srv:_speech._tcp.example.com", Speech, resolver=resolver) as speech:
            assert await speech.upper("hello") == "HELLO"
    finally:
        await names.stopListening()
        await port.stopListening()
