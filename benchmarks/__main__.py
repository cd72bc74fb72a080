"""The command line: `python -m benchmarks`, from the root of the repository.

Knows the options, and in which order things are run and shown.  The servers and clients that it starts are this module
too: ``serve PEER`` and ``take PEER WORKLOAD COUNT PORT SERVER``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks import loss, machine, report, results
from benchmarks.connections import raise_limit
from benchmarks.peers import PEERS
from benchmarks.progress import Progress
from benchmarks.runner import ROOT, Failed, Runner, jobs_of
from benchmarks.workloads import ASKED, WORKLOADS, Kind

ROUNDS, QUICK_SCALE = 5, 0.05


def serve(peer: str) -> None:
    """What a server's process does."""
    raise_limit()
    PEERS[peer].load().serve()


def take(peer: str, name: str, count: str, port: str, server: str) -> None:
    """What a client's process does: it prints its figure."""
    from benchmarks import starts
    from benchmarks.loads import Task

    raise_limit()
    workload = next(workload for workload in WORKLOADS if workload.name == name)
    if workload.kind is Kind.START:
        print(starts.take(peer, int(count)))
    else:
        print(PEERS[peer].load().take(Task(workload, int(count), int(server)), int(port)))


def above_zero(text: str) -> float:
    """A number from the command line."""
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def whole(text: str) -> int:
    """A whole number from the command line."""
    number = int(text)
    if not 1 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not within 1 and 1,000")
    return number


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures protoframe beside its peers; prints a table, and writes JSON, a page and a figure.",
    )
    parser.add_argument("--rounds", type=whole, metavar="N", help=f"of all workloads: {ROUNDS}")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="workloads that have it in their name"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="these peers alone")
    parser.add_argument("--scale", type=above_zero, metavar="X", help="how many times as much as usual each does")
    parser.add_argument("--quick", action="store_true", help=f"one round, and {QUICK_SCALE:g} of what is usual")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where all figures are written: build/benchmarks.json"
    )
    parser.add_argument(
        "--docs",
        action=argparse.BooleanOptionalAction,
        help="write docs/benchmarks.md and docs/benchmarks.png; done where all is measured",
    )
    parser.add_argument("--show", type=Path, metavar="PATH", help="measure nothing, and show what is in such a JSON")
    parser.add_argument("--list", action="store_true", help="the workloads, and the peers that do each")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")
    options = parser.parse_args(arguments)
    names = {name for workload in WORKLOADS for name in workload.counts}
    for name in options.peer:
        if name not in names:
            parser.error(f"there is no peer {name!r}; there are {', '.join(sorted(names))}")
    for text in options.only:
        if not any(text.lower() in name for name in [loss.NAME, *(workload.name.lower() for workload in WORKLOADS)]):
            parser.error(f"no workload has {text!r} in its name; see --list")
    return options


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything that is asked for; what is found."""
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    scale = options.scale or (QUICK_SCALE if options.quick else 1.0)
    jobs, left_out = jobs_of(WORKLOADS, options.only, options.peer, scale)
    has_loss = not options.peer and (not options.only or any(text.lower() in loss.NAME for text in options.only))

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr)

    for line in left_out:
        say(line)
    load = machine.load()
    began = datetime.datetime.now(datetime.UTC)
    progress = Progress(len(jobs) * rounds + has_loss, is_shown=not options.quiet)
    runner = Runner(jobs, rounds, progress)
    runner.run()
    under_loss = None
    if has_loss:
        progress.begin(loss.NAME, loss.NAME)
        try:
            under_loss = loss.measure(rounds, is_quick=scale < 1)
        except Failed as why:
            left_out.append(f"{loss.NAME}: {why}")
            say(left_out[-1])
        finally:
            progress.clear()
    for line in (*runner.left_out, *runner.notes):
        say(line)
    return {
        "format": 1,
        "began": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.UTC) - began).total_seconds()),
        "rounds": rounds,
        "scale": scale,
        "machine": machine.describe() | {"load": load},
        "versions": machine.versions(),
        "left_out": left_out + runner.left_out,
        "failed": sorted(runner.failed),
        "notes": runner.notes,
        "workloads": [
            results.summary(workload, runner.figures[workload.name])
            for workload in WORKLOADS
            if runner.figures.get(workload.name)
        ],
        "asked": results.asked_of(ASKED, runner.figures),
        "loss": under_loss,
    }


def stop(number: int, _: Any) -> None:
    """Ends everything in order."""
    sys.exit(128 + number)


def main(arguments: list[str]) -> int:
    """Does what is asked; the exit status, which is 1 where something of protoframe itself could not be measured."""
    if arguments[:1] == ["serve"]:
        serve(*arguments[1:])
        return 0
    if arguments[:1] == ["take"]:
        take(*arguments[1:])
        return 0
    options = parsed(arguments)
    if options.list:
        for workload in WORKLOADS:
            print(f"{workload.name} ({workload.unit}): {', '.join(workload.counts)}")
        print(loss.NAME)
        return 0
    if options.show:
        found = json.loads(options.show.read_text())
    else:
        signal.signal(signal.SIGTERM, stop)
        try:
            found = measured(options)
        except KeyboardInterrupt:
            return 130
        path = options.json or ROOT / "build" / "benchmarks.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(report.table(found), end="")
    is_whole = not (options.only or options.peer or options.quick or options.show)
    if options.docs if options.docs is not None else is_whole:
        report.write_page(found, ROOT / "docs")
    # That others cannot do some of it is a finding.
    return 1 if any(peer.startswith("protoframe") for peer in found.get("failed", ())) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
