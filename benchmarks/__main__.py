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
from benchmarks.runner import ROOT, SIGNALS, Failed, Runner, is_chosen, jobs_of
from benchmarks.workloads import ASKED, WORKLOADS, Asked, Kind

ROUNDS, QUICK_SCALE = 5, 0.05

#: Signals that end a run.
STOPPING = [signal.SIGTERM, signal.SIGHUP]
#: Of what is written as JSON.
FORMAT = 1
#: The exit status of a usage error, and after Ctrl-C.
USAGE, INTERRUPTED = 2, 130


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
    options.json = options.json or ROOT / "build" / "benchmarks.json"
    if not (options.list or options.show):
        if not (any(jobs_of(WORKLOADS, options.only, options.peer, 1.0)) or loss_is_chosen(options)):
            parser.error("none of these peers does any of these workloads; see --list")
        why = unwritable(options.json)
        if why:
            parser.error(f"{options.json} cannot be written: {why}")
    return options


def loss_is_chosen(options: argparse.Namespace) -> bool:
    """Whether calls under loss are asked for, which have no peers."""
    return not options.peer and is_chosen(loss.NAME, options.only)


def unwritable(path: Path) -> str | None:
    """Why a file cannot be written, if it cannot; its directory is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as why:
        return why.strerror
    return None


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything that is asked for; what is found, which is all until then where Ctrl-C ends it."""
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    scale = options.scale or (QUICK_SCALE if options.quick else 1.0)
    jobs, left_out = jobs_of(WORKLOADS, options.only, options.peer, scale)
    has_loss = loss_is_chosen(options)

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr)

    for line in left_out:
        say(line)
    load = machine.load()
    began = datetime.datetime.now(datetime.UTC)
    progress = Progress(len(jobs) * rounds + has_loss, is_shown=not options.quiet)
    runner = Runner(jobs, rounds, progress)
    under_loss = None
    is_interrupted = False
    try:
        runner.run()
        if has_loss:
            progress.begin(loss.NAME, loss.NAME)
            under_loss = loss.measure(rounds, is_quick=scale < 1)
    except Failed as why:
        left_out.append(f"{loss.NAME}: {why}")
        say(left_out[-1])
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        progress.clear()
    for line in (*runner.left_out, *runner.notes):
        say(line)
    figures = runner.figures
    return {
        "format": FORMAT,
        "interrupted": is_interrupted,
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
            results.summary(workload, figures[workload.name]) for workload in WORKLOADS if workload.name in figures
        ],
        "asked": results.asked_of([each for each in ASKED if is_asked(each, options)], figures),
        "loss": under_loss,
    }


def is_asked(asked: Asked, options: argparse.Namespace) -> bool:
    """Whether all that it is about was to be measured."""
    peers = {asked.ours, asked.theirs or asked.ours}
    return is_chosen(asked.workload, options.only) and (not options.peer or peers <= set(options.peer))


def shown(path: Path) -> dict[str, Any]:
    """What is in a JSON that was written before; ends the process where it is none of these."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        report.table(found)
    except OSError as why:
        reason = why.strerror
    except (AttributeError, KeyError, TypeError, ValueError):
        reason = "it is not what a run has written"
    else:
        return found
    print(f"{path} cannot be shown: {reason}", file=sys.stderr)
    sys.exit(USAGE)


def stop(number: int, _: Any) -> None:
    """Ends everything in order, which a signal that comes after it does not hinder."""
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main(arguments: list[str]) -> int:
    """Does what is asked; the exit status, which is 1 where something of protoframe itself could not be measured."""
    if arguments[:1] in (["serve"], ["take"]):
        # Whoever started it has blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
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
        found = shown(options.show)
    else:
        for each in STOPPING:
            # What is ignored from the start, as by nohup, stays so.
            if signal.getsignal(each) is not signal.SIG_IGN:
                signal.signal(each, stop)
        found = measured(options)
    print(report.table(found), end="", flush=True)
    if not options.show:
        try:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as why:
            print(f"{options.json} is not written: {why.strerror}", file=sys.stderr)
            return 1
    if found.get("interrupted"):
        return INTERRUPTED
    is_whole = not (options.only or options.peer or options.quick or options.show)
    if options.docs if options.docs is not None else is_whole:
        report.write_page(found, ROOT / "docs")
    # That others cannot do some of it is a finding.
    return 1 if any(peer.startswith("protoframe") for peer in found.get("failed", ())) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
