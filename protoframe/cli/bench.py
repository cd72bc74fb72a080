"""``pf bench``: calls a method over and over, and says how long the answers take.

Knows what is asked for on the command line, and in which order a measurement goes; not how load is made
(`protoframe.cli.loops`).
"""

from __future__ import annotations

import gc
import math
import re
from typing import TYPE_CHECKING, Any

import click

from protoframe.cli.arguments import Argument, open_file, parse_arguments
from protoframe.cli.completing import complete_argument, complete_method, complete_where
from protoframe.cli.options import Settings, check_method, check_seconds, check_where, shared
from protoframe.cli.problems import FAILURE, STATUSES, THRESHOLD, USAGE, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.defer import Deferred

    from protoframe.cli.connections import Connections
    from protoframe.cli.loops import Loop, Plan
    from protoframe.cli.running import Target
    from protoframe.cli.thresholds import Threshold

__all__ = ["bench"]

#: Calls on the way at once in an open loop, where nobody says how many.
_OPEN_CONCURRENCY = 1024
#: Seconds, where nobody says how many.
_DURATION = 10.0
_LONGEST_WARMUP = 1.0
#: More are not sent at once by a connection, see `Limits.max_waiting`.
_MOST = 65536
_MOST_CONNECTIONS = 1000

_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h|)")


