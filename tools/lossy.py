#!/usr/bin/env python
"""Calls over a link that loses packets: a server in one network namespace, its clients in another, real sockets.

    tools/lossy.py [--quick] [--calls N] [--loss PERCENT ...] [--transport udp|tcp ...] [--rounds N]
                   [--json FILE]

Knows how namespaces are made and joined, how packets are lost, and what must hold of calls all the same; not how calls
are made, which is `lossy_calls.py`'s.  It needs root, `ip` and `iptables`.  It exits with 0 where all holds, with 1
where something does not, and with 77, and one line that says why, where it may not have a network of its own.

What must hold:

- up to 30 % lost each way, every call has its own answer by its deadline; above that, its answer or `DeadlineExceeded`;
- no call hangs, and none runs twice;
- at 10 %, with 64 small calls in flight, the 99th percentile over UDP is at most half of that over TCP.

Packets are lost as they come in, so that whoever sends them is not told.  The link has no delay of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lossy_calls import PATIENCE, Outcome, Task

TOOLS = Path(__file__).resolve().parent
SKIPPED = 77
#: Addresses for documentation (RFC 5737): no route of the machine's is in their way.
SERVER, CLIENT = "192.0.2.1", "192.0.2.2"
PORT = 12000

#: Percent of packets lost each way, up to which every call must be answered.
ALL_ANSWERED = 30
#: Percent of packets lost each way where UDP and TCP are compared, and the ratio of percentiles that is asked for.
COMPARED_AT = 10
MOST_OF_TCP = 0.5
#: Rounds from which on that is judged: fewer say little.
ENOUGH_ROUNDS = 3
#: Seconds for which every tenth handler waits, so that a call may be sent again while it runs.
PAUSE = 0.05

# What must hold.


def faults_of(outcome: Outcome, calls: int, *, in_time: bool) -> list[str]:
    """What does not hold of the calls.

    :param in_time: whether each must have been answered by its deadline.
    """
    counts = {
        "ran twice": outcome.repeated,
        "hung": outcome.hung,
        "had a wrong answer": outcome.wrong,
        "were answered and did not run": outcome.not_run,
        "missed the deadline": outcome.late if in_time else 0,
        **{f"failed with {name}": count for name, count in outcome.failed.items()},
    }
    faults = [f"{count:,} {what}" for what, count in counts.items() if count]
    ended = outcome.answered + outcome.late + outcome.hung + outcome.wrong + sum(outcome.failed.values())
    if ended != calls:
        faults.append(f"{calls - ended:,} had no outcome")
    if not outcome.answered:
        faults.append("none was answered")
    return faults


def loss_fault(dropped: int, packets: int, loss: float) -> list[str]:
    """Whether the link itself did not lose what it should, where there were packets enough to tell."""
    wanted = packets * loss / 100
    return [f"the link dropped {dropped:,} of {packets:,} packets"] if wanted >= 50 and dropped < wanted / 2 else []


@dataclasses.dataclass
class Row:
    """A line of the table."""

    name: str
    outcome: Outcome
    dropped: int
    packets: int
    faults: list[str]

    HEAD = ("", "answered", "late", "other", "twice", "median ms", "99 % ms", "slowest ms", "dropped", "packets", "")

    @property
    def cells(self) -> tuple[str, ...]:
        """Its cells, as texts."""
        outcome = self.outcome
        other = outcome.hung + outcome.wrong + sum(outcome.failed.values())
        numbers = (outcome.answered, outcome.late, other, outcome.repeated)
        times = (outcome.percentile(50), outcome.percentile(99), outcome.percentile(100))
        return (
            self.name,
            *(f"{number:,}" for number in numbers),
            *(f"{milliseconds:,.1f}" for milliseconds in times),
            f"{self.dropped:,}",
            f"{self.packets:,}",
            "does not hold" if self.faults else "holds",
        )

    @property
    def record(self) -> dict[str, Any]:
        """The same, for JSON."""
        outcome = self.outcome
        return {
            "name": self.name,
            "answered": outcome.answered,
            "late": outcome.late,
            "other": outcome.hung + outcome.wrong + sum(outcome.failed.values()),
            "repeated": outcome.repeated,
            "milliseconds": {f"{part:g}": outcome.percentile(part) for part in (50, 99, 100)},
            "dropped": self.dropped,
            "packets": self.packets,
            "faults": self.faults,
        }

    @property
    def line(self) -> str:
        """The same as a sentence, for whoever watches."""
        outcome = self.outcome
        parts = [
            f"{outcome.answered:,} answered",
            f"{outcome.late:,} late",
            f"median {outcome.percentile(50):,.1f} ms, 99 % {outcome.percentile(99):,.1f} ms",
            f"{self.dropped:,} of {self.packets:,} packets dropped",
        ]
        if outcome.openings_failed or outcome.reopened:
            parts.append(f"connections tried again {outcome.openings_failed}, lost {outcome.reopened}")
        verdict = "; ".join(self.faults) if self.faults else "holds"
        return f"{self.name}: {', '.join(parts)}, {outcome.seconds:,.1f} s: {verdict}"


# The network.


class Failed(Exception):
    """A program of the system's is not there, or does not do what it is told to."""


