"""What must hold after a measurement: ``p99<20ms``, as in the thresholds of k6.

Knows the syntax, units and comparisons; not how anything is measured, nor what becomes of a threshold that does not
hold.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping

from protoframe.cli.histogram import Histogram
from protoframe.cli.problems import USAGE, Problem, clip

__all__ = ["Threshold", "parse_threshold"]

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
#: Nanoseconds.
_TIMES = {"us": 1e3, "µs": 1e3, "μs": 1e3, "ms": 1e6, "s": 1e9}
_PERCENT = 0.01
_COUNTS = frozenset({"rate", "errors", "unsent"})
_SHARES = frozenset({"error-rate"})

_EXPRESSION = re.compile(r"\s*([\w.-]+)\s*(<=|>=|<|>)\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|\w*)\s*")
_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d)?)")
_FORMS = "p99<20ms, mean<=500us, max<1s, rate>=1000, errors<1, error-rate<0.1% or unsent<1"


@dataclasses.dataclass(frozen=True, slots=True)
class Threshold:
    """Something that must hold.

    :ivar expression: what was typed.
    :ivar metric: ``min``, ``mean``, ``max``, a percentile such as ``p99.9``, ``rate``, ``errors``, ``error-rate`` or
        ``unsent``.
    :ivar comparison: how the metric must compare with the limit.
    :ivar limit: in nanoseconds where the metric is a time, a fraction where it is ``error-rate``.
    :ivar unit: what was typed behind the number.
    """

    expression: str
    metric: str
    comparison: str
    limit: float
    unit: str

    def value(self, latency: Histogram, figures: Mapping[str, float | None]) -> float | None:
        """What was measured, in the units of `limit`; ``None`` where nothing was.

        :param figures: the metrics that are no times.
        """
        if self.metric in figures:
            return figures[self.metric]
        if not latency.count:
            return None
        if self.metric in ("min", "max"):
            return latency.minimum if self.metric == "min" else latency.maximum
        return latency.mean() if self.metric == "mean" else latency.percentile(float(self.metric[1:]))

    def holds(self, value: float | None) -> bool:
        """Whether a value is as it must be; what was not measured is not."""
        return value is not None and _COMPARISONS[self.comparison](value, self.limit)

    def text(self, value: float | None) -> str:
        """A value in the unit that was typed."""
        if value is None:
            return "unknown"
        number = self.scaled(value)
        digits = f"{number:.0f}" if number >= 1000 else f"{number:.4g}"
        return f"{digits}%" if self.unit == "%" else f"{digits} {self.unit}".rstrip()

    def scaled(self, value: float) -> float:
        """A value as a number of the unit that was typed."""
        return value / (_PERCENT if self.unit == "%" else _TIMES.get(self.unit, 1))


def parse_threshold(text: str) -> Threshold:
    """Reads a threshold.

    :raises Problem: it is none; the text says what is understood.
    """
    shown = f"--fail-if {clip(text, 80)!r}"
    match = _EXPRESSION.fullmatch(text)
    if match is None:
        raise Problem(f"{shown} is no threshold", USAGE, _FORMS)
    metric, comparison, number, unit = match.groups()
    percentile = _PERCENTILE.fullmatch(metric)
    if metric in _COUNTS:
        units = {"": 1.0}
    elif metric in _SHARES:
        units = {"": 1.0, "%": _PERCENT}
    elif metric in ("min", "mean", "max") or (percentile is not None and float(percentile[1]) > 0):
        units = _TIMES
    else:
        what = "min, mean, max, p1 to p99.9, rate, errors, error-rate or unsent"
        raise Problem(f"{shown}: there is no metric {clip(metric, 40)!r}", USAGE, what)
    if unit not in units:
        said = "without a unit" if not unit else f"in {clip(unit, 20)!r}"
        expected = "us, ms or s" if units is _TIMES else "no unit" if metric in _COUNTS else "a fraction, or %"
        raise Problem(f"{shown}: {metric} {said}; expected {expected}", USAGE, _FORMS)
    return Threshold(text.strip(), metric, comparison, float(number) * units[unit], unit)
