"""Queue servers as real processes: killed under load, stopped, over each transport, and what memory they take."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread

from protoframe.queue import DeliveryPolicy, Settings
from tests.processes import PATIENCE, free_port, server
from tests.queue_load import Load, client, pause

#: How often the server is killed.
KILLS = int(os.environ.get("PROTOFRAME_KILLS", "3"))


def arguments(directory: Path, port: int, *more: str) -> tuple[str, ...]:
    return ("pf-queue", "--data", str(directory / "data"), "--listen", f"tcp:{port}:interface=127.0.0.1", *more)


def running(coroutine: Any) -> Deferred[Any]:
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
                    running(load.publish("plain", "a", 1, has_keys=False, delay=0.0)),
                    running(load.publish("plain", "b", 7, has_keys=False, delay=0.01)),
                    running(load.publish("kept", "a", 3, has_keys=False, delay=0.01)),
                    running(load.publish("keys", "a", 1, has_keys=True, delay=0.0)),
                    running(load.publish("keys", "b", 1, has_keys=True, delay=0.005)),
                    running(load.publish("keys", "c", 20, has_keys=True, delay=0.03)),
                    running(load.publish("once", "a", 1, has_keys=False, delay=0.0)),
                    running(load.publish("once", "b", 10, has_keys=False, delay=0.02)),
                ]
            )
            consumers = gatherResults(
                [
                    running(load.consume(queue, settle, prefetch))
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
        assert len(ledger.stored) > 50 * times, (queue, note)
    for queue in ("plain", "keys"):
        ledger = load.ledgers[queue]
        lost = set(ledger.stored.values()) - set(ledger.delivered)
        assert not lost, f"{queue}: {sorted(lost)[:10]} had receipts, and never came; {note}"
        assert len(ledger.settled) > 50 * times, note
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
