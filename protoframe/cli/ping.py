"""``pf ping``: how long a server takes for a sign of life.

Knows round trips and their summary.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click

from protoframe.cli.completing import complete_where
from protoframe.cli.options import Settings, check_seconds, check_where, shared
from protoframe.cli.output import write_json, write_text
from protoframe.cli.problems import STATUSES, clean

__all__ = ["ping"]

#: Pings; the times of all are kept.
_MOST = 1_000_000


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.option("--count", "-c", type=click.IntRange(1, _MOST), default=1, show_default=True, help="How often to ask.")
@click.option(
    "--interval",
    "-i",
    type=float,
    callback=check_seconds,
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="From an answer to the next question.",
)
@shared
def ping(where: str, count: int, interval: float, timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """Ask a server for a sign of life, over one connection, and print the round trips in milliseconds.

    --timeout holds for connecting and the first answer together, and for each answer after it.  --quiet prints the
    summary alone.  With --json, one object: where, sent, answered, milliseconds, min, mean, max, stddev.

    \b
    Examples:
      pf ping tcp:127.0.0.1:12000
      pf ping --count 10 --interval 0.2 tcp:127.0.0.1:12000
    """
    from protoframe.cli.running import Progress, Target, converse, read_token, run

    settings = Settings(timeout, json, quiet, read_token(token_file))
    target = Target(where)
    progress = Progress(target, settings)
    times: list[float] = []
    sent = 0

    async def session(reactor: Any) -> None:
        nonlocal sent
        from twisted.internet.task import deferLater

        deadline = time.monotonic() + timeout
        async with converse(reactor, target, settings) as connecting:
            while sent < count:
                if sent:
                    await deferLater(reactor, interval)
                    deadline = time.monotonic() + timeout
                sent += 1
                milliseconds = 1000 * await _answer(reactor, connecting.connection, deadline - time.monotonic())
                times.append(milliseconds)
                progress.stop()
                if not json and not quiet:
                    write_text(clean(f"{where}: {milliseconds:.3f} ms"))

    try:
        run(session, target, settings, progress)
    finally:
        # Also when it ends early: what was measured is worth having.
        if times:
            _summarize(where, sent, times, settings)


async def _answer(reactor: Any, connection: Any, seconds: float) -> float:
    from twisted.internet.defer import TimeoutError as TwistedTimeoutError

    from protoframe.errors import DeadlineExceeded

    answer = connection.ping()
    answer.addTimeout(max(0.0, seconds), reactor)
    try:
        took: float = await answer
    except TwistedTimeoutError:
        raise DeadlineExceeded("no answer to a ping") from None
    return took


def _summarize(where: str, sent: int, times: list[float], settings: Settings) -> None:
    least, mean, most, deviation = min(times), statistics.fmean(times), max(times), statistics.pstdev(times)
    if settings.json:
        from json import dumps

        summary = {
            "where": where,
            "sent": sent,
            "answered": len(times),
            "milliseconds": [_rounded(one) for one in times],
            "min": _rounded(least),
            "mean": _rounded(mean),
            "max": _rounded(most),
            "stddev": _rounded(deviation),
        }
        write_json(dumps(summary, ensure_ascii=False))
    elif sent > 1 or settings.quiet:
        write_text(
            f"{len(times)} of {sent} answered; round trip min {least:.3f}, mean {mean:.3f}, max {most:.3f}, "
            f"stddev {deviation:.3f} ms",
        )


def _rounded(milliseconds: float) -> float:
    return round(milliseconds, 6)
