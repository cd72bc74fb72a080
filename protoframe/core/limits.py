"""How much of everything one end of a conversation takes.

Knows numbers and their bounds; whoever meets a limit raises the error.
"""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Limits"]

KIB = 1024
MIB = 1024 * KIB

#: The least that the rest of the wire format needs: a HELLO, or an ERROR with a cut message, fits in one such frame.
SMALLEST_FRAME = 2 * KIB
LARGEST_FRAME = 64 * KIB


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The bounds that one end keeps, whatever the other does.  Sizes are in bytes, times in seconds.

    What concerns the peer (`max_frame`, `max_message`, `max_unfinished`, `max_calls`) is told to it in HELLO.

    :param max_message: the encoded arguments or result of one call; 1 KiB to 1 GiB.
    :param max_nesting: containers within containers, in values whose type does not bound it; 1 to 500.
    :param max_frame: one frame, its header included; 2 KiB to 64 KiB.  A longer message travels in several frames.
    :param max_calls: calls of the peer that are served at once; 1 to 1,000,000.
    :param max_waiting: calls of this end that wait for one of the peer's `max_calls` slots; 0 to 10,000,000.
    :param max_unfinished: messages of one connection whose rest is on the way, together; at least `max_message`.
    :param handshake_timeout: from the connection to the peer's HELLO; above 0.
    :param frame_timeout: from the first byte of a frame to its last; above 0.
    :param close_timeout: from asking for a connection's end to cutting it off; above 0.
    :param default_timeout: the deadline of a call that has none; above 0.
    :raises ValueError: a value is out of its bounds; the text names it.
    :raises TypeError: a value is no number of the right kind.
    """

    max_message: int = 4 * MIB
    max_nesting: int = 64
    max_frame: int = LARGEST_FRAME
    max_calls: int = 1024
    max_waiting: int = 65536
    max_unfinished: int = 16 * MIB
    handshake_timeout: float = 10.0
    frame_timeout: float = 30.0
    close_timeout: float = 5.0
    default_timeout: float = 10.0

    def __post_init__(self) -> None:
        _integer("max_message", self.max_message, KIB, 1024 * MIB)
        _integer("max_nesting", self.max_nesting, 1, 500)
        _integer("max_frame", self.max_frame, SMALLEST_FRAME, LARGEST_FRAME)
        _integer("max_calls", self.max_calls, 1, 1_000_000)
        _integer("max_waiting", self.max_waiting, 0, 10_000_000)
        _integer("max_unfinished", self.max_unfinished, self.max_message, 1024 * 1024 * MIB)
        _seconds("handshake_timeout", self.handshake_timeout)
        _seconds("frame_timeout", self.frame_timeout)
        _seconds("close_timeout", self.close_timeout)
        _seconds("default_timeout", self.default_timeout)


def _integer(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def _seconds(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected seconds, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number of seconds above 0, got {value}")
