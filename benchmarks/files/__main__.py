"""The command line: `python -m benchmarks.files`, from the root of the repository.

Knows the options, and in which order things are run and shown.  The clients of protoframe that it starts are this
module too: ``take WAY LOCAL REMOTE WHERE DIGEST``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, results
from benchmarks.__main__ import INTERRUPTED, STOPPING, above_zero, stop, unwritable, whole
from benchmarks.files import report
from benchmarks.files.client import take
from benchmarks.files.peers import COPIERS, version
from benchmarks.files.runner import CopyRunner
from benchmarks.files.workloads import ASKED, WORKLOADS
from benchmarks.progress import Progress
from benchmarks.queues import disk
from benchmarks.runner import ROOT, Failed, jobs_of
from protoframe.files._small import _native

ROUNDS, QUICK_SCALE = 5, 0.1
#: What the speed of the disk is measured with.
_WRITTEN = 256 << 20


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.files",
        description="Measures pf-files beside an rsync daemon and scp; prints a table, writes JSON.",
    )
    parser.add_argument("--rounds", type=whole, metavar="N", help=f"of all workloads: {ROUNDS}")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="workloads with it in their name")
    parser.add_argument("--peer", action="append", default=[], choices=list(COPIERS), help="these programs alone")
    parser.add_argument("--scale", type=above_zero, metavar="X", help="how many times as much as usual is copied")
    parser.add_argument("--quick", action="store_true", help=f"one round, and {QUICK_SCALE:g} of what is usual")
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(),
        help="where everything is copied, in a directory that is gone at the end: here",
    )
    parser.add_argument("--warm", action="store_true", help="use much memory, and give it back, before each copy")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where figures go: build/files-benchmarks.json")
    parser.add_argument("--docs", action="store_true", help=f"write docs/{report.PAGE}")
    parser.add_argument("--check", action="store_true", help="exit with 1 where what is asked for does not hold")
    parser.add_argument("--list", action="store_true", help="the workloads, and the programs of each")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")
    options = parser.parse_args(arguments)
    options.json = options.json or ROOT / "build" / "files-benchmarks.json"
    for text in options.only:
        if not any(text.lower() in workload.name.lower() for workload in WORKLOADS):
            parser.error(f"no workload has {text!r} in its name; see --list")
    if not options.dir.is_dir():
        parser.error(f"--dir: {options.dir} is no directory")
    why = None if options.list else unwritable(options.json)
    if why:
        parser.error(f"{options.json} cannot be written: {why}")
    return options


def _write_speed(directory: Path, size: int) -> float:
    """MB/s of a file that is written, and then made durable."""
    path, octets = directory / "speed", os.urandom(1 << 20)
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(max(1, size >> 20)):
            file.write(octets)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return max(1 << 20, size) / 1e6 / took


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything that is asked for; what is found, which is all until then where Ctrl-C ends it."""
    with tempfile.TemporaryDirectory(prefix="files-benchmarks-", dir=options.dir.resolve()) as directory:
        return _measured(options, Path(directory))


def _measured(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    scale = options.scale or (QUICK_SCALE if options.quick else 1.0)

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr)

    file_system = disk.file_system(directory)
    jobs, left_out = jobs_of(WORKLOADS, options.only, options.peer, scale, COPIERS)
    if file_system in disk.WITHOUT_DISK:
        left_out.append(f"The directory is on {file_system}, which is memory: nothing here was durable.")
    if options.warm:
        left_out.append("This is with `--warm`: memory that was just in use was there for each copy.")
    if _native is None:
        left_out.append("The compiled part of protoframe was not built: trees are copied slower than they could be.")
    for line in left_out:
        say(line)
    programs = dict.fromkeys(program for peer in COPIERS.values() for program, _ in peer.programs if program != "scp")
    versions = machine.versions(COPIERS) | {name: found for name in programs if (found := version(name))}
    load = machine.load()
    speed = {
        "file_system": file_system,
        "fsync": disk.fsync_milliseconds(directory),
        "write": _write_speed(directory, round(_WRITTEN * min(1, scale))),
    }
    began = datetime.datetime.now(datetime.UTC)
    progress = Progress(len(jobs) * rounds, is_shown=not options.quiet)
    runner = CopyRunner(jobs, rounds, progress, directory, is_warm=options.warm)
    is_interrupted = False
    try:
        runner.run()
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
    names = [job.workload.name for job in jobs]
    return {
        "format": 1,
        "interrupted": is_interrupted,
        "began": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.UTC) - began).total_seconds()),
        "rounds": rounds,
        "scale": scale,
        "machine": machine.describe() | {"load": load},
        "versions": versions,
        "disk": speed,
        "left_out": left_out + runner.left_out,
        "failed": sorted(runner.failed),
        "notes": runner.notes,
        "workloads": [
            results.summary(workload, figures[workload.name]) for workload in WORKLOADS if workload.name in figures
        ],
        "memory": runner.memory,
        "asked": results.asked_of([asked for asked in ASKED if asked.workload in names], figures),
    }


def main(arguments: list[str]) -> int:
    """Does what is asked; the exit status."""
    if arguments[:1] == ["take"]:
        take(*arguments[1:])
        return 0
    options = parsed(arguments)
    if options.list:
        for workload in WORKLOADS:
            print(f"{workload.name} ({workload.unit}): {', '.join(workload.counts)}")
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
