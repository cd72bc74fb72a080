"""What carries the frames of a conversation.

Knows what a `protoframe._connection.Connection` asks of it; `protoframe._stream.StreamCarrier` and
`protoframe._datagram.DatagramCarrier` do it.
"""

from __future__ import annotations

import typing
from typing import Any

__all__ = ["Carrier"]


class Carrier(typing.Protocol):
    """What brings frames to the peer.

    :cvar allowance: octets that are handed to it at a time, at first: what a peer must read for it to take more.
    :cvar is_confirming: whether it tells by `Outbox.confirm` when a large message has come, because what it sends later
        may come earlier.
    """

    allowance: int
    is_confirming: bool

    def send(self, frames: list[bytes]) -> None:
        """Sends frames, in order, as `Outbox.poll` gives them."""

    def close(self) -> None:
        """Closes once everything is sent; `Connection.lost` follows."""

    def abort(self) -> None:
        """Closes at once; `Connection.lost` follows."""

    def certificate(self) -> Any:
        """The certificate that the peer has shown, and that was verified; ``None`` where there is none."""

    def next_timer(self) -> float:
        """When the carrier wants `handle_timer`; infinity for never.

        Where that moves, it calls `Connection.wake_at`.
        """

    def handle_timer(self, now: float) -> None:
        """
        :raises ProtocolError: the peer was too slow.
        """
