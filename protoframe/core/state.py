"""The states of a conversation and what moves it from one to the next, as data.

Knows names alone; `protoframe.core.conversation` acts on them.
"""

from __future__ import annotations

import enum

__all__ = ["TRANSITIONS", "Input", "Role", "State"]


class Role(enum.Enum):
    """Which end this is; it decides whose call ids are odd."""

    INITIATOR = 1
    """The end that connected: its calls have odd ids."""
    ACCEPTOR = 0
    """The end that was connected to: its calls have even ids."""


class State(enum.Enum):
    """Where a conversation stands."""

    GREETING = "greeting"
    """HELLO is sent, the peer's is awaited."""
    OPEN = "open"
    """Calls go both ways."""
    LEAVING = "leaving"
    """GOAWAY is sent: new calls of the peer are not taken; this end may still call."""
    LEFT = "left"
    """GOAWAY is received: no new calls of this end; the peer's are served."""
    DRAINING = "draining"
    """GOAWAY went both ways: what runs ends, and nothing new begins."""
    CLOSED = "closed"
    """Over; nothing is sent or taken any more."""


class Input(enum.Enum):
    """What moves a conversation from one state to another."""

    HELLO_RECEIVED = "HELLO received"
    GOAWAY_RECEIVED = "GOAWAY received"
    GOAWAY_SENT = "GOAWAY sent"
    ENDED = "ended"


#: The state machine.  What is not listed is not allowed.
TRANSITIONS: dict[tuple[State, Input], State] = {
    (State.GREETING, Input.HELLO_RECEIVED): State.OPEN,
    (State.GREETING, Input.ENDED): State.CLOSED,
    (State.OPEN, Input.GOAWAY_SENT): State.LEAVING,
    (State.OPEN, Input.GOAWAY_RECEIVED): State.LEFT,
    (State.OPEN, Input.ENDED): State.CLOSED,
    (State.LEAVING, Input.GOAWAY_RECEIVED): State.DRAINING,
    (State.LEAVING, Input.ENDED): State.CLOSED,
    (State.LEFT, Input.GOAWAY_SENT): State.DRAINING,
    (State.LEFT, Input.ENDED): State.CLOSED,
    (State.DRAINING, Input.ENDED): State.CLOSED,
}
