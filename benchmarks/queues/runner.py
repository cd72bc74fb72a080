"""Runs the workloads of queues, by turns as those of calls, and judges them.

Knows which server a peer needs, and which ones are compared with.  It must not know how servers and clients work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.progress import Progress
from benchmarks.queues.peers import QUEUES
from benchmarks.queues.servers import QueueServer
from benchmarks.queues.workloads import ASKED, BEST
from benchmarks.runner import Job, Runner

__all__ = ["QueueRunner", "asked_of", "best_of"]


class QueueRunner(Runner):
    """Runs jobs of queues.

    :param directory: below which each server has one of its own.
    """

    module = "benchmarks.queues"

    def __init__(self, jobs: Sequence[Job], rounds: int, progress: Progress, directory: Path) -> None:
        super().__init__(jobs, rounds, progress)
        self._directory = directory
        self._shared: dict[str, QueueServer] = {}

    def _server(self, peer: str) -> QueueServer:
        """The peer's, which others may use as well."""
        name = QUEUES[peer].server
        if name not in self._shared or not self._shared[name].is_running:
            if name in self._shared:
                self._shared.pop(name).end()
            self._shared[name] = QueueServer(name, self._directory)
        return self._shared[name]

    def _end_server(self, peer: str) -> None:
        self._servers.pop(peer, None)
        name = QUEUES[peer].server
        if name in self._shared:
            self._shared.pop(name).end()
            for other in list(self._servers):
                if QUEUES[other].server == name:
                    del self._servers[other]


def best_of(of_peers: Mapping[str, results.Rounds], left_out: Sequence[str]) -> list[float | None]:
    """The best of the others in each round, but for these."""
    others = [rounds for peer, rounds in of_peers.items() if not peer.startswith("protoframe") and peer not in left_out]
    best: list[float | None] = []
    for figures in zip(*others, strict=True):
        known = [figure for figure in figures if figure is not None]
        best.append(max(known) if known else None)
    return best


def asked_of(figures: results.Figures, not_durable: Sequence[str], only: Sequence[str]) -> list[dict[str, Any]]:
    """What is asked, and whether it holds.

    :param not_durable: those that answer before a message is durable: they are shown, and nobody is compared with them.
    """
    with_best = {
        name: {**of_peers, **({BEST: best} if (best := best_of(of_peers, not_durable)) else {})}
        for name, of_peers in figures.items()
    }
    return results.asked_of([each for each in ASKED if each.workload in only], with_best)
