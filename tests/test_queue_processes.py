"""Queue servers as real processes: killed under load, stopped, over each transport, and what memory they take."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread

from protoframe import connect
from protoframe.queue import DeliveryPolicy, Message, Overloaded, Queue, Settings
from tests.processes import PATIENCE, Server, free_port, server
from tests.queue_load import Load, client, pause, queue_server

#: How often the server is killed.
KILLS = int(os.environ.get("PROTOFRAME_KILLS", "3"))
#: What is published as fast as that goes, in bodies of 64 KiB.
MEBIBYTES = 200


def arguments(directory: Path, port: int, *more: str) -> tuple[str, ...]:
    return ("pf-queue", "--data", str(directory / "data"), "--listen", f"tcp:{port}:interface=127.0.0.1", *more)


def started(coroutine: Any) -> Deferred[Any]:
    return Deferred.fromCoroutine(coroutine)


@pytest.mark.parametrize(("end", "times"), [(signal.SIGKILL, KILLS), (signal.SIGTERM, 1)])
@pytest_twisted.ensureDeferred
async def test_what_was_acknowledged_holds_however_the_server_ends(
    tmp_path: Path, end: signal.Signals, times: int
) -> None:
    port = free_port()
    where = f"tcp:127.0.0.1:{port}"
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    load = Load(where, chance)

    def start(stack: contextlib.ExitStack) -> Any:
        return stack.enter_context(server(tmp_path, *arguments(tmp_path, port, "--ballast", "1M")))

    with contextlib.ExitStack() as stack:
        killed = await deferToThread(start, stack)
        async with client(where) as proxy:
            await proxy.declare("plain")
            await proxy.declare("kept")
            await proxy.declare("keys", Settings(dedup_window=3600))
            await proxy.declare("once", Settings(delivery=DeliveryPolicy.AT_MOST_ONCE))
            publishers = gatherResults(
                [
                    started(load.publish("plain", "a", 1, has_keys=False, delay=0.0)),
                    started(load.publish("plain", "b", 7, has_keys=False, delay=0.01)),
                    started(load.publish("kept", "a", 3, has_keys=False, delay=0.01)),
                    started(load.publish("keys", "a", 1, has_keys=True, delay=0.0)),
                    started(load.publish("keys", "b", 1, has_keys=True, delay=0.005)),
                    started(load.publish("keys", "c", 20, has_keys=True, delay=0.03)),
                    started(load.publish("once", "a", 1, has_keys=False, delay=0.0)),
                    started(load.publish("once", "b", 10, has_keys=False, delay=0.02)),
                ]
            )
            consumers = gatherResults(
                [
                    started(load.consume(queue, settle, prefetch))
                    for queue, settle, prefetch in [
                        ("plain", load.at_once, 50),
                        ("plain", load.slowly, 10),
                        ("plain", load.fussily, 50),
                        ("keys", load.at_once, 50),
                        ("keys", load.fussily, 5),
                        ("keys", load.slowly, 100),
                        ("once", None, 50),
                        ("once", None, 5),
                    ]
                ]
            )
            for _ in range(times):
                await pause(0.1 + 0.5 * chance.random())
                began = time.monotonic()
                killed.process.send_signal(end)
                status = await deferToThread(killed.process.wait, PATIENCE)
                assert status == (0 if end == signal.SIGTERM else -end)
                # Those that consume do not hold it up for the time that calls have to end in.
                assert time.monotonic() - began < 5
                assert "Traceback" not in killed.log
                killed = await deferToThread(start, stack)
                assert await proxy.statistics("kept")
            await pause(0.3)
            load.is_over = True
            await publishers
            began = time.monotonic()
            while sum([(await proxy.statistics(queue)).depth for queue in ("plain", "keys", "once")]):
                assert time.monotonic() - began < PATIENCE
                await pause(0.02)
            kept = [waiting.message async for waiting in proxy.peek("kept", count=1_000_000)]
            load.is_drained = True
            assert await deferToThread(killed.terminate) == 0
        await consumers
    note = f"seed {seed}, errors {load.errors}"
    for queue, ledger in load.ledgers.items():
        ledger.check(is_once=queue == "once")
        assert len(ledger.stored) > 10 * times, (queue, note)
    for queue in ("plain", "keys"):
        ledger = load.ledgers[queue]
        lost = set(ledger.stored.values()) - set(ledger.delivered)
        assert not lost, f"{queue}: {sorted(lost)[:10]} had receipts, and never came; {note}"
        assert len(ledger.settled) > 10 * times, note
    assert any(delivery.redelivered for _, delivery in load.ledgers["plain"].deliveries), note
    # What nobody takes is there, in the order in which it was published; more may be, of calls that had no answer.
    sequences = [delivery.sequence for delivery in kept]
    assert sequences == sorted(set(sequences))
    stored = {delivery.body: delivery.sequence for delivery in kept}
    assert len(stored) == len(kept)
    assert load.ledgers["kept"].stored.items() <= stored.items(), note
    assert not load.ledgers["kept"].refused & stored.keys()
    # With keys, what was published until there was a receipt is there once.
    keys = load.ledgers["keys"]
    assert {delivery.body for _, delivery in keys.deliveries} == keys.stored.keys(), note
    # Each of these is one after which a client may try again.
    assert load.errors
    assert load.errors.keys() <= {"ConnectFailed", "ConnectionLost", "GoingAway", "SessionLost"}, note


def running_at(running: Server) -> str:
    """Where it is reached."""
    port = running.wait_for_log(r"serving Queue at tcp:(\d+)")[1]
    return f"tcp:127.0.0.1:{port}"


def peak_mib(running: Server) -> float:
    """The most of resident memory that a server had so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{running.process.pid}/status").read_text())
    if found is None:
        pytest.skip("this system does not say how much memory a process had")
    return int(found[1]) / 1024


