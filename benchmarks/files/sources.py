"""What is copied: a large file and a tree of small ones, and whether a copy of them is whole.

Knows files alone; no programs and no figures.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.files.workloads import SMALL_FILE
from benchmarks.workloads import Kind

__all__ = ["has_arrived", "source"]

MIB = 1 << 20
#: Files in one directory of a tree.
_IN_DIRECTORY = 1000


def source(directory: Path, kind: Kind, count: int) -> Path:
    """A file of so many MiB, or a tree of so many files, made if it is not there."""
    path = directory / f"{kind.value}-{count}"
    if path.exists():
        return path
    if kind is Kind.COPY:
        with path.open("wb") as file:
            for _ in range(count):
                file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())
        return path
    path.mkdir()
    for number in range(count):
        place = path / f"{number // _IN_DIRECTORY:04}"
        if not number % _IN_DIRECTORY:
            place.mkdir()
        (place / f"file-{number}").write_bytes(os.urandom(SMALL_FILE))
    os.sync()
    return path


def has_arrived(path: Path, kind: Kind, count: int) -> bool:
    """Whether a copy is whole, by the lengths of its files."""
    if kind is Kind.COPY:
        return path.is_file() and path.stat().st_size == count * MIB
    sizes = [os.stat(os.path.join(place, name)).st_size for place, _, names in os.walk(path) for name in names]
    return sizes == [SMALL_FILE] * count
