"""Runs the copies by turns, each with a server and directories of its own, and keeps what they find.

Knows processes and directories, and when they are gone.  It must not know how a program copies.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from benchmarks.files.peers import COPIERS
from benchmarks.files.sources import MIB, has_arrived, source
from benchmarks.files.workloads import GET, PUT
from benchmarks.loads import free_port
from benchmarks.progress import Progress
from benchmarks.queues.servers import UNBLOCKED, connect_until
from benchmarks.runner import Failed, Job, Runner, end, said_in, start
from benchmarks.workloads import Kind

__all__ = ["CopyRunner", "peak"]

#: Seconds that a server has to listen, and a copy to be done.
LISTENING, LONGEST = 30.0, 900.0
#: Seconds before each copy, after which a host has taken away what memory the copy before it has freed.  Without them
#: a program that starts fast would find it, and another not.
_PAUSE = 5.0
#: What gives a program memory that has just been in use: bytes that another has had until then.
_WARM = 3 << 30


def peak(process: int) -> int:
    """Bytes of memory that a process had at most."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise Failed("this system does not tell the memory of a process in /proc")


class CopyRunner(Runner):
    """Runs jobs of copies.

    :param directory: below which everything is copied from and to.
    :param is_warm: whether memory that was just in use is there for each copy.
    :ivar memory: bytes that ours had at most, at each end, by the workload.
    """

    def __init__(
        self, jobs: Sequence[Job], rounds: int, progress: Progress, directory: Path, *, is_warm: bool = False
    ) -> None:
        super().__init__(jobs, rounds, progress)
        self._is_warm = is_warm
        self._sources = directory / "source"
        self._sources.mkdir()
        self._directory = directory
        self.memory: dict[str, dict[str, list[int]]] = {}

    def _run(self, job: Job) -> float:
        kind = job.workload.kind
        original = source(self._sources, kind, job.count)
        # What was written before is on the disk, and not written on another's time.
        os.sync()
        way = PUT if job.workload.name.startswith(PUT) else GET
        directory = Path(tempfile.mkdtemp(prefix="copy-", dir=self._directory))
        try:
            for name in ("settings", "there", "here"):
                (directory / name).mkdir()
            if way == PUT:
                root, local, remote, copy = directory / "there", original, "copy", directory / "there" / "copy"
            else:
                root, local, remote = self._sources, directory / "here" / "copy", original.name
                copy = local
            seconds = self._copy(job, way, local, remote, root, directory / "settings")
            if not has_arrived(copy, kind, job.count):
                raise Failed("the copy is not whole")
        finally:
            # After many files were removed, ext4 makes new ones slowly for half a minute, as it avoids their inodes:
            # trees stay until everything is measured.
            if kind is not Kind.TREE:
                shutil.rmtree(directory, ignore_errors=True)
        return job.count * (MIB / 1e6 if kind is Kind.COPY else 1) / seconds

    def _copy(self, job: Job, way: str, local: Path, remote: str, root: Path, settings: Path) -> float:
        peer = COPIERS[job.peer]
        is_udp = "UDP" in job.peer
        port = free_port(socket.SOCK_DGRAM if is_udp else socket.SOCK_STREAM)
        with tempfile.TemporaryFile() as errors:
            server = _start(peer.serve(root, settings, port), errors)
            try:
                until = time.monotonic() + LISTENING
                if not (_serves_datagrams(errors, until) if is_udp else connect_until(port, server, until)):
                    raise Failed(f"its server does not listen: {said_in(errors) or 'it said nothing'}")
                command = peer.copy(way, local, remote, root, settings, port)
                time.sleep(_PAUSE)
                if self._is_warm:
                    subprocess.run([sys.executable, "-c", f"bytes(1) * {_WARM}"], check=True)
                began = time.perf_counter()
                output = _done(command)
                seconds = time.perf_counter() - began
                if job.peer.startswith("protoframe"):
                    # A library: its copies are measured, not the start of an interpreter.
                    found = json.loads(output)
                    seconds = found["seconds"]
                    memory = self.memory.setdefault(job.name, {"client": [], "server": []})
                    memory["client"].append(found["memory"])
                    memory["server"].append(peak(server.pid))
                return seconds
            finally:
                end(server)


def _start(command: list[str], errors: IO[bytes]) -> subprocess.Popen[str]:
    return start([sys.executable, "-c", UNBLOCKED, *command], errors=errors, output=errors)


def _done(command: list[str]) -> str:
    """What a command printed, when it has ended."""
    with tempfile.TemporaryFile() as errors:
        process = start([sys.executable, "-c", UNBLOCKED, *command], errors=errors)
        try:
            output, _ = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise Failed(f"it had not ended after {LONGEST:.0f} s") from None
        finally:
            end(process)
        if process.returncode != 0:
            raise Failed(f"it ended with {process.returncode}: {said_in(errors) or 'it said nothing'}")
    return output


def _serves_datagrams(output: IO[bytes], until: float) -> bool:
    """Whether a server says that it listens, which of datagrams nobody else can tell."""
    while time.monotonic() < until:
        output.seek(0)
        if b"starting on" in output.read():
            return True
        time.sleep(0.05)
    return False
