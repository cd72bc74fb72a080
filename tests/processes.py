"""Real server processes for tests: started, waited for, and ended, each in a directory of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0


def environment(**more: str) -> dict[str, str]:
    """The environment of a process: this checkout first on the import path, and nothing that colours output."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PROTOFRAME_", "COV_"))}
    paths = [str(ROOT), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    variables["NO_COLOR"] = "1"
    return variables | more


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pf(*arguments: str, timeout: float = PATIENCE, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs ``pf`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "protoframe.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**variables),
        check=False,
    )


def run_twistd(
    *arguments: str, cwd: Path, timeout: float = PATIENCE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``twistd`` to its end."""
    return subprocess.run(
        [twistd(), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**variables),
        cwd=cwd,
        check=False,
    )


def twistd() -> str:
    """The ``twistd`` that belongs to this interpreter."""
    return str(Path(sys.executable).with_name("twistd"))


class Server:
    """A ``twistd -n`` that runs.

    :ivar log: what it has written to its log so far.
    """

    def __init__(self, process: subprocess.Popen[bytes], logfile: Path) -> None:
        self.process = process
        self._logfile = logfile

    @property
    def log(self) -> str:
        return self._logfile.read_text(errors="replace")

    def wait_for_log(self, pattern: str, patience: float = PATIENCE) -> re.Match[str]:
        """Waits until the log matches."""
        limit = time.monotonic() + patience
        while True:
            found = re.search(pattern, self.log)
            if found:
                return found
            if time.monotonic() > limit:
                raise AssertionError(f"the log has no {pattern!r} within {patience:g} s:\n{self.log}")
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            time.sleep(0.01)

    def resident_kib(self) -> int:
        """Its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        if found is None:
            raise AssertionError(status)
        return int(found[1])

    def terminate(self) -> int:
        """Asks it to end, and gives its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def server(directory: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Runs ``twistd -n`` with a plugin's arguments, until it serves."""
    logfile = directory / "twistd.log"
    logfile.unlink(missing_ok=True)
    with (directory / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [twistd(), "-n", "--logfile", str(logfile), "--pidfile", str(directory / "twistd.pid"), *arguments],
            cwd=directory,
            env=environment(**(variables or {})),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    running = Server(process, logfile)
    try:
        logfile.touch()
        for _ in range(max(1, arguments.count("--listen"))):
            running.wait_for_log(r"serving ")
        yield running
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