class Skipped(Exception):
    """There can be no network to lose packets in, on this machine or for this user."""


def tool(name: str) -> str:
    """The path of a program of the system's, which may stand where only root's PATH leads.

    :raises Failed: there is none.
    """
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    if found is None:
        raise Failed(f"there is no {name}")
    return found


def have(*command: str) -> str:
    """Runs a program of the system's to its end; what it prints.

    :raises Failed: it says that it failed.
    """
    done = subprocess.run(
        [tool(command[0]), *command[1:]], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if done.returncode != 0:
        why = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise Failed(f"`{' '.join(command)}` failed: {why}")
    return done.stdout


class Link:
    """Two network namespaces, and a cable between them that loses packets."""

    def __init__(self, server: str, client: str) -> None:
        self.server = server
        self.client = client
        self._both = (server, client)

    @classmethod
    @contextmanager
    def made(cls) -> Iterator[Link]:
        """One, which is gone when the block ends.

        :raises Skipped: it cannot be made.
        """
        link = cls(f"pf-lossy-{os.getpid()}-server", f"pf-lossy-{os.getpid()}-client")
        try:
            try:
                link._make()
            except Failed as why:
                raise Skipped(str(why)) from None
            yield link
        finally:
            for name in link._both:
                # It goes when the last process in it has ended, and the cable with it.
                with suppress(Failed):
                    have("ip", "netns", "delete", name)

    def _make(self) -> None:
        for name in self._both:
            have("ip", "netns", "add", name)
        have("ip", "link", "add", "link0", "netns", self.server, "type", "veth", "peer", "link0", "netns", self.client)
        for name, address in zip(self._both, (SERVER, CLIENT), strict=True):
            have("ip", "-n", name, "address", "add", f"{address}/24", "dev", "link0")
            # A large write is as many packets as it is on a wire, each of which may be lost.
            have("ip", "-n", name, "link", "set", "dev", "link0", "gso_max_segs", "1", "up")
        # Packets that are to be lost are refused here already, where they cannot be.
        self.lose(50)
        self.lose(0)

    def inside(self, name: str, *command: str) -> list[str]:
        """The command that runs another in one of the namespaces, in the same process."""
        return [tool("ip"), "netns", "exec", name, *command]

    def lose(self, percent: float) -> None:
        """Loses so many packets of a hundred from now on, in each direction, and counts anew."""
        for name in self._both:
            rules = ("ip", "netns", "exec", name, tool("iptables"), "--wait")
            have(*rules, "--flush", "INPUT")
            if percent:
                chance = f"{percent / 100:.6f}"
                match = ("--match", "statistic", "--mode", "random", "--probability", chance)
                have(*rules, "--append", "INPUT", "--in-interface", "link0", *match, "--jump", "DROP")
            have(*rules, "--append", "INPUT", "--in-interface", "link0", "--jump", "ACCEPT")

    def counted(self) -> tuple[int, int]:
        """How many packets were lost since `lose`, and how many were sent."""
        found: Counter[str] = Counter()
        for name in self._both:
            listed = have("ip", "netns", "exec", name, tool("iptables"), "--wait", "-nvxL", "INPUT")
            for packets, what in re.findall(r"^ *(\d+) +\d+ +(DROP|ACCEPT) ", listed, flags=re.MULTILINE):
                found[what] += int(packets)
        return found["DROP"], found.total()


def environment() -> dict[str, str]:
    """For the processes: this checkout and this module are on their import path."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PROTOFRAME_")}
    paths = [str(TOOLS.parent), str(TOOLS), variables.get("PYTHONPATH", "")]
    return variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NO_COLOR": "1"}


def end(process: subprocess.Popen[Any]) -> int:
    """Ends a process that this one started; its exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


class Server:
    """A ``twistd`` that runs in one of the namespaces."""

    def __init__(self, directory: Path, process: subprocess.Popen[Any]) -> None:
        self.beside = f"unix:{directory / 'socket'}"
        self.log = directory / "log"
        self.process = process

    @classmethod
    @contextmanager
    def running(cls, link: Link, directory: Path) -> Iterator[Server]:
        """One that listens everywhere, and has ended when the block has.

        :raises Failed: it does not come to listen.
        """
        places = [f"{kind}:{PORT}:interface={SERVER}" for kind in ("tcp", "udp")] + [f"unix:{directory / 'socket'}"]
        command = [
            *(str(Path(sys.executable).with_name("twistd")), "--nodaemon", "--pidfile="),
            *("--logfile", str(directory / "log"), "pf-serve", "--drain", "5", "--protocol", "lossy_calls:Counting"),
            *(part for place in places for part in ("--listen", place)),
        ]
        (directory / "log").touch()
        with (directory / "errors").open("wb") as errors:
            process = subprocess.Popen(
                link.inside(link.server, *command),
                cwd=directory,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        server = cls(directory, process)
        try:
            limit = time.monotonic() + PATIENCE
            while server.log.read_text(errors="replace").count("serving ") < len(places):
                if process.poll() is not None or time.monotonic() > limit:
                    said = (directory / "errors").read_text(errors="replace").strip()
                    raise Failed(f"the server does not listen: {said or server.log.read_text()}")
                time.sleep(0.02)
            yield server
        finally:
            end(process)

    def repeated(self) -> int:
        """How many of all calls it has run more than once."""
        command = [sys.executable, "-m", "protoframe.cli", "call", self.beside, "Counting.repeated"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False)
        if done.returncode != 0:
            raise Failed(done.stderr.strip())
        return int(done.stdout)


class Runs:
    """The runs over a link, one after another, and what is found."""

    def __init__(self, link: Link, server: Server) -> None:
        self._link = link
        self._server = server
        self.rows: list[Row] = []
        self.broken: list[str] = []
        self.compared: dict[str, Any] | None = None

    def say(self, text: str, *, holds: bool) -> None:
        """Prints a result, and keeps it for the end where it is a bad one."""
        print(text, flush=True)
        if not holds:
            self.broken.append(text)

    def calls(self, transport: str, loss: float, calls: int) -> None:
        """Calls over a few connections, some of which take a while to be run."""
        in_time = loss <= ALL_ANSWERED
        self._run(f"{transport}, {loss:g} %", transport, loss, calls, 16, connections=4, pause=PAUSE, in_time=in_time)

    def _run(
        self,
        name: str,
        transport: str,
        loss: float,
        calls: int,
        at_once: int,
        *,
        connections: int,
        pause: float,
        in_time: bool,
    ) -> Row:
        """Has a client make calls over the link that loses so many percent of the packets each way."""
        task = Task(
            where=f"{transport}:{SERVER}:{PORT}",
            beside=self._server.beside,
            run=f"{len(self.rows)}",
            calls=calls,
            at_once=at_once,
            connections=connections,
            pause=pause,
        )
        if self._server.process.poll() is not None:
            raise Failed(f"the server ended with {self._server.process.returncode}")
        self._link.lose(loss)
        outcome, faults = self._client(task)
        dropped, packets = self._link.counted()
        self._link.lose(0)
        faults = faults or faults_of(outcome, calls, in_time=in_time)
        row = Row(name, outcome, dropped, packets, faults + loss_fault(dropped, packets, loss))
        self.rows.append(row)
        self.say(row.line, holds=not row.faults)
        return row

    def _client(self, task: Task) -> tuple[Outcome, list[str]]:
        command = [sys.executable, str(TOOLS / "lossy_calls.py"), json.dumps(dataclasses.asdict(task))]
        process = subprocess.Popen(
            self._link.inside(self._link.client, *command),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            output, errors = process.communicate(timeout=task.longest)
        except subprocess.TimeoutExpired:
            return Outcome(), [f"it had not ended after {task.longest:,.0f} s"]
        finally:
            end(process)
        if process.returncode != 0:
            why = (errors.strip() or "it said nothing").splitlines()[-1]
            return Outcome(), [f"the client ended with {process.returncode}: {why}"]
        outcome = Outcome(**json.loads(output))
        outcome.failed = Counter(outcome.failed)
        return outcome, []

    def compare(self, rounds: int, calls: int) -> None:
        """Small calls, 64 in flight on one connection, over UDP and over TCP by turns."""
        rows: dict[str, list[Row]] = {"udp": [], "tcp": []}
        for round_ in range(rounds):
            for transport in ("udp", "tcp") if round_ % 2 == 0 else ("tcp", "udp"):
                name = f"{transport}, {COMPARED_AT} %, 64 in flight, round {round_ + 1}"
                # How long TCP takes is what is measured.
                in_time = transport == "udp"
                row = self._run(name, transport, COMPARED_AT, calls, 64, connections=1, pause=0.0, in_time=in_time)
                rows[transport].append(row)
        pairs = zip(rows["udp"], rows["tcp"], strict=True)
        ratios = [udp.outcome.percentile(99) / tcp.outcome.percentile(99) for udp, tcp in pairs]
        medians = {kind: statistics.median(row.outcome.percentile(99) for row in rows[kind]) for kind in rows}
        ratio = statistics.median(ratios)
        is_judged = rounds >= ENOUGH_ROUNDS
        holds = ratio <= MOST_OF_TCP
        self.compared = {
            "loss": COMPARED_AT,
            "congestion_control": congestion_control(),
            "rounds": rounds,
            "percentiles": medians,
            "ratio": {"median": ratio, "least": min(ratios), "most": max(ratios)},
            "most": MOST_OF_TCP,
            "holds": holds if is_judged else None,
        }
        self.say(
            f"99th percentile at {COMPARED_AT} % lost each way, 64 in flight: UDP {medians['udp']:,.1f} ms, "
            f"TCP ({congestion_control()}) {medians['tcp']:,.1f} ms, UDP / TCP {ratio:.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}; at most {MOST_OF_TCP} is asked for): "
            + (("holds" if holds else "does not hold") if is_judged else f"not judged below {ENOUGH_ROUNDS} rounds"),
            holds=holds or not is_judged,
        )

    def finish(self) -> None:
        """Looks at the server once more, ends it, and prints the table."""
        repeated = self._server.repeated()
        verdict = "holds" if not repeated else "does not hold"
        self.say(f"at the end {repeated:,} of all calls were run more than once: {verdict}", holds=not repeated)
        status = end(self._server.process)
        tracebacks = self._server.log.read_text(errors="replace").count("Traceback")
        holds = status == 0 and not tracebacks
        self.say(
            f"the server ended with {status}, and {tracebacks} tracebacks are in its log: "
            + ("holds" if holds else "does not hold"),
            holds=holds,
        )
        table = [Row.HEAD, *(row.cells for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print()
        for first, *cells, last in table:
            middle = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True))
            print(f"{first.ljust(widths[0])}  {middle}  {last}".rstrip())
        print()
        print("\n".join(["does not hold:", *self.broken]) if self.broken else "all holds")

    def write(self, path: Path) -> None:
        """Writes the same as JSON."""
        found = {"rows": [row.record for row in self.rows], "compared": self.compared, "broken": self.broken}
        path.write_text(json.dumps(found, indent=1) + "\n")


def congestion_control() -> str:
    """What TCP uses in new namespaces."""
    with suppress(OSError):
        return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return "of an unknown kind"


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def give_up(number: int, _: Any) -> None:
    """Ends everything, once: what clears away is not to be interrupted."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def percent(text: str) -> float:
    """A percentage of packets, from the command line."""
    number = float(text)
    if not 0 <= number <= 90:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 90")
    return number


def count(least: int) -> Callable[[str], int]:
    """How a number from the command line is read."""

    def read(text: str) -> int:
        number = int(text)
        if not least <= number <= 100_000:
            raise argparse.ArgumentTypeError(f"{text} is not within {least} and 100,000")
        return number

    return read


def main() -> int:
    """Runs everything; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=count(1), help="at each loss: 1000")
    parser.add_argument("--loss", type=percent, nargs="+", metavar="PERCENT", help="lost each way: 1 5 10 30 50")
    parser.add_argument("--transport", choices=["udp", "tcp"], nargs="+", default=["udp"], help="of the calls: udp")
    parser.add_argument("--rounds", type=count(0), help="of UDP beside TCP, 0 for none: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what is found is written there too")
    parser.add_argument("--quick", action="store_true", help="100 calls at 10 and 50 %%, and 1 round")
    options = parser.parse_args()
    quick = options.quick
    calls = options.calls or (100 if quick else 1000)
    losses = options.loss or ([10.0, 50.0] if quick else [1.0, 5.0, 10.0, 30.0, 50.0])
    rounds = options.rounds if options.rounds is not None else (1 if quick else 5)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, give_up)
    try:
        with tempfile.TemporaryDirectory(prefix="protoframe-lossy-") as directory, Link.made() as link:
            with Server.running(link, Path(directory)) as server:
                runs = Runs(link, server)
                for transport in options.transport:
                    for loss in losses:
                        runs.calls(transport, loss, calls)
                if rounds:
                    runs.compare(rounds, 640 if quick else 6400)
                runs.finish()
            if options.json:
                runs.write(options.json)
            return 1 if runs.broken else 0
    except Skipped as why:
        print(f"skipped: {why}")
        return SKIPPED
    except Failed as why:
        print(f"lossy: {why}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