@pytest_twisted.ensureDeferred
async def test_memory_is_bounded_whoever_publishes_fast_and_reads_nothing(tmp_path: Path) -> None:
    body = bytes(64 * 1024)
    refused = 0

    async def publish(queue: Any, count: int) -> None:
        nonlocal refused
        while count:
            try:
                await queue.publish("q", body)
            except Overloaded:
                refused += 1
                await pause(0.1)
            else:
                count -= 1

    async with queue_server(tmp_path, tmp_path / "data", "--ballast", "1M") as (running, queue):
        where = running_at(running)
        await queue.declare("q")
        await publish(queue, 100)
        before = peak_mib(running)
        # One that reads nothing, with all the credit that there is, and one that settles nothing.
        asleep = connect(reactor, where, Queue)
        stream = (await asleep).consume("q", prefetch=10_000)
        await anext(stream)
        lazy = queue.consume("q", prefetch=10)
        taken = [await anext(lazy) for _ in range(10)]
        others = [connect(reactor, where, Queue) for _ in range(4)]
        queues = [await other for other in others]
        each = MEBIBYTES * 16 // (len(queues) * 500)
        await gatherResults([started(publish(one, each)) for one in queues for _ in range(500)])
        grown = peak_mib(running) - before
        statistics = (await queue.statistics("q")).groups[0]
        assert statistics.ready + statistics.leased == 100 + each * len(queues) * 500
        assert len({delivery.sequence for delivery in taken}) == 10
        assert refused
        # 64 MiB may wait to be stored; the rest is on the way in, from four connections.
        assert grown < 250
        await lazy.aclose()
        await stream.aclose()
        for one in (asleep, *others):
            await one.close()


@pytest_twisted.ensureDeferred
async def test_messages_that_wait_are_on_the_disk_and_not_in_memory(tmp_path: Path) -> None:
    messages = [Message(body=bytes(256)) for _ in range(5_000)]
    async with queue_server(tmp_path, tmp_path / "data", "--ballast", "64M") as (running, queue):
        await queue.declare("q")
        # From here on the pages that are kept in memory are as many as there will be.
        for _ in range(12):
            await queue.publish_batch("q", messages)
        before = running.resident_kib()
        for _ in range(20):
            await queue.publish_batch("q", messages)
        assert (await queue.statistics("q")).depth == 160_000
        assert running.resident_kib() - before < 20 * 1024