def _check_rate(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0.001 <= value <= 1e6:
        raise click.BadParameter(f"expected 0.001 to 1000000 calls a second, got {value:g}", context, parameter)
    return value


def _check_time(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A number of seconds, or one with a unit; in seconds."""
    if value is None:
        return None
    match = _TIME.fullmatch(value.strip())
    if match is None:
        raise click.BadParameter(f"expected a time such as 10, 10s, 500ms or 2m, got {value!r}", context, parameter)
    return check_seconds(context, parameter, float(match[1]) * _UNITS[match[2]])


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("method", metavar="PROTOCOL.METHOD", callback=check_method, shell_complete=complete_method)
@click.argument("arguments", metavar="[k=v | k:=json | k@file]...", nargs=-1, shell_complete=complete_argument)
@click.option(
    "--rate",
    "-r",
    type=float,
    callback=_check_rate,
    metavar="N",
    help="Calls a second, by a timetable (an open loop).  Without it, calls wait for answers (a closed loop).",
)
@click.option(
    "--concurrency",
    "-c",
    type=click.IntRange(1, _MOST),
    metavar="N",
    help=f"Calls on the way at once, at most.  [default: 1; with --rate {_OPEN_CONCURRENCY}]",
)
@click.option(
    "--connections",
    type=click.IntRange(1, _MOST_CONNECTIONS),
    metavar="N",
    default=1,
    show_default=True,
    help="Calls go over this many in turn.",
)
@click.option(
    "--duration",
    "-d",
    callback=_check_time,
    metavar="TIME",
    help="For how long calls are sent and counted: 10, 10s, 500ms, 2m.  [default: 10s; with --requests, no end]",
)
@click.option("--requests", "-n", type=click.IntRange(1), metavar="N", help="Ends after so many calls.")
@click.option(
    "--warmup",
    callback=_check_time,
    metavar="TIME",
    help="Before that, and not counted.  [default: a tenth of --duration, 1s at most; with --requests 0]",
)
@click.option(
    "--fail-if",
    "expressions",
    multiple=True,
    metavar="THRESHOLD",
    help="What must hold, such as 'p99<20ms': exits with 99 if it does NOT.  May be given several times.",
)
@shared
def bench(
    where: str,
    method: str,
    arguments: tuple[str, ...],
    rate: float | None,
    concurrency: int | None,
    connections: int,
    duration: float | None,
    requests: int | None,
    warmup: float | None,
    expressions: tuple[str, ...],
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Call a method over and over, and say how many answers a second there are, and how long they take.

    With --rate, calls are due by a timetable, whatever becomes of those before, and their latency counts from when they
    were due (so there is no coordinated omission); "service" counts from when they were sent.  Without it, each of
    --concurrency callers sends its next call when it has an answer.

    --fail-if takes a threshold that must hold, as those of k6: 'p99<20ms' is what is wanted, and pf fails where p99 is
    20 ms or more.  There are min, mean, max and p1 to p99.9, with us, ms or s; rate (answers a second); errors and
    unsent (calls); error-rate, as a fraction or with %.  They are compared by <, <=, > or >=.

    Each call may take --timeout, a stream as a whole.  Errors are counted, and do not end it, but for the very first
    call's.  Arguments are as in pf call, and are read once.

    \b
    Examples:
      pf bench tcp:127.0.0.1:12000 Speech.upper text=hello -c 8 -d 5s
      pf bench udp:127.0.0.1:12000 Speech.upper text=hello --rate 1000 \\
        --fail-if 'p99<20ms' --fail-if 'error-rate<0.1%'
    """
    from protoframe.cli.thresholds import parse_threshold

    given = parse_arguments(arguments)
    thresholds = [parse_threshold(one) for one in expressions]
    if duration == 0:
        raise Problem("--duration is 0", USAGE, "--duration 1s")
    for argument in given:
        open_file(argument)

    from protoframe.cli.loops import Plan
    from protoframe.cli.running import Target, read_token

    settings = Settings(timeout, json, quiet, read_token(token_file))
    if duration is None:
        duration = _DURATION if requests is None else math.inf
    if warmup is None:
        warmup = min(_LONGEST_WARMUP, duration / 10) if requests is None else 0.0
    if concurrency is None:
        concurrency = 1 if rate is None else _OPEN_CONCURRENCY
    plan = Plan(concurrency, duration, requests, warmup, rate)
    _Bench(Target(where, method), settings, plan, given, connections).run(thresholds)


class _Bench:
    """A measurement."""

    def __init__(self, target: Target, settings: Settings, plan: Plan, given: list[Argument], connections: int) -> None:
        from protoframe.cli.bench_report import Bar

        self._target = target
        self._settings = settings
        self._plan = plan
        self._given = given
        self._count = connections
        self._bar = Bar(target, settings, plan)
        self._loop: Loop | None = None
        self._streams = False

    def run(self, thresholds: list[Threshold]) -> None:
        """Measures, and says what came of it, also where it is interrupted.

        :raises Problem: a threshold does not hold, or nothing was answered.
        """
        from protoframe.cli.bench_report import Report
        from protoframe.cli.running import run

        def report() -> Report | None:
            loop = self._loop
            if loop is None or not (loop.sent or loop.unsent):
                return None
            return Report(self._target, self._plan, self._count, loop, thresholds, self._streams)

        try:
            run(self._session, self._target, self._settings, self._bar)
        except KeyboardInterrupt:
            if (measured := report()) is not None:
                measured.write(as_json=self._settings.json)
            raise
        if (measured := report()) is None:
            raise self._target.problem("no call was counted", USAGE, "a longer --duration, or a shorter --warmup")
        measured.write(as_json=self._settings.json)
        # First, for what could not be measured does not hold: a server that answers nothing breaks its promise too.
        if broken := measured.broken():
            raise self._target.problem(broken, THRESHOLD)
        if not measured.loop.answered:
            raise self._nothing_answered(measured.loop)

    async def _session(self, reactor: Any) -> None:
        from protoframe.cli.connections import Connections
        from protoframe.cli.loops import ClosedLoop, OpenLoop

        connections = Connections(reactor, self._target, self._settings, self._count)
        try:
            await connections.open()
            call = await self._caller(connections)
            # A collection of all that was imported would take longer than many a call.
            gc.collect()
            gc.freeze()
            kind = ClosedLoop if self._plan.rate is None else OpenLoop
            loop = self._loop = kind(reactor, call, self._plan)
            self._bar.follow(loop)
            loop.start()
            await loop.done
        finally:
            if self._loop is not None:
                self._loop.stop()
            await connections.close()

    async def _caller(self, connections: Connections) -> Callable[[], Deferred[Any]]:
        """What makes a call."""
        from protoframe.cli.methods import find_method

        method = await find_method(connections.first, self._target.what)
        hint = f"another method: {self._target.command('list')}"
        if method.sent_streams:
            (name,) = method.sent_streams
            raise self._target.problem(f"it takes a stream ({name}), and pf bench sends none", USAGE, hint)
        if method.description is not None and method.description.oneway:
            raise self._target.problem("it gives no answer (oneway), so there is nothing to measure", USAGE, hint)
        self._streams = method.streams
        arguments = await method.compose(self._given)
        # One that is not described may answer with either.
        return connections.caller(self._target.what, arguments, streams=method.streams or not method.is_described)

    def _nothing_answered(self, loop: Loop) -> Problem:
        """Why: what went wrong most often, or that the calls did not get their turn."""
        from protoframe.cli.running import not_opened, refused
        from protoframe.errors import ConnectFailed, Error

        if not loop.errors:
            hint = "a lower --rate, or a higher --concurrency"
            return self._target.problem(f"nothing was answered, and {loop.unsent} calls had to wait", FAILURE, hint)
        error = max(loop.errors.values(), key=lambda one: one.count).first
        if isinstance(error, ConnectFailed):
            return not_opened(error, self._target, self._settings)
        if isinstance(error, Error):
            return refused(error, self._target, self._settings)
        return self._target.problem(f"{type(error).__name__}: {error}", FAILURE)
