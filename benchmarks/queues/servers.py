"""The servers of queues: how each is started, durable, on a free port and with a directory of its own, and ended.

Knows their command lines and settings.  It must not know what clients do, nor what is measured.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.loads import free_port
from benchmarks.runner import SIGNALS, Failed, end, said_in, start

__all__ = ["PROGRAMS", "UNBLOCKED", "QueueServer", "connect_until", "nats_can_sync", "version"]

#: Seconds until a server accepts connections; RabbitMQ takes ten and more.
LISTENING = 60.0
#: Debian's `/usr/sbin/rabbitmq-server` changes to a user of its own, who may not write where this one may.
RABBITMQ_PLACES = "/usr/lib/rabbitmq/bin"

#: A foreign program unblocks no signals: this does it for it, and becomes it.
UNBLOCKED = (
    "import os, signal, sys; "
    f"signal.pthread_sigmask(signal.SIG_UNBLOCK, {sorted(int(each) for each in SIGNALS)}); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)

Command = list[str]


def _program(name: str) -> str | None:
    return shutil.which(name, path=RABBITMQ_PLACES) or shutil.which(name)


#: The program of each server, with the Debian package that has it.
PROGRAMS = {"RabbitMQ": "rabbitmq-server", "NATS": "nats-server", "Redis": "redis-server"}


def version(server: str) -> str | None:
    """Of a server, if it is there."""
    program = _program(PROGRAMS[server])
    if not program:
        return None
    if server == "RabbitMQ":
        # `rabbitmq-server --version` would start one, and `rabbitmqctl version` leaves a name server behind.
        said = " ".join(each.name for each in Path(RABBITMQ_PLACES).parent.glob("lib/rabbitmq_server-*"))
    else:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r"\d+\.\d+\.\d+", said)
    return found[0] if found else "of an unknown version"


def nats_can_sync() -> bool:
    """Whether this NATS knows ``sync_interval: always``, without which it answers before a message is durable."""
    program = _program(PROGRAMS["NATS"])
    if not program:
        return False
    with tempfile.TemporaryDirectory() as directory:
        settings = Path(directory) / "nats.conf"
        settings.write_text(f'jetstream {{ store_dir: "{directory}", sync_interval: always }}\n')
        done = subprocess.run([program, "-t", "-c", str(settings)], capture_output=True, timeout=30, check=False)
    return done.returncode == 0


def _protoframe(directory: Path, port: int) -> tuple[Command, dict[str, str]]:
    run = "from twisted.scripts.twistd import run; run()"
    where = f"tcp:{port}:interface=127.0.0.1"
    return [
        *(sys.executable, "-c", run, "-n", "--pidfile=", "pf-queue"),
        *("--data", str(directory / "data"), "--listen", where),
    ], {}


def _redis(directory: Path, port: int) -> tuple[Command, dict[str, str]]:
    settings = directory / "redis.conf"
    settings.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {directory}\nappendonly yes\nappendfsync always\n"
        'no-appendfsync-on-rewrite no\nsave ""\n'
    )
    return [_program("redis-server") or "redis-server", str(settings)], {}


def _nats(directory: Path, port: int) -> tuple[Command, dict[str, str]]:
    settings = directory / "nats.conf"
    sync = "sync_interval: always" if nats_can_sync() else ""
    settings.write_text(f'host: "127.0.0.1"\nport: {port}\njetstream {{\n  store_dir: "{directory}"\n  {sync}\n}}\n')
    return [_program("nats-server") or "nats-server", "-c", str(settings)], {}


def _rabbitmq(directory: Path, port: int) -> tuple[Command, dict[str, str]]:
    settings = directory / "rabbitmq.conf"
    settings.write_text("log.console.level = error\nlog.file = false\ndisk_free_limit.absolute = 50MB\n")
    (directory / "enabled_plugins").write_text("[].\n")
    return [_program("rabbitmq-server") or "rabbitmq-server"], {
        "HOME": str(directory),
        "RABBITMQ_NODENAME": f"bench{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port(socket.SOCK_STREAM)),
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_CONFIG_FILE": str(settings),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        "RABBITMQ_PID_FILE": str(directory / "pid"),
    }


_COMMANDS: dict[str, Callable[[Path, int], tuple[Command, dict[str, str]]]] = {
    "protoframe": _protoframe,
    "RabbitMQ": _rabbitmq,
    "NATS": _nats,
    "Redis": _redis,
}


class QueueServer:
    """A server of queues.

    :param directory: below which it has one of its own, which is gone when it has ended.
    :raises Failed: it does not come to listen.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{name.lower()}-", dir=directory))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        self._names: subprocess.Popen[str] | None = None
        self._is_erlang = name == "RabbitMQ"
        self._started: subprocess.Popen[str] | None = None
        try:
            self.port = free_port(socket.SOCK_STREAM)
            command, variables = _COMMANDS[name](self.directory, self.port)
            if self._is_erlang:
                variables |= self._start_names()
            self._started = self._start(command, variables)
            self._wait()
        except BaseException:
            # Nobody else knows of it yet.
            self.end()
            raise

    @property
    def process(self) -> subprocess.Popen[str]:
        """Its process."""
        if self._started is None:
            raise Failed("its server was not started")
        return self._started

    @property
    def is_running(self) -> bool:
        """Whether its process has not ended."""
        return self.process.poll() is None

    def _start(self, command: Command, variables: dict[str, str]) -> subprocess.Popen[str]:
        return start([sys.executable, "-c", UNBLOCKED, *command], errors=self._errors, output=self._errors, **variables)

    def _start_names(self) -> dict[str, str]:
        """Erlang's name server, as a process that can be ended: a node would leave one behind."""
        port = free_port(socket.SOCK_STREAM)
        variables = {"ERL_EPMD_PORT": str(port), "ERL_EPMD_ADDRESS": "127.0.0.1"}
        self._names = self._start(["epmd"], variables)
        connect_until(port, self._names, time.monotonic() + LISTENING)
        return variables

    def _wait(self) -> None:
        if not connect_until(self.port, self.process, time.monotonic() + LISTENING):
            raise Failed(f"its server does not listen: {said_in(self._errors) or 'it said nothing'}")

    def end(self) -> None:
        """Ends it, and removes what it has stored."""
        if self._started is not None:
            if self._is_erlang:
                # A shell script has started the node, and ends with it.
                self._end_node(self._started)
            end(self._started)
        if self._names is not None:
            end(self._names)
        self._errors.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end_node(self, script: subprocess.Popen[str]) -> None:
        """Ends what is in the session that was begun for the server, however far it has come."""
        for number, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
            for process in _of_session(script.pid):
                if number == signal.SIGKILL or process != script.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                script.wait(patience)
                if not _of_session(script.pid):
                    return


def _of_session(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the name, which may have blanks in it: the state, the parent, the group and the session.
            state, _, _, session, *_ = status.read_text().rpartition(")")[2].split()
            if int(session) == leader and state != "Z":
                found.append(int(status.parent.name))
    return found


def connect_until(port: int, process: subprocess.Popen[str], until: float) -> bool:
    """Whether a process came to listen."""
    while process.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False
