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

__all__ = ["OURS", "Figures", "Rounds", "asked_of", "holds", "spread", "summary", "within_rounds"]

#: What was found of a peer in each round, and nothing in those that it did not get through.
Rounds = Sequence[float | None]
#: By workload and peer.
Figures = Mapping[str, Mapping[str, Rounds]]

#: Which of a workload's peers is ours, the first that is there.
OURS = ("protoframe", "protoframe, UDP")


def within_rounds(ours: Rounds, theirs: Rounds) -> list[float]:
    """The ratio of two peers' figures in each round that both have, in which the machine was about as fast for both."""
    return [one / other for one, other in zip(ours, theirs, strict=True) if one is not None and other is not None]


def spread(rounds: Rounds) -> dict[str, float] | None:
    """The median, the least and the most, of what there is."""
    numbers = [each for each in rounds if each is not None]
    if not numbers:
        return None
    return {"median": statistics.median(numbers), "least": min(numbers), "most": max(numbers)}


def holds(asked: Asked, found: float) -> bool:
    """Whether a median is as it should be."""
    return (asked.least is None or found >= asked.least) and (asked.most is None or found <= asked.most)


def asked_of(all_asked: Sequence[Asked], figures: Figures) -> list[dict[str, Any]]:
    """What was found of what is asked, and whether it holds; neither where a figure is not there."""
    found = []
    for asked in all_asked:
        of_peers = figures.get(asked.workload, {})
        ours = of_peers.get(asked.ours)
        theirs = of_peers.get(asked.theirs) if asked.theirs else None
        numbers = None
        if ours and (theirs or not asked.theirs):
            numbers = spread(within_rounds(ours, theirs) if theirs else ours)
        verdict = holds(asked, numbers["median"]) if numbers else None
        found.append(dataclasses.asdict(asked) | {"found": numbers, "holds": verdict})
    return found


def summary(workload: Workload, of_peers: Mapping[str, Rounds]) -> dict[str, Any]:
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
                **(spread(figures) or {}),
                "ratio": spread(within_rounds(of_peers[ours], figures)) if ours and peer != ours else None,
            }
            for peer, figures in of_peers.items()
        },
    }
