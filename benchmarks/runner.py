"""Runs the workloads: each server and each client a process of its own, the clients by turns, round after round.

Knows processes: how they begin, what they print, and that all of them end.  It must not know what a peer does, nor what
its figures come to.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.peers import PEERS, Peer
from benchmarks.progress import Progress
from benchmarks.workloads import Kind, Workload

__all__ = [
    "ROOT",
    "SIGNALS",
    "Failed",
    "Job",
    "Runner",
    "end",
    "in_turn",
    "is_chosen",
    "jobs_of",
    "said_in",
    "start",
]

ROOT = Path(__file__).resolve().parent.parent

#: Seconds that a server has to listen, a client to do its task, and either to end when it is told to.
LISTENING, TASK, ENDING = 30.0, 180.0, 10.0
#: Rounds in which a job fails, and fails again, before it is given up where it has no figure.
ROUNDS_OF_FAILURE = 2


#: What ends this process, and must not do so between the start of another and the note of it; it unblocks them itself.
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
#: All processes that were started and have not been ended.
_running: set[subprocess.Popen[Any]] = set()


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
    _running.discard(process)


def _start(*arguments: str, errors: IO[bytes], module: str = "benchmarks") -> subprocess.Popen[str]:
    """One of this package's own processes."""
    return start([sys.executable, "-m", module, *arguments], errors=errors)


def start(
    command: Sequence[str], *, errors: IO[bytes], output: int | IO[bytes] = subprocess.PIPE, **more: str
) -> subprocess.Popen[str]:
    """A process, with these variables beside those of this one; it has to unblock `SIGNALS`.

    It is in a session of its own, so that an interrupt from the terminal reaches this process alone, which ends it.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PROTOFRAME_")}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=variables | more,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        _running.add(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def said_in(errors: IO[bytes]) -> str:
    """What was said, in a line: that of the last traceback which names the exception, or the last that has a word."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    for number in range(begins[-1] + 1 if begins else len(lines), len(lines)):
        if re.match(r"\w", lines[number]):
            # Some exceptions tell the rest in the lines after it.
            more = 3 if lines[number].endswith(":") else 1
            return " ".join(line.strip() for line in lines[number : number + more])
    return next((line.strip() for line in reversed(lines) if re.search(r"\w", line)), "")


class Running(typing.Protocol):
    """A server that was started."""

    port: int

    @property
    def process(self) -> subprocess.Popen[str]:
        """What serves."""

    @property
    def is_running(self) -> bool:
        """Whether its process has not ended."""

    def end(self) -> None:
        """Ends it."""


