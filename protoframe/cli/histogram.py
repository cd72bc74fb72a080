"""A histogram of latencies with a relative error of a thousandth at most, in bounded memory.

Knows the arithmetic of HDR histograms (http://hdrhistogram.org): buckets whose width doubles with their values.  Not
what is measured, nor when: times are whole nanoseconds that somebody else took.
"""

from __future__ import annotations

import math
from fractions import Fraction

__all__ = ["LONGEST", "Histogram"]

#: Nanoseconds; what takes longer is counted as this: an hour.
LONGEST = 3600 * 1_000_000_000

#: Values below 2 ** 11 have buckets of their own; above, each power of two has 2 ** 10 of them, so none is wider than a
#: 1024th of its values.
_DIGITS = 11
_HALF = 1 << (_DIGITS - 1)


def _index(value: int) -> int:
    shift = max(0, value.bit_length() - _DIGITS)
    return (shift << (_DIGITS - 1)) + (value >> shift)


def _bounds(index: int) -> tuple[int, int]:
    """The least and the highest value that are counted in a bucket."""
    shift = max(0, (index >> (_DIGITS - 1)) - 1)
    low = (index - (shift << (_DIGITS - 1))) << shift
    return low, low + (1 << shift) - 1


_BUCKETS = _index(LONGEST) + 1


class Histogram:
    """Counts times from 0 to `LONGEST` in some 33,000 buckets.  All times are in nanoseconds.

    :ivar count: how many times were recorded.
    :ivar clamped: how many of them were longer than `LONGEST`, as which they are counted.
    :ivar minimum: the least, exactly; 0 where there is none.
    :ivar maximum: the most, exactly but for those that were clamped; 0 where there is none.
    """

    __slots__ = ("_counts", "_sum", "clamped", "count", "maximum", "minimum")

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._sum = 0
        self.count = 0
        self.clamped = 0
        self.minimum = 0
        self.maximum = 0

    def record(self, value: int, count: int = 1) -> None:
        """Counts a time, as often as it was taken; one below 0 counts as 0."""
        if value > LONGEST:
            self.clamped += count
            value = LONGEST
        elif value < 0:
            value = 0
        # `_index`, written out: this is done for each call that is measured.
        shift = value.bit_length() - _DIGITS
        self._counts[(shift << (_DIGITS - 1)) + (value >> shift) if shift > 0 else value] += count
        if not self.count or value < self.minimum:
            self.minimum = value
        if value > self.maximum:
            self.maximum = value
        self._sum += value * count
        self.count += count

    def add(self, other: Histogram) -> None:
        """Counts here too what another has counted."""
        if not other.count:
            return
        self.minimum = min(self.minimum, other.minimum) if self.count else other.minimum
        self.maximum = max(self.maximum, other.maximum)
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        self._sum += other._sum
        self.count += other.count
        self.clamped += other.clamped

    def percentile(self, percent: float) -> int:
        """A time that so many percent did not exceed.

        It is the highest of its bucket, as HDR histograms have it, and never above `maximum`.  Of few values a high
        percentile is just the maximum.

        :param percent: above 0, to 100.
        :raises ValueError: it is not that, or nothing was recorded.
        """
        if not 0 < percent <= 100:
            raise ValueError(f"percentile: expected above 0, to 100, got {percent}")
        if not self.count:
            raise ValueError("percentile: nothing was recorded")
        # In floating point 1.1 % of 3000 would be more than 33.
        above = self.count - math.ceil(Fraction(repr(percent)) * self.count / 100)
        # From the top, where what is asked for is near.
        for index in range(_index(self.maximum), -1, -1):
            above -= self._counts[index]
            if above < 0:
                return min(_bounds(index)[1], self.maximum)
        raise AssertionError("the counts are not those of the buckets")

    def mean(self) -> float:
        """The mean, exactly; 0 where there is nothing."""
        return self._sum / self.count if self.count else 0.0

    def stddev(self) -> float:
        """The standard deviation, each value taken for the middle of its bucket; 0 where there is nothing."""
        if not self.count:
            return 0.0
        mean = self.mean()
        squares = 0.0
        for index in range(_index(self.minimum), _index(self.maximum) + 1):
            if self._counts[index]:
                low, high = _bounds(index)
                squares += self._counts[index] * ((low + high) / 2 - mean) ** 2
        return math.sqrt(squares / self.count)

    def buckets(self) -> list[tuple[int, int]]:
        """The buckets that are not empty: the highest value of each, and its count.

        To record these in another histogram counts the same there.
        """
        return [(_bounds(index)[1], count) for index, count in enumerate(self._counts) if count]
