"""A client in a process of its own, to be killed: where, put or get, from, to; a bandwidth."""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet.task import react

from protoframe.files import FileClient


async def main(reactor: Any) -> None:
    where, verb, source, target, bandwidth = sys.argv[1:]
    async with FileClient(reactor, where, bandwidth=float(bandwidth), observer=_told) as files:
        summary = await getattr(files, verb)(source, target)
        sys.stdout.write(f"done {summary.moved}\n")


def _told(progress: Any) -> None:
    sys.stdout.write(f"{progress.octets}\n")
    sys.stdout.flush()


react(main)
