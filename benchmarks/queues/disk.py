"""The disk that queues are measured on: what it is, how long it takes to make something durable, and what is on it.

Knows files alone; no queues.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

__all__ = ["WITHOUT_DISK", "file_system", "fsync_milliseconds", "size"]

#: File systems that hold what is in them in memory.
WITHOUT_DISK = {"tmpfs", "ramfs"}
WRITES, OCTETS = 200, 256


def file_system(directory: Path) -> str:
    """The kind of the file system that a directory is on; empty where the system does not tell."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        _, where, found, *_ = line.split()
        if directory.resolve().is_relative_to(where) and len(where) >= len(best):
            best, kind = where, found
    return kind


def fsync_milliseconds(directory: Path) -> dict[str, float]:
    """What 256 octets at the end of a file take to be durable: the median, and the 99th of a hundred."""
    took = []
    path = directory / "fsync"
    with path.open("wb", buffering=0) as file:
        for _ in range(WRITES):
            began = time.perf_counter()
            file.write(bytes(OCTETS))
            os.fsync(file.fileno())
            took.append(1000 * (time.perf_counter() - began))
    path.unlink()
    return {"median": statistics.median(took), "99": statistics.quantiles(took, n=100)[98]}


def size(directory: Path) -> int:
    """Octets that the files below a directory take on the disk, which of files with holes is less than their length."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            # It went while we looked.
            continue
    return total