class Server:
    """A peer's server.

    :raises Failed: it does not come to listen.
    """

    def __init__(self, peer: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        self.process: subprocess.Popen[str] = _start("serve", peer, errors=self._errors)
        try:
            ready, _, _ = select.select([self.process.stdout], [], [], LISTENING)
            line = self.process.stdout.readline().strip() if ready and self.process.stdout else ""
            if not line.isdigit():
                end(self.process)
                raise Failed(f"its server does not listen: {said_in(self._errors) or line or 'it said nothing'}")
        except BaseException:
            # Nobody else knows of it yet.
            self.end()
            raise
        self.port = int(line)

    @property
    def is_running(self) -> bool:
        """Whether its process has not ended."""
        return self.process.poll() is None

    def end(self) -> None:
        """Ends it."""
        end(self.process)
        if self.process.stdout:
            self.process.stdout.close()
        self._errors.close()


class Runner:
    """Runs jobs, and keeps what they find.

    :ivar notes: what clients had to say, and which jobs got through when they were tried again.
    """

    #: Which of the packages here has the clients' command line.
    module = "benchmarks"

    def __init__(self, jobs: Sequence[Job], rounds: int, progress: Progress) -> None:
        self._jobs = list(jobs)
        self._rounds = rounds
        self._progress = progress
        self._servers: dict[str, Running] = {}
        self._found: dict[Job, list[float | None]] = {job: [None] * rounds for job in jobs}
        self._failures: dict[Job, dict[int, str]] = {job: {} for job in jobs}
        self.notes: list[str] = []

    @property
    def figures(self) -> dict[str, dict[str, list[float | None]]]:
        """By workload and peer, what was found in each round; without those of whom nothing was found."""
        figures: dict[str, dict[str, list[float | None]]] = {}
        for job, found in self._found.items():
            if any(figure is not None for figure in found):
                figures.setdefault(job.workload.name, {})[job.peer] = found
        return figures

    @property
    def failed(self) -> set[str]:
        """The peers that have no figure in some workload, since they failed."""
        return {job.peer for job in self._jobs if self._failures[job] and self._has_none(job)}

    @property
    def left_out(self) -> list[str]:
        """What could not be measured, and why."""
        lines = []
        for job, failures in self._failures.items():
            if failures:
                where = ", ".join(str(round_ + 1) for round_ in failures)
                missing = "" if self._has_none(job) else f"no figure in round {where} of {self._rounds}: "
                lines.append(f"{job.name}: {missing}{list(failures.values())[-1]}")
        return lines

    def _has_none(self, job: Job) -> bool:
        return all(figure is None for figure in self._found[job])

    def run(self) -> None:
        """Runs all jobs in each round; what was found until then is kept where it is interrupted."""
        order = [(round_, job) for round_ in range(self._rounds) for job in in_turn(self._jobs, round_)]
        self._progress.plan([job.name for _, job in order])
        try:
            for round_, job in order:
                self._progress.begin(job.name, f"round {round_ + 1} of {self._rounds}, {job.name}")
                if len(self._failures[job]) < ROUNDS_OF_FAILURE or not self._has_none(job):
                    self._try(job, round_)
                self._progress.end(job.name)
        finally:
            self.end()

    def end(self) -> None:
        """Ends every process that was started."""
        for peer in list(self._servers):
            self._end_server(peer)
        for process in list(_running):
            end(process)
        self._progress.clear()

    def _try(self, job: Job, round_: int) -> None:
        """Runs it, and once more where it fails, with a server of its own again."""
        try:
            try:
                found = self._run(job)
            except Failed as why:
                self._end_server(job.peer)
                found = self._run(job)
                self.notes.append(f"{job.name}: tried again in round {round_ + 1}: {why}")
        except Failed as why:
            self._end_server(job.peer)
            self._failures[job][round_] = str(why)
        else:
            self._found[job][round_] = found

    def _end_server(self, peer: str) -> None:
        if peer in self._servers:
            self._servers.pop(peer).end()

    def _run(self, job: Job) -> float:
        if job.workload.kind is Kind.START:
            return self._take(job, 0, 0)
        if job.workload.needs_fresh_server:
            server = Server(job.peer)
            try:
                return self._take(job, server.port, server.process.pid)
            finally:
                server.end()
        if job.peer in self._servers and not self._servers[job.peer].is_running:
            self.notes.append(f"{job.name}: its server had ended, and was started again")
            self._end_server(job.peer)
        if job.peer not in self._servers:
            self._servers[job.peer] = self._server(job.peer)
        running = self._servers[job.peer]
        return self._take(job, running.port, running.process.pid)

    def _server(self, peer: str) -> Running:
        return Server(peer)

    def _take(self, job: Job, port: int, server: int) -> float:
        """Has a client do it."""
        with tempfile.TemporaryFile() as errors:
            numbers = [str(number) for number in (job.count, port, server)]
            process = _start("take", job.peer, job.workload.name, *numbers, errors=errors, module=self.module)
            try:
                output, _ = process.communicate(timeout=TASK)
            except subprocess.TimeoutExpired:
                raise Failed(f"its client had not ended after {TASK:.0f} s") from None
            finally:
                end(process)
            said = said_in(errors)
        if process.returncode != 0:
            raise Failed(f"its client ended with {process.returncode}: {said or 'it said nothing'}")
        if said:
            self.notes.append(f"{job.name}: {said}")
        try:
            return float(output.strip().splitlines()[-1])
        except (IndexError, ValueError):
            raise Failed(f"its client gave no figure: {said or 'it said nothing'}") from None


def in_turn(jobs: Sequence[Job], round_: int) -> list[Job]:
    """The jobs, in whose workloads another peer comes first in each round."""
    ordered: list[Job] = []
    for _, group in itertools.groupby(jobs, lambda job: job.workload.name):
        of_one = list(group)
        first = round_ % len(of_one)
        ordered += of_one[first:] + of_one[:first]
    return ordered


def is_chosen(name: str, only: Sequence[str]) -> bool:
    """Whether a workload of that name is asked for: it has one of these in it, or there are none."""
    return not only or any(text.lower() in name.lower() for text in only)


def jobs_of(
    workloads: Sequence[Workload],
    only: Sequence[str],
    peers: Sequence[str],
    scale: float,
    known: Mapping[str, Peer] = PEERS,
) -> tuple[list[Job], list[str]]:
    """The jobs that are asked for, and a line for each peer that is not installed.

    :param only: parts of the names of workloads, or none for all.
    :param peers: names of peers, or none for all.
    """
    jobs, missing = [], {}
    for workload in workloads:
        if not is_chosen(workload.name, only):
            continue
        for name in workload.counts:
            if peers and name not in peers:
                continue
            lacking = known[name].missing() if name in known else None
            if lacking:
                missing[name] = f"{name} is left out: {lacking} is not installed"
            else:
                jobs.append(Job(workload, name, workload.count(name, scale)))
    return jobs, list(missing.values())
