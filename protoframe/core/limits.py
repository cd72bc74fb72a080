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

    What concerns the peer (`max_frame`, `max_message`, `max_unfinished`, `max_calls`, and the credits) is told to it in
    HELLO.  An item of a stream costs its encoded size and 32 bytes.

    :param max_message: the encoded arguments or result of one call; 1 KiB to 1 GiB.
    :param max_nesting: containers within containers, in values whose type does not bound it; 1 to 500.
    :param max_frame: one frame, its header included; 2 KiB to 64 KiB.  A longer message travels in several frames.
    :param max_calls: calls of the peer that are served at once; 1 to 1,000,000.
    :param max_waiting: calls of this end that wait for one of the peer's `max_calls` slots; 0 to 10,000,000.
    :param max_unfinished: messages of one connection whose rest is on the way, together; at least `max_message`.
    :param max_unsent: what waits to be sent to a peer that does not read, before it is dropped; at least `max_message`.
    :param max_connections: connections that a `Factory` serves at once; 1 to 10,000,000.
    :param stream_credit: what the items of one stream may cost that came and were not taken yet; 1 KiB to 1 GiB.
    :param connection_credit: what the items of all streams of a connection may cost that are on the way; at least
        `stream_credit`.
    :param max_unread: what those may cost that came and were not taken yet, of all streams of a connection, before the
        peer has to wait with further ones of any; 0 to 1 TiB.
    :param cancel_burst: calls that the peer may cancel at once, or open above `max_calls`; 1 to 1,000,000.  Where
        `max_calls` is more, that is the number.
    :param cancel_rate: calls a second that it may cancel in the long run; above 0.
    :param ping_burst: PINGs that it may send at once; 1 to 1,000,000.
    :param ping_rate: PINGs a second that it may send in the long run; above 0.
    :param keepalive_idle: of silence of the peer, before it is asked for a sign of life; above 0.
    :param keepalive_timeout: from there to giving it up; above 0.
    :param write_timeout: for which a peer may read nothing of what there is for it; above 0.
    :param drain_timeout: from the announcement that a conversation ends until what still runs is cancelled; above 0.
    :param handshake_timeout: from the connection to the peer's HELLO; above 0.
    :param frame_timeout: from the first byte of a frame to its last; above 0.
    :param close_timeout: from asking for a connection's end to cutting it off; above 0.
    :param max_sessions: clients of which a server keeps account beyond their connections; 1 to 10,000,000.
    :param max_replies: what is kept for them of the answers to their calls, all together; 0 to 1 TiB.
    :param session_retention: from the loss of a client's connection until what is kept for it goes; above 0.  The
        default is the lifetime of an exchange in RFC 7252, section 4.8.2.
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
    max_unsent: int = 64 * MIB
    max_connections: int = 10_000
    stream_credit: int = 256 * KIB
    connection_credit: int = MIB
    max_unread: int = 16 * MIB
    cancel_burst: int = 1000
    cancel_rate: float = 33.0
    ping_burst: int = 100
    ping_rate: float = 10.0
    keepalive_idle: float = 30.0
    keepalive_timeout: float = 10.0
    write_timeout: float = 30.0
    drain_timeout: float = 30.0
    handshake_timeout: float = 10.0
    frame_timeout: float = 30.0
    close_timeout: float = 5.0
    max_sessions: int = 10_000
    max_replies: int = 64 * MIB
    session_retention: float = 247.0
    default_timeout: float = 10.0

    def __post_init__(self) -> None:
        _integer("max_message", self.max_message, KIB, 1024 * MIB)
        _integer("max_nesting", self.max_nesting, 1, 500)
        _integer("max_frame", self.max_frame, SMALLEST_FRAME, LARGEST_FRAME)
        _integer("max_calls", self.max_calls, 1, 1_000_000)
        _integer("max_waiting", self.max_waiting, 0, 10_000_000)
        _integer("max_unfinished", self.max_unfinished, self.max_message, 1024 * 1024 * MIB)
        _integer("max_unsent", self.max_unsent, self.max_message, 1024 * 1024 * MIB)
        _integer("max_connections", self.max_connections, 1, 10_000_000)
        _integer("stream_credit", self.stream_credit, KIB, 1024 * MIB)
        _integer("connection_credit", self.connection_credit, self.stream_credit, 1024 * MIB)
        _integer("max_unread", self.max_unread, 0, 1024 * 1024 * MIB)
        _integer("cancel_burst", self.cancel_burst, 1, 1_000_000)
        _integer("ping_burst", self.ping_burst, 1, 1_000_000)
        _integer("max_sessions", self.max_sessions, 1, 10_000_000)
        _integer("max_replies", self.max_replies, 0, 1024 * 1024 * MIB)
        for name in (
            "cancel_rate",
            "ping_rate",
            "keepalive_idle",
            "keepalive_timeout",
            "write_timeout",
            "drain_timeout",
            "handshake_timeout",
            "frame_timeout",
            "close_timeout",
            "session_retention",
            "default_timeout",
        ):
            _above_zero(name, getattr(self, name))


def _integer(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def _above_zero(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
