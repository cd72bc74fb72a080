"""What a conversation tells whoever drives it.

Knows what happened, not what it means: methods are names and messages octets here.  Events are made on the hot path,
hence Structs; those without references to other objects are left out of cycle collection.
"""

from __future__ import annotations

from typing import Any

import msgspec

from protoframe.core.frames import ErrorBody, Hello, Key
from protoframe.errors import Error

__all__ = [
    "CallFailed",
    "CreditReceived",
    "Drained",
    "EndReceived",
    "Ended",
    "ErrorReceived",
    "Event",
    "Greeted",
    "ItemsReceived",
    "Opened",
    "PongReceived",
    "RequestCancelled",
    "RequestReceived",
    "ResponseReceived",
    "StopReceived",
]


class Greeted(msgspec.Struct, gc=False):
    """The peer's HELLO has come, and is to be looked at; `Conversation.greet` or `Conversation.end` is to follow."""

    hello: Hello


class Opened(msgspec.Struct, gc=False):
    """The peer's HELLO has come: calls may go."""

    hello: Hello


class RequestReceived(msgspec.Struct, gc=False):
    """The peer calls.

    Exactly one of `Conversation.respond`, `Conversation.refuse` and, where the flags have STREAM,
    `Conversation.end_items` is to follow.  The deadline is infinity where there is none.  With KEYED it has a key.
    """

    call_id: int
    method: bytes
    deadline: float
    metadata: bytes
    arguments: bytes
    flags: int
    key: Key | None = None


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


class ItemsReceived(msgspec.Struct, gc=False):
    """Items of a stream, of a call of either end.  `Conversation.give_back` is to follow, once they are taken.

    :ivar message: what `protoframe.core.frames.parse_count` reads.
    """

    call_id: int
    count: int
    message: bytes
    cost: int


class EndReceived(msgspec.Struct):
    """A stream has ended: the answer to a call of this end, whose token it has, or what comes with one of the peer's.

    That has ``None`` for a token.
    """

    call_id: int
    token: Any


class CreditReceived(msgspec.Struct, gc=False):
    """Items may go that had to wait: of one stream, or (call id 0) of any."""

    call_id: int


class StopReceived(msgspec.Struct, gc=False):
    """Whoever serves a call of this end takes no more of the stream that goes with it; the call goes on."""

    call_id: int


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
    Greeted
    | Opened
    | RequestReceived
    | RequestCancelled
    | ResponseReceived
    | ErrorReceived
    | CallFailed
    | ItemsReceived
    | EndReceived
    | CreditReceived
    | StopReceived
    | PongReceived
    | Drained
    | Ended
)
