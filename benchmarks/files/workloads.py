"""What is measured of copies, and what is asked of it, as tables of data.

Knows names, counts and bounds.  It must not know how a program copies, how anything is run, or what was found.
"""

from __future__ import annotations

from benchmarks.workloads import Asked, Kind, Workload

__all__ = ["ASKED", "GET", "PUT", "SMALL_FILE", "WORKLOADS"]

PUT, GET = "put", "get"
#: Bytes of each file of a tree.
SMALL_FILE = 1024
#: MiB of the large file, and files of the tree.
_FILE, _TREE = 1024, 100_000


def _file(way: str, *more: str) -> Workload:
    counts = dict.fromkeys(("protoframe", "protoframe, BLAKE3", "rsync daemon", "scp", *more), _FILE)
    return Workload(
        name=f"{way} a file of 1 GiB", kind=Kind.COPY, counts={**counts, "protoframe, UDP": _FILE // 8}, size=1 << 20
    )


def _tree(way: str, *more: str) -> Workload:
    counts = {**dict.fromkeys(("protoframe", "rsync daemon", *more), _TREE), "scp": _TREE // 10}
    return Workload(name=f"{way} a tree of 100,000 files", kind=Kind.TREE, counts=counts, size=SMALL_FILE)


WORKLOADS = [_file(PUT, "rsync, --fsync"), _file(GET), _tree(PUT, "rsync, --fsync"), _tree(GET)]

ASKED = [
    *(
        Asked(workload.name, "protoframe", theirs, least=0.8)
        for workload in WORKLOADS[:2]
        for theirs in ("rsync daemon", "scp")
    ),
    *(Asked(workload.name, "protoframe", "rsync daemon", least=1.0) for workload in WORKLOADS[2:]),
]
