"""What figures come to: medians, ratios within each round, their spread, and whether what is asked holds.

Knows numbers alone: no processes, no files and no words for readers.  What it gives is made of dicts and lists, as it
is written to JSON and read from there by whatever shows it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.workloads import Asked, Workload

__all__ = ["OURS", "Figures", "asked_of", "holds", "spread", "summary", "within_rounds"]

#: By workload and peer, what was found in each round.
Figures = Mapping[str, Mapping[str, Sequence[float]]]

#: Which of a workload's peers is ours, the first that is there.
OURS = ("protoframe", "protoframe, UDP")


def within_rounds(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratio of two peers' figures in each round, in which the machine was about as fast for both."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """The median, the least and the most."""
    return {"median": statistics.median(numbers), "least": min(numbers), "most": max(numbers)}


def holds(asked: Asked, found: float) -> bool:
    """Whether a median is as it should be."""
    return (asked.least is None or found >= asked.least) and (asked.most is None or found <= asked.most)


def asked_of(all_asked: Sequence[Asked], figures: Figures) -> list[dict[str, Any]]:
    """What was found of what is asked, and whether it holds; nothing where a figure is not there."""
    found = []
    for asked in all_asked:
        of_peers = figures.get(asked.workload, {})
        ours = of_peers.get(asked.ours)
        theirs = of_peers.get(asked.theirs) if asked.theirs else None
        if not ours or (asked.theirs and not theirs):
            continue
        numbers = spread(within_rounds(ours, theirs) if theirs else ours)
        found.append(dataclasses.asdict(asked) | {"found": numbers, "holds": holds(asked, numbers["median"])})
    return found


def summary(workload: Workload, of_peers: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What was found of a workload: every figure, the spread of each peer's, and that of our ratio to each."""
    ours = next((name for name in OURS if name in of_peers), None)
    return {
        "name": workload.name,
        "kind": workload.kind.value,
        "unit": workload.unit,
        "more_is_better": workload.is_more_better,
        "at_once": workload.at_once,
        "size": workload.size,
        "connections": workload.connections,
        "ours": ours,
        "peers": {
            peer: {
                "figures": list(figures),
                **spread(figures),
                "ratio": spread(within_rounds(of_peers[ours], figures)) if ours and peer != ours else None,
            }
            for peer, figures in of_peers.items()
        },
    }
