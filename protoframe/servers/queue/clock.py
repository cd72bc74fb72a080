"""The time of queues: that of the wall, as it was at the start, and from then on as long as it takes.

What is kept beyond the server's end needs a time that means something then; and a clock that somebody sets must not end
leases, or make messages expire.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["wall_clock"]


def wall_clock() -> Callable[[], float]:
    """A clock: seconds since the epoch, as the system's clock has them now, that no setting of it moves later."""
    offset = time.time() - time.monotonic()
    monotonic = time.monotonic
    return lambda: monotonic() + offset
