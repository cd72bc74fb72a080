"""The command line: `python -m benchmarks.queues`, from the root of the repository.

Knows the options, and in which order things are run and shown.  The clients that it starts are this module too: ``take
PEER WORKLOAD COUNT PORT SERVER``, and ``depth DEPTH MEASURED PORT SERVER DIRECTORY``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine, results
from benchmarks.__main__ import INTERRUPTED, STOPPING, above_zero, stop, unwritable, whole
from benchmarks.progress import Progress
from benchmarks.queues import depths, disk, report, servers
from benchmarks.queues.peers import QUEUES
from benchmarks.queues.runner import QueueRunner, asked_of
from benchmarks.queues.workloads import BODY, DEPTHS, WORKLOADS
from benchmarks.runner import ROOT, SIGNALS, Failed, is_chosen, jobs_of

ROUNDS, QUICK_SCALE = 5, 0.1
NATS = "NATS JetStream"
C_CLIENT, C_COUNT = "redis-benchmark", 50_000


def take(peer: str, name: str, count: str, port: str, server: str) -> None:
    """What a client's process does: it prints its figure."""
    from benchmarks.loads import Task

    workload = next(workload for workload in WORKLOADS if workload.name == name)
    print(QUEUES[peer].load().take(Task(workload, int(count), int(server)), int(port)))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.queues",
        description="Measures pf-queue beside RabbitMQ, NATS JetStream and Redis streams; prints a table, writes JSON.",
    )
    parser.add_argument("--rounds", type=whole, metavar="N", help=f"of all workloads: {ROUNDS}")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="workloads with it in their name")
    parser.add_argument("--peer", action="append", default=[], choices=list(QUEUES), help="these queues alone")
    parser.add_argument("--scale", type=above_zero, metavar="X", help="how many times as much as usual each does")
    parser.add_argument("--depth", action="append", type=int, metavar="N", help=f"messages that wait: {DEPTHS}")
    parser.add_argument("--depth-rounds", type=whole, default=1, metavar="N", help="rounds of depths: 1")
    parser.add_argument("--quick", action="store_true", help=f"one round, and {QUICK_SCALE:g} of what is usual")
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="where servers have their directories, which are gone at the end: here"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where figures go: build/queue-benchmarks.json")
    parser.add_argument("--docs", action="store_true", help=f"write docs/{report.PAGE}")
    parser.add_argument("--check", action="store_true", help="exit with 1 where what is asked for does not hold")
    parser.add_argument("--list", action="store_true", help="the workloads, and the queues of each")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")
    options = parser.parse_args(arguments)
    options.json = options.json or ROOT / "build" / "queue-benchmarks.json"
    names = [depths.NAME, *(workload.name for workload in WORKLOADS)]
    for text in options.only:
        if not any(text.lower() in name for name in names):
            parser.error(f"no workload has {text!r} in its name; see --list")
    if any(depth < 1 for depth in options.depth or ()):
        parser.error("--depth: expected a number above 0")
    if not options.dir.is_dir():
        parser.error(f"--dir: {options.dir} is no directory")
    why = None if options.list else unwritable(options.json)
    if why:
        parser.error(f"{options.json} cannot be written: {why}")
    return options


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything that is asked for; what is found, which is all until then where Ctrl-C ends it."""
    with tempfile.TemporaryDirectory(prefix="queue-benchmarks-", dir=options.dir.resolve()) as directory:
        return _measured(options, Path(directory))


def _measured(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    scale = options.scale or (QUICK_SCALE if options.quick else 1.0)

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr)

    file_system = disk.file_system(directory)
    jobs, left_out = jobs_of(WORKLOADS, options.only, options.peer, scale, QUEUES)
    if file_system in disk.WITHOUT_DISK:
        left_out.append(f"The directory is on {file_system}, which is memory: nothing here was durable.")
    has_depth = is_chosen(depths.NAME, options.only) and (not options.peer or "protoframe" in options.peer)
    for line in left_out:
        say(line)
    versions = machine.versions(QUEUES)
    versions |= {name: found for name in servers.PROGRAMS if (found := servers.version(name))}
    load = machine.load()
    fsync = disk.fsync_milliseconds(directory)
    not_durable = [NATS] if any(job.peer == NATS for job in jobs) and not servers.nats_can_sync() else []
    began = datetime.datetime.now(datetime.UTC)
    progress = Progress(len(jobs) * rounds + has_depth, is_shown=not options.quiet)
    runner = QueueRunner(jobs, rounds, progress, directory)
    deep: list[dict[str, Any]] = []
    c_client = None
    is_interrupted = False
    try:
        runner.run()
        if any(job.peer.startswith("Redis") for job in jobs):
            c_client = _c_client(directory, scale)
        if has_depth:
            deep = depths.measure(
                options.depth or DEPTHS,
                options.depth_rounds,
                scale,
                directory,
                lambda text: progress.begin(depths.NAME, text),
            )
    except Failed as why:
        left_out.append(str(why))
        say(str(why))
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        runner.end()
    for line in (*runner.left_out, *runner.notes):
        say(line)
    figures = runner.figures
    return {
        "format": 1,
        "interrupted": is_interrupted,
        "began": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.UTC) - began).total_seconds()),
        "rounds": rounds,
        "scale": scale,
        "machine": machine.describe() | {"load": load},
        "versions": versions,
        "disk": {"file_system": file_system, "fsync": fsync},
        "not_durable": not_durable,
        "left_out": left_out + runner.left_out,
        "failed": sorted(runner.failed),
        "notes": runner.notes,
        "workloads": [
            results.summary(workload, figures[workload.name]) for workload in WORKLOADS if workload.name in figures
        ],
        "asked": asked_of(figures, not_durable, [job.workload.name for job in jobs]),
        "depths": deep,
        "c_client": c_client,
    }


def _c_client(directory: Path, scale: float) -> float | None:
    """What a client in C makes of Redis, where there is one."""
    program = shutil.which(C_CLIENT)
    if not program:
        return None
    server = servers.QueueServer("Redis", directory)
    try:
        done = subprocess.run(
            [
                *(program, "-p", str(server.port), "-c", "64", "-n", str(max(64, round(C_COUNT * min(1, scale))))),
                *("--csv", "XADD", "bench", "*", "body", "x" * len(BODY)),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        server.end()
    found = re.search(r'"XADD[^"]*","([\d.]+)"', done.stdout)
    return float(found[1]) if found else None


def main(arguments: list[str]) -> int:
    """Does what is asked; the exit status."""
    if arguments[:1] in (["take"], ["depth"]):
        # Whoever started it has blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if arguments[:1] == ["take"]:
        take(*arguments[1:])
        return 0
    if arguments[:1] == ["depth"]:
        *numbers, directory = arguments[1:]
        depth, count, port, server = map(int, numbers)
        print(json.dumps(depths.take(depth, count, port, server, directory)))
        return 0
    options = parsed(arguments)
    if options.list:
        for workload in WORKLOADS:
            print(f"{workload.name} ({workload.unit}): {', '.join(workload.counts)}")
        print(f"{depths.NAME}: protoframe")
        return 0
    for each in STOPPING:
        # What is ignored from the start, as by nohup, stays so.
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, stop)
    found = measured(options)
    print(report.table(found), end="", flush=True)
    try:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as why:
        print(f"{options.json} is not written: {why.strerror}", file=sys.stderr)
        return 1
    if found["interrupted"]:
        return INTERRUPTED
    if options.docs:
        report.write_page(found, ROOT / "docs")
    falls_short = options.check and not all(asked["holds"] for asked in found["asked"])
    return 1 if falls_short or "protoframe" in found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
