"""How long a round trip takes, as RFC 9002, section 5, estimates it.

Knows seconds; not which packets they are of.
"""

from __future__ import annotations

__all__ = ["GRANULARITY", "INITIAL_RTT", "RoundTrip"]

#: What is assumed before anything was measured; RFC 9002, section 6.2.2.
INITIAL_RTT = 0.333
#: No timer is meant to be finer; RFC 9002, section 6.1.2.
GRANULARITY = 0.001


class RoundTrip:
    """An estimate of the time of a round trip, in seconds.

    :ivar smoothed: the moving average.
    :ivar variance: that of the deviation from it.
    :ivar latest: what was measured last; 0 before anything was.
    :ivar least: the shortest that was measured.
    """

    __slots__ = ("latest", "least", "smoothed", "variance")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets what was measured: the path is another."""
        self.smoothed = INITIAL_RTT
        self.variance = INITIAL_RTT / 2
        self.latest = 0.0
        self.least = 0.0

    def measure(self, seconds: float, delay: float) -> None:
        """Takes a measurement.

        :param delay: for how much of it the peer says that it is to blame.
        """
        if not self.latest:
            # Unlike RFC 9002, section 5.3, less the delay: where packets are lost, it is most of what the first takes.
            self.latest = self.least = self.smoothed = max(seconds - delay, 1e-6)
            self.variance = self.smoothed / 2
            return
        self.latest = seconds
        self.least = min(self.least, seconds)
        # Only as far as it stays plausible; RFC 9002, section 5.3.
        adjusted = seconds - delay if seconds >= self.least + delay else seconds
        self.variance = 0.75 * self.variance + 0.25 * abs(self.smoothed - adjusted)
        self.smoothed = 0.875 * self.smoothed + 0.125 * adjusted

    def probe_after(self) -> float:
        """For how long an answer may be out, the peer's own delay not counted; RFC 9002, section 6.2.1."""
        return self.smoothed + max(4 * self.variance, GRANULARITY)

    def lost_after(self) -> float:
        """How much older than one that has come a packet is lost; RFC 9002, section 6.1.2."""
        return max(1.125 * max(self.smoothed, self.latest), GRANULARITY)
