"""What a run was made on: the machine, and the versions of everything.

Knows where systems tell these.  It names no host and no user: what it gives is published.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.peers import PEERS, Peer

__all__ = ["describe", "load", "versions"]


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "of an unknown kind"


def describe() -> dict[str, str | int | float]:
    """The machine: its processor, how many of them this process may use, its memory in GiB, and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gibibytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "processor": _processor(),
        "cores": cores,
        "memory": round(gibibytes, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}, {platform.machine()}",
    }


def load() -> float:
    """How many processes wanted to run in the last minute, on average."""
    return round(os.getloadavg()[0], 2)


def versions(peers: Mapping[str, Peer] = PEERS) -> dict[str, str]:
    """Of Python, and of each distribution that is installed."""
    found = {"Python": f"{platform.python_version()} ({platform.python_implementation()})"}
    for distribution in dict.fromkeys(name for peer in peers.values() for name in peer.distributions):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
