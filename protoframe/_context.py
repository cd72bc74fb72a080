"""What surrounds a call: its deadline, its metadata, and inside a handler the call that is served.

Knows context variables alone, so that a deadline reaches every call made below it, across coroutines and Deferreds; the
connection reads them when a call is made and sets them when one is served.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import msgspec

from protoframe.errors import LocalProtocolError

__all__ = ["Call", "Deadline", "current_call", "metadata", "timeout"]


class Deadline(msgspec.Struct, frozen=True, gc=False):
    """A point in the time of a clock."""

    at: float
    clock: Callable[[], float]

    def remaining(self) -> float:
        """Seconds until then; below 0 when it has passed."""
        return self.at - self.clock()


class Call:
    """A call that is being served, for the handler to look at.

    :ivar method: ``Protocol.method``.
    :ivar address: the peer's, as Twisted's transport gives it.
    :ivar identity: who the peer has shown to be; ``None`` where nobody asked.
    """

    __slots__ = ("_deadline", "_metadata", "address", "identity", "method")

    def __init__(self, method: str, address: Any, deadline: Deadline, metadata: bytes, identity: Any = None) -> None:
        self.method = method
        self.address = address
        self.identity = identity
        self._deadline = deadline
        self._metadata = metadata

    @property
    def remaining(self) -> float:
        """Seconds until the caller's deadline; below 0 when it has passed."""
        return self._deadline.remaining()

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the caller sent with ``with metadata(...)``."""
        return MappingProxyType(_decode_metadata(self._metadata)) if self._metadata else MappingProxyType({})


deadline_variable: ContextVar[Deadline | None] = ContextVar("protoframe.deadline", default=None)
call_variable: ContextVar[Call | None] = ContextVar("protoframe.call", default=None)
metadata_variable: ContextVar[bytes] = ContextVar("protoframe.metadata", default=b"")
clock_variable: ContextVar[Callable[[], float]] = ContextVar("protoframe.clock", default=time.monotonic)

_decode_metadata = msgspec.msgpack.Decoder(dict[str, str]).decode
_LONGEST_METADATA = 8192


@contextmanager
def timeout(seconds: float) -> Iterator[None]:
    """Gives all calls made in the block ``seconds`` from now, together.

    The deadline goes with each call to the other end, and from there with each call that its handler makes.  A block
    within another can only shorten it.  A call that has no answer by then fails with `DeadlineExceeded`.

    :raises ValueError: ``seconds`` is not a finite number of 0 or more.
    """
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"timeout: expected a finite number of seconds, 0 or more, got {seconds}")
    outer = deadline_variable.get()
    clock = outer.clock if outer is not None else clock_variable.get()
    deadline = Deadline(clock() + seconds, clock)
    if outer is not None and outer.at < deadline.at:
        deadline = outer
    token = deadline_variable.set(deadline)
    try:
        yield
    finally:
        deadline_variable.reset(token)


@contextmanager
def metadata(**entries: str) -> Iterator[None]:
    """Sends entries, names and texts, with every call made in the block; a block within another adds to them.

    :raises TypeError: a value is not a string.
    :raises ValueError: the entries are more than 8 KiB.
    """
    for name, value in entries.items():
        if not isinstance(value, str):
            raise TypeError(f"metadata: {name}: expected str, got {type(value).__name__}")
    outer = metadata_variable.get()
    octets = msgspec.msgpack.encode((_decode_metadata(outer) if outer else {}) | entries)
    if len(octets) > _LONGEST_METADATA:
        raise ValueError(f"metadata: {len(octets)} bytes are more than {_LONGEST_METADATA}")
    token = metadata_variable.set(octets)
    try:
        yield
    finally:
        metadata_variable.reset(token)


def current_call() -> Call:
    """The call that is being served.

    :raises LocalProtocolError: no call is: this is not inside a handler.
    """
    call = call_variable.get()
    if call is None:
        raise LocalProtocolError("current_call() is for handlers, while they serve a call")
    return call
