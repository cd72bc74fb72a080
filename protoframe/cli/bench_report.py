"""What `pf bench` says: the table, the JSON object, and the line of progress.

Knows what the figures of a run are called and how they are written; not how they come about.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from protoframe.cli.histogram import LONGEST, Histogram
from protoframe.cli.loops import Loop, Plan
from protoframe.cli.options import Settings
from protoframe.cli.output import style_for, width, write_json, write_text
from protoframe.cli.problems import REMOTE, TIMEOUT, clean, clip
from protoframe.cli.running import Progress, Target
from protoframe.cli.thresholds import Threshold
from protoframe.errors import Status

__all__ = ["Bar", "Report"]

_PERCENTILES = ("p50", "p75", "p90", "p95", "p99", "p99.9")
_BAR = 20
_MILLISECOND = 1e6
_LONGEST_NAME = 60


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """A run that has ended.

    :ivar target: what was called.
    :ivar plan: how.
    :ivar connections: over how many connections.
    :ivar loop: what came of it.
    :ivar thresholds: what must hold.
    :ivar streams: whether answers were streams.
    """

    target: Target
    plan: Plan
    connections: int
    loop: Loop
    thresholds: Sequence[Threshold]
    streams: bool

    def broken(self) -> str:
        """Which thresholds do not hold, and what was measured; empty where all do."""
        return "; ".join(
            f"threshold {one.expression} does not hold: {one.metric} is {one.text(value)}"
            for one, value in self._judged()
            if not one.holds(value)
        )

    def write(self, *, as_json: bool) -> None:
        """Writes it to standard output."""
        if as_json:
            write_json(json.dumps(self._object(), ensure_ascii=False))
        else:
            write_text("\n".join(self._lines()))

    def _judged(self) -> list[tuple[Threshold, float | None]]:
        loop = self.loop
        ended = loop.answered + loop.failed
        figures: Mapping[str, float | None] = {
            "rate": loop.achieved,
            "errors": loop.failed,
            "error-rate": loop.failed / ended if ended else None,
            "unsent": loop.unsent,
        }
        return [(one, one.value(loop.latency, figures)) for one in self.thresholds]

    def _object(self) -> dict[str, Any]:
        loop, plan = self.loop, self.plan
        return {
            "where": self.target.where,
            "method": self.target.what,
            "mode": "closed" if plan.rate is None else "open",
            "rate": plan.rate,
            "achieved": _rounded(loop.achieved),
            "concurrency": plan.concurrency,
            "connections": self.connections,
            "warmup": plan.warmup,
            "duration": _rounded(loop.seconds),
            "sent": loop.sent,
            "answered": loop.answered,
            "unsent": loop.unsent,
            "errors": {
                name: {
                    "count": kind.count,
                    "status": kind.status and int(kind.status),
                    "exit": _exit_status(kind.status),
                }
                for name, kind in loop.errors.items()
            },
            "latency_ms": _statistics(loop.latency),
            "service_ms": None if plan.rate is None else _statistics(loop.service),
            "clamped": loop.latency.clamped,
            "items": loop.items if self.streams else None,
            "thresholds": [
                {
                    "expression": one.expression,
                    "value": None if value is None else _rounded(one.scaled(value)),
                    "holds": one.holds(value),
                }
                for one, value in self._judged()
            ],
            "histogram": [[upper / 1000, count] for upper, count in loop.latency.buckets()],
        }

    def _lines(self) -> list[str]:
        import sys

        loop, plan = self.loop, self.plan
        style = style_for(sys.stdout)
        over = f"over {self.connections} connection{'s' if self.connections > 1 else ''}"
        seconds = f"{loop.seconds:.3g} s" if loop.seconds < 100 else f"{loop.seconds:.0f} s"
        if plan.rate is None:
            how = f"closed loop, {plan.concurrency} at a time {over}, {seconds}"
        else:
            how = f"open loop, {plan.rate:g} a second {over}, {seconds}"
        lines = [
            f"{style.bold(clean(str(self.target)))}: {how}",
            f"sent      {loop.sent}",
            f"answered  {loop.answered}  {loop.achieved:.1f} a second",
        ]
        if self.streams:
            lines.append(f"items     {loop.items}  {loop.achieved_items:.1f} a second")
        kinds = ", ".join(f"{clip(clean(name), _LONGEST_NAME)} {kind.count}" for name, kind in loop.errors.items())
        errors = f"errors    {loop.failed}"
        lines.append(style.red(f"{errors}  {kinds}") if loop.failed else errors)
        if plan.rate is not None:
            unsent = f"unsent    {loop.unsent}"
            text = "  were due and had to wait to the end: the latencies are a lower bound"
            lines.append(style.red(unsent + text) if loop.unsent else unsent)
        lines += ["", *self._table()]
        if loop.latency.clamped:
            lines.append(f"{loop.latency.clamped} took more than {LONGEST // 10**9} s, and count as that")
        for one, value in self._judged():
            said = "holds" if one.holds(value) else style.red("does not hold")
            lines.append(f"{one.expression}  {said}: {one.text(value)}")
        return lines

    def _table(self) -> list[str]:
        columns = {"latency": _statistics(self.loop.latency)}
        if self.plan.rate is not None:
            columns["service"] = _statistics(self.loop.service)
        lines = ["ms      " + "".join(f"{name:>11}" for name in columns)]
        for name in columns["latency"]:
            cells = [column[name] for column in columns.values()]
            lines.append(f"{name:8}" + "".join("          -" if cell is None else f"{cell:11.3f}" for cell in cells))
        return lines


class Bar(Progress):
    """How far a run is, on a terminal."""

    interval = 0.5

    def __init__(self, target: Target, settings: Settings, plan: Plan) -> None:
        super().__init__(target, settings)
        self._plan = plan
        self._loop: Loop | None = None

    def follow(self, loop: Loop) -> None:
        """Shows how far this is."""
        self._loop = loop

    def line(self, columns: int) -> str:
        """How long it runs, how fast, and how well."""
        loop, plan = self._loop, self._plan
        if loop is None:
            return super().line(columns)
        if loop.has_ended:
            return f"waiting for {loop.in_flight} answers"
        ended = loop.answered + loop.failed
        if loop.elapsed < plan.warmup:
            share, text = 0.0, f"warming up {loop.elapsed:.0f}/{plan.warmup:g} s"
        elif plan.requests is not None:
            share, text = ended / plan.requests, f"{ended}/{plan.requests}"
        else:
            share, text = loop.seconds / plan.duration, f"{loop.seconds:.0f}/{plan.duration:g} s"
        text = f"{text}  {loop.achieved:.0f}/s"
        if loop.latency.count:
            text += f"  p99 {loop.latency.percentile(99) / _MILLISECOND:.3f} ms"
        if loop.failed:
            text += f"  {loop.failed} errors"
        filled = int(_BAR * min(1.0, share))
        line = f"[{'#' * filled}{'-' * (_BAR - filled)}] {text}"
        return line if width(line) < columns else clip(text, max(1, columns - 1))


def _statistics(times: Histogram) -> dict[str, float | None]:
    names = ("min", "mean", "stddev", *_PERCENTILES, "max")
    if not times.count:
        return dict.fromkeys(names)
    values = [times.minimum, times.mean(), times.stddev()]
    values += [times.percentile(float(name[1:])) for name in _PERCENTILES]
    return {name: _rounded(value / _MILLISECOND) for name, value in zip(names, (*values, times.maximum), strict=True)}


def _rounded(value: float) -> float:
    return round(value, 6)


def _exit_status(status: int | None) -> int | None:
    if status is None:
        return None
    return TIMEOUT if status == Status.DEADLINE_EXCEEDED else REMOTE + status
