"""The copy that is measured of protoframe: what the client's process does.

Knows `FileClient` alone; it prints the seconds that the copy took, its connection included, and its own memory.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from benchmarks.files.workloads import PUT

__all__ = ["take"]


def take(way: str, local: str, remote: str, where: str, digest: str) -> None:
    """Copies, verifying with this digest, and prints what it took.

    :raises SystemExit: something could not be copied.
    """
    from twisted.internet import reactor
    from twisted.internet.task import react

    from benchmarks.files.runner import peak
    from protoframe.files import Digest, FileClient

    async def copy(_: Any) -> None:
        began = time.perf_counter()
        async with FileClient(reactor, where, digest=Digest(digest)) as client:
            summary = await (client.put(local, remote) if way == PUT else client.get(remote, local))
            seconds = time.perf_counter() - began
        if summary.failed:
            raise SystemExit(f"{summary.failed} files were not copied: {summary.problems[0].reason}")
        print(json.dumps({"seconds": seconds, "memory": peak(os.getpid())}))

    from twisted.internet.defer import Deferred

    react(lambda reactor: Deferred.fromCoroutine(copy(reactor)))
