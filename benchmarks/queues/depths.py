"""Queues with many messages in them: how fast they are, and what they take of memory and disk.

Knows pf-queue alone.  Each depth has a server of its own, whose memory is that of this many messages.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.connections import resident
from benchmarks.loads import Task
from benchmarks.queues import disk
from benchmarks.queues.servers import QueueServer
from benchmarks.queues.workloads import WORKLOADS
from benchmarks.runner import Failed, end, said_in, start

__all__ = ["NAME", "measure", "take"]

NAME = "depth"
#: Messages that are published, and as many that are consumed, while the others wait.
MEASURED = 20_000
#: Seconds that one may take: a million messages are published before it is measured.
LONGEST = 600.0


def take(depth: int, measured: int, port: int, server: int, directory: str) -> dict[str, float]:
    """What the client's process does."""
    from benchmarks.queues.peers import protoframe_

    def look() -> dict[str, float]:
        return {"memory": resident(server), "disk": disk.size(Path(directory))}

    empty = {"empty": resident(server), "disk_empty": disk.size(Path(directory))}
    workload = WORKLOADS[0]
    measured = max(1, measured // workload.at_once) * workload.at_once
    found = protoframe_.depth(depth, Task(workload, measured, server), min(measured, depth), port, look)
    # Consuming may read what waits into memory: that counts too.
    return found | empty | {"memory_after": resident(server)}


def measure(
    depths: Sequence[int], rounds: int, scale: float, directory: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What was found at each depth, in each round.

    :raises Failed: a server or a client does not do what it should.
    """
    found: list[dict[str, Any]] = []
    for depth in depths:
        figures = []
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}, {depth:,} waiting")
            server = QueueServer("protoframe", directory)
            try:
                figures.append(_client(depth, max(64, round(MEASURED * min(1, scale))), server))
            finally:
                server.end()
        found.append({"depth": depth, "figures": figures})
    return found


def _client(depth: int, measured: int, server: QueueServer) -> dict[str, float]:
    numbers = [str(number) for number in (depth, measured, server.port, server.process.pid)]
    with tempfile.TemporaryFile() as errors:
        process = start(
            [sys.executable, "-m", "benchmarks.queues", "depth", *numbers, str(server.directory / "data")],
            errors=errors,
        )
        try:
            output, _ = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise Failed(f"{depth:,} waiting: its client had not ended after {LONGEST:.0f} s") from None
        finally:
            end(process)
        if process.returncode != 0:
            raise Failed(f"{depth:,} waiting: its client ended with {process.returncode}: {said_in(errors)}")
    figures: dict[str, float] = json.loads(output)
    return figures
