"""What a conversation tells whoever drives it.

Knows what happened, not what it means: methods are names and messages octets here.  Events are made on the hot path,
hence Structs; those without references to other objects are left out of cycle collection.
"""

from __future__ import annotations

from typing import Any

import msgspec

from protoframe.core.frames import ErrorBody, Hello
from protoframe.errors import Error

__all__ = [
    "CallFailed",
    "Drained",
    "Ended",
    "ErrorReceived",
    "Event",
    "Opened",
    "PongReceived",
    "RequestCancelled",
    "RequestReceived",
    "ResponseReceived",
]


class Opened(msgspec.Struct, gc=False):
    """The peer's HELLO has come: calls may go."""

    hello: Hello


class RequestReceived(msgspec.Struct, gc=False):
    """The peer calls.  Exactly one of `Conversation.respond` and `Conversation.refuse` is to follow."""

    call_id: int
    method: bytes
    deadline: float
    metadata: bytes
    arguments: bytes
    json: bool


class RequestCancelled(msgspec.Struct, gc=False):
    """A call that runs here is not wanted any more: the caller said so, or its deadline passed (``expired``).

    It still takes its slot, until `Conversation.respond` or `Conversation.refuse`.
    """

    call_id: int
    expired: bool


class ResponseReceived(msgspec.Struct):
    """A call of this end has its result."""

    token: Any
    message: bytes


class ErrorReceived(msgspec.Struct):
    """A call of this end was answered with an error."""

    token: Any
    body: ErrorBody
    may_have_run: bool


class CallFailed(msgspec.Struct):
    """A call of this end failed here, without an answer."""

    token: Any
    error: Error


class PongReceived(msgspec.Struct, gc=False):
    """The answer to a PING, with its payload."""

    payload: bytes


class Drained(msgspec.Struct, gc=False):
    """After a GOAWAY: no call is left in either direction."""


class Ended(msgspec.Struct):
    """The conversation is over; what is left to send says why.  The connection is to be closed.

    ``error`` is ``None`` where the peer ended it in order.
    """

    error: Error | None


Event = (
    Opened
    | RequestReceived
    | RequestCancelled
    | ResponseReceived
    | ErrorReceived
    | CallFailed
    | PongReceived
    | Drained
    | Ended
)
