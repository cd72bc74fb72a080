"""Runs the workloads: each server and each client a process of its own, the clients by turns, round after round.

Knows processes: how they begin, what they print, and that all of them end.  It must not know what a peer does, nor what
its figures come to.
"""

from __future__ import annotations

import dataclasses
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.peers import PEERS
from benchmarks.progress import Progress
from benchmarks.workloads import Kind, Workload

__all__ = ["ROOT", "Failed", "Job", "Runner", "jobs_of"]

ROOT = Path(__file__).resolve().parent.parent

#: Seconds that a server has to listen, a client to do its task, and either to end when it is told to.
LISTENING, TASK, ENDING = 30.0, 180.0, 10.0


class Failed(Exception):
    """A process does not do what it should; the text has the last that it said."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A workload of one peer."""

    workload: Workload
    peer: str
    count: int

    @property
    def name(self) -> str:
        """For whoever watches."""
        return f"{self.workload.name}: {self.peer}"


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process that this one started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _start(*arguments: str, errors: IO[bytes]) -> subprocess.Popen[str]:
    """One of this package's own processes.

    It is in a session of its own, so that an interrupt from the terminal reaches this process alone, which ends it.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PROTOFRAME_")}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )


def _last_line(errors: IO[bytes]) -> str:
    """The last line of what was said that has a word in it."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if re.search(r"\w", line)), "")


class Server:
    """A peer's server.

    :raises Failed: it does not come to listen.
    """

    def __init__(self, peer: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        self.process = _start("serve", peer, errors=self._errors)
        ready, _, _ = select.select([self.process.stdout], [], [], LISTENING)
        line = self.process.stdout.readline().strip() if ready and self.process.stdout else ""
        if not line.isdigit():
            end(self.process)
            why = _last_line(self._errors) or line or "it said nothing"
            self.end()
            raise Failed(f"its server does not listen: {why}")
        self.port = int(line)

    def end(self) -> None:
        """Ends it."""
        end(self.process)
        if self.process.stdout:
            self.process.stdout.close()
        self._errors.close()


class Runner:
    """Runs jobs, and keeps what they find.

    :ivar figures: by workload and peer, what was found in each round.
    :ivar left_out: what could not be measured, and why.
    :ivar failed: the peers that it was of.
    :ivar notes: what clients had to say.
    """

    def __init__(self, jobs: Sequence[Job], rounds: int, progress: Progress) -> None:
        self._jobs = list(jobs)
        self._rounds = rounds
        self._progress = progress
        self._servers: dict[str, Server] = {}
        self.figures: dict[str, dict[str, list[float]]] = {}
        self.left_out: list[str] = []
        self.failed: set[str] = set()
        self.notes: list[str] = []

    def run(self) -> None:
        """Runs all jobs in each round."""
        self._progress.plan([job.name for _ in range(self._rounds) for job in self._jobs])
        broken: set[str] = set()
        try:
            for round_ in range(self._rounds):
                for job in self._jobs:
                    self._progress.begin(job.name, f"round {round_ + 1} of {self._rounds}, {job.name}")
                    if job.name not in broken:
                        try:
                            found = self._run(job)
                        except Failed as why:
                            broken.add(job.name)
                            self.failed.add(job.peer)
                            self.left_out.append(f"{job.name}: {why}")
                            self.figures.get(job.workload.name, {}).pop(job.peer, None)
                        else:
                            self.figures.setdefault(job.workload.name, {}).setdefault(job.peer, []).append(found)
                    self._progress.end(job.name)
        finally:
            for server in self._servers.values():
                server.end()
            self._servers.clear()
            self._progress.clear()

    def _run(self, job: Job) -> float:
        if job.workload.kind is Kind.START:
            return self._take(job, 0, 0)
        if job.workload.needs_fresh_server:
            server = Server(job.peer)
            try:
                return self._take(job, server.port, server.process.pid)
            finally:
                server.end()
        if job.peer not in self._servers:
            self._servers[job.peer] = Server(job.peer)
        server = self._servers[job.peer]
        return self._take(job, server.port, server.process.pid)

    def _take(self, job: Job, port: int, server: int) -> float:
        """Has a client do it."""
        with tempfile.TemporaryFile() as errors:
            numbers = [str(number) for number in (job.count, port, server)]
            process = _start("take", job.peer, job.workload.name, *numbers, errors=errors)
            try:
                output, _ = process.communicate(timeout=TASK)
            except subprocess.TimeoutExpired:
                raise Failed(f"its client had not ended after {TASK:.0f} s") from None
            finally:
                end(process)
            said = _last_line(errors)
        if process.returncode != 0:
            raise Failed(f"its client ended with {process.returncode}: {said or 'it said nothing'}")
        if said:
            self.notes.append(f"{job.name}: {said}")
        return float(output.strip().splitlines()[-1])


def jobs_of(
    workloads: Sequence[Workload], only: Sequence[str], peers: Sequence[str], scale: float
) -> tuple[list[Job], list[str]]:
    """The jobs that are asked for, and a line for each peer that is not installed.

    :param only: parts of the names of workloads, or none for all.
    :param peers: names of peers, or none for all.
    """
    jobs, missing = [], {}
    for workload in workloads:
        if only and not any(text.lower() in workload.name.lower() for text in only):
            continue
        for name in workload.counts:
            if peers and name not in peers:
                continue
            lacking = PEERS[name].missing() if name in PEERS else None
            if lacking:
                missing[name] = f"{name} is left out: {lacking} is not installed"
            else:
                jobs.append(Job(workload, name, workload.count(name, scale)))
    return jobs, list(missing.values())
